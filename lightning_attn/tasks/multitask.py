"""The LightningModule of a joint training: several tasks on images, whose networks share their backbone."""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_attn.attention import AttentionSpec
from lightning_attn.datamodules.sampling.joint_batches import JointBatch
from lightning_attn.errors import InputError
from lightning_attn.io import write_json
from lightning_attn.networks.compilation import CompileBackend
from lightning_attn.networks.images.backbone import ResNetSpec
from lightning_attn.networks.sharing import copy_buffers, share_parameters, statistics_in
from lightning_attn.tasks.base import BaseTask, argument_default
from lightning_attn.tasks.evaluation import Evaluator
from lightning_attn.tasks.membership import Membership
from lightning_attn.tasks.multitask_evaluation import JointScore, MemberEvaluator
from lightning_attn.tasks.workload import Workload, WorkloadOptions
from lightning_attn.training.balancing import (
    BalancingSpec,
    GradientSummary,
    build_balancing,
    gradient_statistics,
    gradients_of,
)
from lightning_attn.training.checkpoint_keys import BACKBONE_NAME_KEY, MEMBERS_KEY, TASK_KEY
from lightning_attn.training.checkpoints import SHARED_BACKBONE, CheckpointError, member_prefix, read_checkpoint
from lightning_attn.training.optimization import OptimizerSpec, ScheduleSpec, complete_momentum
from lightning_attn.training.progress import print_gradients

__all__ = ["MultitaskTask", "joint_arguments"]

Statistics = Literal["shared", "per_task"]

_BACKBONE = "backbone"  # in `freeze`, beside the names of tasks
# What acts on a whole optimizer step, which is not one task's.
_OF_THE_WHOLE = (
    *("backward", "configure_callbacks", "configure_gradient_clipping", "configure_optimizers", "lr_scheduler_step"),
    *("on_after_backward", "on_before_backward", "on_before_optimizer_step", "on_before_zero_grad", "optimizer_step"),
    *("optimizer_zero_grad", "parameter_groups"),
)


