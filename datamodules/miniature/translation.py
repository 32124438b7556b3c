"""A miniature English-German corpus, generated without downloads.

It is for quick experiments: the quick start, the tests and a first look at a new attention need a task that a model of
two million parameters learns in minutes on a laptop, and that still is translation. Number words come from `num2words`,
dates, times of day, sums of money and measures from the Unicode CLDR through Babel, and a small grammar composes them
into sentences. The grammar keeps what makes German word order a test of attention: the finite verb is second in a
statement, first in a question and last in a subordinate clause; participles, infinitives and separable particles close
the clause; time stands before place; articles, adjectives, possessives and relative pronouns agree in gender, case and
number. Each English sentence has exactly one translation, so a perfect model reaches 100 BLEU.

Scores on this corpus show that a model works, not how good it is on real text.
"""

import datetime
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

from lightning_attn.datamodules.miniature.files import check_counts, write_generated
from lightning_attn.errors import InputError

__all__ = ["MINIATURE_PAIRS", "miniature_pairs", "write_miniature_corpus"]

MINIATURE_PAIRS: Mapping[str, int] = MappingProxyType({"train": 20_000, "valid": 500, "test": 500})
"""Default number of sentence pairs of each part."""

GRAMMAR_VERSION = 1  # increase with every change of the text, so that corpora on disk are regenerated
MANIFEST_NAME = "miniature_translation.json"

Gender = Literal["m", "f", "n"]
Case = Literal["nominative", "accusative", "dative"]
Tense = Literal["present", "past", "future", "must", "can", "should"]
Order = Literal["verb first", "verb second", "verb last"]
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------- lexicon


@dataclass(frozen=True)
class _Phrase:
    """The same thing said in both languages, in a form that nothing around it changes."""

    english: str
    german: str


@dataclass(frozen=True)
class _Noun:
    english: str
    english_plural: str
    gender: Gender
    german: str
    german_plural: str
    oblique: str = ""  # accusative and dative singular of weak nouns

    def inflect(self, case: Case, plural: bool) -> str:
        if plural:
            needs_n = case == "dative" and not self.german_plural.endswith(("n", "s"))
            return self.german_plural + "n" * needs_n
        return self.oblique if self.oblique and case != "nominative" else self.german


@dataclass(frozen=True)
class _Verb:
    """A verb; German plural forms of the present equal the infinitive for all verbs listed here."""

    base: str
    third: str
    past: str
    participle: str
    infinitive: str  # without its separable particle
    german_third: str
    german_participle: str  # with its particle
    particle: str = ""
    auxiliary: Literal["haben", "sein"] = "haben"

    @property
    def german_base(self) -> str:
        return self.particle + self.infinitive

    @property
    def zu_infinitive(self) -> str:
        return f"{self.particle}zu{self.infinitive}" if self.particle else f"zu {self.infinitive}"


@dataclass(frozen=True)
class _Place:
    """A place with its prepositions: where something is (dative) and where somebody goes to."""

    noun: _Noun
    at: _Phrase
    toward: Literal["zu", "in"]


# Subjects. Names carry the gender that "his" and "her" need; "child" has none in English and takes no possessive.
_NAMES: Sequence[tuple[str, Gender]] = (
    ("Anna", "f"), ("Maria", "f"), ("Julia", "f"), ("Laura", "f"),
    ("Peter", "m"), ("Paul", "m"), ("Thomas", "m"), ("David", "m"),
)  # fmt: skip
_CHILD = _Noun("child", "children", "n", "Kind", "Kinder")
_PEOPLE = (
    _CHILD,
    _Noun("man", "men", "m", "Mann", "Männer"),
    _Noun("woman", "women", "f", "Frau", "Frauen"),
    _Noun("boy", "boys", "m", "Junge", "Jungen", oblique="Jungen"),
    _Noun("uncle", "uncles", "m", "Onkel", "Onkel"),
    _Noun("aunt", "aunts", "f", "Tante", "Tanten"),
    _Noun("king", "kings", "m", "König", "Könige"),
    _Noun("queen", "queens", "f", "Königin", "Königinnen"),
    _Noun("prince", "princes", "m", "Prinz", "Prinzen", oblique="Prinzen"),
)
_VEHICLES = (
    _Noun("train", "trains", "m", "Zug", "Züge"),
    _Noun("bus", "buses", "m", "Bus", "Busse"),
    _Noun("taxi", "taxis", "n", "Taxi", "Taxis"),
)
_THINGS = (
    _Noun("book", "books", "n", "Buch", "Bücher"),
    _Noun("picture", "pictures", "n", "Bild", "Bilder"),
    _Noun("shirt", "shirts", "n", "Hemd", "Hemden"),
    _Noun("dress", "dresses", "n", "Kleid", "Kleider"),
    _Noun("knife", "knives", "n", "Messer", "Messer"),
    _Noun("letter", "letters", "m", "Brief", "Briefe"),
    _Noun("coat", "coats", "m", "Mantel", "Mäntel"),
    _Noun("key", "keys", "m", "Schlüssel", "Schlüssel"),
    _Noun("chair", "chairs", "m", "Stuhl", "Stühle"),
    _Noun("ball", "balls", "m", "Ball", "Bälle"),
    _Noun("lamp", "lamps", "f", "Lampe", "Lampen"),
    _Noun("bag", "bags", "f", "Tasche", "Taschen"),
    _Noun("cup", "cups", "f", "Tasse", "Tassen"),
    _Noun("clock", "clocks", "f", "Uhr", "Uhren"),
    _Noun("newspaper", "newspapers", "f", "Zeitung", "Zeitungen"),
)
_GOODS: Mapping[str, Sequence[_Phrase]] = {
    "volume-liter": (_Phrase("milk", "Milch"), _Phrase("water", "Wasser"), _Phrase("juice", "Saft")),
    "mass-kilogram": (_Phrase("sugar", "Zucker"), _Phrase("rice", "Reis"), _Phrase("cheese", "Käse")),
}
# Adjectives: the German stem, to which the ending of gender, case, number and article is added.
_THING_ADJECTIVES = (
    _Phrase("old", "alt"), _Phrase("new", "neu"), _Phrase("red", "rot"), _Phrase("green", "grün"),
    _Phrase("small", "klein"), _Phrase("big", "groß"), _Phrase("cheap", "billig"), _Phrase("expensive", "teur"),
    _Phrase("beautiful", "schön"),
)  # fmt: skip
_PEOPLE_ADJECTIVES = (
    _Phrase("tired", "müd"), _Phrase("friendly", "freundlich"), _Phrase("curious", "neugierig"),
    _Phrase("happy", "glücklich"),
)  # fmt: skip

