import hashlib
import tracemalloc

import pytest
from parallel_corpus import write_corpus, write_lines

from datamodules.translation.parallel_text import (
    Cleaning,
    FilePair,
    check_counts,
    find_pairs,
    read_blocks,
    read_evaluation,
    read_lines,
    summarise,
)

ODD = "form\x0cfeed, unit\x1cseparators\x1e, next\x85line, line\u2028and\u2029paragraph separator, vertical\x0btab"


@pytest.fixture
def root(tmp_path):
    return write_corpus(tmp_path / "corpus", train=25, valid=4, test=3)


def pair_of(root, split="valid"):
    return FilePair(root / f"{split}.en", root / f"{split}.de")


def test_find_pairs_of_one_part(root):
    assert find_pairs(root, "valid", "en", "de") == [pair_of(root)]
    assert find_pairs(root, "valid", "de", "en") == [FilePair(root / "valid.de", root / "valid.en")]


def test_find_pairs_by_glob_is_sorted_and_matches_languages(root):
    for name in ("train-extra2", "train-extra10", "train.clean"):
        for language in ("en", "de"):
            write_lines(root / f"{name}.{language}", ["x"])
    names = [pair.source.name for pair in find_pairs(root, "train*", "en", "de")]
    assert names == ["train.en", "train-extra10.en", "train-extra2.en", "train.clean.en"]
    assert all(pair.target == pair.source.with_suffix(".de") for pair in find_pairs(root, "train*", "en", "de"))


def test_missing_root_names_layout_and_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist") as error:
        find_pairs(tmp_path / "nowhere", "train", "en", "de")
    assert "{train,valid,test}.{en,de}" in str(error.value)
    assert "--data.download true" in str(error.value)


def test_missing_files_name_layout_documents_and_download(root):
    with pytest.raises(FileNotFoundError, match=r"dev\.en and dev\.de are missing") as error:
        find_pairs(root, "dev", "en", "de")
    for part in (str(root), "{train,valid,test}.{en,de}", "docs/translation.md", "--data.download true"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"dev\*\.en and dev\*\.de are missing"):
        find_pairs(root, "dev*", "en", "de")


@pytest.mark.parametrize("pattern", ["train", "train*"])
def test_a_file_without_counterpart_is_named(root, pattern):
    (root / "train.de").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.de is missing, but .*train\.en exists"):
        find_pairs(root, pattern, "en", "de")


@pytest.mark.parametrize(
    ("content", "lines"),
    [(b"a", 1), (b"a\n", 1), (b"a\nb", 2), (b"\n", 1), (b"a\r\nb\r\n", 2), (b"\r", 1), (b"\n\n", 2)],
)
def test_summarise_counts_as_reading_does(tmp_path, content, lines):
    path = tmp_path / "x"
    path.write_bytes(content)
    summary = summarise(path)
    assert summary.lines == lines == len(list(read_lines(path)))
    assert summary.digest == hashlib.blake2b(content, digest_size=16).hexdigest()