class MultitaskTask(BaseTask):
    """Trains several tasks on images at once, with one backbone and a head for each task.

    The tasks are those that train alone: each makes its own losses, scores, pictures and files, from its own data in a
    `MultitaskDataModule`, at the output stride of its own head. The parameters of the backbone are the same ones.
    docs/multitask.md has more.

    Args:
        tasks: The tasks, by names that are also those of their data. Of the arguments of each, `attention`,
            `backbone`, `optimizer`, `schedule` and `compile` are left out: they are given here, once. None (null)
            leaves out a task that another configuration names.
        attention: Attention of the backbone, and of heads that have one.
        backbone: Which ResNet, its weights, and which blocks have attention.
        share: What the tasks share.
        statistics: Whose statistics batch normalisation of the backbone has, with `norm: batch` or `sync`: "per_task",
            with weights and biases for all. "shared" ones are refused there.
        weights: Factors on the tasks' losses; 1 for those that are not named. With 0 a task is not trained: its head is
            left as it is, and its loss does not reach the backbone.
        balancing: How the losses are weighted beyond that.
        freeze: What is not trained: names of tasks, for their heads, and "backbone".
        baselines: A score for each task that `best.ckpt` compares with, such as those of the tasks trained alone; for
            all tasks or none. See `JointScore`.
        gradient_report: Whether the norm of each loss's gradient in the backbone, and the cosines between them, are
            logged every `trainer.log_every_n_steps` steps, which takes a further backward pass of each loss then; and
            their means printed and written to `gradients.json` at the end of the training.
        optimizer: The optimizer of all parameters.
        schedule: The learning rate schedule.
        compile: See `BaseTask`.

    Attributes:
        members: The tasks by name.
        trained: Names of the tasks whose losses are trained on.
        balancing: Weights the losses.
    """

    task_name: ClassVar[str] = "multitask"
    monitor: ClassVar[str] = "val/joint"
    monitor_mode: ClassVar[str] = "max"

    def __init__(
        self,
        tasks: dict[str, BaseTask | None],
        attention: AttentionSpec = AttentionSpec(),  # noqa: B008 - a frozen value
        backbone: ResNetSpec = ResNetSpec(),  # noqa: B008 - a frozen value
        share: Literal["backbone"] = "backbone",
        statistics: Statistics = "shared",
        weights: dict[str, float] | None = None,
        balancing: BalancingSpec = BalancingSpec(),  # noqa: B008 - a frozen value
        freeze: tuple[str, ...] = (),
        baselines: dict[str, float] | None = None,
        gradient_report: bool = True,
        optimizer: OptimizerSpec = OptimizerSpec(),  # noqa: B008 - a frozen value
        schedule: ScheduleSpec = ScheduleSpec(),  # noqa: B008 - a frozen value
        compile: bool | CompileBackend = False,
    ) -> None:
        weights, baselines = dict(weights or {}), dict(baselines or {})
        given = _given_tasks(tasks)
        _check_names(given, weights, freeze, baselines)
        _check_statistics(backbone, statistics)
        for name, task in given.items():
            _check_member(name, task)
            task.use_backbone(attention, backbone)  # before the arguments are stored
        super().__init__(optimizer, schedule, compile=compile)
        self.attention, self.backbone, self.statistics = attention, backbone, statistics
        self.freeze_parts, self.baselines = tuple(freeze), baselines
        self.trained = _trained(given, weights, freeze)
        if not self.trained:
            raise InputError(f"weights and freeze: none of the tasks {', '.join(given)} is left to train.")
        self.members = nn.ModuleDict(given)
        self.balancing = build_balancing(balancing, {name: weights.get(name, 1.0) for name in self.trained})
        if self.balancing.needs_gradients and (compile or _BACKBONE in freeze):
            reason = "compile: true, whose graphs are gone after one backward pass" if compile else "a frozen backbone"
            raise InputError(
                f"balancing.name: {balancing.name} needs the gradients of each loss in the backbone, which there are "
                f"not with {reason}. Leave that out, or choose another balancing."
            )
        self._reports_gradients = gradient_report and not compile  # compiled graphs are gone after one backward pass
        self._gradient_summary = GradientSummary()
        self._is_shared = False
        for name, task in self.tasks().items():
            task.membership = Membership(self, name)
        self.register_state_dict_post_hook(_store_once)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_for_each)  # type: ignore[no-untyped-call]

    def tasks(self) -> dict[str, BaseTask]:
        """The tasks by name."""
        return dict(self.members.items())  # type: ignore[arg-type]

    # Network

    @override
    def configure_model(self) -> None:
        """Builds the tasks' networks for their data, and shares the backbone."""
        data = self.from_data("members")
        if not isinstance(data, Mapping) or data.keys() != self.tasks().keys():
            found = ", ".join(data) if isinstance(data, Mapping) else type(self.datamodule).__name__
            raise InputError(
                f"data.members: the data is of {found}, and the tasks are {', '.join(self.tasks())}. Give a "
                "MultitaskDataModule with a member for each task, of the same name."
            )
        for task in self.tasks().values():
            task.trainer = self.trainer
            task.checkpoint_path, task.stored_numbers = self.checkpoint_path, self.stored_numbers
        if not self._is_shared:
            for task in self.tasks().values():
                task.configure_model()
            self._share()

    @override
    def build_from_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for task in self.tasks().values():
            assert task.membership is not None, "made by the constructor"
            task.stored_numbers = self.stored_numbers
            task.build_from_checkpoint(task.membership.checkpoint(checkpoint, "The checkpoint"))
        self._share()

    def backbones(self) -> dict[str, nn.Module]:
        """Each task's backbone, of the same parameters, by name of the task."""
        return {name: task.get_submodule(task.backbone_name) for name, task in self.tasks().items()}

    def _share(self) -> None:
        first, *others = self.backbones().values()
        for other in others:
            share_parameters(first, other)
        for name, task in self.tasks().items():
            shared = {id(parameter) for parameter in first.parameters()}
            if name not in self.trained:
                for parameter in task.parameters():
                    parameter.requires_grad_(parameter.requires_grad and id(parameter) in shared)
        if _BACKBONE in self.freeze_parts:
            first.requires_grad_(False)
        self._is_shared = True
        if self.freeze_parts or len(self.trained) < len(self.tasks()):
            warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # it was asked for
        self.train(self.training)

    @override
    def train(self, mode: bool = True) -> "MultitaskTask":
        """As in any module, but what is frozen stays in evaluation mode."""
        super().train(mode)
        if mode and self._is_shared:
            for name, task in self.tasks().items():
                if name not in self.trained:
                    task.eval()
            if _BACKBONE in self.freeze_parts:
                for backbone in self.backbones().values():
                    backbone.eval()
        return self

    @override
    def modules_to_compile(self) -> Sequence[nn.Module]:
        return [module for task in self.tasks().values() for module in task.modules_to_compile()]

    @override
    def workload(self, datamodule: pl.LightningDataModule, options: WorkloadOptions) -> Workload:
        """A step with a batch of every task, each of its own size unless one is given for all."""
        members = getattr(datamodule, "members", {})
        parts = {name: _workload(task, members[name], options) for name, task in self.tasks().items()}
        networks = {name: part.network for name, part in parts.items()}
        first, *others = (
            networks[name].get_submodule(task.backbone_name.partition(".")[2]) for name, task in self.tasks().items()
        )
        for other in others:
            share_parameters(first, other)
        return Workload(
            nn.ModuleDict(networks),
            lambda: [part.forward() for part in parts.values()],
            lambda: torch.stack([part.loss() for part in parts.values()]).sum(),
            sum(part.batch_size for part in parts.values()),
            "images",
            sum(part.units for part in parts.values()),
            "; ".join(f"{name}: {part.inputs}" for name, part in parts.items()),
            tuple(f"{name}: {note}" for name, part in parts.items() for note in part.notes),
        )

    # Checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also stores what each task stores, for `load` of one of them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[MEMBERS_KEY] = {}
        for name, task in self.tasks().items():
            own: dict[str, Any] = {BACKBONE_NAME_KEY: task.backbone_name}
            task.on_save_checkpoint(own)
            checkpoint[MEMBERS_KEY][name] = own

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also refuses a checkpoint of other tasks, or that one of them refuses."""
        if checkpoint.get(TASK_KEY, {}).get("name") == self.task_name:
            stored = checkpoint.get(MEMBERS_KEY, {})
            if stored.keys() != self.tasks().keys():
                raise CheckpointError(
                    f"The checkpoint is of the tasks {', '.join(stored)}, but the configuration is for "
                    f"{', '.join(self.tasks())}. Use the configuration in the checkpoint's run directory."
                )
            self._require_same_training(checkpoint[TASK_KEY].get("arguments", {}))
            for task in self.tasks().values():
                assert task.membership is not None, "made by the constructor"
                task.on_load_checkpoint(task.membership.checkpoint(checkpoint, "The checkpoint"))
        super().on_load_checkpoint(checkpoint)

    def _require_same_training(self, stored: Mapping[str, Any]) -> None:
        """Refuses to resume with other parts to train, of which the optimizer has no state."""
        weights, freeze = stored.get("weights") or {}, tuple(stored.get("freeze") or ())
        trained = _trained(self.tasks(), weights, freeze)
        if self.trainer.state.fn == "fit" and (
            trained != self.trained or (_BACKBONE in freeze) != (_BACKBONE in self.freeze_parts)
        ):
            raise CheckpointError(
                f"weights and freeze: the run that is resumed trained {', '.join(trained)} with weights: {weights} and "
                f"freeze: {list(freeze)}; now it would be {', '.join(self.trained)} with freeze: "
                f"{list(self.freeze_parts)}. Resume with what it had, or begin a new run with its weights "
                "(--run.initial_weights)."
            )

    @override
    def configure_data_from_checkpoint(self, datamodule: pl.LightningDataModule, checkpoint: dict[str, Any]) -> None:
        members = getattr(datamodule, "members", {})
        for name, task in self.tasks().items():
            if isinstance(members, Mapping) and name in members and name in checkpoint.get(MEMBERS_KEY, {}):
                assert task.membership is not None, "made by the constructor"
                own = task.membership.checkpoint(checkpoint, "The checkpoint")
                task.configure_data_from_checkpoint(members[name], own)

    @override
    def take_initial_weights(self, path: str, *, strict: bool) -> None:
        """Begins with the weights of a joint training, or with those of one task, for that task and the backbone."""
        for task in self.tasks().values():
            if task.convert_external_weights(path) is not None:
                self._take_from(task, path, strict=strict)
                return
        stored = read_checkpoint(path).get(TASK_KEY, {}).get("name")
        if stored == self.task_name:
            super().take_initial_weights(path, strict=strict)
            return
        fitting = [name for name, task in self.tasks().items() if task.task_name == stored]
        if len(fitting) != 1:
            kinds = ", ".join(f"{name} ({task.task_name})" for name, task in self.tasks().items())
            raise CheckpointError(
                f"initial_weights: {path} is of the kind {stored!r}, as {len(fitting)} of the tasks are: {kinds}. Give "
                "a checkpoint of a joint training, or of a kind of task that is here once."
            )
        self._take_from(self.tasks()[fitting[0]], path, strict=strict)

    def _take_from(self, task: BaseTask, path: str, *, strict: bool) -> None:
        task.take_initial_weights(path, strict=strict)
        own = task.get_submodule(task.backbone_name)
        for backbone in self.backbones().values():
            if backbone is not own:
                copy_buffers(own, backbone)

    # Training

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        precision = str(self.trainer.precision)
        for name, task in self.tasks().items():
            task.require_steps(stage)
            if precision not in task.precisions:
                raise InputError(
                    f"trainer.precision: {precision!r} is not supported by tasks.{name} ({type(task).__name__}); give "
                    f"one of {', '.join(task.precisions)}."
                )
        if stage == "fit":
            self._prepare_for_order(str(getattr(self.datamodule, "order", "together")))

    def _prepare_for_order(self, order: str) -> None:
        """Refuses steps without a loss, and tells DDP that not every parameter has a gradient in every step."""
        untrained = [name for name in self.tasks() if name not in self.trained]
        if order != "alternating":
            return
        if self.balancing.needs_gradients:
            raise InputError(
                "data.order: alternating has one task's loss in each step, and balancing.name: torchjd weighs the "
                "losses of a step against each other. Set order: together, or choose another balancing."
            )
        if untrained:
            raise InputError(
                f"data.order: alternating would give steps to {', '.join(untrained)}, which is not trained. Set order: "
                "together."
            )
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            strategy._ddp_kwargs["find_unused_parameters"] = True
            rank_zero_info(
                "order: alternating trains one head in each step, so DDP looks for parameters without a gradient "
                "(find_unused_parameters), which takes some time in every step."
            )

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        configured = super().configure_optimizers()
        assert isinstance(configured, dict), "made by the base class"
        # Heads may get their first gradients in different steps, of which a fused SGD makes no momentum.
        complete_momentum(configured["optimizer"])
        return configured

    @override
    def parameter_groups(self, spec: OptimizerSpec) -> list[dict[str, Any]]:
        """Those of all tasks; weights that are learnt do not decay."""
        learnt = {id(parameter) for parameter in self.balancing.parameters()}
        groups = super().parameter_groups(spec)
        if not learnt:
            return groups
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in learnt]
        groups[0].setdefault("name", "network")
        return [*groups, {"params": list(self.balancing.parameters()), "name": "balancing", "weight_decay": 0.0}]

    @override
    def on_before_batch_transfer(self, batch: JointBatch, dataloader_idx: int) -> JointBatch:
        changed = {
            name: self.tasks()[name].on_before_batch_transfer(part, dataloader_idx)
            for name, part in batch.parts.items()
        }
        return JointBatch(changed)

    @override
    def training_step(self, batch: JointBatch, batch_idx: int) -> Tensor:
        """The weighted sum of the losses of the tasks that have a batch: one forward pass of the module."""
        self._forget_logged_steps()
        losses = {
            name: _loss(self.tasks()[name].training_step(part, batch_idx))
            for name, part in batch.parts.items()
            if name in self.trained
        }
        gradients = self._gradients(losses)
        total = self.balancing.total(losses, self._mean_over_ranks, gradients)
        if self._is_logged_step():
            self._log_balance(list(losses), gradients)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=1)
        return total

    def _forget_logged_steps(self) -> None:
        """Lightning would log a task's values of an earlier step again in a step without that task."""
        for value in (self.trainer._results or {}).values():
            if value.meta.on_step and not value.meta.on_epoch:
                value.reset()

    def _is_logged_step(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool(every) and (self.trainer.global_step + 1) % every == 0

    def _gradients(self, losses: Mapping[str, Tensor]) -> Tensor | None:
        """Those of each loss in the backbone, in steps in which they are logged or weigh the losses."""
        if not (self.balancing.needs_gradients or (self._reports_gradients and self._is_logged_step())):
            return None
        shared = [one for one in next(iter(self.backbones().values())).parameters() if one.requires_grad]
        return gradients_of(losses, shared, self._mean_over_ranks) if shared else None

    def _log_balance(self, names: Sequence[str], gradients: Tensor | None) -> None:
        """Logs the weight of each loss, the norm of its gradient in the backbone, and what angles these have."""
        weights = self.balancing.current()
        logged: dict[str, Tensor | float] = {f"train/{name}/weight": weights[name] for name in names}
        if self._reports_gradients and gradients is not None:
            norms, cosines = gradient_statistics(names, gradients)
            logged |= {f"train/{name}/gradient_norm": value for name, value in norms.items()}
            logged |= {f"train/gradient_cosine/{pair}": value for pair, value in cosines.items()}
            self._gradient_summary.add(weights, norms, cosines)
        self.log_dict(logged, batch_size=1)

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        reduced = self.trainer.strategy.reduce(value, reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        for task in self.tasks().values():
            task.on_fit_start()

    @override
    def on_train_start(self) -> None:
        """Says which tasks have no part in the choice of `best.ckpt`."""
        self._gradient_summary = GradientSummary()
        scored = self.evaluated_members() if sum(self.trainer.num_val_batches) else ()
        unscored = [name for name in self.tasks() if name not in scored]
        if scored and unscored:
            rank_zero_info(
                f"No validation data of {', '.join(unscored)}: best.ckpt is chosen by {', '.join(scored)} alone, and "
                f"there is no {' or '.join(f'best_{name}.ckpt' for name in unscored)}."
            )

    @override
    def on_train_end(self) -> None:
        """Prints and writes the means of what was logged of the gradients, since the start or where it was resumed."""
        means = self._gradient_summary.means()
        if len(means) > 1 and self.trainer.is_global_zero:
            steps = self._gradient_summary.steps
            print_gradients(means, steps)
            if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                write_json(self.output_directory / "gradients.json", {"steps": steps, "tasks": means})

    @override
    def on_fit_end(self) -> None:
        for task in self.tasks().values():
            task.on_fit_end()

    @override
    def on_train_epoch_start(self) -> None:
        for task in self.tasks().values():
            task.on_train_epoch_start()

    @override
    def on_train_epoch_end(self) -> None:
        for task in self.tasks().values():
            task.on_train_epoch_end()
        self.balancing.end_epoch()

    # Evaluation

    def evaluated_members(self) -> tuple[str, ...]:
        """Names of the tasks that have data in the current pass over validation, test or prediction."""
        return tuple(self.from_data("evaluated"))

    @override
    def validation_step(self, batch: JointBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {name: self.tasks()[name].validation_step(part, batch_idx) for name, part in batch.parts.items()}

    @override
    def test_step(self, batch: JointBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {name: self.tasks()[name].test_step(part, batch_idx) for name, part in batch.parts.items()}

    @override
    def configure_evaluators(self) -> list[Evaluator]:
        of_members = [
            MemberEvaluator(self, name, task, evaluator)
            for name, task in self.tasks().items()
            for evaluator in task.evaluators
        ]
        return [*of_members, JointScore(self.tasks(), self.baselines, of_members)]

    @override
    def further_checkpoints(self) -> dict[str, tuple[str, str]]:
        """`best_<name>.ckpt` of each task, by the score that it is monitored by."""
        found = {}
        for name, task in self.tasks().items():
            assert task.membership is not None, "made by the constructor"
            found[f"best_{name}"] = (task.membership.named(task.monitor), task.monitor_mode)
        return found

    # Prediction

    @override
    def predict_step(self, batch: JointBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Each task writes its results into its own folder of the run directory."""
        for name, part in batch.parts.items():
            self.tasks()[name].predict_step(part, batch_idx)

    @override
    def on_predict_epoch_start(self) -> None:
        for name in self.evaluated_members():
            self.tasks()[name].on_predict_epoch_start()

    @override
    def on_predict_epoch_end(self) -> None:
        for name in self.evaluated_members():
            self.tasks()[name].on_predict_epoch_end()

    @override
    def interrupted_note(self) -> str:
        return " ".join(filter(None, (task.interrupted_note() for task in self.tasks().values())))

    @property
    def bad_images(self) -> list[Any]:
        """Those evaluators of unusable images that found some."""
        return list(filter(None, (getattr(task, "bad_images", None) for task in self.tasks().values())))

    @override
    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The results of every task for each input, by the tasks' names."""
        found = {name: task.predict(inputs) for name, task in self.tasks().items()}
        return [{name: results[place] for name, results in found.items()} for place in range(len(inputs))]


def _trained(names: Iterable[str], weights: Mapping[str, float], freeze: Sequence[str]) -> list[str]:
    """The tasks whose losses are trained on."""
    return [name for name in names if weights.get(name, 1.0) and name not in freeze]


def _given_tasks(tasks: Mapping[str, BaseTask | None]) -> dict[str, BaseTask]:
    """Those that are not left out."""
    if not isinstance(tasks, Mapping) or not all(task is None or isinstance(task, BaseTask) for task in tasks.values()):
        raise InputError(f"tasks: they must be tasks by name, got {str(tasks)[:200]}.")
    return {name: task for name, task in tasks.items() if task is not None}


def _check_names(
    tasks: Mapping[str, BaseTask], weights: Mapping[str, float], freeze: Sequence[str], baselines: Mapping[str, float]
) -> None:
    if not tasks:
        raise InputError("tasks: there is none; give at least one, by a name of your choice.")
    for name in tasks:
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[A-Za-z]\w*", name)
            or name == _BACKBONE
            or hasattr(nn.ModuleDict(), name)
        ):
            raise InputError(f"tasks: {name!r} is no name for a task: give letters, digits and _, such as detection.")
    for option, given, further in (
        ("weights", weights, ()),
        ("freeze", freeze, (_BACKBONE,)),
        ("baselines", baselines, ()),
    ):
        unknown = [name for name in given if name not in (*tasks, *further)]
        if unknown:
            raise InputError(f"{option}: {unknown[0]!r} is none of {', '.join((*tasks, *further))}.")
    if wrong := {name: value for name, value in weights.items() if not 0 <= value < float("inf")}:
        raise InputError(f"weights: {wrong} must be finite numbers of at least 0.")
    if baselines and (baselines.keys() != tasks.keys() or not all(0 < abs(one) < 1e9 for one in baselines.values())):
        raise InputError(
            f"baselines: {dict(baselines)}: give a score other than 0 for each of {', '.join(tasks)}, or none at all."
        )


def _check_statistics(backbone: ResNetSpec, statistics: Statistics) -> None:
    has_statistics = backbone.norm in ("batch", "sync")
    if statistics not in ("shared", "per_task"):
        raise InputError(f"statistics must be shared or per_task, got {statistics!r}.")
    if has_statistics and statistics == "shared":
        raise InputError(
            f"statistics: 'shared' with backbone.norm: {backbone.norm} would normalise the images of each task in "
            "evaluation by the mean and variance of all tasks' images, which those of none have, nor the batches that "
            "it was trained on. Set statistics: per_task, or backbone.norm: frozen or group."
        )
    if not has_statistics and statistics == "per_task":
        raise InputError(
            f"statistics: 'per_task' with backbone.norm: {backbone.norm}, which keeps none. Leave statistics out."
        )


def _check_member(name: str, task: BaseTask) -> None:
    """Refuses a task that cannot be one of several."""
    kind = type(task).__name__
    if not task.backbone_name:
        raise InputError(
            f"tasks.{name}: {kind} has no backbone to share (its backbone_name is empty), so a joint training would "
            "only alternate between two networks. Train it in a run of its own."
        )
    own = [one for one in _OF_THE_WHOLE if getattr(type(task), one) is not getattr(BaseTask, one)]
    if own:
        raise InputError(
            f"tasks.{name}: {kind} defines {', '.join(own)}, which act on optimizer steps, and these are of all tasks. "
            "Leave them out."
        )
    values = {"optimizer": task.optimizer, "schedule": task.schedule, "compile": task.arguments.get("compile", False)}
    for argument, value in values.items():
        default = argument_default(type(task), argument)
        if default is not None and value is not default:
            raise InputError(
                f"tasks.{name}.{argument}: {task.arguments.get(argument)} has no effect, as all tasks are trained by "
                f"one optimizer. Leave it out, and give it once (--model.{argument})."
            )


def joint_arguments(task_class: type[BaseTask]) -> tuple[str, ...]:
    """Arguments of a task that a joint training has for all tasks, so that the task leaves them out."""
    of_backbone = () if task_class.use_backbone is BaseTask.use_backbone else ("attention", "backbone")
    names = (*of_backbone, "optimizer", "schedule", "compile")
    return tuple(name for name in names if argument_default(task_class, name) is not None)


def _workload(task: BaseTask, data: pl.LightningDataModule, options: WorkloadOptions) -> Workload:
    """A task's own; a number of classes that is given is for those whose data does not tell it."""
    try:
        return task.workload(data, dataclasses.replace(options, num_classes=None))
    except InputError:
        if options.num_classes is None:
            raise
        return task.workload(data, options)


def _loss(returned: Any) -> Tensor:
    """The loss in what a training step returned."""
    loss = returned["loss"] if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor):
        raise InputError(
            f"training_step of a member returned {type(loss).__name__}; it must return its loss, a Tensor."
        )
    return loss


def _of_backbones(task: "MultitaskTask", prefix: str) -> dict[str, tuple[str, set[str]]]:
    """By name of each task, what the names of its backbone begin with, and the names that are its own."""
    return {
        name: (
            f"{prefix}{member_prefix(name)}{task.tasks()[name].backbone_name}.",
            statistics_in(backbone) if task.statistics == "per_task" else set(),
        )
        for name, backbone in task.backbones().items()
    }


def _store_once(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Of the tasks' backbones, keeps that of the first, under a name of its own, and what each has for itself."""
    assert isinstance(module, MultitaskTask)
    if not module._is_shared:
        return
    for place, (own, apart) in enumerate(_of_backbones(module, prefix).values()):
        for key in [key for key in state if key.startswith(own)]:
            name = key.removeprefix(own)
            if name not in apart:
                value = state.pop(key)
                if not place:
                    state[f"{prefix}{SHARED_BACKBONE}{name}"] = value


def _load_for_each(module: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """The reverse of `_store_once`."""
    assert isinstance(module, MultitaskTask)
    shared = prefix + SHARED_BACKBONE
    values = {key.removeprefix(shared): state.pop(key) for key in list(state) if key.startswith(shared)}
    if module._is_shared:
        for own, _ in _of_backbones(module, prefix).values():
            state.update({own + name: value for name, value in values.items()})