_BUY = _Verb("buy", "buys", "bought", "bought", "kaufen", "kauft", "gekauft")
_SELL = _Verb("sell", "sells", "sold", "sold", "verkaufen", "verkauft", "verkauft")
_ORDER = _Verb("order", "orders", "ordered", "ordered", "bestellen", "bestellt", "bestellt")
_NEED = _Verb("need", "needs", "needed", "needed", "brauchen", "braucht", "gebraucht")
_BRING = _Verb(
    "bring along", "brings along", "brought along", "brought along", "bringen", "bringt", "mitgebracht", "mit"
)
_FIND = _Verb("find", "finds", "found", "found", "finden", "findet", "gefunden")
_SEE = _Verb("see", "sees", "saw", "seen", "sehen", "sieht", "gesehen")
_SEEK = _Verb("look for", "looks for", "looked for", "looked for", "suchen", "sucht", "gesucht")
_FORGET = _Verb("forget", "forgets", "forgot", "forgotten", "vergessen", "vergisst", "vergessen")
_FETCH = _Verb("pick up", "picks up", "picked up", "picked up", "holen", "holt", "abgeholt", "ab")
_CHOOSE = _Verb("choose", "chooses", "chose", "chosen", "suchen", "sucht", "ausgesucht", "aus")
_RETURN = _Verb("return", "returns", "returned", "returned", "geben", "gibt", "zurückgegeben", "zurück")
_DISCARD = _Verb("throw away", "throws away", "threw away", "thrown away", "werfen", "wirft", "weggeworfen", "weg")
_PAY = _Verb("pay", "pays", "paid", "paid", "bezahlen", "bezahlt", "bezahlt")
_COST = _Verb("cost", "costs", "cost", "cost", "kosten", "kostet", "gekostet")
_WEIGH = _Verb("weigh", "weighs", "weighed", "weighed", "wiegen", "wiegt", "gewogen")
_ARRIVE = _Verb("arrive", "arrives", "arrived", "arrived", "kommen", "kommt", "angekommen", "an", "sein")
_DEPART = _Verb("depart", "departs", "departed", "departed", "fahren", "fährt", "abgefahren", "ab", "sein")

_TRADING = (_BUY, _SELL, _ORDER, _NEED, _BRING)
_HANDLING = (*_TRADING, _FIND, _SEE, _SEEK, _FORGET, _FETCH, _CHOOSE, _RETURN, _DISCARD)
_WITH_PASSIVE = (_BUY, _SELL, _ORDER, _FIND, _FORGET, _FETCH, _CHOOSE, _RETURN, _DISCARD)
_WITH_RELATIVE = (_BUY, _SELL, _NEED, _FIND, _SEE, _SEEK)
_AS_PURPOSE = (_BUY, _SELL, _ORDER, _SEEK, _FETCH, _CHOOSE, _RETURN)
_GIVING = (
    _Verb("give", "gives", "gave", "given", "geben", "gibt", "gegeben"),
    _Verb("show", "shows", "showed", "shown", "zeigen", "zeigt", "gezeigt"),
    _Verb("send", "sends", "sent", "sent", "schicken", "schickt", "geschickt"),
)
_GOING = (
    _Verb("go", "goes", "went", "gone", "gehen", "geht", "gegangen", auxiliary="sein"),
    _Verb("drive", "drives", "drove", "driven", "fahren", "fährt", "gefahren", auxiliary="sein"),
    _Verb("run", "runs", "ran", "run", "laufen", "läuft", "gelaufen", auxiliary="sein"),
)
_STAYING = (
    _Verb("wait", "waits", "waited", "waited", "warten", "wartet", "gewartet"),
    _Verb("work", "works", "worked", "worked", "arbeiten", "arbeitet", "gearbeitet"),
    _Verb("sleep", "sleeps", "slept", "slept", "schlafen", "schläft", "geschlafen"),
)
# What a subordinate clause hangs on: the matrix verb in singular and plural, and the conjunction.
_MATRIX = (
    (_Phrase("says that", "sagt, dass"), _Phrase("say that", "sagen, dass")),
    (_Phrase("knows that", "weiß, dass"), _Phrase("know that", "wissen, dass")),
    (_Phrase("believes that", "glaubt, dass"), _Phrase("believe that", "glauben, dass")),
    (_Phrase("asks whether", "fragt, ob"), _Phrase("ask whether", "fragen, ob")),
    (_Phrase("is happy because", "freut sich, weil"), _Phrase("are happy because", "freuen sich, weil")),
    (
        _Phrase("stays at home although", "bleibt zu Hause, obwohl"),
        _Phrase("stay at home although", "bleiben zu Hause, obwohl"),
    ),
)

