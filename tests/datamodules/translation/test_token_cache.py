import dataclasses
import errno
import json
import multiprocessing
import os
import pickle

import numpy as np
import pytest
from parallel_corpus import write_corpus, write_lines

from datamodules.machine import user_cache_folder
from datamodules.translation import token_cache
from datamodules.translation.parallel_text import Cleaning, FilePair, read_lines
from datamodules.translation.token_cache import (
    Preparation,
    TokenArray,
    TokenCache,
    default_cache_folder,
)


@pytest.fixture
def root(tmp_path):
    return write_corpus(tmp_path / "corpus")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def preparation_of(root, **changes):
    settings = {
        "pairs": (FilePair(root / "train.en", root / "train.de"),),
        "source_language": "en",
        "target_language": "de",
        "vocabulary_size": 60,
        "cleaning": Cleaning(),
    }
    return Preparation(**{**settings, **changes})


def build(root, cache, **changes):
    return TokenCache.open(preparation_of(root, **changes).build(cache, processes=1, show_progress=False))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(cache):
    return sorted(path.name for path in cache.iterdir() if path.name != "files") if cache.is_dir() else []


def test_tokens_are_those_of_the_text(root, cache):
    entry = build(root, cache)
    assert entry.vocabulary.size == 60
    for side, language in ((entry.source, "en"), (entry.target, "de")):
        lines = list(read_lines(root / f"train.{language}"))
        assert [entry.vocabulary.decode(side[index].tolist()) for index in range(len(side))] == lines
        assert side.lengths.tolist() == [len(entry.vocabulary.encode(line)) for line in lines]
        assert side.ids.dtype == np.uint16
    assert entry.manifest["pairs_read"] == entry.manifest["pairs_kept"] == 200
    assert entry.manifest["left_out"] == {}


def test_large_vocabularies_take_four_bytes(root, cache, monkeypatch):
    monkeypatch.setattr(token_cache.Vocabulary, "size", property(lambda self: (1 << 16) + 1))
    assert build(root, cache).source.ids.dtype == np.int32


def test_cleaning_is_counted_by_reason(root, cache):
    english = ["", "x " * 300, "one two", "same words", "a b c d", "good one"]
    german = ["y", "x " * 300, "eins", "same words", "m", "gutes wort"]
    for language, lines in (("en", english), ("de", german)):
        write_lines(root / f"train-noise.{language}", [*lines, "k" * 100_000] if language == "en" else [*lines, "lang"])
    parts = (FilePair(root / "train.en", root / "train.de"), FilePair(root / "train-noise.en", root / "train-noise.de"))
    entry = build(root, cache, pairs=parts, cleaning=Cleaning(max_tokens=40))
    expected = {"drop_empty": 1, "max_length": 1, "drop_identical": 1, "max_ratio": 1, "max_characters": 1}
    tokens = entry.manifest["left_out"].pop("max_tokens")
    assert entry.manifest["left_out"] == expected
    assert tokens > 0, "some sentences of the corpus are longer than 40 pieces"
    assert entry.manifest["pairs_read"] == 207
    assert entry.manifest["pairs_kept"] == len(entry.source) == len(entry.target) == 207 - 5 - tokens
    assert max(entry.source.lengths.max(), entry.target.lengths.max()) <= 40
    assert [file["pairs"] for file in entry.manifest["files"]] == [200, 7]


def test_an_entry_is_built_once(root, cache, monkeypatch):
    first = build(root, cache)
    monkeypatch.setattr(token_cache, "read_blocks", None)  # no line is read again
    assert build(root, cache).folder == first.folder
    assert leftovers(cache) == [first.folder.name]


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary_size": 61},
        {"cleaning": Cleaning(max_length=9)},
        {"cleaning": Cleaning(drop_identical=False)},
        {"source_language": "fr"},
    ],
)
def test_a_changed_setting_changes_the_key(root, cache, changes):
    assert preparation_of(root, **changes).key(cache) != preparation_of(root).key(cache)


