"""Translation on text that it was not trained on, in other forms, and predictions as they come."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datamodules import WMT14DataModule
from datamodules.miniature.translation import write_miniature_corpus
from datamodules.translation.vocabulary import Vocabulary
from lightning_attn.networks.translation.beam_search import BeamSearchOptions, beam_search
from lightning_attn.networks.translation.transformer import Transformer
from lightning_attn.tasks import TranslationTask

RUN = Path("checkpoints/translation/tiny")
QUIET = ["--model.num_examples", 0]


@pytest.fixture
def trained(run, tiny_config) -> Path:
    run("fit", "-c", tiny_config)
    return RUN / "last.ckpt"


@pytest.fixture
def other(tmp_path, corpus) -> Path:
    """Another corpus: other training text, the same test text."""
    root = tmp_path / "other"
    write_miniature_corpus(root, {"train": 600, "valid": 30, "test": 31})
    lines = (root / "train.en").read_text().splitlines()[300:]
    (root / "train.en").write_text("\n".join(f"{line} indeed" for line in lines) + "\n")
    (root / "train.de").write_text("\n".join((root / "train.de").read_text().splitlines()[300:]) + "\n")
    for language in ("en", "de"):
        shutil.copy(corpus / f"test.{language}", root)
    return root


def scores(folder=RUN):
    newest = max(folder.glob("test_metrics*.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())


def test_evaluation_needs_nothing_of_training(run, trained, corpus, other):
    run("test", "--ckpt_path", trained, *QUIET)
    expected = scores()
    (other / "valid.en").write_text("a\n\n")  # of no interest to a test
    run("test", "--ckpt_path", trained, "--data.root", other, *QUIET)
    assert scores() == expected
    assert not list(other.rglob("vocabulary.model")), "the training text is not looked at"
    alone = other.parent / "alone"
    alone.mkdir()
    shutil.copy(corpus / "test.en", alone / "news.en")
    run("predict", "--ckpt_path", trained, "--data.root", alone, "--data.test_files", "news")
    predicted = (RUN / "predictions/hypotheses.txt").read_text()
    assert predicted == (RUN / "predictions/test_hypotheses.txt").read_text()


def test_test_and_predict_see_the_same_batches(run, trained, corpus):
    module = WMT14DataModule(str(corpus), max_tokens=150, vocabulary_size=300)
    module.prepare_data()
    module.setup("test")
    module.setup("predict")
    batches = [
        [batch.ids.tolist() for batch in loader] for loader in (module.test_dataloader(), module.predict_dataloader())
    ]
    assert batches[0] == batches[1]
    assert len(batches[0]) > 3


def test_initial_weights_of_another_corpus(run, trained, tiny_config, other):
    arguments = ["fit", "-c", tiny_config, "--data.root", other, "--run.name", "second", "--trainer.max_steps", 1]
    arguments += ["--run.initial_weights", trained]
    refused = run(*arguments, status=2)
    assert "300 pieces, the data 300" in refused
    assert f"--data.vocabulary {trained}" in refused
    run(*arguments, "--data.vocabulary", trained, "--model.optimizer.learning_rate", 1e-30)
    second = TranslationTask.load(RUN.with_name("second") / "last.ckpt")
    first = TranslationTask.load(trained)
    assert second.vocabulary == first.vocabulary
    for name, value in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value)
    printed = run(
        *arguments,
        "--run.initial_weights_strict",
        "false",
        "--run.name",
        "third",
        "--model.optimizer.learning_rate",
        1e-30,
    )
    third = TranslationTask.load(RUN.with_name("third") / "last.ckpt")
    old, new = first.output_names(), third.output_names()
    common = [piece for piece in new if piece in old]
    assert 0 < len(common) < len(new)
    assert f"{len(common)} of {len(new)} pieces are matched by name" in printed
    rows, moved = (task.built_network.source_embedding.weight for task in (first, third))
    for piece in common[4:]:
        torch.testing.assert_close(moved[new.index(piece)], rows[old.index(piece)])


def test_vocabularies_of_models_and_checkpoints(trained, tmp_path, corpus):
    stored = Vocabulary.from_file(trained)
    (tmp_path / "own.model").write_bytes(stored.model)
    module = WMT14DataModule(str(corpus), vocabulary=str(tmp_path / "own.model"), max_tokens=400)
    module.prepare_data()
    module.setup("fit")
    assert module.vocabulary == stored
    with pytest.raises(ValueError, match=r"train.en holds none"):
        Vocabulary.from_file(corpus / "train.en")


@pytest.mark.parametrize("form", ["gz", "tsv", "tsv.gz"])
def test_compressed_text_and_tables_are_the_same_corpus(corpus, tmp_path, form):
    modules = []
    for root in (corpus, tmp_path / "packed"):
        if root != corpus:
            root.mkdir()
            for split in ("train", "valid", "test"):
                sides = [(corpus / f"{split}.{language}").read_text().splitlines() for language in ("en", "de")]
                if form == "gz":
                    for language, lines in zip(("en", "de"), sides, strict=True):
                        (root / f"{split}.{language}.gz").write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))
                else:
                    text = "".join(f"{one}\t{two}\n" for one, two in zip(*sides, strict=True)).encode()
                    (root / f"{split}.{form}").write_bytes(gzip.compress(text) if form.endswith("gz") else text)
        module = WMT14DataModule(str(root), vocabulary_size=300, max_tokens=400, cache_dir=str(tmp_path / root.name))
        module.prepare_data()
        for stage in ("fit", "test", "predict"):
            module.setup(stage)
        modules.append(module)
    plain, packed = modules
    assert plain.vocabulary == packed.vocabulary
    for split in ("train", "valid", "test", "predict"):
        ours, theirs = plain.dataset(split), packed.dataset(split)
        assert len(ours) == len(theirs)
        assert all((ours.source[index] == theirs.source[index]).all() for index in range(len(ours)))
        assert ours.source_text == theirs.source_text


def test_tables_and_archives_that_are_damaged(corpus, tmp_path):
    (tmp_path / "test.tsv").write_text("one\teins\ntwo\n")
    module = WMT14DataModule(str(tmp_path))
    module.given_vocabulary = Vocabulary.from_file  # any: the text is read first
    with pytest.raises(ValueError, match=r"test.tsv, line 2: there is no tab between"):
        module._read("test")
    whole = gzip.compress(b"a sentence\n" * 1000)
    (tmp_path / "test.tsv").unlink()
    (tmp_path / "test.en.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"test.en.gz is not a complete gzip file"):
        module._read("predict")


def test_a_prediction_that_was_broken_off_goes_on(run, trained, monkeypatch):
    run("predict", "--ckpt_path", trained, "--data.eval_max_tokens", 100)
    expected = (RUN / "predictions/hypotheses.txt").read_text()
    step, calls = TranslationTask.predict_step, []

    def broken_off(task, batch, batch_idx):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch))
        step(task, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TranslationTask, "predict_step", broken_off)
        printed = run("predict", "--ckpt_path", trained, "--data.eval_max_tokens", 100, status=130)
    assert f"{sum(calls)} sentences are translated, in " in printed
    assert "repeat the command with --data.skip_done true" in printed
    assert "To resume it, set --data.skip_done true" in run("predict", "--ckpt_path", trained)
    (RUN / "predictions/hypotheses-2.txt").unlink()
    (part,) = (RUN / "predictions/hypotheses_so_far").glob("rank-*.jsonl")
    assert len(part.read_text().splitlines()) == sum(calls)
    with part.open("a") as file:
        file.write('{"id": 30, "sou')  # as a kill may leave it
    done = []
    start_decoding = Transformer.start_decoding

    def counted(network, source):
        done.append(len(source))
        return start_decoding(network, source)

    monkeypatch.setattr(Transformer, "start_decoding", counted)
    printed = run("predict", "--ckpt_path", trained, "--data.eval_max_tokens", 100, "--data.skip_done", "true")
    assert f"{sum(calls)} sentences were translated before" in printed
    assert sum(done) == 31 - sum(calls)
    assert (RUN / "predictions/hypotheses-2.txt").read_text() == expected
    assert not (RUN / "predictions/hypotheses_so_far").exists()


def test_what_is_left_of_another_prediction_is_not_taken(run, trained, monkeypatch, tmp_path):
    """Other text, shorter or longer, or other options: it is refused, and what is left stays."""
    (tmp_path / "long.en").write_text("".join(f"The man reads book {number}.\n" for number in range(40)))
    (tmp_path / "short.en").write_text("".join(f"The man reads book {number}.\n" for number in range(3)))

    def broken_off(task, batch, batch_idx):
        if batch_idx:
            raise KeyboardInterrupt
        step(task, batch, batch_idx)

    step = TranslationTask.predict_step
    predict = ["predict", "--ckpt_path", trained, "--data.eval_max_tokens", 100, "--data.predict_file"]
    with monkeypatch.context() as patch:
        patch.setattr(TranslationTask, "predict_step", broken_off)
        run(*predict, "long.en", status=130)
    skip = ["--data.skip_done", "true"]
    assert "interrupted prediction of another text" in run(*predict, "short.en", *skip, status=2)
    printed = run(*predict, "long.en", *skip, "--model.decoding.beam_size", 1, status=2)
    assert "interrupted prediction of another decoding" in printed
    assert "were translated before" in run(*predict, "long.en", *skip)
    assert len((RUN / "predictions/hypotheses.txt").read_text().splitlines()) == 40


def test_all_of_the_n_best_have_scores(run, trained):
    run("predict", "--ckpt_path", trained, "--model.decoding.nbest", 2)
    lines = [json.loads(line) for line in (RUN / "predictions/hypotheses.jsonl").read_text().splitlines()]
    texts = (RUN / "predictions/hypotheses.txt").read_text().splitlines()
    assert [line["hypotheses"][0]["text"] for line in lines] == texts
    for line in lines:
        first, second = (one["score"] for one in line["hypotheses"])
        assert first >= second


def test_long_lines_are_cropped_or_skipped(run, trained, tmp_path):
    text = tmp_path / "long.en"
    text.write_text("a dog\n" + "dog " * 300 + "\na cat\n")
    arguments = ["predict", "--ckpt_path", trained, "--data.predict_file", text, "--data.eval_max_tokens", 50]
    printed = run(*arguments)
    assert "line 2 has 301 tokens, more than 50: only its beginning is translated" in printed.replace("\n", " ") or (
        "more than 50: only its beginning is translated" in printed
    )
    assert len((RUN / "predictions/hypotheses.txt").read_text().splitlines()) == 3
    printed = run(*arguments, "--data.on_long_line", "skip")
    assert "it has no translation" in printed
    assert (RUN / "predictions/hypotheses-2.txt").read_text().split("\n")[1] == ""
    assert "raise --data.eval_max_tokens" in run(*arguments, "--data.on_long_line", "stop", status=2)


@pytest.mark.parametrize("blank", ["", " ", "\t", "\u00a0", "\u3000", "\u2028"])
def test_every_kind_of_blank_line_has_no_translation(trained, blank):
    task = TranslationTask.load(trained)
    assert task.predict(["a dog", blank])[1] == ""


def test_translations_begin_with_what_is_given(run, trained, tmp_path):
    task = TranslationTask.load(trained)
    prefix = "Die Frau"
    (found,) = task.predict(["The woman sees a dog."], prefixes=[prefix])
    assert found.startswith(prefix)
    text, begun = tmp_path / "in.en", tmp_path / "in.de"
    text.write_text("The woman sees a dog.\nA man.\n")
    begun.write_text(f"{prefix}\n\n")
    options = ["--data.predict_file", text, "--data.predict_prefixes", begun]
    run("predict", "--ckpt_path", trained, *options)
    assert (RUN / "predictions/hypotheses.txt").read_text().startswith(prefix)
    begun.write_text("x\n")
    assert "has 1 lines, but the text 2" in run("predict", "--ckpt_path", trained, *options, status=2)


def test_no_sequence_comes_twice(trained):
    task = TranslationTask.load(trained, decoding=BeamSearchOptions(beam_size=3, no_repeat_ngram=2, min_length=25))
    sources = ["The woman sees a dog.", "A man buys a chair at the market."]
    task.predict(sources)
    network, vocabulary = task.built_network, task.vocabulary
    batch = torch.tensor([[*vocabulary.encode(sources[0]), vocabulary.eos_id]])
    ids = {name: getattr(vocabulary, name) for name in ("bos_id", "eos_id", "pad_id")}
    max_lengths = task.decoding.max_lengths(torch.tensor([batch.shape[1]]))
    (best,) = beam_search(network.start_decoding(batch), 1, task.decoding, **ids, max_lengths=max_lengths)
    assert best
    for one in best:
        pairs = list(zip(one.tokens, one.tokens[1:], strict=False))
        assert len(one.tokens) >= 25
        assert len(set(pairs)) == len(pairs)
    assert network is task.network


def test_prefixes_may_repeat_and_a_dead_end_is_no_error(trained):
    task = TranslationTask.load(trained, decoding=BeamSearchOptions(beam_size=2, no_repeat_ngram=2))
    (found, _) = task.predict(["A man.", "A dog."], prefixes=["Ein Mann Ein Mann Ein Mann", ""])
    assert found.startswith("Ein Mann Ein Mann Ein Mann")
    size = task.vocabulary.size
    options = BeamSearchOptions(beam_size=2, no_repeat_ngram=1, min_length=size + 5)
    (found,) = TranslationTask.load(trained, decoding=options).predict(["A man."])
    assert found


def test_a_prediction_in_a_directory_of_its_own_goes_on_too(run, trained, monkeypatch, tmp_path):
    shutil.copy(trained, tmp_path / "copy.ckpt")
    step, calls = TranslationTask.predict_step, []

    def broken_off(task, batch, batch_idx):
        if calls:
            raise KeyboardInterrupt
        calls.append(len(batch))
        step(task, batch, batch_idx)

    arguments = ["predict", "--ckpt_path", tmp_path / "copy.ckpt", "--run.name", "own", "--data.eval_max_tokens", 100]
    with monkeypatch.context() as patch:
        patch.setattr(TranslationTask, "predict_step", broken_off)
        run(*arguments, status=130)
    printed = run(*arguments, "--data.skip_done", "true")
    assert f"{calls[0]} sentences were translated before" in printed
    assert len((RUN.with_name("own") / "predictions/hypotheses.txt").read_text().splitlines()) == 31
    assert "contains no interrupted prediction" in run(*arguments, "--data.skip_done", "true")


def test_text_without_blanks_between_words_is_not_cleaned_away(tmp_path):
    for split, count in (("train", 60), ("valid", 3), ("test", 3)):
        english = [f"the weather of day number {n} is good for a walk" for n in range(count)]
        japanese = [f"{n}日目の天気は散歩に良い" for n in range(count)]
        (tmp_path / f"{split}.en").write_text("\n".join(english) + "\n")
        (tmp_path / f"{split}.ja").write_text("\n".join(japanese) + "\n")
    module = WMT14DataModule(str(tmp_path), target_language="ja", vocabulary_size=90)
    module.prepare_data()
    module.setup("fit")
    assert module.left_out == {}
    assert len(module.dataset("train")) == 60


def test_cleaning_that_leaves_nothing_says_why(tmp_path):
    (tmp_path / "train.en").write_text("one two three four\n" * 5)
    (tmp_path / "train.de").write_text("eins\n" * 5)
    with pytest.raises(
        ValueError, match=r"none of the 5 training pairs is left \(max_ratio 5\).*--data.cleaning.max_ratio"
    ):
        WMT14DataModule(str(tmp_path)).prepare_data()


def test_a_plain_script_prepares_with_many_processes(tmp_path):
    """Without `if __name__ == "__main__"`: its work must not begin again in each of the processes."""
    write_miniature_corpus(tmp_path / "corpus", {"train": 3000, "valid": 3, "test": 3})
    script = tmp_path / "prepare.py"
    script.write_text(
        "print('begun', flush=True)\n"
        "from datamodules import WMT14DataModule\n"
        "from datamodules.translation import token_cache\n"
        "token_cache.MIN_LINES_FOR_POOL = token_cache.BLOCK_LINES = 1000\n"
        f"module = WMT14DataModule({str(tmp_path / 'corpus')!r}, vocabulary_size=300, preparation_processes=2)\n"
        "module.prepare_data()\n"
        "module.setup('fit')\n"
        "print(len(module.dataset('train')))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["begun", "3000"]


def test_what_killed_preparations_left_is_removed(tmp_path):
    from datamodules.translation import token_cache

    write_miniature_corpus(tmp_path, {"train": 300, "valid": 3, "test": 3})
    cache = tmp_path / "cache"
    (cache / ".abandoned-1").mkdir(parents=True)
    host = token_cache._this_process().split(" ")[0]
    (cache / ".abandoned-1" / "owner").write_text(f"{host} 1 123456789")
    (cache / ".working-2").mkdir()
    (cache / ".working-2" / "owner").write_text(token_cache._this_process())
    WMT14DataModule(str(tmp_path), vocabulary_size=300).prepare_data()
    assert not (cache / ".abandoned-1").exists()
    assert (cache / ".working-2").exists(), "its process is alive"


def test_averages_of_other_vocabularies_are_refused(run, trained, tiny_config, other):
    run("fit", "-c", tiny_config, "--data.root", other, "--run.name", "second")
    printed = run("average", trained, RUN.with_name("second") / "last.ckpt", status=2)
    assert "mean different things by their outputs" in printed
    assert "vocabulary: " in printed