_STATION = _Noun("station", "stations", "m", "Bahnhof", "Bahnhöfe")
_BUILDINGS = (
    _Place(_STATION, _Phrase("at", "an"), "zu"),
    _Place(_Noun("museum", "museums", "n", "Museum", "Museen"), _Phrase("in", "in"), "zu"),
    _Place(_Noun("hotel", "hotels", "n", "Hotel", "Hotels"), _Phrase("in", "in"), "zu"),
    _Place(_Noun("school", "schools", "f", "Schule", "Schulen"), _Phrase("in", "in"), "zu"),
    _Place(_Noun("church", "churches", "f", "Kirche", "Kirchen"), _Phrase("in", "in"), "zu"),
)
_PLACES = (
    *_BUILDINGS,
    _Place(_Noun("garden", "gardens", "m", "Garten", "Gärten"), _Phrase("in", "in"), "in"),
    _Place(_Noun("kitchen", "kitchens", "f", "Küche", "Küchen"), _Phrase("in", "in"), "in"),
    _Place(_Noun("city", "cities", "f", "Stadt", "Städte"), _Phrase("in", "in"), "in"),
    _Place(_Noun("village", "villages", "n", "Dorf", "Dörfer"), _Phrase("in", "in"), "in"),
    _Place(_Noun("market", "markets", "m", "Markt", "Märkte"), _Phrase("at", "auf"), "zu"),
    _Place(_Noun("bridge", "bridges", "f", "Brücke", "Brücken"), _Phrase("on", "auf"), "zu"),
)
_BESIDE = (_Phrase("in front of", "vor"), _Phrase("behind", "hinter"), _Phrase("next to", "neben"))

_TIMES_OF_TENSE: Mapping[Tense, Sequence[_Phrase]] = {
    "present": (_Phrase("today", "heute"), _Phrase("every week", "jede Woche"), _Phrase("every day", "jeden Tag")),
    "past": (
        _Phrase("yesterday", "gestern"), _Phrase("last week", "letzte Woche"), _Phrase("last year", "letztes Jahr"),
    ),
    "future": (
        _Phrase("tomorrow", "morgen"), _Phrase("next week", "nächste Woche"), _Phrase("next year", "nächstes Jahr"),
    ),
}  # fmt: skip
_PARTS_OF_DAY = (
    _Phrase("in the morning", "am Morgen"),
    _Phrase("in the afternoon", "am Nachmittag"),
    _Phrase("in the evening", "am Abend"),
)

# --------------------------------------------------------------------------------------- German and English morphology

_DEFINITE: Mapping[Case, Mapping[str, str]] = {
    "nominative": {"m": "der", "f": "die", "n": "das", "plural": "die"},
    "accusative": {"m": "den", "f": "die", "n": "das", "plural": "die"},
    "dative": {"m": "dem", "f": "der", "n": "dem", "plural": "den"},
}
_EIN_ENDINGS: Mapping[Case, Mapping[str, str]] = {
    "nominative": {"m": "", "f": "e", "n": "", "plural": "e"},
    "accusative": {"m": "en", "f": "e", "n": "", "plural": "e"},
    "dative": {"m": "em", "f": "er", "n": "em", "plural": "en"},
}
_WEAK_ENDINGS: Mapping[Case, Mapping[str, str]] = {  # adjectives after der, die, das
    "nominative": {"m": "e", "f": "e", "n": "e", "plural": "en"},
    "accusative": {"m": "en", "f": "e", "n": "e", "plural": "en"},
    "dative": {"m": "en", "f": "en", "n": "en", "plural": "en"},
}
_MIXED_ENDINGS: Mapping[Case, Mapping[str, str]] = {  # adjectives after ein, sein, ihr
    "nominative": {"m": "er", "f": "e", "n": "es", "plural": "en"},
    "accusative": {"m": "en", "f": "e", "n": "es", "plural": "en"},
    "dative": {"m": "en", "f": "en", "n": "en", "plural": "en"},
}
_CONTRACTIONS = {"in dem": "im", "an dem": "am", "von dem": "vom", "zu dem": "zum", "zu der": "zur", "in das": "ins"}
_FINITE: Mapping[str, tuple[str, str]] = {  # auxiliaries in the third person, singular and plural
    "haben": ("hat", "haben"), "sein": ("ist", "sind"), "future": ("wird", "werden"), "passive": ("wurde", "wurden"),
    "must": ("muss", "müssen"), "can": ("kann", "können"), "should": ("sollte", "sollten"),
}  # fmt: skip
_POSSESSIVES: Mapping[str, _Phrase] = {
    "m": _Phrase("his", "sein"),
    "f": _Phrase("her", "ihr"),
    "plural": _Phrase("their", "ihr"),
}


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _sentence(text: str, mark: str = ".") -> str:
    return text[0].upper() + text[1:] + mark


def _with_article(english: str) -> str:
    return f"{'an' if english[0] in 'aeiou' else 'a'} {english}"


def _prepositional(preposition: str, noun: _Noun, case: Case) -> str:
    """A German preposition with the definite article, contracted where German contracts them, and the noun."""
    start = f"{preposition} {_DEFINITE[case][noun.gender]}"
    return f"{_CONTRACTIONS.get(start, start)} {noun.inflect(case, plural=False)}"


def _definite(noun: _Noun, case: Case, plural: bool = False, adjective: _Phrase | None = None) -> _Phrase:
    number = "plural" if plural else noun.gender
    english = _words("the", adjective.english if adjective else "", noun.english_plural if plural else noun.english)
    ending = _WEAK_ENDINGS[case][number]
    german = _words(_DEFINITE[case][number], adjective.german + ending if adjective else "", noun.inflect(case, plural))
    return _Phrase(english, german)


def _indefinite(noun: _Noun, case: Case, adjective: _Phrase | None) -> _Phrase:
    english = _with_article(_words(adjective.english if adjective else "", noun.english))
    described = adjective.german + _MIXED_ENDINGS[case][noun.gender] if adjective else ""
    determiner = "ein" + _EIN_ENDINGS[case][noun.gender]
    return _Phrase(english, _words(determiner, described, noun.inflect(case, plural=False)))


def _possessed(owner: _Phrase, noun: _Noun, plural: bool, adjective: _Phrase | None) -> _Phrase:
    number = "plural" if plural else noun.gender
    owned = noun.english_plural if plural else noun.english
    english = _words(owner.english, adjective.english if adjective else "", owned)
    described = adjective.german + _MIXED_ENDINGS["accusative"][number] if adjective else ""
    determiner = owner.german + _EIN_ENDINGS["accusative"][number]
    return _Phrase(english, _words(determiner, described, noun.inflect("accusative", plural)))


# ------------------------------------------------------------------------- numbers, dates and measures of the libraries


def _plain(text: str) -> str:
    """CLDR puts (narrow) no-break spaces before AM, PM and unit signs; a corpus of plain text has spaces there."""
    return text.replace("\u202f", " ").replace("\u00a0", " ")


@functools.cache
def _number(value: int) -> _Phrase:
    from num2words import num2words

    return _Phrase(num2words(value, lang="en"), num2words(value, lang="de"))


@functools.cache
def _ordinal(value: int) -> _Phrase:
    """An ordinal as an adjective: `num2words` gives "dritte", whose stem is "dritt"."""
    from num2words import num2words

    english, german = (num2words(value, lang=language, to="ordinal") for language in ("en", "de"))
    return _Phrase(english, german.removesuffix("e"))


@functools.cache
def _clock(hour: int, minute: int) -> _Phrase:
    from babel.dates import format_time

    time = datetime.time(hour, minute)
    english, german = (_plain(format_time(time, "short", locale=locale)) for locale in ("en", "de"))
    return _Phrase(f"at {english}", f"um {german} Uhr")


@functools.cache
def _weekday(day: int) -> _Phrase:
    from babel.dates import format_date

    date = datetime.date(2024, 1, 1) + datetime.timedelta(days=day)  # a Monday
    return _Phrase(format_date(date, "EEEE", locale="en"), format_date(date, "EEEE", locale="de"))


@functools.cache
def _date(date: datetime.date) -> _Phrase:
    from babel.dates import format_date

    english, german = (_plain(format_date(date, "long", locale=locale)) for locale in ("en", "de"))
    return _Phrase(f"on {english}", f"am {german}")


@functools.cache
def _day_of_month(month: int, day: int) -> _Phrase:
    from babel.dates import format_date

    date = datetime.date(2024, month, day)
    english, german = format_date(date, "MMMM d", locale="en"), format_date(date, "d. MMMM", locale="de")
    return _Phrase(f"on {english}", f"am {german}")


@functools.cache
def _money(cents: int, currency: str) -> _Phrase:
    from babel.numbers import format_currency

    english, german = (format_currency(cents / 100, currency, locale=lang, format_type="name") for lang in ("en", "de"))
    return _Phrase(_plain(english), _plain(german))


@functools.cache
def _measure(tenths: int, unit: str) -> _Phrase:
    from babel.units import format_unit

    value = tenths / 10 if tenths % 10 else tenths // 10
    english, german = (format_unit(value, unit, length="long", locale=locale) for locale in ("en", "de"))
    return _Phrase(_plain(english), _plain(german))


# ------------------------------------------------------------------------------------------------------------ clauses


@dataclass(frozen=True)
class _Subject:
    english: str
    german: str
    plural: bool
    gender: Gender | None  # of the person as English sees it: None where neither "his" nor "her" is certain

    @property
    def possessive(self) -> _Phrase | None:
        if self.plural:
            return _POSSESSIVES["plural"]
        return _POSSESSIVES[self.gender] if self.gender else None


@dataclass(frozen=True)
class _Clause:
    """A clause before its words are put in order.

    Attributes:
        subject: Who or what does it.
        verb: What is done.
        tense: When, or the modal verb.
        english: Objects and places in English order, after the verb.
        german: The same in the order of the German middle field, which depends on definiteness.
        time: Stands last in English; in German before everything else in the middle field but a dative.
        recipient: An indirect object; first of both languages' objects.
        passive: Whether the subject undergoes it (past tense only).
    """

    subject: _Subject
    verb: _Verb
    tense: Tense
    english: tuple[str, ...] = ()
    german: tuple[str, ...] = ()
    time: _Phrase | None = None
    recipient: _Phrase = _Phrase("", "")
    passive: bool = False

    def english_verb(self) -> tuple[str, str]:
        """The finite verb, and what follows it (infinitive or participle)."""
        if self.passive:
            return "were" if self.subject.plural else "was", self.verb.participle
        if self.tense == "present":
            return self.verb.base if self.subject.plural else self.verb.third, ""
        if self.tense == "past":
            return self.verb.past, ""
        return "will" if self.tense == "future" else self.tense, self.verb.base

    def german_verb(self) -> tuple[str, str]:
        """The finite verb, and what closes the clause (particle, infinitive or participle)."""
        plural = self.subject.plural
        if self.passive:
            return _FINITE["passive"][plural], self.verb.german_participle
        if self.tense == "present":
            return self.verb.infinitive if plural else self.verb.german_third, self.verb.particle
        if self.tense == "past":
            return _FINITE[self.verb.auxiliary][plural], self.verb.german_participle
        return _FINITE[self.tense][plural], self.verb.german_base

    def in_english(self, order: Literal["statement", "question", "time first"] = "statement") -> str:
        finite, rest = self.english_verb()
        objects = _words(self.recipient.english, *self.english)
        time = self.time.english if self.time else ""
        if order == "question":
            if self.tense in ("present", "past") and not self.passive:
                do = "did" if self.tense == "past" else "do" if self.subject.plural else "does"
                return _words(do, self.subject.english, self.verb.base, objects, time)
            return _words(finite, self.subject.english, rest, objects, time)
        if order == "time first":
            return _words(f"{time},", self.subject.english, finite, rest, objects)
        return _words(self.subject.english, finite, rest, objects, time)

    def in_german(self, order: Order, time_first: bool = False) -> str:
        finite, closing = self.german_verb()
        subject, recipient, middle = self.subject.german, self.recipient.german, _words(*self.german)
        time = self.time.german if self.time else ""
        if order == "verb last":
            separated = self.tense != "present" or not closing
            verb = _words(closing, finite) if separated else closing + finite
            return _words(subject, recipient, time, middle, verb)
        if order == "verb first":
            return _words(finite, subject, recipient, time, middle, closing)
        if time_first:
            return _words(time, finite, subject, recipient, middle, closing)
        return _words(subject, finite, recipient, time, middle, closing)


class _Author:
    """Draws sentences from the grammar."""

    def __init__(self, seed: int) -> None:
        # Only `random()` is promised to give the same numbers in every Python release, so all draws come from it.
        self._random = random.Random(seed).random

    def below(self, stop: int) -> int:
        return int(self._random() * stop)

    def between(self, first: int, last: int) -> int:
        return first + self.below(last - first + 1)

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    # Noun phrases

    def quantity(self) -> _Phrase:
        """A number from 2 to 999 in words; 101, 201, ... are left out because German would inflect their "eins"."""
        while True:
            value = self.between(2, 99) if self.chance(0.7) else self.between(100, 999)
            if value % 100 != 1:
                return _number(value)

    def person(self, other_than: _Subject | None = None) -> _Subject:
        while True:
            subject = self._any_person()
            if other_than is None or subject.english != other_than.english:
                return subject

    def _any_person(self) -> _Subject:
        if self.chance(0.55):
            name, gender = self.choice(_NAMES)
            return _Subject(name, name, plural=False, gender=gender)
        noun, plural = self.choice(_PEOPLE), self.chance(0.3)
        phrase = _definite(noun, "nominative", plural, self.choice(_PEOPLE_ADJECTIVES) if self.chance(0.25) else None)
        return _Subject(phrase.english, phrase.german, plural, None if noun is _CHILD else noun.gender)

    def thing_adjective(self) -> _Phrase | None:
        return self.choice(_THING_ADJECTIVES) if self.chance(0.5) else None

    def definite_thing(self, case: Case) -> tuple[_Phrase, _Noun, bool]:
        noun, plural = self.choice(_THINGS), self.chance(0.25)
        adjective = _ordinal(self.between(1, 12)) if not plural and self.chance(0.15) else self.thing_adjective()
        return _definite(noun, case, plural, adjective), noun, plural

    def thing(self, owner: _Phrase | None) -> tuple[_Phrase, bool]:
        """An object in the accusative, and whether it is definite."""
        kind = self.below(4)
        if kind == 0 or (kind == 1 and owner is None):
            return self.definite_thing("accusative")[0], True
        noun, adjective = self.choice(_THINGS), self.thing_adjective()
        if kind == 1 and owner is not None:
            return _possessed(owner, noun, self.chance(0.25), adjective), True
        if kind == 2:
            return _indefinite(noun, "accusative", adjective), False
        number = self.quantity()
        english = _words(number.english, adjective.english if adjective else "", noun.english_plural)
        german = _words(number.german, adjective.german + "e" if adjective else "", noun.german_plural)
        return _Phrase(english, german), False

    def goods(self) -> _Phrase:
        unit = self.choice(tuple(_GOODS))
        amount, stuff = _measure(5 * self.between(3, 40), unit), self.choice(_GOODS[unit])
        return _Phrase(f"{amount.english} of {stuff.english}", f"{amount.german} {stuff.german}")

    def price(self) -> _Phrase:
        cents = 100 * self.between(2, 99) + self.choice((0, 0, 50, 75))
        return _money(cents, self.choice(("EUR", "USD", "CHF")))

    # Adverbials

    def location(self) -> _Phrase:
        if self.chance(0.25):
            noun, preposition = self.choice(_BUILDINGS).noun, self.choice(_BESIDE)
        else:
            place = self.choice(_PLACES)
            noun, preposition = place.noun, place.at
        return _Phrase(f"{preposition.english} the {noun.english}", _prepositional(preposition.german, noun, "dative"))

    def destination(self) -> _Phrase:
        place = self.choice(_PLACES)
        case: Case = "dative" if place.toward == "zu" else "accusative"
        return _Phrase(f"to the {place.noun.english}", _prepositional(place.toward, place.noun, case))

    def clock(self) -> _Phrase:
        return _clock(self.between(6, 22), 15 * self.below(4))

    def time(self, tense: Tense) -> _Phrase:
        kind = self.below(8)
        if kind == 0:
            return self.choice(_PARTS_OF_DAY)
        if kind == 1:
            return self.clock()
        if kind == 2 and tense == "present":
            day = _weekday(self.below(7))
            return _Phrase(f"every {day.english}", f"jeden {day.german}")
        if kind <= 3:
            day = _weekday(self.below(7))
            moment = self.clock() if self.chance(0.4) else _Phrase("", "")
            return _Phrase(_words("on", day.english, moment.english), _words("am", day.german, moment.german))
        if kind == 4:
            return _day_of_month(self.between(1, 12), self.between(1, 28))
        if kind == 5 and tense != "present":
            year = self.between(1990, 2019) if tense == "past" else self.between(2030, 2049)
            return _date(datetime.date(year, self.between(1, 12), self.between(1, 28)))
        return self.choice(_TIMES_OF_TENSE[tense if tense in _TIMES_OF_TENSE else "future"])

    def tense(self) -> Tense:
        kind = self.below(10)
        if kind < 3:
            return "present"
        return "past" if kind < 6 else "future" if kind < 8 else self.choice(("must", "can", "should"))

    # Clauses

    def deed(self, subject: _Subject, tense: Tense, brief: bool = False) -> _Clause:
        """Somebody does something with a thing. German sets definite objects before the place, others after it."""
        verb = self.choice(_HANDLING)
        place = self.location() if verb is not _BRING and self.chance(0.2 if brief else 0.45) else None
        time = self.time(tense) if self.chance(0.3 if brief else 0.7) else None
        if verb in _TRADING and self.chance(0.25):
            thing, definite = self.goods(), False
        else:
            thing, definite = self.thing(subject.possessive)
        if verb in (_BUY, _SELL) and place is None and self.chance(0.5):
            price = self.price()
            place = _Phrase(f"for {price.english}", f"für {price.german}")
        english, german = [thing.english], [thing.german]
        if place:
            english.append(place.english)
            german.insert(1 if definite else 0, place.german)
        return _Clause(subject, verb, tense, tuple(english), tuple(german), time)

    def gift(self) -> _Clause:
        subject, tense = self.person(), self.tense()
        thing, _ = self.thing(subject.possessive)
        recipient = _definite(self.choice(_PEOPLE), "dative", self.chance(0.3))
        time = self.time(tense) if self.chance(0.6) else None
        verb = self.choice(_GIVING)
        return _Clause(subject, verb, tense, (thing.english,), (thing.german,), time, recipient)

    def trip(self, subject: _Subject, tense: Tense) -> _Clause:
        destination, verb = self.destination(), self.choice(_GOING)
        time = self.time(tense) if self.chance(0.7) else None
        return _Clause(subject, verb, tense, (destination.english,), (destination.german,), time)

    def stay(self) -> _Clause:
        tense = self.tense()
        unit = self.choice(("duration-minute", "duration-hour", "duration-day"))
        length = _measure(10 * (5 * self.between(2, 18) if unit == "duration-minute" else self.between(2, 12)), unit)
        place, time = self.location(), self.time(tense) if self.chance(0.5) else None
        english, german = (place.english, f"for {length.english}"), (f"{length.german} lang", place.german)
        return _Clause(self.person(), self.choice(_STAYING), tense, english, german, time)

    def ride(self) -> _Clause:
        noun, plural, tense = self.choice(_VEHICLES), self.chance(0.2), self.tense()
        vehicle = _definite(noun, "nominative", plural)
        subject = _Subject(vehicle.english, vehicle.german, plural, gender=None)
        place = self.choice(_BUILDINGS).noun
        if self.chance(0.5):
            verb, english, german = _DEPART, f"from the {place.english}", _prepositional("von", place, "dative")
        else:
            preposition = "an" if place is _STATION else "vor"
            near = "at" if place is _STATION else "in front of"
            verb, english, german = _ARRIVE, f"{near} the {place.english}", _prepositional(preposition, place, "dative")
        return _Clause(subject, verb, tense, (english,), (german,), self.time(tense))

    def passive(self) -> _Clause:
        thing, _, plural = self.definite_thing("nominative")
        place = self.location() if self.chance(0.6) else None
        subject = _Subject(thing.english, thing.german, plural, gender=None)
        english, german = ((place.english,), (place.german,)) if place else ((), ())
        time = self.time("past") if self.chance(0.8) else None
        return _Clause(subject, self.choice(_WITH_PASSIVE), "past", english, german, time, passive=True)

    def payment(self) -> _Clause:
        subject, tense, price = self.person(), self.tense(), self.price()
        thing, _ = self.thing(subject.possessive)
        english, german = (f"{price.english} for {thing.english}",), (f"{price.german} für {thing.german}",)
        time = self.time(tense) if self.chance(0.6) else None
        return _Clause(subject, _PAY, tense, english, german, time)

    def property(self) -> _Clause:
        """What a thing costs or weighs."""
        thing, _, plural = self.definite_thing("nominative")
        subject = _Subject(thing.english, thing.german, plural, gender=None)
        if self.chance(0.4):
            weight = _measure(5 * self.between(3, 100), "mass-kilogram")
            return _Clause(subject, _WEIGH, "present", (weight.english,), (weight.german,))
        price = self.price()
        if not self.chance(0.6):
            return _Clause(subject, _COST, "present", (price.english,), (price.german,))
        place = self.location()
        return _Clause(subject, _COST, "present", (price.english, place.english), (place.german, price.german))

    # Sentences

    def statement(self, clause: _Clause) -> _Phrase:
        if clause.time and self.chance(0.5):
            english, german = clause.in_english("time first"), clause.in_german("verb second", time_first=True)
        else:
            english, german = clause.in_english(), clause.in_german("verb second")
        return _Phrase(_sentence(english), _sentence(german))

    def question(self, clause: _Clause) -> _Phrase:
        return _Phrase(_sentence(clause.in_english("question"), "?"), _sentence(clause.in_german("verb first"), "?"))

    def subordinate(self) -> _Phrase:
        """Somebody says, asks or regrets something: the verb goes to the end."""
        speaker = self.person()
        matrix = self.choice(_MATRIX)[speaker.plural]
        clause = self.deed(self.person(other_than=speaker), self.tense())
        english = _words(speaker.english, matrix.english, clause.in_english())
        german = _words(speaker.german, matrix.german, clause.in_german("verb last"))
        return _Phrase(_sentence(english), _sentence(german))

    def conditional(self) -> _Phrase:
        """If one does this, another will do that: the condition is the first element, so the verb follows at once."""
        condition = self.deed(self.person(), "present", brief=True)
        result = self.deed(
            self.person(other_than=condition.subject), self.choice(("future", "must", "can")), brief=True
        )
        english = f"if {condition.in_english()}, {result.in_english()}"
        german = f"wenn {condition.in_german('verb last')}, {result.in_german('verb first')}"
        return _Phrase(_sentence(english), _sentence(german))

    def purpose(self) -> _Phrase:
        """Somebody goes somewhere to do something: "um ... zu"."""
        subject = self.person()
        trip = self.trip(subject, self.choice(("present", "past", "future")))
        verb, (thing, _) = self.choice(_AS_PURPOSE), self.thing(subject.possessive)
        # The time goes first or is left out: after the object it would belong to the purpose.
        order: Literal["time first", "statement"] = "time first" if trip.time else "statement"
        english = f"{trip.in_english(order)} to {verb.base} {thing.english}"
        german = f"{trip.in_german('verb second', bool(trip.time))}, um {thing.german} {verb.zu_infinitive}"
        return _Phrase(_sentence(english), _sentence(german))

    def relative(self) -> _Phrase:
        """Somebody handles what another one handled: the pronoun agrees with the thing, the verb comes last."""
        subject, verb = self.person(), self.choice(_WITH_RELATIVE)
        thing, noun, plural = self.definite_thing("accusative")
        main = _Clause(subject, verb, "present", (thing.english,), (thing.german,))
        deed = self.choice(_HANDLING)
        place = self.location() if deed is not _BRING and self.chance(0.4) else None
        english, german = ((place.english,), (place.german,)) if place else ((), ())
        time = self.time("past") if self.chance(0.6) else None
        inner = _Clause(self.person(other_than=subject), deed, "past", english, german, time)
        pronoun = _DEFINITE["accusative"]["plural" if plural else noun.gender]
        return _Phrase(
            _sentence(f"{main.in_english()} that {inner.in_english()}"),
            _sentence(f"{main.in_german('verb second')}, {pronoun} {inner.in_german('verb last')}"),
        )

    def distance(self) -> _Phrase:
        start, end = self.choice(_PLACES).noun, self.choice(_BUILDINGS).noun
        while start is end:
            end = self.choice(_BUILDINGS).noun
        length = _measure(5 * self.between(3, 120), "length-kilometer")
        place = _definite(start, "nominative")
        english = f"{place.english} is {length.english} away from the {end.english}"
        german = f"{place.german} ist {length.german} {_prepositional('von', end, 'dative')} entfernt"
        return _Phrase(_sentence(english), _sentence(german))

    def temperature(self) -> _Phrase:
        time, place = self.time("past"), self.location()
        heat = _measure(5 * self.between(4, 70), "temperature-celsius")
        english = f"{time.english}, the temperature {place.english} was {heat.english}"
        german = f"{time.german} betrug die Temperatur {place.german} {heat.german}"
        return _Phrase(_sentence(english), _sentence(german))

    def write(self) -> _Phrase:
        """One sentence pair."""
        kind = self.below(100)
        if kind < 27:
            return self.statement(self.deed(self.person(), self.tense()))
        if kind < 37:
            return self.question(self.deed(self.person(), self.tense()))
        if kind < 53:
            return self.subordinate()
        if kind < 60:
            return self.conditional()
        if kind < 66:
            return self.purpose()
        if kind < 73:
            return self.relative()
        if kind < 97:
            clause = self.choice(
                (self.gift, self.gift, self.stay, self.ride, self.passive, self.payment, self.property)
            )()
            return self.statement(clause)
        return self.distance() if self.chance(0.5) else self.temperature()


# ------------------------------------------------------------------------------------------------------------- corpus


def miniature_pairs(seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yields (English, German) sentence pairs without end, no English sentence twice.

    Args:
        seed: Seed of the random draws; the same seed gives the same sentences on every machine that has the same
            releases of Babel and num2words.
    """
    author, seen = _Author(seed), set[str]()
    while True:
        pair = author.write()
        if pair.english not in seen:
            seen.add(pair.english)
            yield pair.english, pair.german


def write_miniature_corpus(root: Path, pairs: Mapping[str, int] = MINIATURE_PAIRS, seed: int = 0) -> None:
    """Writes the corpus in the official layout, `root/{train,valid,test}.{en,de}`: UTF-8, one sentence a line.

    All source sentences are distinct, so none of the valid or test parts occurs in train. Nothing is done if the same
    corpus exists. A corpus of other settings or other library releases is replaced as a whole: while files
    are being exchanged, the manifest beside them (`miniature_translation.json`) marks the corpus as incomplete.

    Args:
        root: Folder to write to; created if it is missing.
        pairs: Number of sentence pairs of each of the parts "train", "valid" and "test".
        seed: Seed of the random draws.

    Raises:
        ValueError: `pairs` lacks a part, names an unknown one or asks for less than one pair; or `seed` is negative.
        FileExistsError: `root` holds a corpus that this function did not write; it is not changed.
    """
    check_counts("pairs", pairs, MINIATURE_PAIRS)
    if seed < 0:
        raise InputError(f"seed={seed}: give 0 or more.")
    write_generated(
        Path(root),
        functools.partial(_write_parts, pairs=pairs, seed=seed),
        settings={"grammar": GRAMMAR_VERSION, "seed": seed, "pairs": dict(pairs)},
        libraries=("babel", "num2words"),
        owned=[f"{part}.{language}" for part in MINIATURE_PAIRS for language in ("en", "de")],
        manifest_name=MANIFEST_NAME,
        what="miniature corpus",
    )


def _write_parts(folder: Path, pairs: Mapping[str, int], seed: int) -> None:
    source = miniature_pairs(seed)
    # Test first: it stays the same when only the size of train changes.
    for part in ("test", "valid", "train"):
        drawn = list(islice(source, pairs[part]))
        for language, sentences in zip(("en", "de"), zip(*drawn, strict=True), strict=True):
            (folder / f"{part}.{language}").write_bytes("".join(f"{line}\n" for line in sentences).encode())
