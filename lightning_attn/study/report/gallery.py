"""Pictures and attention maps of a study's groups, within a number of bytes."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lightning_attn.study.report.collecting import CellRecord, GroupRecord, StudyRecord
from lightning_attn.study.report.images import Budget, map_overlay, matrix, sentence_heat, size_of, thumbnail
from lightning_attn.study.report.reading import finite, read_json, text

__all__ = ["Gallery"]

_TERMS = ("E1", "E2", "E3", "E4", "whole")
_MOST_PICTURES = 120  # of a study
_MOST_PIXELS = 90_000_000  # that are opened for them
_STEMS = 4
_MOST_TOKENS = 256
_SHARE = 0.4  # of the room for attention


class Gallery:
    """Pictures of all studies of a page.

    Args:
        size: Bytes for all of them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._classes: dict[str, str] = {}  # pictures that occur many times, by a class of CSS

    def classes(self) -> str:
        """CSS of pictures that maps are laid over."""
        return "".join(f".{name}{{background-image:url({uri})}}" for name, uri in self._classes.items())

    def of(self, record: StudyRecord, size: int) -> dict[str, Any]:
        """What the template shows of a study.

        Args:
            record: The study.
            size: Bytes for its pictures.
        """
        budget = Budget(size)
        of_maps = Budget(int(size * _SHARE))
        attention = self._attention(record, of_maps)
        budget.left -= int(size * _SHARE) - of_maps.left
        return {"attention": attention, "pictures": self._pictures(record, budget)}

    def _attention(self, record: StudyRecord, budget: Budget) -> list[dict[str, Any]]:
        """Maps by what they are of; a row for each group, a column for each term."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        left_out = 0
        for place, group in enumerate(record.groups):
            cell = group.shown_cell
            if cell is None or cell.attention is None:
                continue
            stored = read_json(cell.attention, [])
            maps = stored.get("maps") if isinstance(stored, dict) else None
            for one in maps if isinstance(maps, list) else []:
                drawn = self._map(one, cell, budget) if isinstance(one, dict) else None
                if drawn is None:
                    left_out += 1
                    continue
                key = (drawn["kind"], text(one.get("title"), 120))
                entry = found.setdefault(key, {"kind": key[0], "title": key[1], "rows": [], "inputs": []})
                if drawn["input"] not in entry["inputs"]:
                    entry["inputs"].append(drawn["input"])
                drawn["input_place"] = entry["inputs"].index(drawn["input"])
                seed = cell.status.cell.seed
                entry["rows"].append({"place": place, "title": group.title, "seed": seed, **drawn})
        for number, entry in enumerate(found.values()):
            entry["place"] = number
            entry["terms"] = [term for term in _TERMS if any(term in row["maps"] for row in entry["rows"])]
            entry["left_out"] = left_out
        return list(found.values())

    def _map(self, one: Mapping[str, Any], cell: CellRecord, budget: Budget) -> dict[str, Any] | None:
        weights = one.get("weights")
        kind = one.get("kind")
        if not isinstance(weights, dict) or kind not in ("sentence", "map"):
            return None
        maps, ranges, on = {}, {}, []
        shape = (1, 1)
        for term in _TERMS:
            values = matrix(weights.get(term))
            if values is None:
                continue
            shape = (values.shape[0], values.shape[1])
            on.append(term)
            uri = budget.take(sentence_heat(values) if kind == "sentence" else map_overlay(values))
            if uri:
                maps[term] = uri
                largest = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
                ranges[term] = f"{largest:.2f}" if kind == "sentence" else f"{largest:.3g}×"
        if not maps:
            return None
        shown: dict[str, Any] = {"kind": kind, "maps": maps, "ranges": ranges, "on": on, "shape": shape}
        if kind == "sentence":
            queries, keys = _tokens(one.get("queries")), _tokens(one.get("keys"))
            fits = len(queries) == shape[0] and len(keys) == shape[1]
            return shown | {"input": {"queries": queries, "keys": keys} if fits else {}}
        height, width = _pair(one.get("size"), shape)
        row, column = _pair(one.get("query"), (-1, -1))
        shown["query"] = None
        if 0 <= row < height and 0 <= column < width:
            shown["query"] = (100 * (column + 0.5) / width, 100 * (row + 0.5) / height)
        shown["aspect"] = f"{width:g}/{height:g}"
        box, at = _numbers(one.get("key_box"), 4), _numbers(one.get("query_at"), 2)
        if box is not None and min(box[2:]) > 0:  # else of an older test, whose picture is that of the padded batch
            shown["box"] = [100 * value for value in box]
            # The picture is a whole where the map is all the squares of its keys.
            columns, rows = shape[1] / box[2], shape[0] / box[3]
            shown["aspect"] = f"{columns:g}/{rows:g}"
            if at is not None and shown["query"] is not None:
                shown["query"] = (100 * at[0], 100 * at[1])
        shown["input"] = {"class": self._background(one.get("image"), cell)}
        return shown

    def _background(self, name: object, cell: CellRecord) -> str:
        """The class of the picture that a map is of; empty if there is none."""
        if not isinstance(name, str) or name != Path(name).name or name in ("", ".", "..") or cell.attention is None:
            return ""
        file = cell.attention.parent / name
        try:
            if not file.is_file() or file.stat().st_size > 20_000_000:
                return ""
            digest = f"in-{hashlib.sha256(file.read_bytes()).hexdigest()[:10]}"
        except OSError:  # such as a name that is too long
            return ""
        if digest not in self._classes:
            if len(self._classes) >= 12:
                return ""
            uri = thumbnail(file, 24_000, as_background=True)
            if not uri:
                return ""
            self._classes[digest] = uri
        return digest

    def _pictures(self, record: StudyRecord, budget: Budget) -> dict[str, Any]:
        """The same test pictures of each group."""
        shown = [
            (place, group)
            for place, group in enumerate(record.groups)
            if group.shown_cell and group.shown_cell.pictures
        ]
        counts: dict[str, int] = {}
        for _, group in shown:
            for stem in _cell_of(group).pictures:
                counts[stem] = counts.get(stem, 0) + 1
        stems = sorted(counts, key=lambda stem: (-counts[stem], stem))[:_STEMS]
        wanted = [
            (stem, place, group, _cell_of(group).pictures[stem])
            for stem in stems
            for place, group in shown
            if stem in _cell_of(group).pictures
        ]
        pixels = [size_of(one[3]) for one in wanted]
        chosen: list[tuple[str, int, GroupRecord, Path]] = []
        opened = 0
        for one, size in zip(wanted, pixels, strict=True):
            if len(chosen) < _MOST_PICTURES and size and opened + size <= _MOST_PIXELS:
                chosen.append(one)
                opened += size
        if not chosen:
            return {"rows": [], "left_out": len(wanted), "stems": len(counts)}
        each = min(40_000, budget.left // len(chosen))
        with ThreadPoolExecutor(2) as pool:
            uris = list(pool.map(lambda one: thumbnail(one[3], each), chosen))
        rows: dict[str, dict[str, Any]] = {}
        number = 0
        for (stem, place, group, _), uri in zip(chosen, uris, strict=True):
            if uri := budget.take(uri):
                number += 1
                row = rows.setdefault(stem, {"stem": stem, "pictures": []})
                seed = _cell_of(group).status.cell.seed
                row["pictures"].append({"place": place, "title": group.title, "seed": seed, "uri": uri})
        return {"rows": list(rows.values()), "left_out": len(wanted) - number, "stems": len(counts)}


def _cell_of(group: GroupRecord) -> CellRecord:
    cell = group.shown_cell
    assert cell is not None
    return cell


def _tokens(value: object) -> list[str]:
    return [text(one, 24) or "?" for one in value[:_MOST_TOKENS]] if isinstance(value, list) else []


def _numbers(value: object, count: int) -> list[float] | None:
    """So many numbers that a picture can be placed with, or None."""
    found = [finite(one) for one in value] if isinstance(value, list) and len(value) == count else []
    numbers = [one for one in found if one is not None and abs(one) < 1e4]
    return numbers if len(numbers) == count else None


def _pair(value: object, default: Sequence[float]) -> tuple[float, float]:
    if isinstance(value, list) and len(value) == 2:
        first, second = finite(value[0]), finite(value[1])
        if first is not None and second is not None:
            return first, second
    return float(default[0]), float(default[1])
