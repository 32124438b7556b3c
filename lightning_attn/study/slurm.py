"""Submits the cells of a study to SLURM: one job each, which Lightning alone requeues."""

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lightning_attn.errors import InputError, UnusableFileError
from lightning_attn.io import write_text
from lightning_attn.study.grid import Cell
from lightning_attn.study.states import COMMAND_MARK, EXIT_CODE_FILE, JOB_FILE, CellFolder, CellStatus

__all__ = ["job_script", "submit_cells"]

_SIGNAL_SECONDS = 120  # before the time limit


def submit_cells(
    statuses: Sequence[CellStatus], command: Sequence[str], options: Sequence[str]
) -> list[tuple[Cell, str]]:
    """Submits a job for each cell, unless another process works on it.

    Args:
        statuses: Of the cells to be run.
        command: What the arguments of a cell are given to.
        options: Of sbatch, such as `--time=4:00:00`.

    Returns:
        The submitted cells and the numbers of their jobs.

    Raises:
        OSError: If sbatch is missing or refuses a job; jobs submitted before stay.
    """
    for option in options:
        if not option.startswith("--") or option.startswith(("--signal", "--output", "--open-mode")):
            raise InputError(f"sbatch: {option!r} cannot be used: give options such as --sbatch=--time=4:00:00.")
    program = shutil.which("sbatch")
    if program is None:
        raise UnusableFileError("slurm: there is no program sbatch here. Call this on a login node of the cluster.")
    submitted = []
    for status in statuses:
        lock = status.folder.acquire()
        if lock is None:
            continue
        try:
            folder = status.folder
            if status.is_finished:  # by older code
                folder.set_aside()
                folder.path.mkdir()
            (folder.path / EXIT_CODE_FILE).unlink(missing_ok=True)
            script = write_text(folder.path / "job.sh", job_script(status.cell, folder, command, options), replace=True)
            done = subprocess.run([program, "--parsable", str(script)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnusableFileError(f"slurm: sbatch refused {script}: {done.stderr.strip() or done.returncode}")
            number = done.stdout.strip().partition(";")[0]
            write_text(folder.path / JOB_FILE, f"{number}\n", replace=True)
            submitted.append((status.cell, number))
        finally:
            with contextlib.suppress(OSError):
                os.close(lock)
    return submitted


def job_script(cell: Cell, folder: CellFolder, command: Sequence[str], options: Sequence[str]) -> str:
    """The batch script of a cell: training, and if that succeeds the test.

    SIGUSR1 goes to the tasks of `srun`: the training saves, and Lightning requeues the job, which resumes.
    """
    own = [f"--job-name={cell.readable_name}", f"--output={folder.log.absolute()}", "--open-mode=append", "--requeue"]
    own.append(f"--signal=SIGUSR1@{_SIGNAL_SECONDS}")
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in (*own, *options))]
    place = folder.path.absolute()
    lines += [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", f"rm -f {shlex.quote(str(place / EXIT_CODE_FILE))}"]
    steps = [shlex.join([*command, *cell.arguments(stage, folder.path)]) for stage in ("fit", "test")]
    echoes = [f"printf '%s\\n' {shlex.quote(COMMAND_MARK + step)}" for step in steps]
    lines.append(" && ".join(f"{echo} && srun {step}" for echo, step in zip(echoes, steps, strict=True)))
    lines += ["code=$?", f"echo $code > {shlex.quote(str(place / EXIT_CODE_FILE))}", "exit $code"]
    return "\n".join(lines) + "\n"
