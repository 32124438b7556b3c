import json
import logging
import pickle
import types

import pytest
import pytorch_lightning as pl
import torch
from parallel_corpus import write_corpus, write_lines
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import datamodules
from datamodules import Cleaning, MiniatureTranslationDataModule, TranslationBatch, WMT14DataModule
from datamodules.translation.batches import TranslationDataset
from datamodules.translation.parallel_text import read_lines


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def root(tmp_path):
    return write_corpus(tmp_path / "corpus")


def module_of(root, **changes):
    return WMT14DataModule(str(root), **{"vocabulary_size": 60, "max_tokens": 400, **changes})


def ready(root, *stages, **changes):
    module = module_of(root, **changes)
    module.prepare_data()
    for stage in stages:
        module.setup(stage)
    return module


def lines_of(path):
    return list(read_lines(path))


# Batches


def test_training_batches_hold_the_corpus(shared_root):
    module = ready(shared_root, "fit")
    vocabulary = module.vocabulary
    english, german = lines_of(shared_root / "train.en"), lines_of(shared_root / "train.de")
    seen = []
    for batch in module.train_dataloader():
        assert isinstance(batch, TranslationBatch)
        assert batch.ids.dtype == batch.source.dtype == batch.target.dtype == torch.long
        assert batch.source_text == batch.target_text == []
        assert (batch.target[:, 0] == vocabulary.bos_id).all()
        for row, index in enumerate(batch.ids.tolist()):
            for ids, text in ((batch.source[row], english[index]), (batch.target[row, 1:], german[index])):
                expected = [*vocabulary.encode(text), vocabulary.eos_id]
                assert ids[: len(expected)].tolist() == expected
                assert (ids[len(expected) :] == vocabulary.pad_id).all()
        assert batch.source.numel() <= 400
        assert batch.target[:, 1:].numel() <= 400
        assert (batch.source[:, -1] != vocabulary.pad_id).any(), "no column is all padding"
        seen += batch.ids.tolist()
    assert sorted(seen) == list(range(200))


@pytest.mark.parametrize(("stage", "split"), [("validate", "valid"), ("test", "test")])
def test_evaluation_batches_carry_their_lines(shared_root, stage, split):
    module = ready(shared_root, stage, eval_max_tokens=120)
    loader = module.val_dataloader() if stage == "validate" else module.test_dataloader()
    pairs = {}
    longest = []
    for batch in loader:
        assert len(batch) == len(batch.ids) == len(batch.source_text) == len(batch.target_text)
        assert max(batch.source.numel(), batch.target[:, 1:].numel()) <= 120
        longest.append(batch.source.shape[1])
        pairs |= dict(zip(batch.ids.tolist(), zip(batch.source_text, batch.target_text, strict=True), strict=True))
        assert [module.vocabulary.decode(row) for row in batch.target.tolist()] == batch.target_text
    expected = zip(lines_of(shared_root / f"{split}.en"), lines_of(shared_root / f"{split}.de"), strict=True)
    assert [pairs[index] for index in sorted(pairs)] == list(expected)
    assert longest == sorted(longest, reverse=True)


def test_prediction_needs_no_references(shared_root):
    module = ready(shared_root, "predict")
    texts = {}
    for batch in module.predict_dataloader():
        assert batch.target.shape == (len(batch), 0)
        assert batch.target_text == []
        texts |= dict(zip(batch.ids.tolist(), batch.source_text, strict=True))
    assert [texts[index] for index in range(len(texts))] == lines_of(shared_root / "test.en")


def test_prediction_of_a_file_keeps_its_lines(shared_root, tmp_path):
    path = write_lines(tmp_path / "mine.txt", ["alpha beta", "", "gamma\u2028delta"])
    module = ready(shared_root, "predict", predict_file=str(path))
    (batch,) = module.predict_dataloader()
    assert sorted(zip(batch.ids.tolist(), batch.source_text, strict=True)) == list(enumerate(lines_of(path)))


def test_the_other_direction(shared_root):
    forwards = ready(shared_root, "test")
    backwards = ready(shared_root, "test", source_language="de", target_language="en")
    assert backwards.vocabulary.size == 60
    assert sum(len(batch) for batch in backwards.test_dataloader()) == 15
    there = {text for batch in forwards.test_dataloader() for text in batch.target_text}
    assert there == {text for batch in backwards.test_dataloader() for text in batch.source_text}


