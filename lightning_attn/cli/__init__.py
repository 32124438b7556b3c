"""The command: `train.py`, `python -m lightning_attn` and `lightning-attn` are this."""

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        args: Command-line arguments; None for those of the process.

    Raises:
        SystemExit: With status 2 and a message on the standard error if an option or the data is wrong, or some images
            of a prediction, which is complete without them; with 128 and the signal's number if a signal stopped a
            training, whose state is saved.
    """
    from lightning_attn.cli.launching import bind_to_launcher, open_standard_streams

    open_standard_streams()
    bind_to_launcher()
    arguments = sys.argv[1:] if args is None else [str(argument) for argument in args]
    from lightning_attn.cli.front import answer, explain_torchvision
    from lightning_attn.configurations import with_located_files

    arguments = with_located_files(arguments)
    try:
        if answer(arguments):
            sys.stdout.flush()
            return
        if arguments[0] == "study":
            from lightning_attn.cli.study import run_study_command

            run_study_command(arguments[1:])
            sys.stdout.flush()
            return
    except BrokenPipeError:  # whoever reads the list has enough, as `head` does
        _discard_output()
        sys.exit(141)  # as a shell calls it
    except OSError as error:
        if error.filename is not None:  # of a file, and not of what is printed
            raise
        _discard_output()
        sys.stderr.write(f"Writing to the standard output: {error.strerror}.\n")
        sys.exit(1)
    try:
        # Only now, as this imports torch and Lightning, which takes seconds.
        from lightning_attn.cli.subcommands import run
    except (RuntimeError, OSError, ImportError) as error:
        explain_torchvision(error)
        raise

    run(arguments)


def _discard_output() -> None:
    """Leads what is left in the standard output's buffer nowhere, or Python fails once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
