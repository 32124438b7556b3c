"""What training asks of a task, which it does not know."""

from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class TrainableTask(Protocol):
    """The methods of `lightning_attn.tasks.BaseTask` that the callbacks of a run call."""

    task_name: ClassVar[str]

    def interrupted_note(self) -> str:
        """What a test or prediction that is interrupted has left behind; empty if nothing."""
        ...

    def convert_external_weights(self, path: str) -> dict[str, Tensor] | None:
        """Weights of another project under this network's names; None if the file is none of theirs."""
        ...

    def matched_weights(self, checkpoint: dict[str, Any], path: str | Path, *, strict: bool) -> dict[str, Tensor]:
        """The weights of a checkpoint of the same task, rows of outputs matched by name."""
        ...
