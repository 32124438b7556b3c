"""Draws the figures of docs/attention.md, in about a minute and from nothing but this repository.

`python docs/figures/make_attention_figures.py [folder]` writes them beside this file, or into the folder.

The attention of the image has weights set by hand, so that each term visibly does one thing. That of the sentences is
part of a small Transformer that learns to translate the miniature corpus here and now.
"""

import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from datamodules.miniature.translation import miniature_pairs
from lightning_attn.attention import AttentionSpec, TransformerAttention
from lightning_attn.attention.deformable import DeformableConv
from lightning_attn.attention.dynamic import DynamicConv
from lightning_attn.attention.positions import relative_encoding
from lightning_attn.networks.translation.transformer import Transformer
from lightning_attn.visualization import (
    draw_dynamic_kernels,
    draw_sampling_points,
    draw_term_maps,
    draw_token_matrix,
    dynamic_kernel,
    recorded_inputs,
    sampling_points,
    save_figure,
    term_maps,
)

# ------------------------------------------------------------------------------------------------- an image of objects

PIXELS, STRIDE = (256, 384), 8
SIZE = (PIXELS[0] // STRIDE, PIXELS[1] // STRIDE)
COLOURS = {"orange": (0.90, 0.45, 0.10), "blue": (0.10, 0.40, 0.75), "green": (0.15, 0.60, 0.40)}
SHAPES = ("triangle", "disc", "square")
OBJECTS = (  # shape, colour, row and column of the middle, half the size; in pixels
    ("triangle", "orange", 130, 120, 27),
    ("disc", "orange", 120, 232, 24),
    ("square", "orange", 62, 44, 22),
    ("disc", "blue", 56, 160, 22),
    ("square", "green", 200, 200, 24),
    ("triangle", "green", 60, 322, 24),
    ("disc", "green", 208, 50, 23),
    ("square", "blue", 150, 316, 23),
    ("disc", "orange", 222, 344, 19),
)
QUERY = (16, 15)  # on the orange triangle
DIM = 64
Array = npt.NDArray[np.float64]


def scene() -> tuple[Array, Tensor]:
    """An image `[H, W, 3]`, and how much of each cell is of each colour and shape, as a map `[1, DIM, h, w]`."""
    rows, columns = np.mgrid[: PIXELS[0], : PIXELS[1]]
    ground = 0.84 - 0.08 * rows / PIXELS[0]
    image = ground[..., None] * np.array([0.98, 0.97, 0.93])
    kinds = np.zeros((DIM, *PIXELS))
    for shape, colour, row, column, half in OBJECTS:
        down, right = rows - row, columns - column
        outside = {  # distance to the edge, in pixels
            "disc": np.hypot(down, right) - half,
            "square": np.maximum(abs(down), abs(right)) - 0.9 * half,
            "triangle": np.maximum(-right - 0.8 * half, (right + 2 * abs(down) - 1.2 * half) / math.sqrt(5)),
        }[shape]
        cover = np.clip(0.5 - outside, 0, 1)  # a soft edge of one pixel
        image = image * (1 - cover[..., None]) + cover[..., None] * np.array(COLOURS[colour])
        kinds[list(COLOURS).index(colour)] += cover
        kinds[len(COLOURS) + SHAPES.index(shape)] += cover
    cells = kinds.reshape(DIM, SIZE[0], STRIDE, SIZE[1], STRIDE).mean((2, 4))
    return image, torch.tensor(cells, dtype=torch.float32)[None]


def position_row(along_x: Array, along_y: Array) -> Tensor:
    """A row of V^R whose energies are, by least squares, the given ones, by offset from -n to n along each axis."""
    halves = []
    for wanted in (along_x, along_y):
        reach = len(wanted) // 2
        encoding = relative_encoding(torch.arange(-reach, reach + 1).double(), DIM // 2)
        ridge = 1e-4 * torch.eye(DIM // 2, dtype=torch.float64)
        halves.append(torch.linalg.solve(encoding.T @ encoding + ridge, encoding.T @ torch.tensor(wanted * 2**0.5)))
    return torch.cat(halves).float()


def bump(reach: int, middle: float, width: float) -> Array:
    """Energies whose exponential is a Gaussian around an offset, for offsets from -reach to reach."""
    offsets = np.arange(-reach, reach + 1)
    return -np.minimum((offsets - middle) ** 2 / (2 * width**2), 9.0)


@torch.no_grad()
def set_by_hand(**settings: Any) -> TransformerAttention:
    """An attention of one head whose terms each do one thing; the comments name the coordinates of its head."""
    attention = TransformerAttention(DIM, num_heads=1, terms="1111", ndim=2, **settings)
    for parameter in attention.parameters():
        parameter.zero_()
    along_x, along_y = SIZE[1] - 1, SIZE[0] - 1
    for colour in range(3):  # 0-2, E1: what is orange looks for what is orange
        attention.query_proj.weight[colour, colour] = attention.key_proj.weight[colour, colour] = 2.0
    attention.key_proj.weight[3, :3] = 1.0  # 3, E3: every object is worth a look
    attention.key_bias[0, 3] = 2.5
    for shape, (down, right) in enumerate([(0, 13), (9, 0), (0, -13)]):  # 4-6, E2: a triangle looks to the right
        attention.query_proj.weight[4 + shape, 3 + shape] = 1.0
        attention.position_proj.weight[4 + shape] = position_row(bump(along_x, right, 7), bump(along_y, down, 5))
    attention.position_proj.weight[7] = position_row(bump(along_x, 0, 9), bump(along_y, 0, 9))  # 7, E4: near is better
    attention.position_bias[0, 7] = 1.0
    return attention


@torch.no_grad()
def four_heads() -> TransformerAttention:
    """An attention of four heads, each of which uses one term of the one-headed attention set by hand."""
    single = set_by_hand()
    attention = TransformerAttention(DIM, num_heads=4, terms="1111", ndim=2)
    for parameter in attention.parameters():
        parameter.zero_()
    width = DIM // 4
    for head, coordinates in enumerate([slice(0, 3), slice(4, 7), slice(3, 4), slice(7, 8)]):
        own = slice(head * width, head * width + coordinates.stop - coordinates.start)
        for name in ("query_proj", "key_proj", "position_proj"):
            getattr(attention, name).weight[own] = getattr(single, name).weight[coordinates]
        for name in ("key_bias", "position_bias"):
            getattr(attention, name).view(-1)[own] = getattr(single, name).view(-1)[coordinates]
    return attention


def draw_image_figures(folder: Path) -> None:
    """The terms, the heads, the range and stride of keys, and both convolutions, on the same image."""
    image, content = scene()
    maps = term_maps(set_by_hand(), content, position=QUERY)
    place = "the orange triangle"
    draw_term_maps(maps, image, folder / "attention_terms.png", title=f"What a query on {place} attends to")
    draw_term_maps(
        maps, image, folder / "attention_energies.png", quantity="energies", title=f"Energies of a query on {place}"
    )
    maps = term_maps(four_heads(), content, position=QUERY)
    draw_term_maps(maps, image, folder / "attention_heads.png", heads="both", title=f"The heads of a query on {place}")
    maps = term_maps(set_by_hand(window=25, kv_stride=2), content, position=QUERY)
    draw_term_maps(
        maps, image, folder / "attention_window.png", title="The same weights with window 25 and kv_stride 2"
    )
    draw_deformable(image, content, folder / "deformable_points.png")
    draw_dynamic(content, folder / "dynamic_kernels.png")


@torch.no_grad()
def draw_deformable(image: Array, content: Tensor, path: Path) -> None:
    """Offsets that the shape decides: triangles look ahead, discs around themselves, squares turn."""
    convolution = DeformableConv(DIM, DIM, modulated=True)
    grid = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 2)
    turned = grid @ torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) * 1.3
    moves = {"triangle": torch.tensor([0.0, 12.0]) + 1.3 * grid, "disc": 2.4 * grid, "square": turned - grid}
    for shape, move in moves.items():
        convolution.offset.weight[:18, len(COLOURS) + SHAPES.index(shape), 1, 1] = move.flatten()
    convolution.offset.weight[18:, :3, 1, 1] = (3.0 - 2.0 * grid.abs().sum(1))[:, None]  # the middle counts more
    queries = [QUERY, (7, 20), (25, 25)]
    draw_sampling_points([sampling_points(convolution, content, query) for query in queries], image, path)


@torch.no_grad()
def draw_dynamic(content: Tensor, path: Path) -> None:
    """Kernels that the query's shape decides: before it, around it, or at it, each in every group in another way."""
    convolution = DynamicConv(DIM, kernel_size=7, groups=8, ndim=2)
    for parameter in convolution.parameters():
        parameter.zero_()
    convolution.input_proj.weight[:DIM] = torch.eye(DIM)
    convolution.input_proj.bias[DIM:] = 10.0  # an open gate: the kernel is predicted from the content as it is
    rows, columns = torch.meshgrid(torch.arange(-3.0, 4.0), torch.arange(-3.0, 4.0), indexing="ij")
    for group in range(8):
        angle = math.tau * group / 8
        logits = {
            "triangle": 1.2 * (columns * math.cos(angle) + rows * math.sin(angle)),
            "disc": -((torch.hypot(rows, columns) - 0.5 * group) ** 2),
            "square": -0.15 * group * torch.maximum(rows.abs(), columns.abs()) ** 2,
        }
        for shape, logit in logits.items():
            taps = slice(group * 49, (group + 1) * 49)
            convolution.kernel_proj.weight[taps, len(COLOURS) + SHAPES.index(shape)] = logit.flatten()
    queries = {"triangle": QUERY, "disc": (7, 20), "square": (25, 25)}
    kernels = {f"{shape}": dynamic_kernel(convolution, content, query) for shape, query in queries.items()}
    draw_dynamic_kernels(kernels, path, title="7 × 7 kernels that dynamic convolution predicts for three queries")


# ----------------------------------------------------------------------------------------------------------- sentences


def words(text: str) -> list[str]:
    """Words and punctuation marks."""
    return re.findall(r"\w+|[^\w\s]", text)


def trained_translation(steps: int) -> tuple[Transformer, dict[str, int]]:
    """A Transformer of one layer that has learned short sentences of the miniature corpus, and its vocabulary."""
    short = ((words(english), words(german)) for english, german in miniature_pairs(0) if len(words(english)) <= 13)
    pairs = list(itertools.islice((pair for pair in short if not re.search(r"\d", "".join(pair[0]))), 6000))
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for word in sorted({word for pair in pairs for sentence in pair for word in sentence}):
        vocabulary[word] = len(vocabulary)
    source, target = (
        nn.utils.rnn.pad_sequence(
            [torch.tensor([vocabulary[word] for word in [*start, *pair[side], "</s>"]]) for pair in pairs], True
        )
        for side, start in ((0, []), (1, ["<s>"]))
    )
    torch.manual_seed(0)
    spec = AttentionSpec(num_heads=4, scale=0.25)
    network = Transformer(
        len(vocabulary), 0, spec, spec, dim=64, hidden_dim=128, encoder_layers=1, decoder_layers=1, dropout=0.0,
        norm_position="pre",
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)
        chosen = torch.randint(0, len(pairs), (32,))
        loss, _, tokens = network.loss(source[chosen], target[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        (loss / tokens).backward()
        optimizer.step()
    return network.eval(), vocabulary


def draw_sentence_figures(folder: Path, steps: int) -> None:
    """Encoder-decoder attention and both self-attentions of one sentence pair."""
    network, vocabulary = trained_translation(steps)
    english, german = words(ENGLISH), words(GERMAN)
    source, target = (
        torch.tensor([[vocabulary[word] for word in sentence]]) for sentence in ([*english, "</s>"], ["<s>", *german])
    )
    encoder, decoder = network.encoder[0], network.decoder[0]
    for attention, name, title, queries, keys, labels in (
        (
            decoder.cross_attention,
            "attention_cross",
            "Encoder-decoder attention",
            [*german, "</s>"],
            [*english, "</s>"],
            ("target token that is predicted (query)", "source token (key)"),
        ),
        (
            encoder.self_attention,
            "attention_encoder",
            "Self-attention of the encoder",
            [*english, "</s>"],
            [*english, "</s>"],
            ("query", "key"),
        ),
        (
            decoder.self_attention,
            "attention_decoder",
            "Self-attention of the decoder",
            ["<s>", *german],
            ["<s>", *german],
            ("query", "key"),
        ),
    ):
        maps = term_maps(attention, **recorded_inputs(attention, lambda: network(source, target)))
        draw_token_matrix(
            maps,
            queries,
            keys,
            folder / f"{name}.png",
            title=f"{title}, mean over heads",
            query_label=labels[0],
            key_label=labels[1],
        )


ENGLISH, GERMAN = (
    "The aunt chose a new lamp in the church yesterday.",
    "Die Tante hat gestern in der Kirche eine neue Lampe ausgesucht.",
)


# ----------------------------------------------------------------------------------------------------------- positions


def draw_encoding(path: Path) -> None:
    """R_{k-q} of one axis."""
    reach = 60
    encoding = relative_encoding(torch.arange(-reach, reach + 1), 64)
    figure = Figure(figsize=(6.4, 3.4), dpi=100, layout="compressed")
    axes = figure.subplots()
    shown = axes.imshow(
        encoding.T,
        extent=(-reach - 0.5, reach + 0.5, 63.5, -0.5),
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
    )
    axes.axhline(31.5, color="black", linewidth=0.8)
    axes.set_yticks([16, 48], ["sin", "cos"])
    axes.set_xlabel("offset k − q along one axis, in positions", fontsize=9)
    axes.set_ylabel("features; wavelengths grow downwards", fontsize=9)
    figure.colorbar(shown, ax=axes, label="value", pad=0.01)
    figure.suptitle("Encoding R of the relative position, D = 64", fontsize=11)
    save_figure(figure, path)


def shrink(path: Path) -> None:
    """Keeps 256 colours of a PNG, which makes it a third of the size."""
    with Image.open(path) as picture:
        smaller = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    smaller.save(path, optimize=True)


def main(folder: Path, steps: int = 1000) -> None:
    """Draws all figures, those of the sentences after so many steps of training."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw_encoding(folder / "position_encoding.png")
    draw_image_figures(folder)
    draw_sentence_figures(folder, steps)
    for path in folder.glob("*.png"):
        shrink(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
