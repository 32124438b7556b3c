import hashlib
import random
import re
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import pytest
from num2words import num2words

from datamodules.miniature import translation as miniature_translation
from datamodules.miniature.translation import MINIATURE_PAIRS, miniature_pairs, write_miniature_corpus

SMALL = {"train": 300, "valid": 20, "test": 30}
NAMES = [f"{part}.{language}" for part in SMALL for language in ("en", "de")]
PARTICLES = ("mit", "ab", "aus", "zurück", "weg")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return list(islice(miniature_pairs(seed=3), 6000))


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def test_same_seed_gives_same_bytes_and_another_seed_gives_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_miniature_corpus(tmp_path / name, SMALL, seed=seed)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert all(read(tmp_path / "a")[name] != read(tmp_path / "c")[name] for name in NAMES)


@pytest.mark.skipif(
    (version("babel"), version("num2words")) != ("2.18.0", "0.5.14"), reason="other releases may write other text"
)
def test_text_is_the_same_on_every_machine():
    # If this changes on purpose, raise GRAMMAR_VERSION, or corpora on disk will not be written anew.
    text = "\n".join(f"{english}\t{german}" for english, german in islice(miniature_pairs(0), 2000))
    assert miniature_translation.GRAMMAR_VERSION == 1
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "a3af4fd8034e9ff19bf8af7162578ccee83245490c14f53046787f97a7e51425"
    )


def test_text_does_not_depend_on_the_global_random_state():
    random.seed(5)
    first = list(islice(miniature_pairs(0), 20))
    random.seed(6)
    assert list(islice(miniature_pairs(0), 20)) == first


def test_default_corpus_has_its_counts_and_no_source_twice(tmp_path):
    write_miniature_corpus(tmp_path)
    sources: list[str] = []
    for part, count in MINIATURE_PAIRS.items():
        english, german = (
            (tmp_path / f"{part}.{lang}").read_text(encoding="utf-8").split("\n") for lang in ("en", "de")
        )
        assert english.pop() == german.pop() == ""  # the last line is ended
        assert len(english) == len(german) == count
        assert all(line == " ".join(line.split()) and line for line in english + german)
        sources += english
    assert MINIATURE_PAIRS == {"train": 20_000, "valid": 500, "test": 500}
    assert len(set(sources)) == 21_000


def test_each_source_has_one_translation():
    translations = {}
    repeated = 0
    for seed in range(11, 17):
        for english, german in islice(miniature_pairs(seed), 10_000):
            repeated += english in translations
            assert translations.setdefault(english, german) == german
    assert repeated > 100  # so the check above has compared something


def test_sentences_are_of_moderate_length(pairs):
    lengths = sorted(len(english.split()) for english, _ in pairs)
    assert 10 < sum(lengths) / len(lengths) < 13
    assert lengths[0] >= 4
    assert lengths[-1] <= 32


def test_number_words_agree_with_num2words(pairs):
    german_words = {num2words(n, lang="de"): n for n in range(2, 1000)}
    english_words = {num2words(n, lang="en"): n for n in range(2, 1000)}
    number = re.compile("|".join(sorted(map(re.escape, english_words), key=len, reverse=True)))
    seen = set()
    for english, german in pairs:
        spelled = [english_words[match] for match in number.findall(english.lower()) if f" {match} " in english.lower()]
        words = (word.strip(".,?") for word in german.split())
        assert sorted(spelled) == sorted(german_words[word] for word in words if word in german_words), english
        seen.update(spelled)
    assert len(seen) > 300
    assert not {n for n in seen if n % 100 == 1}  # German would inflect them


def test_digits_of_clock_times_are_converted(pairs):
    seen = set()
    for english, german in pairs:
        for hour, minute, half in re.findall(r"at (\d+):(\d\d) ([AP]M)", english):
            clock = f"um {int(hour) % 12 + 12 * (half == 'PM'):02d}:{minute} Uhr"
            assert clock in german or clock.capitalize() in german
            seen.add(clock)
    assert len(seen) > 50


def test_finite_verb_is_last_in_a_subordinate_clause(pairs):
    subordinate = [pair for pair in pairs if re.search(r", (dass|ob|weil|obwohl) ", pair[1])]
    assert len(subordinate) > 500
    finite_past = 0
    for english, german in subordinate:
        last = german.rstrip(".").split()[-1]
        clause = re.split(r" (?:that|whether|because|although) ", english, maxsplit=1)[1]
        if re.search(r"\bwill\b", clause):
            assert last in ("wird", "werden"), german
            assert english.split()[-1] != "will"
        elif re.search(r"\b(must|can|should)\b", clause):
            assert last in ("muss", "müssen", "kann", "können", "sollte", "sollten"), german
        elif last in ("hat", "haben"):
            assert re.match(r"(ge|ver|be)\w+(t|en)$|\w+ge\w+(t|en)$", german.split()[-2]), german
            finite_past += 1
        else:  # present: the particle is joined to the verb again
            assert re.search(r"(t|en)$", last), german
            assert not german.rstrip(".").endswith(tuple(f" {particle}" for particle in PARTICLES))
    assert finite_past > 100


def test_separable_particle_closes_the_statement(pairs):
    brought = [pair for pair in pairs if re.search(r"^\S+ brings along ", pair[0])]
    assert brought
    for _, german in brought:
        assert german.split()[1] == "bringt"
        assert german.endswith(" mit.")


