from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from datamodules import WMT14DataModule
from datamodules.translation.vocabulary import Vocabulary
from lightning_attn.attention import AttentionSpec
from lightning_attn.tasks import BaseTask, CheckpointError, OptimizerSpec, ScheduleSpec, TranslationTask
from lightning_attn.tasks.base import plain_value
from lightning_attn.visualization import cross_attention_maps

TINY = {
    "self_attention": AttentionSpec(terms="0110", num_heads=2),
    "cross_attention": AttentionSpec(terms="1011", num_heads=2),
    "dim": 16,
    "hidden_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "schedule": ScheduleSpec("constant", warmup_steps=0),
}


class Subclass(TranslationTask):
    """A user's task with an argument of its own."""

    def __init__(self, flavour: str = "plain", **arguments) -> None:
        super().__init__(**arguments)
        self.flavour = flavour


def fit(folder: Path, corpus: Path, task: TranslationTask, **settings) -> pl.Trainer:
    data = WMT14DataModule(root=str(corpus), vocabulary_size=300, max_tokens=400, preparation_processes=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(task, data)
    return trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, corpus) -> Path:
    path = tmp_path_factory.mktemp("task") / "trained.ckpt"
    trainer = fit(path.parent, corpus, Subclass(flavour="sour", **TINY), max_steps=3)
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_alone_is_enough(checkpoint, monkeypatch):
    task = TranslationTask.load(checkpoint, trust=(__name__,))
    assert isinstance(task, Subclass)
    assert task.flavour == "sour"
    assert task.network_arguments["self_attention"] == TINY["self_attention"]
    assert not task.training
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in task.state_dict().items())
    sentences = ["The woman reads a book.", "", "Today, the man sees the dog and the cat in the garden."]
    together = task.predict(sentences)
    assert together == [task.predict([sentence])[0] for sentence in sentences]
    assert together == task.predict(sentences, batch_size=2)
    assert task.predict([]) == []
    monkeypatch.setattr(Vocabulary, "decode", lambda self, tokens: "text")
    assert task.predict(["", "a dog", " "]) == ["", "text", ""], "a blank line stays blank"
    with pytest.raises(TypeError, match=r"give a list, \[text\] for one"):
        task.predict("The woman reads a book.")
    assert Subclass.load_from_checkpoint(checkpoint, flavour="sweet").flavour == "sweet"


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(mechanism="dynamic", groups=4, kernel_size=5),
        AttentionSpec(terms="0010", num_heads=2, convolution="deformable"),
    ],
    ids=["dynamic", "deformable"],
)
def test_other_mechanisms_train_and_translate_from_a_checkpoint_alone(tmp_path, corpus, spec):
    trainer = fit(tmp_path, corpus, TranslationTask(**TINY | {"self_attention": spec}), max_steps=2)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    task = TranslationTask.load(tmp_path / "trained.ckpt")
    assert task.network_arguments["self_attention"] == spec
    sentences = ["The woman reads a book.", "Today, the man sees the dog and the cat in the garden."]
    assert task.predict(sentences) == [task.predict([sentence])[0] for sentence in sentences]


def test_offsets_move_slowly_and_are_clipped_with_the_rest(tmp_path, corpus):
    """The length of one step of plain SGD shows the learning rate of each group, and that they are clipped together."""
    task = TranslationTask(
        **TINY | {"self_attention": AttentionSpec(num_heads=2, convolution="modulated_deformable")},
        optimizer=OptimizerSpec("sgd", learning_rate=0.5, momentum=0.0),
    )
    before = {}

    class Remember(pl.Callback):
        def on_train_start(self, trainer, task):
            before.update({name: parameter.detach().clone() for name, parameter in task.named_parameters()})

    fit(tmp_path, corpus, task, max_steps=1, gradient_clip_val=1e-2, callbacks=[Remember()])
    moved = {name: (parameter - before[name]).detach().norm() for name, parameter in task.named_parameters()}
    offsets = torch.stack([norm for name, norm in moved.items() if ".offset." in name])
    others = torch.stack([norm for name, norm in moved.items() if ".offset." not in name])
    assert len(offsets) == 6  # of one encoder and two decoder layers
    assert (offsets > 0).all()
    gradient = torch.cat((offsets / 0.05, others / 0.5))
    assert gradient.norm().item() == pytest.approx(1e-2, rel=1e-3)


def test_wrong_class_is_refused(checkpoint):
    class OtherTask(BaseTask):
        pass

    with pytest.raises(CheckpointError, match="which is no OtherTask"):
        OtherTask.load(checkpoint, trust=(__name__,))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        TranslationTask.load(checkpoint.with_name("missing.ckpt"))


def test_arguments_must_be_plain(tmp_path):
    assert plain_value("x", {"a": (1, AttentionSpec()), "b": tmp_path})["b"] == str(tmp_path)
    with pytest.raises(
        ValueError, match="'flavour' of a task is a Linear, which cannot be stored safely in a checkpoint"
    ):
        Subclass(flavour=torch.nn.Linear(1, 1))


def test_sizes_are_checked_before_the_data_is_read():
    with pytest.raises(ValueError, match="cannot be divided among num_heads=8"):
        TranslationTask(dim=20)
    with pytest.raises(ValueError, match="label_smoothing must be"):
        TranslationTask(label_smoothing=1.0)


def test_no_network_before_there_is_a_vocabulary():
    with pytest.raises(RuntimeError, match="not built yet: start a Trainer"):
        TranslationTask(optimizer=OptimizerSpec(), **TINY).predict(["x"])


def test_attention_maps_are_those_of_the_decoder(checkpoint):
    """The maps that are drawn reproduce the decoder's own outputs when they are applied by hand."""
    task = TranslationTask.load(checkpoint, trust=(__name__,))
    source = torch.tensor([[5, 6, 7, 3]])
    target = torch.tensor([[2, 8, 9]])
    maps = cross_attention_maps(task.network, source, target)
    assert maps.shape == (2, 2, 3, 4)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 2, 3))
    inputs, outputs = [], []
    attention = task.network.decoder[1].cross_attention

    def record(module, arguments, output):
        inputs.append(arguments)
        outputs.append(output)

    attention.register_forward_hook(record)
    task.network(source, target)
    (_, memory), output = inputs[0], outputs[0]
    values = attention.value_proj(memory).view(1, 4, 2, 8).transpose(1, 2)
    by_hand = attention.out_proj((maps[1][None] @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, by_hand, atol=1e-5, rtol=1e-4)
