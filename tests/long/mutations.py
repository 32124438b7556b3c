"""Damages sound things at random: nested values, bytes, text, pictures."""

import copy
import io
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def places(value: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested containers; of long lists, the first few."""
    found = [keys] if keys else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*keys, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:3]):
            found += places(inner, (*keys, number))
    return found


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def replacement(value: Any, chance: random.Random, plain: bool = False) -> tuple[str, Any]:
    """Something else for a value: of another type, size, sign, or damaged; `plain` if JSON can hold it."""
    strange: list[Any] = [
        *(None, True, 0, -1, 1, 10**6, 2**53, 10**40, 0.5, -0.0, math.nan, math.inf, "", "x", "nan", "../../x", "/etc"),
        *("\0", "ü" * 1000, [], {}, [1], ["x"], {"x": 1}, {"class_path": "os.abort"}, nested(60)),
    ]
    odd = [
        b"bytes",
        *(torch.zeros(()), torch.zeros(1), torch.full((2, 2), math.nan), torch.zeros(1).expand(10**12)),
        *(torch.zeros(3, dtype=torch.complex64), torch.zeros(2, 0), torch.ones(3, dtype=torch.uint8)),
    ]
    if isinstance(value, torch.Tensor) and chance.random() < 0.5:
        changes = [
            (
                "transposed",
                lambda: value.flatten().flip(0).view(value.shape).t() if value.ndim == 2 else value.flatten()[:0],
            ),
            ("longer", lambda: torch.cat([value.flatten(), value.flatten()])),
            ("half", lambda: value.to(torch.float16) if value.is_floating_point() else value.double()),
            ("nan", lambda: torch.full(value.shape, math.nan)),
            ("huge", lambda: torch.full(value.shape, 3e38)),
            ("int64", lambda: value.to(torch.int64)),
            ("one", lambda: value.flatten()[:1].clone()),
        ]
        name, change = chance.choice(changes)
        return name, change()
    if isinstance(value, int | float) and not isinstance(value, bool) and chance.random() < 0.4:
        new = chance.choice([-value - 1, value + 1, value * 1000 + 7, float(value) + 0.5, str(value), [value]])
        return repr(new)[:60], new
    new = chance.choice(strange if plain else strange + odd)
    return (f"tensor {tuple(new.shape)}" if isinstance(new, torch.Tensor) else repr(new)[:60]), new


def mutated(sound: dict[str, Any], chance: random.Random, plain: bool = False) -> tuple[str, dict[str, Any]]:
    """A copy of nested values with one to three changes, and what they are."""
    checkpoint = copy.deepcopy(sound)
    changes = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        # Every top-level part as often as any other, however much it holds.
        part = chance.choice(list(checkpoint))
        keys = chance.choice(places(checkpoint[part], (part,)))
        place: Any = checkpoint
        for key in keys[:-1]:
            place = place[key]
        where = ".".join(map(str, keys))[:120]
        if chance.random() < 0.2:
            del place[keys[-1]]
            changes.append(f"{where} dropped")
        else:
            name, new = replacement(place[keys[-1]], chance, plain)
            place[keys[-1]] = new
            changes.append(f"{where} = {name}")
        if not checkpoint:
            break
    return "; ".join(changes), checkpoint


def damaged_bytes(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The bytes of a file cut off, changed or repeated somewhere."""
    kind, place = chance.choice(["cut", "flip", "zero", "repeat"]), chance.randrange(len(content))
    changed = bytearray(content)
    if kind == "cut":
        changed = changed[:place]
    elif kind == "flip":
        for _ in range(chance.choice([1, 4, 64])):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        changed[place : place + 256] = bytes(len(changed[place : place + 256]))
    else:
        changed[place:place] = changed[:place]
    return f"bytes: {kind} at {place}", bytes(changed)


def damaged_text(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Lines of text with what text should not have, or in another encoding."""
    lines = content.splitlines(keepends=True)
    strange = [
        *(
            b"\xff\xfe\n",
            b"\x00\x01\x02\n",
            b"\xc3\n",
            b"\n",
            b" \t \n",
            "\u2028\u2029\x85\n".encode(),
            b"\x1b[2J\x07\n",
        ),
        *(
            b"word " * 50_000 + b"\n",
            b"x" * 300_000 + b"\n",
            "e\u0301\u202e\ufeff\U0001f600".encode() * 200 + b"\n",
            b"a\rb\r\n",
        ),
        *(b"<unk> <s> </s> <pad>\n", "\u2581\u2581\u2581\n".encode(), b"-1e400 nan inf\n", b"{}\n", b"\xed\xa0\x80\n"),
    ]
    kind = chance.choice(["bytes", "lines", "lines", "lines", "encoding", "fewer", "empty", "repeated"])
    if kind == "bytes":
        return damaged_bytes(content, chance)
    if kind == "encoding":
        name = chance.choice(["utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7"])
        return name, content.decode().encode(name, errors="replace")
    if kind == "fewer":
        return kind, b"".join(lines[: chance.randrange(len(lines))])
    if kind == "empty":
        return kind, b""
    if kind == "repeated":
        return kind, lines[0] * len(lines)
    changed = sorted(chance.sample(range(len(lines)), min(len(lines), chance.choice([1, 3, 50]))))
    for number in changed:
        lines[number] = chance.choice(strange)
    return f"{len(changed)} strange lines", b"".join(lines)


def odd_picture(source: Path, chance: random.Random) -> tuple[str, bytes]:
    """A picture in some format and mode, sound or damaged, or something else that has its name."""
    kind = chance.choice(["damaged", "damaged", "damaged", "odd", "header", "other"])
    if kind == "other":
        others = [
            b"",
            b"\x89PNG\r\n\x1a\n",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
            b"P6 100000 100000 255\n",
            b"#!/bin/sh\nexit 1\n",
            bytes(100_000),
            b"\xff\xd8\xff\xe0" + bytes(chance.randrange(256) for _ in range(3000)),
        ]
        content = chance.choice(others)
        return f"{content[:8]!r}", content
    if kind == "header":  # far larger than what follows
        side = chance.choice([0, 1, 20_000, 60_000, 2**31 - 1])
        chunk = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
        content = bytearray(source.read_bytes())
        content[16 : 16 + len(chunk)] = chunk
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        return f"{side} x {side} px", bytes(content)
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    side = chance.choice([1, 3, 40, 3000])
    form = chance.choice(["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
    modes = {
        "JPEG": ["RGB", "L", "CMYK"],
        "PNG": ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"],
        "TIFF": ["RGB", "L", "F", "I;16", "CMYK"],
    }
    mode = chance.choice(modes.get(form, ["RGB", "L"]))
    if kind == "odd":
        picture = picture.resize((side, chance.choice([1, side])))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    else:
        picture = picture.convert(mode)
    file = io.BytesIO()
    picture.save(file, format=form)
    if kind == "odd":
        return f"{form}, {mode}, {picture.size}", file.getvalue()
    what, content = damaged_bytes(file.getvalue(), chance)
    return f"{form}, {mode}, {what}", content