def test_several_training_parts(root):
    write_lines(root / "train-extra.en", ["alpha beta", "gamma delta"])
    write_lines(root / "train-extra.de", ["BETA ALPHA", "DELTA GAMMA"])
    assert len(ready(root, "fit", train_files="train*").train_dataloader().dataset) == 202
    assert len(ready(root, "fit").train_dataloader().dataset) == 200


def test_batch_moves_and_converts(shared_root):
    batch = next(iter(ready(shared_root, "test").test_dataloader()))
    moved = batch.to("meta")
    assert moved.source.device.type == moved.target.device.type == "meta"
    assert torch.equal(moved.ids, batch.ids), "read on the CPU, which would wait for a GPU"
    assert moved.source_text is batch.source_text
    assert TranslationDataset.from_text(module_vocabulary(shared_root), ["alpha"])[0].source_text == ["alpha"]


def module_vocabulary(root):
    return ready(root, "test").vocabulary


def test_data_set_pickles_small_for_spawned_workers(shared_root):
    module = ready(shared_root, "fit", num_workers=1)
    dataset = module.train_dataloader().dataset
    assert len(pickle.dumps(dataset)) < 2000
    spawned = DataLoader(dataset, batch_sampler=[[3, 1]], collate_fn=list, num_workers=0)
    assert spawned.dataset[3].ids.tolist() == [3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(shared_root, num_workers):
    module = ready(shared_root, "fit", num_workers=num_workers)
    ids = [batch.ids.tolist() for batch in module.train_dataloader()]
    assert ids == [batch.ids.tolist() for batch in ready(shared_root, "fit").train_dataloader()]


# Preparing


def test_cleaning_counts_are_logged(root, caplog):
    with (root / "train.en").open("a") as english, (root / "train.de").open("a") as german:
        english.write("\nsame\n" + "k" * 100_000 + "\n")
        german.write("leer\nsame\nlang\n")
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        module = ready(root, "fit")
    for part in ("200 of 203 pairs are used", "drop_empty 1", "drop_identical 1", "max_characters 1"):
        assert part in caplog.text
    assert sum(len(batch) for batch in module.train_dataloader()) == 200


def test_cache_is_in_root_or_where_asked(root, tmp_path):
    ready(root)
    assert [path.name for path in (root / "cache").iterdir() if path.name != "files"]
    ready(root, cache_dir=str(tmp_path / "other"), vocabulary_size=61)
    assert [path.name for path in (tmp_path / "other").iterdir() if path.name != "files"]


def test_a_read_only_root_uses_the_users_cache_but_an_entry_that_is_there(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    ready(root)
    for folder in (root / "cache", root):
        folder.chmod(0o555)
    try:
        ready(root, "fit")
        assert not list((tmp_path / "xdg").rglob("vocabulary.model"))
        assert ready(root, "fit", vocabulary_size=61).vocabulary.size == 61
        assert len(list((tmp_path / "xdg").rglob("vocabulary.model"))) == 1
    finally:
        for folder in (root, root / "cache"):
            folder.chmod(0o755)


def test_setup_only_reads(root):
    module = module_of(root)
    with pytest.raises(FileNotFoundError, match=r"no token cache .* Call prepare_data\(\) first"):
        module.setup("fit")
    module.prepare_data()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    other_rank = module_of(root)
    other_rank.setup("fit")
    assert len(other_rank.train_dataloader()) > 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_changed_setting_never_reuses_the_cache(root):
    assert ready(root, "fit").vocabulary.size == 60
    assert ready(root, "fit", vocabulary_size=70).vocabulary.size == 70
    with (root / "train.en").open("a") as english, (root / "train.de").open("a") as german:
        english.write("alpha beta\n")
        german.write("BETA ALPHA\n")
    assert len(ready(root, "fit").train_dataloader().dataset) == 201
    short = ready(root, "fit", cleaning=Cleaning(max_length=5)).train_dataloader().dataset
    assert 0 < len(short) < 200


def test_miniature_corpus_is_made_on_the_spot(tmp_path, monkeypatch):
    def write_miniature_corpus(root):
        write_corpus(root, train=50)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("datamodules.miniature.translation_datamodule.write_miniature_corpus", write_miniature_corpus)
    module = MiniatureTranslationDataModule(vocabulary_size=60)
    module.prepare_data()
    module.setup("fit")
    assert module.root == tmp_path / "lightning_attn" / "miniature_translation"
    assert len(module.train_dataloader().dataset) == 50


def test_download_runs_before_anything_is_read(tmp_path, monkeypatch):
    sources = pytest.importorskip("datamodules.downloads.wmt14")
    monkeypatch.setattr(sources, "download_wmt14", lambda root: write_corpus(root))
    assert len(ready(tmp_path / "new", "fit", download=True).train_dataloader().dataset) == 200


# Bad input


def test_vocabulary_before_setup(root):
    with pytest.raises(RuntimeError, match=r"after prepare_data\(\) and setup\(\)"):
        _ = module_of(root).vocabulary


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens: 0 is too small; give 1 or more \(--data.max_tokens 1\)"),
        ({"num_workers": -1}, "num_workers: -1 is too small"),
        ({"vocabulary_size": 4}, "vocabulary_size: 4 is too small"),
        ({"eval_max_tokens": -1}, "eval_max_tokens: -1 is too small"),
        ({"seed": -1}, "seed: -1 is too small"),
        ({"preparation_processes": -2}, "preparation_processes: -2 is too small"),
        ({"source_language": "de"}, "target_language: 'de' is the source language too"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        module_of("anywhere", **changes)


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root: the folder .*nowhere does not exist.*--data\.download true"):
        module_of(tmp_path / "nowhere").prepare_data()


def test_a_missing_split_matters_only_to_its_stage(root):
    for language in ("en", "de"):
        (root / f"test.{language}").unlink()
    module = ready(root, "fit")
    with pytest.raises(FileNotFoundError, match=r"test\.en and test\.de are missing"):
        module.setup("test")
    with pytest.raises(FileNotFoundError, match=r"test\.en does not exist.*--data\.test_files"):
        module.setup("predict")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.de", b"eins\n", r"test\.en has 15 lines, but .*test\.de has 1\b"),
        ("valid.en", b"", r"valid\.en: the file is empty"),
        ("valid.de", b"\n" * 20, r"valid\.de, line 1: the line is empty"),
        ("valid.de", b"gro\xdf\n" * 20, r"valid\.de, line 1: not UTF-8"),
        ("train.de", b"gro\xdf\n" * 200, r"train\.de, line 1: not UTF-8"),
        ("train.en", b"", r"train\.en: the file is empty"),
        ("train.en", b"a\n" * 7, r"train\.en has 7 lines, but .*train\.de has 200"),
    ],
)
def test_bad_files_are_named_and_nothing_is_cached(root, name, content, message):
    (root / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        module_of(root).prepare_data()
    assert not list(root.rglob("vocabulary.model"))


def test_an_evaluation_line_too_long_for_a_batch(root):
    write_lines(root / "valid.en", ["alpha beta", "x" * 100_000])
    write_lines(root / "valid.de", ["BETA", "x"])
    module = ready(root, "fit")
    with pytest.raises(ValueError, match=r"valid, line 2 has 10\d,\d+ tokens .*\(400\): raise --data\.eval_max_tokens"):
        module.val_dataloader()
    module = ready(root, "fit", eval_max_tokens=200_000)
    assert sum(len(batch) for batch in module.val_dataloader()) == 2


def test_a_training_pair_too_long_for_a_batch(root):
    module = ready(root, "fit", max_tokens=20)
    with pytest.raises(
        ValueError, match=r"training pair \d+ has \d+ tokens .*\(20\): raise --data\.max_tokens or lower"
    ):
        module.train_dataloader()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"predict_file: .*mine\.txt does not exist.*--data\.predict_file"),
        (b"", ValueError, r"predict_file: .*mine\.txt is empty"),
        (b"ok\n\xff\n", ValueError, r"mine\.txt, line 2: not UTF-8"),
    ],
)
def test_bad_prediction_files(shared_root, tmp_path, content, error, message):
    path = tmp_path / "mine.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        ready(shared_root, "predict", predict_file=str(path))