def test_a_changed_file_changes_the_key_and_its_place_does_not(root, cache, tmp_path):
    key = preparation_of(root).key(cache)
    other = write_corpus(tmp_path / "elsewhere")
    assert preparation_of(other).key(cache) == key
    content = (root / "train.de").read_bytes()
    stat = (root / "train.de").stat()
    (root / "train.de").write_bytes(content.replace(b"ALPHA", b"ALPHE", 1))  # same size
    os.utime(root / "train.de", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and the same time of change
    assert preparation_of(root).key(cache) != key
    (root / "train.de").write_bytes(content)
    assert preparation_of(root).key(cache) == key


def test_parts_change_the_key_with_their_order(root, cache):
    write_corpus(root / "more", seed=1)
    parts = [FilePair(folder / "train.en", folder / "train.de") for folder in (root, root / "more")]
    keys = {preparation_of(root, pairs=pairs).key(cache) for pairs in (tuple(parts), tuple(parts[::-1]), (parts[0],))}
    assert len(keys) == 3


def test_files_are_hashed_once(root, cache, monkeypatch):
    key = preparation_of(root).key(cache)
    monkeypatch.setattr(token_cache, "summarise", None)
    assert preparation_of(root).key(cache) == key


def test_a_damaged_note_is_made_anew(root, cache):
    key = preparation_of(root).key(cache)
    for note in (cache / "files").iterdir():
        note.write_text("{half")
    assert preparation_of(root).key(cache) == key


def test_a_pool_of_processes_gives_the_same_bytes(root, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_LINES", 30)
    alone = preparation_of(root).build(cache, processes=1, show_progress=False)
    monkeypatch.setattr(token_cache, "MIN_LINES_FOR_POOL", 0)
    pool = preparation_of(root).build(tmp_path / "second", processes=2, show_progress=False)
    assert contents(pool) == contents(alone)


@pytest.mark.slow
def test_a_bad_line_is_named_through_the_pool_and_nothing_is_left(root, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_LINES", 30)
    monkeypatch.setattr(token_cache, "MIN_LINES_FOR_POOL", 0)
    monkeypatch.setattr(token_cache, "VOCABULARY_PAIRS", 20)  # so that the vocabulary does not see line 8
    lines = (root / "train.en").read_bytes().split(b"\n")
    lines[7] = b"caf\xe9 au lait"
    (root / "train.en").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"train\.en, line 8: not UTF-8"):
        preparation_of(root, vocabulary_size=45).build(cache, processes=2, show_progress=False)
    assert leftovers(cache) == []


def test_the_vocabulary_is_learnt_from_every_kth_pair(root, cache, monkeypatch):
    monkeypatch.setattr(token_cache, "VOCABULARY_PAIRS", 67)  # every third
    monkeypatch.setattr(token_cache, "BLOCK_LINES", 10)
    found = []
    learn = token_cache.train_vocabulary
    monkeypatch.setattr(
        token_cache, "train_vocabulary", lambda texts, size, **_: learn(found.extend(texts) or found, size)
    )
    build(root, cache, vocabulary_size=50)
    english, german = (list(read_lines(root / f"train.{language}"))[::3] for language in ("en", "de"))
    assert found == [text for pair in zip(english, german, strict=True) for text in pair]


def test_line_counts_that_differ(root, cache):
    write_lines(root / "train.de", ["nur eine"])
    with pytest.raises(ValueError, match=r"train\.en has 200 lines, but .*train\.de has 1\b"):
        build(root, cache)
    assert leftovers(cache) == []


def test_a_vocabulary_too_large(root, cache):
    with pytest.raises(ValueError, match=r"vocabulary_size: 9999 is more .*--data\.vocabulary_size"):
        build(root, cache, vocabulary_size=9999)
    assert leftovers(cache) == []


def test_cleaning_that_leaves_nothing(root, cache):
    vocabulary = build(root, cache).vocabulary
    with pytest.raises(
        ValueError, match=r"none of the 200 training pairs is left \(max_tokens 200\).*--data\.cleaning"
    ):
        build(root, cache, cleaning=Cleaning(max_tokens=1), vocabulary=vocabulary)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"cannot be written \(No space left on device\).*--data\.cache_dir",
        ),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (KeyboardInterrupt(), None),
    ],
)
def test_a_full_disk_or_ctrl_c_leaves_nothing_behind(root, cache, monkeypatch, failure, expected):
    def fail(descriptor):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(type(failure), match=expected) as error:
            build(root, cache)
    assert leftovers(cache) == []
    if isinstance(failure, OSError):
        assert error.value.errno == failure.errno
    assert len(build(root, cache).source) == 200, "the next try works"


