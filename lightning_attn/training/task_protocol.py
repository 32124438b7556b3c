"""What training asks of a task, which it does not know."""

from typing import ClassVar, Protocol, runtime_checkable


@runtime_checkable
class TrainableTask(Protocol):
    """The methods of `lightning_attn.tasks.BaseTask` that the callbacks of a run call."""

    task_name: ClassVar[str]

    def interrupted_note(self) -> str:
        """What a test or prediction that is interrupted has left behind; empty if nothing."""
        ...

    def take_initial_weights(self, path: str, *, strict: bool) -> None:
        """Begins with the weights of a checkpoint, or of another project; all of them must fit if `strict`."""
        ...