def test_several_processes_cannot_share_what_is_typed(shared_root):
    module = WMT14DataModule(str(shared_root), vocabulary_size=60, predict_file="-")
    state = types.SimpleNamespace(fn=types.SimpleNamespace(value="predict"))
    module.trainer = types.SimpleNamespace(world_size=2, state=state, is_global_zero=True)
    with pytest.raises(ValueError, match=r"which 2 processes cannot share; use one \(--trainer\.devices 1\)"):
        module.prepare_data()


# With the Trainer


class Recorder(pl.LightningModule):
    """Notes which sentences it is trained and evaluated on."""

    def __init__(self, fail_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_after = fail_after
        self.trained, self.validated, self.predicted = [], [], []

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.fail_after:
            raise RuntimeError("the power is gone")
        self.trained.append((self.current_epoch, batch.ids.tolist()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.ids.tolist())

    def predict_step(self, batch, batch_idx):
        self.predicted.append(batch.ids.tolist())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class WithoutValidation(Recorder):
    validation_step = pl.LightningModule.validation_step


def trainer_of(**options):
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "enable_checkpointing": "callbacks" in options,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**settings, **options})


def fit(root, model, checkpoint=None, num_workers=0, max_tokens=400, **options):
    trainer = trainer_of(**options)
    module = module_of(root, num_workers=num_workers, max_tokens=max_tokens)
    trainer.fit(model, datamodule=module, ckpt_path=checkpoint, weights_only=True)
    return model.trained, trainer