def test_summarise_a_file_of_many_megabytes(tmp_path):
    path = write_lines(tmp_path / "x", [str(number) * 20 for number in range(100_000)])
    assert path.stat().st_size > 9_000_000
    assert summarise(path).lines == 100_000
    assert summarise(path).digest == hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def test_only_newlines_end_a_line(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(f"{ODD}\r\nsecond\nthird\rstill third".encode())
    assert list(read_lines(path)) == [ODD, "second", "third\rstill third"]


def test_byte_order_mark_is_dropped_from_the_first_line_only(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("\ufefffirst\n\ufeffsecond\n".encode())
    assert list(read_lines(path)) == ["first", "\ufeffsecond"]


def test_not_utf8_names_file_line_and_byte(tmp_path):
    path = tmp_path / "x.de"
    path.write_bytes("gut\ngro\xdf\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.de, line 2: not UTF-8 \(byte 0xdf at position 4") as error:
        list(read_lines(path))
    assert "iconv" in str(error.value)


@pytest.mark.parametrize("size", [1, 7, 25, 100])
def test_blocks_hold_all_lines_in_order(root, size):
    blocks = list(read_blocks([pair_of(root, "train"), pair_of(root)], size))
    assert max(len(block) for block in blocks) <= size
    texts = [text for block in blocks for text in block.texts()]
    english, german = (
        [line for split in ("train", "valid") for line in read_lines(root / f"{split}.{language}")]
        for language in ("en", "de")
    )
    assert texts == list(zip(english, german, strict=True))
    assert [block.first for block in blocks if block.pair == pair_of(root, "train")] == list(range(1, 26, size))


def test_blocks_decode_every_nth_pair(root):
    (block,) = read_blocks([pair_of(root, "train")], 100)
    assert list(block.texts(2, 5)) == list(block.texts())[2::5]


def test_blocks_say_the_line_of_the_file_that_is_bad(root):
    lines = (root / "train.de").read_bytes().split(b"\n")
    lines[16] = b"gro\xdf"
    (root / "train.de").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"train\.de, line 17: not UTF-8"):
        [list(block.texts()) for block in read_blocks([pair_of(root, "train")], 10)]


@pytest.mark.parametrize("size", [10, 100])
def test_line_counts_that_differ_name_both_files_and_counts(root, size):
    with (root / "train.de").open("a") as file:
        file.write("zu viel\nzu viel\n")
    with pytest.raises(ValueError, match=r"train\.en has 25 lines, but .*train\.de has 27"):
        list(read_blocks([pair_of(root, "train")], size))


def test_check_counts_accepts_equal_counts(root):
    check_counts(pair_of(root), 3, 3)


def test_reading_blocks_takes_little_memory(tmp_path):
    for language in ("en", "de"):
        write_lines(tmp_path / f"train.{language}", ["some words " * 10] * 40_000)
    tracemalloc.start()
    assert sum(len(block) for block in read_blocks([pair_of(tmp_path, "train")], 500)) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (tmp_path / "train.en").stat().st_size / 4


def test_evaluation_text_is_read_as_it_is(root):
    long = "x" * 100_000
    write_lines(root / "valid.en", ["same", ODD, long])
    write_lines(root / "valid.de", ["same", "y", "z"])
    assert read_evaluation(pair_of(root)) == (["same", ODD, long], ["same", "y", "z"])


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_evaluation_refuses_empty_files(root, content):
    (root / "valid.de").write_bytes(content)
    with pytest.raises(ValueError, match=r"valid\.de: the file is empty|valid\.en has 4 lines, but .*valid\.de has 1"):
        read_evaluation(pair_of(root))


def test_summarise_refuses_an_empty_file(tmp_path):
    path = tmp_path / "train.en"
    path.touch()
    with pytest.raises(ValueError, match=r"train\.en: the file is empty"):
        summarise(path)


@pytest.mark.parametrize("empty", ["", "  ", "\u00a0"])
def test_evaluation_names_file_and_line_of_an_empty_line(root, empty):
    write_lines(root / "valid.de", ["a", "b", empty, "d"])
    with pytest.raises(ValueError, match=r"valid\.de, line 3: the line is empty.*remove line 3 from both"):
        read_evaluation(pair_of(root))


def test_evaluation_names_both_counts(root):
    write_lines(root / "valid.de", ["a"])
    with pytest.raises(ValueError, match=r"valid\.en has 4 lines, but .*valid\.de has 1"):
        read_evaluation(pair_of(root))


CLEANING = Cleaning(max_characters=60, min_length=2, max_length=6, max_ratio=2.0)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("a b c", "x y z", ""),
        ("a b c d", "x y", ""),
        ("a b c d e", "x y", "max_ratio"),
        ("x y", "a b c d e", "max_ratio"),
        ("", "x y", "drop_empty"),
        ("x y", "", "drop_empty"),
        ("", "", "drop_empty"),
        ("a", "x y", "min_length"),
        ("   ", "x y", "drop_empty"),
        ("a b c d e f", "x y z u v w", ""),
        ("a b c d e f g", "x y z u v w", "max_length"),
        ("a b", "a b", "drop_identical"),
        ("a " + "b" * 58, "x y", ""),
        ("a " + "b" * 59, "x y", "max_characters"),
        ("a b", "x" * 100_000, "max_characters"),
    ],
)
def test_cleaning(source, target, reason):
    assert CLEANING.reason(source, target) == reason


def test_cleaning_can_be_switched_off():
    everything = Cleaning(drop_empty=False, min_length=0, drop_identical=False, max_ratio=float("inf"))
    for pair in (("", "x"), ("", ""), ("a", "a"), ("a", "x " * 200)):
        assert everything.reason(*pair) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_length": -1}, "cleaning.min_length: -1 is negative"),
        ({"max_length": 0}, "cleaning.max_length: 0 is less than min_length 1"),
        ({"min_length": 9, "max_length": 8}, "cleaning.max_length: 8 is less than min_length 9"),
        ({"max_ratio": 0.5}, "cleaning.max_ratio: 0.5 would leave no pair"),
        ({"max_tokens": 0}, "cleaning.max_tokens: 0 would leave no pair"),
        ({"max_characters": -3}, "cleaning.max_characters: -3 would leave no pair"),
    ],
)
def test_cleaning_refuses_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        Cleaning(**arguments)
