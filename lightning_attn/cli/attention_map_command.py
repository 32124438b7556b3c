"""The subcommand `attention-map`: where chosen queries of a trained network look, as figures and a page."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info

from lightning_attn.archives import reading_once
from lightning_attn.attention.spec import TERM_NAMES
from lightning_attn.cli.front import SUBCOMMANDS, command_name
from lightning_attn.cli.parser import Parser
from lightning_attn.cli.stored_configuration import TRUST_HELP
from lightning_attn.datamodules.images.files import read_image
from lightning_attn.datamodules.translation.batches import TranslationDataset
from lightning_attn.datamodules.translation.parallel_text import is_blank
from lightning_attn.errors import ExistingFileError, InputError
from lightning_attn.io import unused_path, write_text, written_together
from lightning_attn.study.report.attention_page import fitting, render_attention
from lightning_attn.tasks import BaseTask, TranslationTask
from lightning_attn.tasks.base import evaluating
from lightning_attn.tasks.images import ImageTask
from lightning_attn.training import run_directory
from lightning_attn.training.checkpoint_keys import MEMBERS_KEY
from lightning_attn.training.checkpoints import read_checkpoint
from lightning_attn.visualization.figures import draw_term_maps, draw_token_matrix, save_figure
from lightning_attn.visualization.images import RecordedImage, record_image
from lightning_attn.visualization.levels import LayerLevels, image_levels, pair_levels
from lightning_attn.visualization.translation import RecordedPair, record_pair

__all__ = ["attention_map_command"]

PAGE = "index.html"
_FEWEST_WITH_HEADS = 150  # queries of a map; with fewer, the page has the mean and one head alone for more queries
_FEWEST = 30  # queries of a map, before layers are left out
_LEVELS = 9_000_000  # bytes of all layers before compression, from which on not all queries are computed
_LONGEST_NAME = 60  # characters of the folder of a sentence


def attention_map_command(arguments: list[str]) -> None:
    """Runs the subcommand.

    Args:
        arguments: Those after its name.

    Raises:
        ValueError: If an option is wrong, or the network has no attention with terms.
        OSError: If a file cannot be read or written.
    """
    options = _parser().parse_args(arguments)
    _check(options)
    path = Path(options.ckpt_path)
    folder = _folder(path, options)
    with reading_once():
        members = list(read_checkpoint(path).get(MEMBERS_KEY, {}))
        if members and options.task is None:
            names = " and ".join(members)
            raise InputError(
                f"task: {path} is of a joint training of {names}. Say which is meant: --task {members[0]}."
            )
        task = BaseTask.load(path, trust=options.trust, task=options.task)
    facts = [("checkpoint", str(path)), *([("task", options.task)] if options.task else [])]
    if isinstance(task, TranslationTask):
        if options.image is not None:
            raise InputError(f"image: {path} translates, and takes no image. Give a sentence: --source TEXT.")
        page, figures = _of_sentence(task, options, facts)
    elif isinstance(task, ImageTask):
        if options.image is None:
            raise InputError(f"source: {path} is of images ({task.task_name}). Give one: --image FILE.")
        page, figures = _of_image(task, options, facts)
    else:
        raise InputError(
            f"ckpt_path: {path} is of a {type(task).__name__}; attention-map knows detection, segmentation and "
            "translation. In Python use lightning_attn.visualization.recorded_inputs and term_maps."
        )
    with written_together(folder) as scratch:
        for name, figure in figures.items():
            save_figure(figure, scratch / name)
        write_text(scratch / PAGE, page)
    rank_zero_info(f"{len(figures)} figure{'s' if len(figures) > 1 else ''}, and a page to explore: {folder / PAGE}")


def _parser() -> Parser:
    parser = Parser(
        prog=f"{command_name()} attention-map", description=f"attention-map: {SUBCOMMANDS['attention-map']}."
    )
    parser.add_argument("--ckpt_path", type=str, required=True, help="the checkpoint, or an export (.safetensors)")
    parser.add_argument("--task", type=str | None, default=None, help="which network of a joint training")
    parser.add_argument("--image", type=str | None, default=None, help="a picture, for a detector or a segmenter")
    parser.add_argument("--source", type=str | None, default=None, help="a sentence, for a translator")
    parser.add_argument("--target", type=str | None, default=None, help="its translation (default: the network's)")
    parser.add_argument(
        "--layer", action="append", default=[], help="name of a layer, or its end; repeat it (default: the last one)"
    )
    parser.add_argument("--head", type=str, default="mean", help="number of a head from 1 on, or mean")
    parser.add_argument(
        "--query",
        nargs="+",
        action="append",
        default=[],
        metavar="PLACE",
        help="row and column of a pixel from 0 on (--query 120 200), or a word or its number from 1 on; repeat it "
        "(default: the middle of the picture, all words of a sentence)",
    )
    parser.add_argument(
        "--terms", nargs="+", default=[], metavar="TERM", help="some of E1 E2 E3 E4 (default: all), beside their sum"
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="a folder (default: attention/<name> in the run's)"
    )
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST_HELP)
    return parser


def _check(options: Any) -> None:
    """Refuses what is wrong whatever the checkpoint is."""
    given = [name for name in ("image", "source") if options[name] is not None]
    if len(given) != 1:
        what = "neither is given" if not given else "both are given"
        raise InputError(f"image, source: {what}. Give a picture (--image FILE) or a sentence (--source TEXT).")
    if options.target is not None and options.image is not None:
        raise InputError("target: a picture has no translation. Leave it out, or give a sentence (--source TEXT).")
    for name in ("source", "target"):
        if options[name] is not None and is_blank(options[name]):
            raise InputError(f"{name}: {options[name]!r} has no word. Give a sentence, in quotation marks.")
    for term in options.terms:
        if term not in TERM_NAMES:
            raise InputError(f"terms: {term!r} is none of {' '.join(TERM_NAMES)}, such as --terms E1 E4.")
    head = options.head
    if head != "mean" and not (head.isdecimal() and int(head) >= 1):
        raise InputError(f"head: {head!r} is neither the number of a head, from 1 on, nor mean.")


def _folder(checkpoint: Path, options: Any) -> Path:
    """Where the files are written to.

    Raises:
        FileExistsError: If the folder that was asked for has such a page.
    """
    if options.output == "":
        raise InputError("--output: '' names no folder. Leave it out for one in the run directory.")
    if options.output is not None:
        folder = Path(options.output)
        if folder.exists() and not folder.is_dir():
            raise ExistingFileError(f"output: {folder} is a file and is kept. Give a folder.")
        if (folder / PAGE).exists():
            raise ExistingFileError(f"output: {folder / PAGE} is there, and is kept. Give another folder.")
        return folder
    words = "".join(one if one.isalnum() else "_" for one in (options.source or "")).strip("_")
    name = Path(options.image).stem if options.image is not None else words[:_LONGEST_NAME].rstrip("_") or "sentence"
    return unused_path((run_directory.owner(checkpoint) or checkpoint.parent) / "attention" / name)


# Pictures


def _of_image(task: ImageTask[Any, Any], options: Any, facts: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    pixels = read_image(Path(options.image), exif=task.exif)
    original = pixels.shape[0], pixels.shape[1]
    asked = [_pixel(one, original) for one in options.query]
    with evaluating(task):
        recorded = record_image(task.built_network, task.network_input(pixels))
    if recorded is None:
        raise _no_terms(task, options)
    layers = _chosen_layers(list(recorded.inputs), options.layer)
    terms = _chosen_terms(recorded, layers, options)
    seen = recorded.image.shape[1], recorded.image.shape[2]
    places = asked or [(original[0] // 2, original[1] // 2)]
    queries = [_seen_pixel(place, original, seen) for place in places]
    figures = {}
    for layer in layers:
        grid = recorded.grid(layer)
        for (y, x), query in zip(places, queries, strict=True):
            name = "attention.png" if len(layers) * len(queries) == 1 else f"{layer}_{y}_{x}.png"
            figures[name] = draw_term_maps(
                recorded.maps(layer, grid.position_of(*query)),
                recorded.image.cpu(),
                grid=grid,
                terms=terms,
                heads="mean" if options.head == "mean" else int(options.head),
                title=f"{layer}: where the query at pixel ({y}, {x}) of {Path(options.image).name} looks",
            )
    kept, notes = fitting(
        [_image_levels(recorded, layer, terms, options.head, _LEVELS // len(layers)) for layer in layers], options.head
    )
    notes += _thinning_notes(recorded, kept)
    if seen != original:
        notes.append(
            f"The network saw the picture resized from {original[0]} × {original[1]} to {seen[0]} × {seen[1]} pixels."
        )
    if getattr(getattr(task, "inference", None), "mode", "whole") != "whole":
        notes.append("The maps are of the network on the whole picture, without the tiles of the task's inference.")
    page = render_attention(
        kept,
        title=f"Where a query of {Path(options.image).name} looks",
        facts=[*facts, ("picture", f"{options.image}, {original[0]} × {original[1]} pixels")],
        notes=notes,
        start={"layer": kept[-1].name, "head": options.head, "term": "whole", "query": list(queries[0])},
        image=Image.fromarray(np.ascontiguousarray(recorded.image.cpu().movedim(0, -1).numpy())),
        original_size=original,
    )
    return page, figures


def _pixel(given: Sequence[str], size: tuple[int, int]) -> tuple[int, int]:
    """The pixel that a `--query` names.

    Raises:
        ValueError: If it names none of the picture.
    """
    shown = " ".join(given)
    if len(given) != 2 or not all(one.isdecimal() for one in given):
        raise InputError(
            f"query: {shown!r} is not the row and the column of a pixel, such as --query {size[0] // 2} {size[1] // 2}."
        )
    y, x = int(given[0]), int(given[1])
    if y >= size[0] or x >= size[1]:
        raise InputError(
            f"query: {shown!r} is not in the picture, whose rows are 0 to {size[0] - 1} and columns 0 to {size[1] - 1}."
        )
    return y, x


def _seen_pixel(pixel: tuple[int, int], size: tuple[int, int], seen: tuple[int, int]) -> tuple[float, float]:
    """Where a pixel of the file is in the picture that was resized from its size to that which was seen."""
    # Its middle is at + 1/2, in parts of a side that resizing keeps.
    y, x = (
        min(max((at + 0.5) * new / old - 0.5, 0.0), new - 1.0) for at, old, new in zip(pixel, size, seen, strict=True)
    )
    return y, x


def _image_levels(
    recorded: RecordedImage, layer: str, terms: Sequence[str] | None, head: str, most: int
) -> LayerLevels:
    """The levels of as many queries as so many bytes may hold, of all heads where that leaves enough queries."""
    attention = recorded.inputs[layer][0]
    grid = recorded.grid(layer)
    keys = math.prod(grid.keys_inside(attention.kv_stride))
    size = keys * ((str(attention.terms).count("1") if terms is None else len(terms)) + 1)
    queries = math.prod(grid.inside)
    steps = [(step, math.prod(-(-length // step) for length in grid.inside)) for step in range(1, max(grid.inside) + 1)]
    with_all_heads = [step for step, count in steps if count * size * (attention.num_heads + 1) <= most]
    if with_all_heads and dict(steps)[with_all_heads[0]] >= min(_FEWEST_WITH_HEADS, queries):
        return image_levels(recorded, layer, terms, heads=None, step=with_all_heads[0])
    heads = tuple(dict.fromkeys(("mean", head)))
    enough = [step for step, count in steps if count >= min(_FEWEST, queries)]
    step = next((step for step in enough if dict(steps)[step] * size * len(heads) <= most), enough[-1])
    return image_levels(recorded, layer, terms, heads=heads, step=step)


def _thinning_notes(recorded: RecordedImage, layers: Sequence[LayerLevels]) -> list[str]:
    """What of the layers a page does not hold."""
    notes = []
    for one in layers:
        step, heads = one.facts["query_step"], recorded.inputs[one.name][0].num_heads
        kept = []
        if step > 1:
            kept.append(f"the queries at every {step} positions (the figures are of exactly that of --query)")
        if heads > 1 and len(one.heads) < heads + 1:
            shown = " and ".join("the mean" if head == "mean" else f"head {head}" for head in one.heads)
            kept.append(f"of {heads} heads {shown} (--head N is another)")
        if kept:
            notes.append(f"To keep the page small, it holds of {one.name} {', and '.join(kept)}.")
    return notes


# Sentences


def _of_sentence(task: TranslationTask, options: Any, facts: list[tuple[str, str]]) -> tuple[str, dict[str, Any]]:
    assert task.vocabulary is not None, "load builds it"
    target = options.target
    if target is None:
        target = task.predict([options.source])[0]
        if is_blank(target):
            raise InputError(
                "target: the network translates this sentence by no word. Give a translation (--target TEXT)."
            )
    batch = TranslationDataset.from_text(task.vocabulary, [options.source], [target])[0].to(task.device)
    with evaluating(task):
        recorded = record_pair(task.built_network, task.vocabulary, batch.source, batch.target)
    if not recorded.inputs:
        raise _no_terms(task, options)
    layers = _chosen_layers(list(recorded.inputs), options.layer)
    terms = _chosen_terms(recorded, layers, options)
    figures = {}
    start = 0
    for layer in layers:
        words, keys = recorded.queries(layer), recorded.keys(layer)
        places: list[int | None] = [_word(one, words, layer) for one in options.query]
        start = places[0] or 0 if places else 0
        for place in places or [None]:
            name = "attention.png"
            if len(layers) * max(1, len(places)) > 1:
                name = f"{layer}.png" if place is None else f"{layer}_{place + 1}.png"
            figures[name] = draw_token_matrix(
                recorded.maps(layer, place),
                words if place is None else [words[place]],
                keys,
                terms=terms,
                heads="mean" if options.head == "mean" else int(options.head),
                title=layer if options.head == "mean" else f"{layer}, head {options.head}",
                query_label="source token (query)" if words is recorded.sources else "predicted target token (query)",
                key_label="source token (key)" if keys is recorded.sources else "target token that is read (key)",
            )
    kept, notes = fitting([pair_levels(recorded, layer, terms, heads=None) for layer in layers], options.head)
    page = render_attention(
        kept,
        title="Where a word looks",
        facts=[
            *facts,
            ("source", options.source),
            ("translation" if options.target is None else "target", target),
        ],
        notes=notes,
        start={"layer": kept[-1].name, "head": options.head, "term": "whole", "query": start},
    )
    return page, figures


def _word(given: Sequence[str], words: Sequence[str], layer: str) -> int:
    """The token that a `--query` names: by its number from 1 on, or the first of a word.

    Raises:
        ValueError: If it names none.
    """
    name = " ".join(given)
    if name.isdecimal() and 1 <= int(name) <= len(words):
        return int(name) - 1
    if name in words:
        return words.index(name)
    starts = [place for place, word in enumerate(words) if word.startswith("_") or word == "</s>"]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        if "".join(words[start:end]).removeprefix("_").casefold() == name.casefold():
            return start
    raise InputError(
        f"query: {name!r} is no query of {layer}. Give one of its tokens, {' '.join(words)}, or a number from 1 to "
        f"{len(words)}."
    )


# Both


def _no_terms(task: BaseTask, options: Any) -> InputError:
    return InputError(
        f"ckpt_path: {options.ckpt_path} has no attention with terms (its mechanism is none, dynamic or of your own), "
        "so there are no maps. Give a checkpoint of a network with Transformer attention."
    )


def _chosen_layers(known: list[str], asked: Sequence[str]) -> list[str]:
    """Full names of the layers that were asked for, in the network's order; the last one by default.

    Raises:
        ValueError: If a name is of none or of several.
    """
    chosen = []
    for name in asked or known[-1:]:
        found = [one for one in known if one == name] or [one for one in known if f".{one}".endswith(f".{name}")]
        if len(found) != 1:
            what = "is no layer with an attention map" if not found else f"may be {' or '.join(found)}"
            raise InputError(f"layer: {name!r} {what}. Give one of {', '.join(known)}.")
        chosen.append(found[0])
    return [one for one in known if one in chosen]


def _chosen_terms(
    recorded: RecordedImage | RecordedPair, layers: Sequence[str], options: Any
) -> tuple[str, ...] | None:
    """The terms that were asked for; None for all that a layer has.

    Raises:
        ValueError: If a layer has no such term or head.
    """
    for layer in layers:
        attention = recorded.inputs[layer][0]
        if options.head != "mean" and int(options.head) > attention.num_heads:
            raise InputError(
                f"head: {options.head} is none of the heads 1 to {attention.num_heads} of {layer}, nor mean."
            )
        on = [name for name, digit in zip(TERM_NAMES, str(attention.terms), strict=True) if digit == "1"]
        for term in options.terms:
            if term not in on:
                raise InputError(f"terms: {term} is off in {layer}, which has {' '.join(on)}. Give some of these.")
    return tuple(sorted(set(options.terms))) or None