def test_a_cache_folder_that_is_a_file(root, tmp_path):
    (tmp_path / "cache").write_text("x")
    with pytest.raises(OSError, match="cache"):
        build(root, tmp_path / "cache")


def _build_in_process(root, cache, barrier):
    barrier.wait()
    preparation_of(root).build(cache, processes=1, show_progress=False)


def test_two_processes_at_once_both_end_well(root, cache):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_build_in_process, args=(root, cache, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    folder = cache / preparation_of(root).key(cache)
    assert leftovers(cache) == [folder.name]
    assert len(TokenCache.open(folder).source) == 200


def test_losing_the_race_keeps_the_winners_entry(root, cache, monkeypatch):
    preparation, sync = preparation_of(root), os.fsync

    def slow(descriptor):  # while the files of the entry are written
        monkeypatch.setattr(os, "fsync", sync)
        (preparation.build(cache, 1, False) / "mark").touch()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    folder = preparation.build(cache, 1, False)
    assert (folder / "mark").is_file()
    assert leftovers(cache) == [folder.name]


def test_open_says_what_is_missing_or_damaged(root, cache):
    with pytest.raises(FileNotFoundError, match=r"no token cache .* Call prepare_data\(\) first"):
        TokenCache.open(cache / "nothing")
    folder = build(root, cache).folder
    ids = (folder / "source.ids").read_bytes()
    (folder / "source.ids").write_bytes(ids[:-10])
    with pytest.raises(ValueError, match=r"damaged \(.*source\.ids holds .* ids instead of .*Delete the folder"):
        TokenCache.open(folder)
    (folder / "source.ids").write_bytes(ids)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        TokenCache.open(folder)


def test_token_arrays_pickle_by_path_and_survive_a_release(root, cache):
    array = build(root, cache).source
    packed = pickle.dumps(array)
    assert len(packed) < 1000
    copy = pickle.loads(packed)  # noqa: S301
    array.release()
    assert np.array_equal(array.ids, copy.ids)
    memory = TokenArray.from_lists([[4, 5], [], [6]])
    memory.release()
    copy = pickle.loads(pickle.dumps(memory))  # noqa: S301
    assert [copy[index].tolist() for index in range(len(copy))] == [[4, 5], [], [6]]
    assert copy.lengths.tolist() == [2, 0, 1]


def test_manifest_tells_what_the_entry_was_made_of(root, cache):
    entry = build(root, cache, cleaning=Cleaning(max_ratio=2.5))
    manifest = json.loads((entry.folder / "manifest.json").read_text())
    assert manifest["cleaning"] == dataclasses.asdict(Cleaning(max_ratio=2.5))
    assert manifest["files"][0]["source"] == str(root / "train.en")
    assert manifest["vocabulary_size"] == 60


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    root = tmp_path / "corpus"
    root.mkdir()
    assert default_cache_folder(root) == root / "cache"
    root.chmod(0o555)
    assert default_cache_folder(root) == tmp_path / "xdg" / "lightning_attn" == user_cache_folder()
    root.chmod(0o755)
    (root / "cache").mkdir(mode=0o555)
    assert default_cache_folder(root) == user_cache_folder()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / ".cache" / "lightning_attn"