def bound_with_an_odd_number_of_batches(root, stage):
    """A `max_tokens` for which neither two ranks nor accumulation over two batches come out even."""
    for bound in range(100, 500):
        module = ready(root, stage, max_tokens=bound)
        if len(module.train_dataloader() if stage == "fit" else module.val_dataloader()) % 2:
            return bound
    raise AssertionError


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", [Recorder, WithoutValidation])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_sees_each_batch_exactly_once(shared_root, tmp_path, model, num_workers, accumulate):
    options = {"num_workers": num_workers, "accumulate_grad_batches": accumulate}
    options["max_tokens"] = bound_with_an_odd_number_of_batches(shared_root, "fit")
    checkpoints = [
        ModelCheckpoint(tmp_path, filename="in {step}", every_n_train_steps=19, save_top_k=-1),
        ModelCheckpoint(tmp_path, filename="end {epoch}", save_on_train_epoch_end=True, save_top_k=-1),
    ]
    whole, trainer = fit(shared_root, model(), callbacks=checkpoints, **options)
    batches, steps = trainer.num_training_batches, trainer.global_step
    assert len(whole) == 3 * batches
    for epoch in range(3):
        seen = [index for number, ids in whole if number == epoch for index in ids]
        assert sorted(seen) == list(range(200))
    assert whole[0][1] != whole[batches][1]

    steps_an_epoch = -(-batches // accumulate)
    done = {f"end epoch={epoch}": (epoch + 1) * batches for epoch in range(3)}
    for step in range(19, steps + 1, 19):
        done[f"in step={step}"] = step // steps_an_epoch * batches + step % steps_an_epoch * accumulate
    assert sorted(done) == sorted(path.stem for path in tmp_path.glob("*.ckpt"))
    for name, count in done.items():
        rest, trainer = fit(shared_root, model(), tmp_path / f"{name}.ckpt", **options)
        assert rest == whole[count:], f"{name}: {len(rest)} batches after {count} of {len(whole)}"
        assert trainer.global_step == steps
        assert trainer.current_epoch == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_after_a_failed_step_repeats_that_batch(shared_root, tmp_path, num_workers):
    whole, _ = fit(shared_root, Recorder())
    broken = Recorder(fail_after=5)
    keep = ModelCheckpoint(tmp_path, filename="broken", save_on_exception=True)
    with pytest.raises(RuntimeError, match="the power is gone"):
        fit(shared_root, broken, num_workers=num_workers, callbacks=[keep])
    rest, _ = fit(shared_root, Recorder(), tmp_path / "broken.ckpt", num_workers=num_workers)
    assert broken.trained + rest == whole


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_a_run_that_reached_max_steps(shared_root, tmp_path, num_workers):
    whole, trainer = fit(shared_root, Recorder())
    batches = trainer.num_training_batches
    options = {"max_epochs": -1, "num_workers": num_workers}
    first, _ = fit(
        shared_root, Recorder(), max_steps=5, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], **options
    )
    rest, _ = fit(shared_root, Recorder(), tmp_path / "last.ckpt", max_steps=batches, **options)
    assert [ids for _, ids in first + rest] == [ids for _, ids in whole[:batches]]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resuming_with_validation_inside_the_epoch(shared_root, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    whole, _ = fit(shared_root, Recorder(), val_check_interval=4, callbacks=[checkpoint])
    names = sorted(path.stem for path in tmp_path.glob("*.ckpt"))
    assert len(names) > 4
    for name in names:
        rest, _ = fit(shared_root, Recorder(), tmp_path / f"{name}.ckpt", val_check_interval=4)
        assert rest == whole[int(name.removeprefix("step=")) :]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resuming_a_limited_epoch_ends_it_at_the_limit(shared_root, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _ = fit(shared_root, Recorder(), limit_train_batches=4, callbacks=[checkpoint])
    for count in range(1, 12):
        rest, _ = fit(shared_root, Recorder(), tmp_path / f"step={count}.ckpt", limit_train_batches=4)
        assert rest == whole[count:]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resuming_with_other_batches_is_refused_in_the_middle_of_an_epoch(shared_root, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(shared_root, Recorder(), max_epochs=1, callbacks=[checkpoint])
    with pytest.raises(ValueError, match="stopped after batch 3 of epoch 0, but since then max_tokens 400 became 300"):
        trainer_of().fit(
            Recorder(), datamodule=module_of(shared_root, max_tokens=300), ckpt_path=tmp_path / "step=3.ckpt"
        )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_overfitting_repeats_the_same_batches(shared_root):
    whole, _ = fit(shared_root, Recorder(), overfit_batches=2)
    assert [ids for _, ids in whole] == [ids for _, ids in whole[:2]] * 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_other_precisions_take_the_batches(shared_root, precision):
    whole, trainer = fit(shared_root, Recorder(), precision=precision, max_epochs=1)
    assert len(whole) == trainer.num_training_batches


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_trainer_has_nothing_to_warn_about(shared_root, recwarn):
    model = Recorder()
    trainer = trainer_of(max_epochs=1)
    module = module_of(shared_root)
    trainer.fit(model, datamodule=module)
    trainer.predict(model, datamodule=module)
    assert sorted(index for ids in model.validated for index in ids) == list(range(20))
    assert sorted(index for ids in model.predicted for index in ids) == list(range(15))
    mentioned = [str(warning.message) for warning in recwarn if "dataloader" in str(warning.message).lower()]
    assert [text for text in mentioned if "many workers" not in text] == []


def test_a_stages_files_are_checked_before_the_long_work(root):
    (root / "valid.en").unlink()
    (root / "valid.de").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.en and valid\.de are missing"):
        fit(root, Recorder())
    assert not list(root.rglob("vocabulary.model"))


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from test_wmt14 import Recorder, fit, module_of, trainer_of

torch.set_num_threads(1)
root, folder, bound = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
two = {"devices": 2, "strategy": "ddp"}
result = {}
for workers, accumulate in ((0, 1), (0, 2), (2, 1), (2, 2)):
    options = {"num_workers": workers, "accumulate_grad_batches": accumulate, **two}
    place = folder / f"{workers}{accumulate}"
    checkpoint = ModelCheckpoint(place, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole, trainer = fit(root, Recorder(), max_epochs=2, callbacks=[checkpoint], **options)
    rest = fit(root, Recorder(), place / "step=2.ckpt", max_epochs=2, **options)[0]
    result[f"{workers} {accumulate}"] = {"whole": whole, "rest": rest}
model = Recorder()
trainer = trainer_of(**two)
trainer.validate(model, datamodule=module_of(root, eval_max_tokens=bound), verbose=False)
trainer.predict(model, datamodule=module_of(root, eval_max_tokens=10_000))
result |= {"validated": model.validated, "predicted": model.predicted}
try:
    fit(root, Recorder(), use_distributed_sampler=True, **two)
except ValueError as error:
    result["refused"] = str(error)
(folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
"""


@pytest.mark.ddp
def test_two_ranks(run_on_two_ranks, root, tmp_path):
    bound = bound_with_an_odd_number_of_batches(root, "validate")
    run_on_two_ranks(SCRIPT, root, tmp_path, bound)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for combination in ("0 1", "0 2", "2 1", "2 2"):
        done = 2 * int(combination[-1])
        shares = [rank[combination] for rank in ranks]
        assert len(shares[0]["whole"]) == len(shares[1]["whole"])
        for share in shares:
            assert share["rest"] == share["whole"][done:]
        for epoch in range(2):
            seen = [index for share in shares for number, ids in share["whole"] if number == epoch for index in ids]
            assert sorted(seen) == list(range(200)), "an epoch sees every pair once, whatever the number of ranks"
    alone = [batch.ids.tolist() for batch in ready(root, "validate", eval_max_tokens=bound).val_dataloader()]
    assert [rank["validated"] for rank in ranks] == [alone[0::2], alone[1::2]]
    assert len(alone) % 2 == 1, "the ranks are to differ by one batch"
    assert [len(rank["predicted"]) for rank in ranks] == [1, 1], "one batch was halved so that both ranks have one"
    assert sorted(index for rank in ranks for ids in rank["predicted"] for index in ids) == list(range(15))
    for rank in ranks:
        assert "--trainer.use_distributed_sampler false" in rank["refused"]


def test_public_names():
    assert set(datamodules.__all__) >= {"WMT14DataModule", "MiniatureTranslationDataModule", "TranslationBatch"}
    assert all(hasattr(datamodules, name) for name in datamodules.__all__)
