"""Draws the figure of docs/trade_off.md and prints its table, in seconds and from nothing but this repository.

`python docs/figures/make_trade_off_figure.py [folder]` writes trade_off.png beside this file, or into the folder.

Accuracies and the cost without attention are the paper's (`configs/studies/figure_3a_miniature.yaml` and `3b`). What
attention adds is counted module by module: by the paper's formulas, and as the algorithms here run on the meta device.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lightning_attn.attention import AttentionSpec, TransformerAttention
from lightning_attn.attention.flops import paper_count
from lightning_attn.study.grid import Study
from lightning_attn.study.profile import count_multiply_adds
from lightning_attn.visualization import save_figure

HERE = Path(__file__).parent
SETS = ("0010", "0001", "0011", "0100", "0110", "1010", "1111")
# Task, panel of Fig. 3, name of its score, and the attentions: how many, channels, height and width of the map (kv
# stride 1), as in docs/attention.md.
TASKS = (
    ("Detection, COCO", "figure_3a", "mAP", ((6, 256, 50, 84), (3, 512, 25, 42))),
    ("Segmentation, Cityscapes", "figure_3b", "mIoU", ((6, 256, 96, 96), (4, 512, 96, 96))),
)
MOVED = ("0010", "0001", "0011")
# Where the names of points that lie close together are written, in points from them.
LABELS = {"0010": ((-6, 4), "right"), "0001": ((7, -12), "left"), "0011": ((0, 8), "center"), "w/o": ((0, 8), "center")}
LABELS |= {"0100": ((7, -6), "left"), "0110": ((0, 8), "center")}
BLUE, ORANGE = "#0072b2", "#d55e00"


def added(terms: str, modules: tuple[tuple[int, int, int, int], ...]) -> tuple[float, float]:
    """What the attentions of a network add, in 10^9 multiply-adds: by the paper's count, and really done."""
    by_paper, done = 0.0, 0.0
    for number, dim, height, width in modules:
        with torch.device("meta"):
            attention = TransformerAttention(dim, 8, terms, ndim=2).eval()
            x = torch.empty(1, dim, height, width)
        by_paper += number * paper_count(AttentionSpec(terms=terms), dim, (height, width)).total / 1e9
        done += number * count_multiply_adds(attention, x).total / 1e9
    return by_paper, done


def envelope(points: dict[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in cost and score, by cost."""
    chosen: list[tuple[float, float]] = []
    for cost, score in sorted(points.values()):
        if not chosen or score > chosen[-1][1]:
            chosen.append((cost, score))
    return chosen


def main(folder: Path) -> None:
    """Draws the figure and prints the table."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, (task, panel, score, modules) in zip(figure.subplots(1, 2), TASKS, strict=True):
        reference = Study.read(HERE.parents[1] / "configs" / "studies" / f"{panel}_miniature.yaml").reference
        base, lowest = reference["none",]["GFLOPs"], reference["none",][score]
        by_paper, here = {"w/o": (base, lowest)}, {"w/o": (base, lowest)}
        print(f"\n{task}\n| set | {score} | paper's count | done here | added: here / paper's |\n|" + " --- |" * 5)
        print(f"| w/o | {lowest} | {base} | {base} | |")
        for terms in SETS:
            counted, done = added(terms, modules)
            accuracy = reference[terms,][score]
            by_paper[terms], here[terms] = (base + counted, accuracy), (base + done, accuracy)
            print(f"| {terms} | {accuracy} | {base + counted:.1f} | {base + done:.1f} | {done / counted:.2f} |")
        for points, colour, line in ((by_paper, "0.6", "--"), (here, BLUE, "-")):
            axes.step(*zip(*envelope(points), strict=True), where="post", color=colour, ls=line, lw=1.2, zorder=1)
        for terms, (cost, accuracy) in here.items():
            moved = terms in MOVED
            colour = ORANGE if moved else BLUE
            axes.plot(*by_paper[terms], "o", mfc="white", mec=colour if moved else "0.6", zorder=2)
            axes.plot(cost, accuracy, "o", color=colour, zorder=3)
            if moved:
                axes.annotate(
                    "", (cost, accuracy), by_paper[terms], arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 1.5}
                )
        names: dict[tuple[float, float], list[str]] = {}
        for terms, point in here.items():
            names.setdefault(point, []).append(terms)
        for point, some in names.items():
            offset, side = LABELS.get(some[0], ((0, 7), "center"))
            colour = ORANGE if some[0] in MOVED else "black"
            axes.annotate(", ".join(some), point, offset, textcoords="offset points", fontsize=9, color=colour, ha=side)
        axes.margins(0.1, 0.1)
        axes.set(title=task, xlabel="multiply-adds of the network, 10⁹", ylabel=f"{score} in the paper")
        axes.grid(alpha=0.25)
    marks = [
        Line2D([], [], marker="o", mfc="white", mec="0.6", color="0.6", ls="--", label="as the paper counts"),
        Line2D([], [], marker="o", color=BLUE, label="as done here"),
        Line2D([], [], marker="o", color=ORANGE, ls="", label="0010, 0001 and 0011, which move"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
    print(f"\n{save_figure(figure, folder / 'trade_off.png')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
