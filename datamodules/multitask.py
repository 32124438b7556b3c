"""Several data sets for one training of several tasks: their batches in one schedule, their evaluations one by one."""

import contextlib
from collections.abc import Iterator
from typing import Any, get_args

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_attn.datamodules.loaders import defines_loader, require_loader
from lightning_attn.datamodules.sampling.joint_batches import (
    EpochLength,
    JointBatch,
    JointBatchSampler,
    JointDataset,
    Order,
)
from lightning_attn.datamodules.sampling.planned_batches import PlannedBatchSampler, PlannedLoader, planned_loader
from lightning_attn.errors import InputError, UserError

__all__ = ["MultitaskDataModule"]


_MOST_STEPS = 10_000_000  # of an epoch


class MultitaskDataModule(pl.LightningDataModule):
    """Several DataModules for one training of a `MultitaskTask`, whose tasks have the same names.

    Training batches are planned for all members together and all ranks; see `JointBatchSampler`. Where the lengths
    of the members differ, shorter ones begin anew, each time in another order. Evaluation has a loader for each member.

    Args:
        members: A DataModule for each task. Those whose loaders are of the package `sampling`: all of this project, and
            your own with `sample_loader` or `training_loader`. None (null) leaves out one that another configuration
            names.
        order: With "together" each optimizer step has a batch of every member, with "alternating" of one.
        ratio: Relative number of batches of each member, for "alternating"; those that are not named have 1.
        epoch: An epoch ends when every member has been through once ("longest"), when the first has ("shortest"), or
            after this number of steps.
        num_workers: Processes that make batches, for the training and for each evaluation; takes the place of the
            members' own.
        seed: Seed, with the epoch, of which member's turn it is; the members have seeds of their own.
        predict_folder: A folder of images for prediction by every task, in place of the members' own; "" for theirs.

    Attributes:
        evaluated: The members whose data is that of the evaluation loaders made last.

    Raises:
        ValueError: If an argument does not fit the others.
    """

    def __init__(
        self,
        members: dict[str, pl.LightningDataModule | None],
        order: Order = "together",
        ratio: dict[str, float] | None = None,
        epoch: EpochLength = "longest",
        num_workers: int = 0,
        seed: int = 0,
        predict_folder: str = "",
    ) -> None:
        super().__init__()
        given = {name: member for name, member in members.items() if member is not None}
        if not given:
            raise InputError("members: there is none; give a DataModule for each task.")
        for name, value, known in (("order", order, get_args(Order)), ("epoch", epoch, ("longest", "shortest"))):
            if value not in known and not (name == "epoch" and type(value) is int and 0 < value <= _MOST_STEPS):
                steps = f" or a number of steps, at most {_MOST_STEPS:,}" if name == "epoch" else ""
                raise InputError(f"{name}: {value!r} is unknown; give {' or '.join(known)}{steps}.")
        ratio = dict(ratio or {})
        if ratio and order == "together":
            raise InputError(
                f"ratio: {ratio} is for order: alternating. Together, each step has a batch of every member, whose "
                "batch_size says how many images that is."
            )
        if unknown := [name for name in ratio if name not in given]:
            raise InputError(f"ratio: {unknown[0]!r} is none of the members, which are {', '.join(given)}.")
        if wrong := {name: value for name, value in ratio.items() if not 0 < value < 1000}:
            raise InputError(f"ratio: {wrong} must be above 0 and below 1000.")
        for name, value in (("num_workers", num_workers), ("seed", seed)):
            if value < 0:
                raise InputError(f"{name}: {value} is too small; give 0 or more (--data.{name} 0).")
        self.members = given
        self.order: Order = order
        self.ratio = ratio
        self.epoch: EpochLength = epoch
        self.num_workers = num_workers
        self.seed = seed
        self.predict_folder = predict_folder
        self.evaluated: tuple[str, ...] = ()
        for member in given.values():
            if hasattr(member, "num_workers"):
                member.num_workers = num_workers
            if predict_folder and hasattr(member, "predict_folder"):
                vars(member)["predict_folder"] = predict_folder
        without = [name for name, member in given.items() if not hasattr(member, "predict_folder")]
        if predict_folder and len(without) == len(given):
            raise InputError(f"predict_folder: none of the members {', '.join(given)} has this option; leave it out.")
        if predict_folder and without:
            rank_zero_info(f"predict_folder: {', '.join(without)} has no such option, and predicts nothing.")

    @property
    def batch_size(self) -> int | None:
        """Samples of one step on one rank; None where that is not the same in every step, or not known."""
        sizes = [getattr(member, "batch_size", None) for member in self.members.values()]
        known = [one for one in sizes if isinstance(one, int)]
        return sum(known) if self.order == "together" and len(known) == len(sizes) else None

    @override
    def prepare_data(self) -> None:
        for name, member in self._attached().items():
            with errors_of(name):
                member.prepare_data()

    @override
    def setup(self, stage: str) -> None:
        for name, member in self._attached().items():
            splits = getattr(member, "split_names", {})
            is_unscored = stage == "validate" and splits.get("val") == "" and bool(splits.get("test"))
            if is_unscored:
                rank_zero_info(f"members.{name} has no validation split, and is not scored.")
            with errors_of(name):
                member.setup("test" if is_unscored else stage)  # which says what classes there are

    @override
    def teardown(self, stage: str) -> None:
        for member in self.members.values():
            member.teardown(stage)

    def _attached(self) -> dict[str, pl.LightningDataModule]:
        """The members, which plan for this trainer's ranks."""
        for member in self.members.values():
            member.trainer = self.trainer
        return self.members

    @override
    def train_dataloader(self) -> PlannedLoader:
        """Loads `JointBatch`es.

        Raises:
            ValueError: If the loader of a member cannot be a part of the schedule.
        """
        loaders = {}
        for name, member in self._attached().items():
            with errors_of(name):
                require_loader(member, "train_dataloader")
                loaders[name] = member.train_dataloader()
        samplers: dict[str, PlannedBatchSampler[Any]] = {}
        for name, loader in loaders.items():
            sampler = getattr(loader, "batch_sampler", None)
            if not (isinstance(loader, PlannedLoader) and isinstance(sampler, PlannedBatchSampler) and sampler.shuffle):
                raise InputError(
                    f"members.{name}: the training loader of {type(self.members[name]).__name__} is a "
                    f"{type(loader).__name__}, whose batches cannot be planned with those of others. Make it by "
                    "lightning_attn.datamodules.sampling.sample_batches.sample_loader, with shuffle=True."
                )
            samplers[name] = sampler
        sampler = JointBatchSampler(samplers, order=self.order, ratio=self.ratio, epoch=self.epoch, seed=self.seed)
        dataset = JointDataset({name: loader.dataset for name, loader in loaders.items()})
        return planned_loader(self, dataset, sampler, self.num_workers)

    @override
    def val_dataloader(self) -> list["TaggedLoader"]:
        return self._evaluation_loaders("val_dataloader")

    @override
    def test_dataloader(self) -> list["TaggedLoader"]:
        return self._evaluation_loaders("test_dataloader")

    @override
    def predict_dataloader(self) -> list["TaggedLoader"]:
        return self._evaluation_loaders("predict_dataloader")

    def _evaluation_loaders(self, kind: str) -> list["TaggedLoader"]:
        loaders = []
        for name, member in self._attached().items():
            if kind == "predict_dataloader" and self.predict_folder and not hasattr(member, "predict_folder"):
                continue
            if kind == "val_dataloader" and not defines_loader(member, kind):
                continue
            with errors_of(name):
                require_loader(member, kind)
                found = getattr(member, kind)()
            if isinstance(found, list | tuple) and len(found) > 1:
                raise InputError(f"members.{name}: {kind} has {len(found)} loaders; one is possible.")
            one = found[0] if isinstance(found, list | tuple) and found else found
            if one is not None and not isinstance(one, list | tuple):
                loaders.append(TaggedLoader(name, one))
        self.evaluated = tuple(one.name for one in loaders)
        return loaders


@contextlib.contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Says in errors of a member's data that a user can mend which member it is, and how its options are called."""
    try:
        yield
    except UserError as error:
        text = str(error).replace("--data.", f"--data.members.{name}.init_args.")
        raise type(error)(f"members.{name}: {text}") from error


class TaggedLoader:
    """The loader of a member, as `JointBatch`es of one part.

    Args:
        name: The member.
        loader: Its loader.
    """

    def __init__(self, name: str, loader: Any) -> None:
        self.name, self.loader = name, loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[JointBatch]:
        for batch in self.loader:
            yield JointBatch({self.name: batch})

    @property
    def _iterator(self) -> Any:
        """The iterator that a DataLoader keeps, of which Lightning ends the workers when it is done with the loader."""
        return getattr(self.loader, "_iterator", None)

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator
