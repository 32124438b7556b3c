"""`metrics.csv`, which a resumed run appends to."""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from lightning_attn.errors import InputError
from lightning_attn.io import naming, sync, write_file


class MetricsLogger(CSVLogger):
    """Lightning's CSVLogger for `metrics.csv` in a folder, which appends to what is there.

    What a resumed run will log again is dropped first: lines that were written after its checkpoint, and lines of steps
    that it had not done.

    Args:
        folder: The run directory.
        first_step: The optimizer step, from 0, that the run starts or resumes with.
        lines: How many lines had been written when the checkpoint was.
    """

    def __init__(self, folder: Path, first_step: int = 0, lines: int = 0) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=50)
        self._first_step, self._lines = first_step, lines

    @override
    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Writer(Path(self.log_dir), self._first_step, self._lines)
        return self._experiment

    @property
    def lines(self) -> int:
        """How many have been logged, those before a run was resumed included; 0 on other ranks than 0."""
        experiment = self.experiment
        return experiment.lines if isinstance(experiment, _Writer) else 0


# Loggers of services, by class as they need not be installed: what names a run, and where files go by default.
_SERVICES = {"WandbLogger": ("id", {"save_dir": "."}), "MLFlowLogger": ("run_id", {"save_dir": "./mlruns"})}
_RUN_ID = re.compile(r"[\w-]{1,128}")


def logger_ids(loggers: Iterable[Logger]) -> dict[str, str]:
    """What names the run in the services that it is logged to, by class of the logger."""
    found = {type(logger).__name__: logger.version for logger in loggers if type(logger).__name__ in _SERVICES}
    return {name: str(value) for name, value in found.items() if value}


def placed_loggers(
    loggers: Sequence[Logger], arguments: Sequence[Mapping[str, Any]], directory: Path, ids: Mapping[str, Any]
) -> list[Logger]:
    """Loggers whose files lie in the run directory, and which continue the run of a service.

    Args:
        loggers: As they were made.
        arguments: What each was made with; what is not the default stays.
        directory: The run directory.
        ids: Of a resumed training, what `logger_ids` returned; else nothing.
    """
    placed = []
    for logger, given in zip(loggers, arguments, strict=True):
        kind = type(logger).__name__
        identifier, defaults = _SERVICES.get(kind, ("", {}))
        changes = {
            name: str(directory / value) for name, value in defaults.items() if given.get(name, value) in (value, None)
        }
        stored = ids.get(kind)
        if identifier and not given.get(identifier) and isinstance(stored, str) and _RUN_ID.fullmatch(stored):
            changes[identifier] = stored
        placed.append(type(logger)(**{**given, **changes}) if changes else logger)
    return placed


class _Writer(ExperimentWriter):
    """Appends to a file, and rewrites it atomically."""

    def __init__(self, folder: Path, first_step: int, number: int) -> None:
        super().__init__(str(folder))
        self.lines = 0
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        try:
            whole, _, _ = path.read_text().rpartition("\n")  # a process that was killed may have left a part of a line
            lines = csv.DictReader(whole.splitlines())
            kept = [row for row in itertools.islice(lines, number) if int(row["step"]) < first_step]
            if any(None in row or None in row.values() for row in kept):
                raise InputError("a line has not as many values as there are names")
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise InputError(
                f"{path} is damaged ({type(error).__name__}: {error}), and the training would append to it. Move it "
                "away: a new one is started."
            ) from error
        self.metrics_keys = [str(name) for name in lines.fieldnames or ()]
        self.lines = len(kept)
        if kept:
            self._write(kept)
        else:
            self.metrics_keys = []
            path.unlink()

    @override
    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics_dict, step)
        self.lines += 1

    @override
    def save(self) -> None:
        """Appends what was logged since the last time, and waits until it is on the disk."""
        if not self.metrics:
            return
        with naming(self.metrics_file_path):
            super().save()
        sync(Path(self.metrics_file_path))

    @override
    def _check_log_dir_exists(self) -> None:
        # Lightning's would delete what is there.
        pass

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with Path(self.metrics_file_path).open(newline="") as file:
            rows = list(csv.DictReader(file))
        self._write(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_file(Path(self.metrics_file_path), lambda file: file.write(text.getvalue().encode()), replace=True)
