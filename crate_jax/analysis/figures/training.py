"""Figures of a run: its curves, and its confusion of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from crate_jax.analysis.figures.canvas import (
    COLOURS,
    Picture,
    drawing,
    framed,
    new_figure,
    number,
    signed,
)

MOST_CLASSES = 20


@drawing
def curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]], name: str, *, logarithmic: bool = False
) -> Picture:
    """A scalar over the steps, of training and of evaluation, for every run.

    Args:
        runs: the lines of each run's ``metrics.jsonl``, in order, by the run's name.
        name: of the scalar without its split, such as "loss".
        logarithmic: whether the vertical axis is.
    """
    figure = new_figure(4, 2.9)
    axes = figure.subplots()
    sentences, table = [], {"run": [], "split": [], "step": [], "value": []}
    drawn = 0
    for i, (run, lines) in enumerate(runs.items()):
        for split, style in (("train", "-"), ("test", "--")):
            points = [(x["step"], x[f"{split}/{name}"]) for x in lines if f"{split}/{name}" in x]
            if not points:
                continue
            steps, values = np.asarray(points, float).T
            label = split if len(runs) == 1 else f"{run}, {split}"
            colour = COLOURS[(2 * i + (split == "test")) % len(COLOURS)]
            marker = "o" if len(steps) < (30 if split == "test" else 2) else None
            axes.plot(steps, values, style, color=colour, label=label, marker=marker)
            drawn += 1
            whose = "" if len(runs) == 1 else f" of {run}"
            ends = [f"{number(values[i])} at step {steps[i]:.0f}" for i in (0, -1)]
            does = f"goes from {ends[0]} to {ends[1]}" if len(steps) > 1 else f"is {ends[0]}"
            sentences.append(f"{name} on the {split} split{whose} {does}.")
            table["run"] += [run] * len(steps)
            table["split"] += [split] * len(steps)
            table["step"] += [int(x) for x in steps]
            table["value"] += [float(x) for x in values]
    axes.set(xlabel="step", title=name, yscale="log" if logarithmic else "linear")
    axes.grid()
    if drawn > 1:
        axes.legend()
    return Picture(figure, " ".join(sentences), table)


@drawing
def confusion(counts_YxY: np.ndarray, names: Sequence[str]) -> Picture:
    """Draw the share of each class, a row, that was taken for another one, a column.

    Of more than twenty classes the twenty with the most mistakes are drawn.

    Args:
        counts_YxY: images of each class, by what they were taken for.
        names: the names of the classes.
    """
    wrong_Y = counts_YxY.sum(axis=1) - np.diag(counts_YxY)
    of_all = float(np.trace(counts_YxY) / max(counts_YxY.sum(), 1))
    shown = np.sort(np.argsort(-wrong_Y, kind="stable")[:MOST_CLASSES])
    chosen = counts_YxY[np.ix_(shown, shown)]
    shares = chosen / np.maximum(counts_YxY.sum(axis=1)[shown], 1)[:, None]
    side = 1.2 + 0.32 * len(shown)
    figure = new_figure(side + 0.4, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap=signed(), vmin=-1, vmax=1)
    for i, row in enumerate(chosen):
        for j, count in enumerate(row):
            if count:
                how: Any = {"color": "white"} if shares[i, j] > 0.5 else {}
                axes.text(j, i, str(count), ha="center", va="center", fontsize=7, **how)
    framed(axes)
    labels = [str(names[int(i)])[:12] for i in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=90 if max(map(len, labels)) > 2 else 0)
    axes.set_yticks(range(len(shown)), labels)
    axes.set(xlabel="taken for", ylabel="class")
    off = counts_YxY - np.diag(np.diag(counts_YxY))
    alt = (
        f"Confusion of {len(counts_YxY)} classes over {counts_YxY.sum()} images: "
        f"{number(of_all)} are taken for what they are"
    )
    if off.any():
        i, j = divmod(int(off.argmax()), len(off))
        alt += f"; most often {names[i]} is taken for {names[j]}, {off.max()} times"
    rows, columns = np.indices(counts_YxY.shape).reshape(2, -1)
    table = {
        "class": [names[int(i)] for i in rows],
        "taken_for": [names[int(j)] for j in columns],
        "images": counts_YxY.ravel(),
    }
    return Picture(figure, alt + ".", table)
