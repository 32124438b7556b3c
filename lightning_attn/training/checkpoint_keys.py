"""Every key of a checkpoint: what it holds, who writes it, and who reads it.

A checkpoint is a dictionary of tensors and plain values that `torch.save` wrote. `read_checkpoint` checks the kind of
every value (`contents.py`) before anyone reads it. "Lightning *" means: after `ExactResume` has checked it.

| Key | Holds | Written by | Read by |
|---|---|---|---|
| `format` | int: the version of this table | `BaseTask` | `read_checkpoint` |
| `task` | `StoredTask` | `BaseTask` | `BaseTask.load`, `InitialWeights`, `average`, `export` |
| `run` | `StoredRun` | `SaveConfiguration` | the command: stored configuration, loggers, differences |
| `state_dict` | dict[str, Tensor]: weights; the averaged ones, if any | Lightning | Lightning, `BaseTask.load` |
| `members` | dict[str, dict]: a joint training's tasks, without weights | `MultitaskTask` | `member_checkpoint` |
| `classes`, `categories` | dict[str, list]: names and ids in the order of the outputs | tasks on images | the same |
| `preprocessing` | dict[str, int or str]: how images are resized | tasks on images | the same, for `predict` |
| `vocabulary` | Tensor, uint8: a sentencepiece model | `TranslationTask` | the same, `--data.vocabulary FILE.ckpt` |
| `epoch`, `global_step` | int: epochs and optimizer steps done | Lightning | loggers, `ExactResume` |
| `pytorch-lightning_version` | str | Lightning | Lightning, which converts older ones |
| `loops` | dict: counts of Lightning's loops, places in the data | Lightning, `LastCheckpoint` | Lightning * |
| `callbacks` | dict[str, dict]: states, paths relative to the run | Lightning, `AtomicCheckpointIO` | Lightning * |
| `optimizer_states` | list[dict] | Lightning | Lightning * |
| `lr_schedulers` | list[dict] | Lightning | Lightning * |
| `MixedPrecision` | dict: the gradient scaler of 16-mixed | Lightning | Lightning * |
| `random_streams` | list[dict], one for each rank: Python, NumPy, torch, CUDA | `ExactResume` | `ExactResume` |
| `metrics_lines` | int: lines of `metrics.csv` | `LastCheckpoint` | `MetricsLogger` |
| `current_model_state` | dict[str, Tensor]: beside an average | Lightning | Lightning, `choose_weights` |
| `averaging_state` | dict[str, Tensor]: how many weights were averaged | Lightning | Lightning |
| name of a DataModule's class | its state, if it has one | Lightning | Lightning |
| `averaged` | list[str]: the checkpoints that this one is the mean of | `average` | nobody: for the user |

`export` writes the same keys as safetensors and JSON, without `TRAINING_KEYS`. A task of your own may add keys: exports
and averages keep tensors and plain values.

The constant of `vocabulary` is `VOCABULARY_KEY` in datamodules/translation/vocabulary.py, which imports nothing from
here; those of `classes` and `categories` are the `classes_key` of the tasks.
"""

from typing import Any, TypedDict

FORMAT_KEY, FORMAT = "format", 2
"""What a checkpoint of this version is marked with; a later number says that this version may misunderstand it."""

TASK_KEY = "task"
RUN_KEY = "run"
WEIGHTS_KEY = "state_dict"
MEMBERS_KEY = "members"
BACKBONE_NAME_KEY = "backbone_name"  # in a member: the path of the shared module in its network
PREPROCESSING_KEY = "preprocessing"
EPOCH_KEY = "epoch"
STEP_KEY = "global_step"
LIGHTNING_VERSION_KEY = "pytorch-lightning_version"
LOOPS_KEY = "loops"
CALLBACKS_KEY = "callbacks"
OPTIMIZERS_KEY = "optimizer_states"
SCHEDULES_KEY = "lr_schedulers"
RANDOM_STREAMS_KEY = "random_streams"
LINES_KEY = "metrics_lines"
CURRENT_WEIGHTS_KEY = "current_model_state"
AVERAGING_KEY = "averaging_state"
SCALER_KEY = "MixedPrecision"  # the class of Lightning's that has one
AVERAGED_KEY = "averaged"

TRAINING_KEYS = (
    *(OPTIMIZERS_KEY, SCHEDULES_KEY, LOOPS_KEY, CALLBACKS_KEY, RANDOM_STREAMS_KEY, LINES_KEY),
    *(CURRENT_WEIGHTS_KEY, AVERAGING_KEY, SCALER_KEY),
)
"""What a training is resumed with, and is no part of a model that is handed on."""


class StoredTask(TypedDict):
    """The task that wrote a checkpoint.

    Attributes:
        name: Its `task_name`.
        class_path: Import path of its class.
        arguments: Of its constructor, as plain values.
    """

    name: str
    class_path: str
    arguments: dict[str, Any]


class StoredRun(TypedDict, total=False):
    """The run that wrote a checkpoint.

    Attributes:
        name: Its directory's name.
        configuration: Every option, as plain values.
        origin: Versions, and the state of the source tree.
        logger_ids: What names the run in the services that it is logged to, by class of the logger.
    """

    name: str
    configuration: dict[str, Any]
    origin: dict[str, Any]
    logger_ids: dict[str, str]
