"""The base class of tasks: optimizer, schedule, exact means over devices, and self-describing checkpoints."""

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.utilities import GradClipAlgorithmType, rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_attn.attention import AttentionSpec
from lightning_attn.errors import InputError, MissingMethodError
from lightning_attn.networks.compilation import CompileBackend
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.tasks.evaluation import Evaluation, Evaluator, SampleMeans
from lightning_attn.tasks.membership import Membership
from lightning_attn.tasks.workload import Workload, WorkloadOptions
from lightning_attn.training.checkpoint_keys import FORMAT, FORMAT_KEY, MEMBERS_KEY, TASK_KEY, WEIGHTS_KEY, StoredTask
from lightning_attn.training.checkpoints import (
    SHARED_BACKBONE,
    CheckpointError,
    OutputRows,
    Weights,
    choose_weights,
    count_numbers,
    described_differences,
    described_mismatches,
    load_initial_weights,
    member_checkpoint,
    members_of_task,
    read_checkpoint,
    stored_task,
)
from lightning_attn.training.compilation import CompileModules
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec, gradient_scaler, gradients_of
from lightning_attn.training.resuming import ExactResume
from lightning_attn.training.stop_on_non_finite import StopOnNonFinite
from lightning_attn.training.trust import Trust, TrustError, argument_types, path_of

Network = TypeVar("Network", bound=nn.Module)