def test_verb_is_second_after_a_fronted_time(pairs):
    fronted = [pair for pair in pairs if re.match(r"(Yesterday|Tomorrow), ", pair[0])]
    assert len(fronted) > 20
    finite = {"hat", "haben", "ist", "sind", "wird", "werden", "muss", "müssen", "kann", "können", "sollte", "sollten"}
    for english, german in fronted:
        first, second = german.split()[:2]
        assert first == {"Y": "Gestern", "T": "Morgen"}[english[0]]
        assert second in finite | {"wurde", "wurden", "betrug"}, german


def test_time_stands_before_place_in_german_and_after_it_in_english(pairs):
    both = [pair for pair in pairs if re.search(r"(in the|at the|behind the) \w+ yesterday[.?]", pair[0])]
    assert len(both) > 10
    for english, german in both:
        place = re.search(r"(im|in der|am|auf dem|hinter dem|hinter der) [A-Z]", german[german.index("gestern") :])
        assert place, (english, german)


@pytest.mark.parametrize(
    ("noun", "gender"), [("Brief", "m"), ("Mantel", "m"), ("Lampe", "f"), ("Tasse", "f"), ("Buch", "n"), ("Hemd", "n")]
)
def test_articles_adjectives_and_relative_pronouns_agree(pairs, noun, gender):
    # Every determiner that may stand before the noun with at most one adjective between, and its adjective's ending.
    allowed = {
        "m": {"der": "e", "den": "en", "einen": "en", "seinen": "en", "ihren": "en"},
        "f": {"die": "e", "eine": "e", "seine": "e", "ihre": "e"},
        "n": {"das": "e", "ein": "es", "sein": "es", "ihr": "es"},
    }[gender]
    articles = "der|die|das|den|dem|des|ein|eine|einen|einem|einer|seine?n?|ihre?n?"
    found = set()
    for english, german in pairs:
        for article, adjective in re.findall(rf"\b({articles}) (?:(\w+) )?{noun}\b", german, re.IGNORECASE):
            assert article.lower() in allowed, (english, german)
            assert not adjective or adjective.endswith(allowed[article.lower()]), (english, german)
            found.add(article.lower())
        if relative := re.search(rf"\b{noun}, (d\w\w) ", german):
            assert relative[1] == {"m": "den", "f": "die", "n": "das"}[gender], german
            found.add("relative")
    assert len(found) >= 5


def test_second_call_does_nothing_and_a_changed_setting_replaces_all_files(tmp_path):
    write_miniature_corpus(tmp_path, SMALL)
    first, times = read(tmp_path), {name: (tmp_path / name).stat().st_mtime_ns for name in NAMES}
    write_miniature_corpus(tmp_path, SMALL)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in NAMES} == times
    write_miniature_corpus(tmp_path, SMALL, seed=9)
    assert all(read(tmp_path)[name] != first[name] for name in NAMES)


def test_a_damaged_file_is_written_anew(tmp_path):
    write_miniature_corpus(tmp_path, SMALL)
    first = read(tmp_path)
    (tmp_path / "train.de").write_bytes(first["train.de"][:100])
    (tmp_path / "test.en").unlink()
    write_miniature_corpus(tmp_path, SMALL)
    assert read(tmp_path) == first


def test_test_part_does_not_change_with_the_size_of_train(tmp_path):
    write_miniature_corpus(tmp_path / "a", SMALL)
    write_miniature_corpus(tmp_path / "b", SMALL | {"train": 50})
    assert read(tmp_path / "a")["test.en"] == read(tmp_path / "b")["test.en"]


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    drawn = miniature_pairs(0)

    def interrupted(seed):
        yield from islice(drawn, 100)
        raise KeyboardInterrupt

    monkeypatch.setattr(miniature_translation, "miniature_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_miniature_corpus(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_exchange_is_finished_by_the_next_call(tmp_path, monkeypatch):
    write_miniature_corpus(tmp_path, SMALL, seed=1)
    replace, calls = Path.replace, []

    def broken(self, target):
        calls.append(target)
        if len(calls) == 4:  # the manifest, train.en and train.de are through
            raise OSError("broken")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(OSError, match="broken"):
        write_miniature_corpus(tmp_path, SMALL, seed=2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*NAMES, miniature_translation.MANIFEST_NAME])
    write_miniature_corpus(tmp_path, SMALL, seed=1)  # what was there before must not be taken for complete
    write_miniature_corpus(tmp_path / "fresh", SMALL, seed=1)
    assert read(tmp_path) == read(tmp_path / "fresh")


def test_somebody_elses_corpus_is_left_alone(tmp_path):
    (tmp_path / "valid.en").write_text("Mine.\n")
    with pytest.raises(FileExistsError, match=r"already holds valid\.en.*folder of its own"):
        write_miniature_corpus(tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["valid.en"]
    assert (tmp_path / "valid.en").read_text() == "Mine.\n"


@pytest.mark.parametrize("wrong", [{"train": 10}, SMALL | {"test": 0}, SMALL | {"dev": 5}])
def test_wrong_counts_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="train, valid, test"):
        write_miniature_corpus(tmp_path / "new", wrong)
    assert not (tmp_path / "new").exists()


def test_negative_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seed=-1"):
        write_miniature_corpus(tmp_path / "new", SMALL, seed=-1)
