"""Measures over the layers: R^c and sparsity as in figure 3 of arXiv 2306.01129, and others."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from crate_jax.analysis.figures.canvas import (
    COLOURS,
    MARKERS,
    Picture,
    drawing,
    new_figure,
    number,
)


class Curve(NamedTuple):
    """A measure of every layer.

    Attributes:
        mean: (L,), over the images.
        std: (L,), likewise; None: not known.
    """

    mean: np.ndarray
    std: np.ndarray | None = None


class Measure(NamedTuple):
    """The measure that is drawn in a panel.

    Attributes:
        name: of the measure, as the curves have it.
        title: in words.
        unit: the unit of the axis.
    """

    name: str
    title: str
    unit: str


@drawing
def by_layer(
    curves: Mapping[str, Mapping[str, Curve]], measures: Sequence[Measure], *, columns: int = 3
) -> Picture:
    """Measures over the layers, a panel each, a line for whatever was measured.

    Args:
        curves: by what was measured, such as "test" or "before training", then by measure; one that
            lacks a measure is left out of its panel.
        measures: a panel each, in order.
        columns: most panels in a row.
    """
    columns = min(columns, len(measures))
    rows = -(-len(measures) // columns)
    figure = new_figure(4 * columns, 2.9 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    sentences, table = [], {"measure": [], "of": [], "layer": [], "mean": [], "std": []}
    for axes, measure in zip(panels, measures, strict=False):
        unit = f" ({measure.unit})" if measure.unit else ""
        sentences.append(f"{measure.title[:1].upper()}{measure.title[1:]}{unit}.")
        for i, (label, found) in enumerate(curves.items()):
            if measure.name not in found:
                continue
            curve = found[measure.name]
            _line(axes, curve, i, label)
            sentences.append(_sentence(label[:1].upper() + label[1:], curve.mean))
            _add_rows(table, measure.name, label, curve)
        axes.set(xlabel="layer ℓ", ylabel=measure.unit, title=measure.title)
        axes.grid()
        if len(curves) > 1:
            axes.legend()
    for axes in panels[len(measures) :]:
        axes.remove()
    return Picture(figure, " ".join(sentences), table)


def _line(axes, curve: Curve, i: int, label: str) -> None:
    """One curve, with the band of a deviation on either side."""
    layers = np.arange(1, len(curve.mean) + 1)
    colour = COLOURS[i % len(COLOURS)]
    if curve.std is not None and np.isfinite(curve.std).all():
        ends = curve.mean - curve.std, curve.mean + curve.std
        axes.fill_between(layers, *ends, alpha=0.18, color=colour, linewidth=0)
    style = "--" if "before" in label else "-"
    marker = MARKERS[i % len(MARKERS)]
    how = (
        dict(markersize=8, markerfacecolor="none", zorder=3) if i == 0 else {}
    )  # others show in it
    axes.plot(layers, curve.mean, style, marker=marker, color=colour, label=label, **how)
    axes.set_xticks(layers if len(layers) <= 12 else layers[:: len(layers) // 8])


def _sentence(label: str, mean_L: np.ndarray) -> str:
    """Describe one curve in numbers."""
    ends = f"{label}: {number(mean_L[0])} in layer 1"
    if len(mean_L) < 2:
        return f"{ends}."
    rises = np.flatnonzero(np.diff(mean_L) > 0) + 2
    where = f"up in layer{'s' * (len(rises) > 1)} {', '.join(map(str, rises))}"
    if len(rises) in (0, len(mean_L) - 1):
        where = "up at each layer" if len(rises) else "never up"
    return f"{ends}, {number(mean_L[-1])} in layer {len(mean_L)}, {where}."


def _add_rows(table: dict[str, list], name: str, label: str, curve: Curve) -> None:
    """One curve as rows of the table; a deviation that is not known stays empty."""
    L = len(curve.mean)
    table["measure"] += [name] * L
    table["of"] += [label] * L
    table["layer"] += range(1, L + 1)
    table["mean"] += [float(v) for v in curve.mean]
    table["std"] += [""] * L if curve.std is None else [float(v) for v in curve.std]
