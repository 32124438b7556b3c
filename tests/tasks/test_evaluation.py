"""How a task of one's own is scored: what its steps may return, several loaders, and what is kept."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_attn.tasks import BaseTask, OptimizerSpec, ScheduleSpec
from lightning_attn.tasks.evaluation import Evaluator

VALUES = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])


class Task(BaseTask):
    """Returns what it is told to."""

    returned = staticmethod(lambda batch: {"right": batch["value"]})

    def __init__(self):
        super().__init__(OptimizerSpec(), ScheduleSpec())
        self.weight = torch.nn.Parameter(torch.ones(1))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return type(self).returned(batch)

    test_step = validation_step


def loader(values=VALUES, ids=True):
    samples = [{"value": value} | ({"ids": place} if ids else {}) for place, value in enumerate(values)]
    return DataLoader(samples, batch_size=2)


def scores(returned, loaders=None, tmp_path=None, task=Task):
    kind = type("Own", (task,), {"returned": staticmethod(returned)})
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    own = kind()
    trainer.validate(own, loader() if loaders is None else loaders, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, own


def test_means_are_over_samples_not_batches(tmp_path):
    found, _ = scores(lambda batch: {"right": batch["value"], "half": batch["value"] / 2}, tmp_path=tmp_path)
    assert found == pytest.approx({"val/right": 0.6, "val/half": 0.3})


@pytest.mark.parametrize("returned", [lambda batch: None, lambda batch: torch.tensor(1.0), lambda batch: {"loss": 1.0}])
def test_a_step_may_return_as_lightnings_do(returned, tmp_path, recwarn):
    """Nothing, or the loss of the batch: it is not averaged, and a warning says so."""
    found, _ = scores(returned, loader(ids=False), tmp_path=tmp_path)
    assert found == {}
    warned = [str(one.message) for one in recwarn if "one number for the whole batch" in str(one.message)]
    assert len(warned) == (0 if returned(None) is None else 1)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda batch: {"right": batch["value"][:1]}, r"val: right must be a tensor \[B\].*got shape \(1,\)"),
        (lambda batch: {"right": batch["value"][:, None]}, r"right must be .*got shape \(2, 1\)"),
        (lambda batch: {"right": [True, False]}, r"right must be .*got list"),
        (lambda batch: batch["value"][:1], r"the returned value must be .*list evaluators of your own"),
    ],
)
def test_values_of_another_shape_are_refused_by_name(returned, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scores(returned, tmp_path=tmp_path)


def test_samples_without_ids_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the batch must have ids, B integers that are unique in the split.*ids None"):
        scores(lambda batch: {"right": batch["value"]}, loader(ids=False), tmp_path=tmp_path)


def test_each_loader_has_scores_of_its_own(tmp_path):
    found, _ = scores(lambda batch: {"right": batch["value"]}, [loader(), loader(1 - VALUES)], tmp_path=tmp_path)
    assert found["val/right/loader_0"] == pytest.approx(0.6)
    assert found["val/right/loader_1"] == pytest.approx(0.4)


def test_an_evaluator_gets_batches_scores_and_is_cleared(tmp_path):
    calls = []

    class Largest(Evaluator):
        shown = ()

        def reset(self, split):
            super().reset(split)
            self.largest = 0.0
            calls.append(("reset", split))

        def update(self, batch, outputs):
            self.largest = max(self.largest, float(outputs["right"].max()))

        def compute(self):
            return {"largest": self.largest, "word": "no number"}

        def write(self, scores):
            calls.append(("write", scores))

        def clear(self):
            calls.append(("clear",))

    class Own(Task):
        def configure_evaluators(self):
            return [*super().configure_evaluators(), Largest()]

    found, own = scores(lambda batch: {"right": 2 * batch["value"]}, tmp_path=tmp_path, task=Own)
    assert found == {"val/right": pytest.approx(1.2), "val/largest": 2.0}
    assert calls == [("reset", "val"), ("write", {"largest": 2.0, "word": "no number"}), ("clear",)]
    assert own.evaluators[1].largest == 2.0


def test_a_task_that_drops_the_callbacks_of_the_base_class_is_refused(tmp_path):
    class Own(Task):
        def configure_callbacks(self):
            return []

    with pytest.raises(
        ValueError, match=r"Own.configure_callbacks leaves out ExactResume, StopOnNonFinite, Evaluation"
    ):
        scores(lambda batch: {"right": batch["value"]}, tmp_path=tmp_path, task=Own)