class BaseTask(pl.LightningModule):
    """Base of all tasks.

    A subclass sets `task_name` and `monitor`, builds its network, and defines the usual Lightning steps. A network that
    depends on its arguments alone is built in the constructor. One that depends on the data is built in
    `configure_model`, where the DataModule is set up and available as `self.datamodule`; then
    `on_save_checkpoint` stores the required properties of the data, and `build_from_checkpoint` builds the network from
    these. Constructor arguments must be plain values or frozen dataclasses of plain values: they are stored in the
    checkpoint, so that `load` needs no other file. docs/extending.md has an example.

    Args:
        optimizer: The optimizer. All parameters are one group, except for the offsets of deformable convolutions.
        schedule: The learning rate schedule, stepped after every optimizer step.
        compile: Whether training compiles `modules_to_compile` by `torch.compile`; or its backend, see
            `CompileBackend`; true is `"inductor"`. Checkpoints are the same.

    Attributes:
        task_name: Folder of the runs, `checkpoints/<task_name>/<name>/`.
        monitor: The logged value that selects `best.ckpt`.
        monitor_mode: Whether the `"max"` or the `"min"` of `monitor` is best.
        output_rows: Which tensors have rows for `output_names`, by the endings of their names.
        outputs_word: A word for `output_names` in messages.
        precisions: The Trainer's precisions that the task supports.
        checkpoint_path: The checkpoint of the command, if any: properties of the data that the data itself lacks are
            read from it before Lightning loads the weights.
        stored_numbers: Number of weights in that checkpoint.
        backbone_name: Path of the ResNet that tasks of a joint training share, from `build_resnet` or `build_backbone`,
            such as "network.backbone.body"; empty if there is none. See `MultitaskTask`.
        membership: The task's place in a joint training; None in a training of its own.
        fresh_optimizer_groups: Options of the optimizer's groups before those of a checkpoint were loaded.
    """

    task_name: ClassVar[str] = "task"
    monitor: ClassVar[str] = "val/loss"
    monitor_mode: ClassVar[str] = "min"
    output_rows: ClassVar[Mapping[str, OutputRows]] = {}
    outputs_word: ClassVar[str] = "outputs"
    precisions: ClassVar[tuple[str, ...]] = ("32-true", "bf16-mixed", "16-mixed")
    backbone_name: ClassVar[str] = ""
    checkpoint_path: str = ""
    stored_numbers: int | None = None
    membership: Membership | None = None

    def __init__(
        self, optimizer: OptimizerSpec, schedule: ScheduleSpec, *, compile: bool | CompileBackend = False
    ) -> None:
        super().__init__()
        # Collects the arguments of the constructors of all classes; the class itself may take fewer. Checkpoints store
        # them under another key than "hyper_parameters", by which the Lightning CLI would override the command line.
        self.save_hyperparameters(logger=False)
        taken = inspect.signature(type(self)).parameters.values()
        names = {one.name for one in taken}
        takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken)
        given = {name: value for name, value in self.hparams.items() if takes_any or name in names}
        self._arguments = {name: plain_value(name, value) for name, value in given.items()}
        self.optimizer = optimizer
        self.schedule = schedule
        if compile not in (False, True, *get_args(CompileBackend)):
            raise InputError(
                f"compile must be true, false or one of {list(get_args(CompileBackend))}, got {compile!r}."
            )
        self._compile_backend: CompileBackend | None = "inductor" if compile is True else compile or None
        self._evaluators: list[Evaluator] | None = None
        self.fresh_optimizer_groups: list[dict[str, Any]] = []
        self._scaled_for = 0  # the global batch size that the learning rate was scaled for; 0 for none

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, as checkpoints store them."""
        return self._arguments

    def use_backbone(self, attention: AttentionSpec, backbone: ResNetSpec) -> None:
        """Takes the backbone of a joint training, which is described there; called before the network is built.

        Raises:
            ValueError: If the task's own arguments say otherwise, or it does not fit them.
        """

    @property
    def datamodule(self) -> pl.LightningDataModule:
        """The task's data: that of the Trainer, or its own in a joint training."""
        if self.membership is not None:
            return self.membership.datamodule
        datamodule: pl.LightningDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        return datamodule

    @property
    def prints_scores(self) -> bool:
        """Whether validate and test print all scores themselves, so that Lightning's table would only repeat them.

        Not with a step of a user's own, which may log others.
        """
        return type(self).__module__.startswith("lightning_attn.")

    @property
    def learning_rate(self) -> float:
        """The optimizer's learning rate, under the name that Lightning's LearningRateFinder uses."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        groups = self.fresh_optimizer_groups
        if groups:
            # The optimizer exists: the value is its learning rate, after scaling for the batch size.
            factor = value / groups[0]["initial_lr"]
            for group in groups:
                group |= {name: group[name] * factor for name in ("lr", "initial_lr")}
            value = self.optimizer.learning_rate * factor
        self.optimizer = dataclasses.replace(self.optimizer, learning_rate=value)
        self._arguments["optimizer"] = plain_value("optimizer", self.optimizer)

    @classmethod
    def require_steps(cls, stage: str) -> None:
        """Checks that a subclass defines the step of a stage.

        Args:
            stage: "fit", "validate", "test" or "predict".

        Raises:
            NotImplementedError: If it does not; the message names the method.
        """
        needed = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
        if getattr(cls, needed[stage]) is getattr(pl.LightningModule, needed[stage]):
            returned = {
                "fit": "and return the loss",
                "predict": "and write the results into self.output_directory",
            }.get(stage, "and return a dictionary with a value for each sample")
            raise MissingMethodError(
                f"{cls.__name__} must define {needed[stage]}(self, batch, batch_idx), {returned}, for {stage!r}."
            )

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and its schedule, which Lightning steps per optimizer step, not per epoch."""
        spec = self.optimizer
        if spec.base_batch_size:
            self._scaled_for = self._global_batch_size()
            rank_zero_info(spec.scaling_note(self._scaled_for))
            spec = spec.scaled(self._scaled_for)
        groups = self.parameter_groups(spec)
        # The scaler of fp16 unscales gradients itself, which a fused optimizer and clipping cannot both do.
        fused = gradient_scaler(self.trainer) is None and all(
            parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"]
        )
        optimizer = spec.build(groups, fused=fused)
        scheduler = self.schedule.build(optimizer, self.trainer.estimated_stepping_batches)
        # Stored because a checkpoint's options will replace them.
        self.fresh_optimizer_groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self, spec: OptimizerSpec) -> list[dict[str, Any]]:
        """The parameters that are trained, in the optimizer's groups."""
        return spec.parameter_groups(self)

    def _global_batch_size(self) -> int:
        """Samples of one optimizer step, over all ranks and accumulated batches."""
        batch_size = getattr(self.datamodule, "batch_size", None)
        if not isinstance(batch_size, int):
            raise InputError(
                f"optimizer.base_batch_size={self.optimizer.base_batch_size} scales the learning rate with the batch, "
                "size, but the DataModule has no batch_size (token batches have none). Set base_batch_size to 0."
            )
        return batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    @override
    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that every run of a task needs; a subclass extends this list."""
        callbacks: list[Callback] = [ExactResume(), StopOnNonFinite(), Evaluation()]
        if self._compile_backend is not None:
            callbacks.append(CompileModules(self.modules_to_compile, self._compile_backend))
        return callbacks

    def modules_to_compile(self) -> Sequence[nn.Module]:
        """The modules that `compile` compiles, each as a whole and for inputs of all sizes."""
        return []

    @override
    def setup(self, stage: str) -> None:
        """Checks that a subclass's `configure_callbacks` keeps the callbacks of the base class.

        Raises:
            ValueError: If one is missing: scores or exact resume would be silently absent.
        """
        present = self.trainer.callbacks  # type: ignore[attr-defined]
        missing = [
            needed.__name__
            for needed in (ExactResume, StopOnNonFinite, Evaluation)
            if not any(isinstance(one, needed) for one in present)
        ]
        if missing:
            raise InputError(
                f"{type(self).__name__}.configure_callbacks leaves out {', '.join(missing)}, which every task needs: "
                "return [*super().configure_callbacks(), ...]."
            )

    def from_data(self, name: str) -> Any:
        """An attribute of the DataModule that the network is built from.

        Raises:
            ValueError: If the DataModule has no such attribute: it is for another task.
        """
        datamodule = self.datamodule
        if not hasattr(type(datamodule), name) and name not in vars(datamodule):
            raise InputError(
                f"{type(self).__name__} needs data with {name}, and {type(datamodule).__name__} has none. Give a "
                f"DataModule for {self.task_name} (--data CLASS), or the task of this data (--model CLASS)."
            )
        return getattr(datamodule, name)

    def configure_evaluators(self) -> list[Evaluator]:
        """The evaluators of validation and test; by default `SampleMeans`, means of the values that steps return."""
        return [SampleMeans()]

    @property
    def evaluators(self) -> list[Evaluator]:
        """The result of `configure_evaluators`, which is called once."""
        if self._evaluators is None:
            self._evaluators = self.configure_evaluators()
        return self._evaluators

    @override
    def on_fit_start(self) -> None:
        """Logs the constructor's arguments, and warns if BatchSizeFinder changed the batch size after scaling."""
        if self.membership is not None:
            return
        for logger in self.loggers:
            logger.log_hyperparams(self._arguments)
        if self._scaled_for and self._scaled_for != self._global_batch_size():
            rank_zero_warn(
                f"The learning rate was scaled for a global batch size of {self._scaled_for}, but data.batch_size was "
                f"changed since, to a global batch size of {self._global_batch_size()}. Put the new batch size into "
                "the configuration and start again without BatchSizeFinder."
            )

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Also clips with a fused optimizer under bf16, where Lightning raises an error that only fp16 requires."""
        if gradient_scaler(self.trainer) is not None or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        Precision.clip_gradients(self.trainer.precision_plugin, optimizer, gradient_clip_val, algorithm)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Stores the class and its arguments as plain values for `load`."""
        checkpoint.pop("hyper_parameters", None)
        checkpoint.pop("hparams_name", None)
        checkpoint[FORMAT_KEY] = FORMAT
        checkpoint[TASK_KEY] = StoredTask(
            name=self.task_name, class_path=path_of(type(self)), arguments=self._arguments
        )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another task or shape, and logs settings that differ from the current ones."""
        stored = stored_task(checkpoint, "The checkpoint")
        if stored["name"] != self.task_name:
            raise CheckpointError(
                f"The checkpoint is of the task {stored['name']!r} ({stored['class_path']}), but the configuration "
                f"is for {self.task_name!r}. Use the configuration in the checkpoint's run directory."
            )
        mismatches = described_mismatches(checkpoint[WEIGHTS_KEY], self.state_dict())
        described = described_differences(stored["arguments"], self._arguments, "model.")
        if mismatches:
            raise CheckpointError(
                f"The checkpoint's weights do not fit the network:{mismatches}"
                + (f"\nThese settings differ:{described}" if described else "")
                + "\nUse the settings that the checkpoint was trained with (config_fit.yaml in its run directory)."
            )
        if described and self.membership is None:
            rank_zero_info(f"Settings that differ from the checkpoint's; the current ones are used:{described}")

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        weights: Weights = "averaged",
        trust: Sequence[str] = (),
        task: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Loads a task from a checkpoint without other files, in evaluation mode, on the CPU.

        Args:
            path: A checkpoint of a run.
            weights: Of a run with weight averaging, the average or the "current" weights.
            trust: Packages other than lightning_attn whose classes the checkpoint may name: that of the task, or of
                a custom attention. The class that `load` is called on is trusted.
            task: Which task of a joint training, by its name there; None for the whole.
            **overrides: Constructor arguments to change.

        Raises:
            FileNotFoundError: If the file does not exist.
            CheckpointError: If it is damaged, not ours, of another task, or names a class that is not trusted.
        """
        checkpoint = read_checkpoint(path)
        choose_weights(checkpoint, weights, path)
        if task is not None:
            checkpoint = member_checkpoint(checkpoint, task, path)
        elif MEMBERS_KEY in checkpoint and (names := members_of_task(checkpoint, cls.task_name)):
            raise CheckpointError(f"{path} is of a joint training: say which of its tasks you want, task={names[0]!r}.")
        stored = stored_task(checkpoint, path)
        if isinstance(trust, str):
            raise TypeError(f"trust must be a sequence of packages, such as ({trust!r},), got {trust!r}.")
        trusted = Trust(_own_classes() | {path_of(cls): cls}, tuple(trust))
        try:
            stored_class = trusted.resolve(stored["class_path"], cls, "task.class_path")
            trusted.require_values(stored["arguments"], stored_class, "task.arguments")
        except TrustError as error:
            raise CheckpointError(f"{path} {error}.") from error
        numbers = count_numbers(checkpoint[WEIGHTS_KEY])
        built: Self = stored_class(**_typed_arguments(stored_class, stored["arguments"] | overrides, trusted))
        built.stored_numbers = numbers
        built.build_from_checkpoint(checkpoint)
        if not built.state_dict() and checkpoint[WEIGHTS_KEY]:
            raise MissingMethodError(
                f"{stored_class.__name__} must define build_from_checkpoint(self, checkpoint) for load, and build "
                "its network there, or build it in the constructor."
            )
        mismatches = described_mismatches(checkpoint[WEIGHTS_KEY], built.state_dict())
        if mismatches:
            raise CheckpointError(f"{path} does not fit the network:{mismatches}")
        built.load_state_dict(checkpoint[WEIGHTS_KEY])
        return built.eval()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """The same as `load`, under Lightning's name."""
        if args:
            raise TypeError("load_from_checkpoint: pass constructor arguments by keyword.")
        return cls.load(checkpoint_path, **kwargs)

    def require_size(self, build: Callable[[], nn.Module]) -> None:
        """Refuses a network far larger than the checkpoint's weights, before memory is allocated.

        Args:
            build: Builds the network; called on the meta device.

        Raises:
            CheckpointError: If the checkpoint's settings and weights are of different networks.
        """
        if self.stored_numbers is None:
            return
        try:
            with torch.device("meta"):
                number = sum(value.numel() for value in build().state_dict().values())
        except (RuntimeError, OverflowError, MemoryError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"No network can be built from the checkpoint's settings ({first[:200]}). Use another checkpoint of "
                "the same run."
            ) from error
        if number > 4 * self.stored_numbers + 1_000_000:  # `on_load_checkpoint` handles smaller differences, by name
            raise CheckpointError(
                f"The checkpoint's weights do not fit the network: they are {self.stored_numbers:,} numbers, and with "
                f"these settings it has {number:,}. Use the settings that it was trained with, or another checkpoint."
            )

    def configure_data_from_checkpoint(self, datamodule: pl.LightningDataModule, checkpoint: dict[str, Any]) -> None:
        """Configures the DataModule of an evaluation from the checkpoint, before its setup."""

    def predict(self, inputs: Any) -> list[Any]:
        """The results for inputs as plain values, one for each input; for a task from `load`."""
        raise MissingMethodError(
            f"{type(self).__name__} must define predict(self, inputs) to be used without a Trainer, and return a list "
            "with the result of each input as plain values. (predict_step is what the command's predict calls.)"
        )

    def workload(self, datamodule: pl.LightningDataModule, options: WorkloadOptions) -> Workload:
        """The network and a batch of made-up inputs for `profile`, which reads no data.

        Args:
            datamodule: The data of the configuration, before its setup: its options only.
            options: Device, sizes and number of classes.

        Raises:
            ValueError: If a number is neither known nor given.
        """
        raise MissingMethodError(f"{type(self).__name__} must define workload(self, datamodule, options) for profile.")

    def interrupted_note(self) -> str:
        """The message of an interrupted evaluation: what is done, where it is stored, and how to resume."""
        return ""

    def output_names(self) -> tuple[str, ...]:
        """Names of the network's outputs (and inputs), in the order of their rows in weights: classes, or pieces."""
        return ()

    def stored_output_names(self, checkpoint: dict[str, Any]) -> tuple[str, ...]:
        """The `output_names` of a checkpoint."""
        return ()

    def matched_weights(self, checkpoint: dict[str, Any], path: str | Path, *, strict: bool) -> dict[str, Tensor]:
        """A checkpoint's weights as initial weights, with rows matched by name where `output_names` differ.

        Args:
            checkpoint: From `read_checkpoint`.
            path: For messages.
            strict: Whether all names must be the same.

        Raises:
            CheckpointError: With `strict`, if names differ.
        """
        weights: dict[str, Tensor] = dict(checkpoint[WEIGHTS_KEY])
        old, new = self.stored_output_names(checkpoint), self.output_names()
        if not old or old == new:
            return weights
        common = len(set(old) & set(new))
        if strict:
            raise CheckpointError(
                f"initial_weights: the outputs of {path} are not those of the data: it has {len(old):,} "
                f"{self.outputs_word}, the data {len(new):,}, of which {common:,} are in both"
                f"{' but in another order' if common == len(old) == len(new) else ''}. {self.same_outputs_hint(path)}"
                "To match them by name, and initialise the others, set --run.initial_weights_strict false."
            )
        current = self.state_dict()
        for name, value in weights.items():
            rows = next((rows for ending, rows in self.output_rows.items() if name.endswith(ending)), None)
            if rows is not None and name in current:
                weights[name] = rows.matched(value, current[name], old, new)
        rank_zero_info(
            f"Initial weights: {common:,} of {len(new):,} {self.outputs_word} are matched by name with the "
            f"{len(old):,} of the checkpoint; the others are newly initialised."
        )
        return weights

    def same_outputs_hint(self, path: str | Path) -> str:
        """How to get the same outputs as a checkpoint, for an error message; ends with a space."""
        return ""

    def take_initial_weights(self, path: str, *, strict: bool) -> None:
        """Begins with the weights of a checkpoint: of this task, or of a joint training with a task of this name.

        Args:
            path: The checkpoint, or what `convert_external_weights` knows.
            strict: Whether all of them must fit; see `load_initial_weights`.

        Raises:
            FileNotFoundError: If there is no such file.
            CheckpointError: If it cannot be used, does not fit, or nothing in it does.
        """
        foreign = self.convert_external_weights(path)
        if foreign is not None:
            load_initial_weights(self, path, strict=strict, foreign=foreign)
            return
        checkpoint = read_checkpoint(path)
        if MEMBERS_KEY in checkpoint and checkpoint.get(TASK_KEY, {}).get("name") != self.task_name:
            checkpoint = self._part_of_joint(checkpoint, path, strict=strict)
        stored = checkpoint[WEIGHTS_KEY]
        if checkpoint.get(TASK_KEY, {}).get("name") == self.task_name:
            stored = self.matched_weights(checkpoint, path, strict=strict)
        load_initial_weights(self, path, strict=strict, stored=stored)

    def _part_of_joint(self, checkpoint: dict[str, Any], path: str, *, strict: bool) -> dict[str, Any]:
        """What a joint training has for this task: the task of the same name, or else the backbone alone."""
        names = members_of_task(checkpoint, self.task_name)
        if len(names) == 1:
            return member_checkpoint(checkpoint, names[0], path)
        if names:
            raise CheckpointError(
                f"initial_weights: {path} is of a joint training whose tasks {', '.join(names)} are all of the kind "
                f"{self.task_name!r}. Export the one that is meant: export --task {names[0]}."
            )
        if strict:
            raise CheckpointError(
                f"initial_weights: {path} is of a joint training without a task of the kind {self.task_name!r}. To "
                "take its backbone alone, set --run.initial_weights_strict false."
            )
        weights = {
            f"{self.backbone_name}.{name.removeprefix(SHARED_BACKBONE)}": value
            for name, value in checkpoint[WEIGHTS_KEY].items()
            if name.startswith(SHARED_BACKBONE)
        }
        return {WEIGHTS_KEY: weights}

    def convert_external_weights(self, path: str) -> dict[str, Tensor] | None:
        """The weights of `run.initial_weights` by this task's names, if they are another library's; else None."""
        return None

    def further_checkpoints(self) -> dict[str, tuple[str, str]]:
        """Scores by which a best network is kept beside `best.ckpt`: by name of the file, the score and its mode."""
        return {}

    @override
    def log(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        """As Lightning's; in a joint training, under the member's name."""
        if self.membership is None:
            super().log(name, value, *arguments, **options)
        else:
            self.membership.host.log(self.membership.named(name), value, *arguments, **options)

    def build_from_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Builds the network from a checkpoint, unless the constructor does; called before weights are loaded."""

    def log_picture(self, name: str, picture: npt.NDArray[np.uint8]) -> None:
        """Logs a picture `[H, W, 3]` at the current step to the loggers that support it: TensorBoard, W&B, MLflow."""
        name = name if self.membership is None else self.membership.named(name)
        for logger in self.loggers:
            kind = type(logger).__name__
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, picture, self.global_step, dataformats="HWC")
            elif kind == "WandbLogger":  # by name, since it may not be installed
                logger.log_image(name, [picture], step=self.global_step)  # type: ignore[attr-defined]
            elif kind == "MLFlowLogger":
                file = f"{name}-{self.global_step}.png"
                logger.experiment.log_image(logger.run_id, picture, file)  # type: ignore[attr-defined]

    def option(self, name: str) -> str:
        """An argument of the task as an option of the command: its own, or the member's in a joint training."""
        return f"--model.{name}" if self.membership is None else self.membership.option(name)

    @property
    def output_directory(self) -> Path:
        """The run directory; in a joint training, the member's folder in it."""
        return Path(self.trainer.default_root_dir) if self.membership is None else self.membership.directory


class TokenMeanTask(BaseTask):
    """A task whose training loss is a mean over all tokens of an optimizer step, over ranks and accumulated batches.

    A training step calls `count_tokens` and returns the *sum* of its losses. Lightning divides it by the number of
    accumulated batches and DDP averages over ranks; before clipping, the gradients are rescaled so that the step is
    sum / number over all ranks and accumulated batches. The same mean is logged as `train/loss`.
    """

    def __init__(
        self, optimizer: OptimizerSpec, schedule: ScheduleSpec, *, compile: bool | CompileBackend = False
    ) -> None:
        super().__init__(optimizer, schedule, compile=compile)
        self._step_sums: Tensor | None = None  # number of tokens and sum of the logged loss, since the last step
        self._window: tuple[Tensor | float, float] = (0.0, time.perf_counter())  # tokens since a time, for the speed

    def count_tokens(self, number: Tensor, logged_sum: Tensor) -> None:
        """Adds a batch's number of tokens, and the sum over them for the mean `train/loss`."""
        sums = torch.stack((number.double(), logged_sum.detach().double()))
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divides the accumulated gradients by the accumulated number of tokens, and logs the mean loss."""
        assert self._step_sums is not None, "a training step counts its tokens"
        sums = self.trainer.strategy.reduce(self._step_sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        self._step_sums = None
        number, logged_sum = sums.clamp_min(1)[0], sums[1]
        factor = self.trainer.world_size * self.trainer.accumulate_grad_batches / number
        gradients = gradients_of(optimizer)
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        self.log("train/loss", (logged_sum / number).float(), prog_bar=True)
        self._log_speed(number)

    def _log_speed(self, number: Tensor) -> None:
        """Logs the speed every `log_every_n_steps`; only then does the host wait for the device."""
        tokens, since = self._window
        tokens = tokens + number
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.trainer.global_step + 1) % every == 0:
            count, now = float(tokens), time.perf_counter()
            self.log("train/tokens_per_second", count / (now - since), prog_bar=True)
            tokens, since = 0.0, now
        self._window = (tokens, since)

    def restart_clock(self) -> None:
        """Excludes the time since the last step from the training speed."""
        self._window = (0.0, time.perf_counter())

    @override
    def on_train_epoch_start(self) -> None:
        self.restart_clock()

    @override
    def on_validation_end(self) -> None:
        self.restart_clock()


def plain_value(name: str, value: Any) -> Any:
    """Converts a constructor argument to plain values for a checkpoint that can be loaded safely.

    Raises:
        TypeError: If it contains anything else than plain values and dataclasses.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain_value(f"{name}.{field.name}", getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain_value(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: plain_value(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, BaseTask):
        return {"class_path": path_of(type(value)), "init_args": value.arguments}
    if hasattr(value, "class_path"):
        raise InputError(
            f"Argument {name!r} of a task is a description of an object ({value.class_path}), which is not "
            "instantiated there. Use plain values."
        )
    raise InputError(
        f"Argument {name!r} of a task is a {type(value).__name__}, which cannot be stored safely in a checkpoint. "
        "Use plain values or a dataclass of plain values."
    )


def argument_default(task_class: type, name: str) -> Any:
    """The default of an argument of a task's constructor, which may hand it on; None if it has none.

    It is one object for all tasks of the class: an argument that is another object was given.
    """
    for one in task_class.__mro__:
        parameter = inspect.signature(one.__init__).parameters.get(name)  # type: ignore[misc]
        if parameter is not None:
            return None if parameter.default is inspect.Parameter.empty else parameter.default
    return None


def _own_classes() -> dict[str, type]:
    """The tasks of this package by import path."""
    found: dict[str, type] = {}
    pending: list[type] = [BaseTask]
    while pending:
        one = pending.pop()
        pending += one.__subclasses__()
        if one.__module__.startswith("lightning_attn."):
            found[path_of(one)] = one
    return found


def _typed_arguments(task_class: type, arguments: dict[str, Any], trust: Trust) -> dict[str, Any]:
    """Converts the plain values of a checkpoint to the dataclasses and tasks of the constructor's annotations."""
    hints = argument_types(task_class, tolerant=False)
    typed = {}
    for name, value in arguments.items():
        hint = hints.get(name)
        is_dataclass = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        if is_dataclass and isinstance(value, dict) and callable(hint):
            made, default = hint(**value), argument_default(task_class, name)
            # Sequences are lists there; the default itself, by which a joint task knows that it was not given.
            typed[name] = default if plain_value(name, made) == plain_value(name, default) else made
        elif hint == dict[str, BaseTask | None] and isinstance(value, dict):
            typed[name] = {
                member: _stored_member(one, trust, f"task.arguments.{name}.{member}") for member, one in value.items()
            }
        else:
            typed[name] = value
    return typed


def _stored_member(value: Any, trust: Trust, key: str) -> Any:
    """A task of a joint training; one that is no description of a class is a task already."""
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    found = trust.resolve(value["class_path"], BaseTask, key)
    return found(**_typed_arguments(found, value.get("init_args") or {}, trust))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the mode afterwards."""
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(was_training)


def check_checkpointing(activation_checkpointing: bool, compile: bool | CompileBackend) -> None:
    """Refuses activation checkpointing of a compiled network: torch runs recomputed layers without their graphs.

    Raises:
        ValueError: If both are on.
    """
    if activation_checkpointing and compile:
        raise InputError(
            f"activation_checkpointing=True with compile={compile!r}: layers that are computed again are not compiled. "
            "Set one of them to false."
        )


def require_network(network: Network | None) -> Network:
    """Returns the network after `configure_model` or `load` has built it.

    Raises:
        RuntimeError: If it is not built yet.
    """
    if network is None:
        raise RuntimeError("The network is not built yet: start a Trainer, or use `load` with a checkpoint.")
    return network
