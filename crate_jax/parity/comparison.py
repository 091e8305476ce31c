"""The result of `compare` for people: a table for the terminal and a page with a plot."""

import textwrap

from crate_jax.analysis.figures.canvas import INK, Picture, drawing, inline_svg, new_figure
from crate_jax.columns import WIDTH, in_columns
from crate_jax.files import Json
from crate_jax.pages import render
from crate_jax.parity.difference import (
    LOW_PRECISION_FACTOR,
    TOLERANCES,
    WEIGHTS_SHARE,
    WEIGHTS_WITHIN,
    Comparison,
    Difference,
)

SHOWN_GRADIENTS = 10  # in the terminal; a large model has hundreds
HEADER = ("", "max abs", "relative", "cosine", "tolerance", "")


def sections(found: Comparison) -> dict[str, list[tuple[str, ...]]]:
    """Every comparison as rows of text, by heading."""
    kinds: dict[str, list[tuple[str, ...]]] = {"layers": [], "logits": [], "gradients": []}
    for row in found.rows:
        kinds[row.kind].append(_cells(row))
    losses = [
        (f"{name} step {step}", f"{ours:.6f}", f"{theirs:.6f}", f"{relative:.1e}")
        for name, run in found.training.items()
        for step, (ours, theirs, relative) in enumerate(
            zip(run["ours"], run["torch"], run["relative"], strict=True), start=1
        )
    ]
    tables = {
        "Layers": [HEADER, *kinds["layers"]],
        "Logits": [HEADER, *kinds["logits"]],
        "Gradients": [HEADER, *kinds["gradients"]],
    }
    if losses:
        tables["Losses"] = [("", "ours", "PyTorch", "relative"), *losses]
    return tables


def _cells(row: Difference) -> tuple[str, ...]:
    """One row; in low precision PyTorch's own difference stands last."""
    note = "" if row.within else "OUT"
    if row.torch_relative is not None:
        note = f"PyTorch {row.torch_relative:.1e} {note}".rstrip()
    numbers = (f"{row.max_abs:.1e}", f"{row.relative:.1e}", f"{row.cosine:.9f}")
    return (row.name, *numbers, f"{row.tolerance:.0e}", note)


def verdict(found: Comparison) -> list[str]:
    """The verdict of a comparison, in a few lines."""
    low = found.dtype != "float32"
    worst = {
        kind: max((r.relative for r in found.rows if r.kind == kind), default=0.0)
        for kind in ("layers", "logits", "gradients")
    }
    bars = {kind: f"tolerance {TOLERANCES[kind]:.0e}" for kind in worst}
    if low:
        bars |= dict.fromkeys(worst, f"may be {LOW_PRECISION_FACTOR:g} times that of autocast")
        bars["gradients"] = "not judged"
    lines = [
        f"{kind}: worst relative difference {value:.1e} ({bars[kind]})"
        for kind, value in worst.items()
    ]
    if found.gradient_images < found.images:
        lines.append(
            f"gradients: of {found.gradient_images} {found.examples}; in the other "
            f"{found.images - found.gradient_images} a value of ISTA lies within rounding of its "
            "threshold and fell to either side"
        )
    lines.append(f"top-1 agreement: {found.top1_agreement:.4f} of {found.images} {found.examples}")
    for name, run in found.training.items():
        lines.append(
            f"{name}, {len(run['ours'])} steps: worst relative difference of the loss "
            f"{max(run['relative']):.1e} (tolerance {found.loss_tolerance:.0e}); "
            f"{run['weights_within']:.4%} of the weights within {WEIGHTS_WITHIN:.0e}"
            + (f" (at least {WEIGHTS_SHARE:.1%})" if name == "adamw" and not low else "")
        )
        if "statistics" in run:
            judged = f" (tolerance {TOLERANCES['statistics']:.0e})"
            lines.append(
                f"{name}, the running statistics after them: worst relative difference "
                f"{run['statistics']:.1e}" + (judged if name == "adamw" and not low else "")
            )
        if "relative_to_float64" in run and "torch_relative_to_float64" in run:
            lines.append(
                f"{name}, from PyTorch in float64: ours {max(run['relative_to_float64']):.1e}, "
                f"PyTorch in float32 {max(run['torch_relative_to_float64']):.1e}"
            )
    rates = found.images_per_s
    lines.append(
        f"forward pass: ours {rates['ours']:.1f} {found.examples}/s, PyTorch (eager, CPU) "
        f"{rates['torch']:.1f} {found.examples}/s"
    )
    first = found.first_difference
    lines.append("within tolerance" if first is None else f"DIFFERENT, first at: {first}")
    return lines


def table(found: Comparison) -> str:
    """The whole comparison as text."""
    parts = []
    for heading, rows in sections(found).items():
        if heading == "Gradients" and len(rows) > 1 + SHOWN_GRADIENTS:
            rows = [HEADER, *sorted(rows[1:], key=lambda row: -float(row[2]))[:SHOWN_GRADIENTS]]
            heading = f"Gradients, the {SHOWN_GRADIENTS} that differ most"
        parts.append("\n".join([heading, *in_columns(rows)]))
    told = [textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in verdict(found)]
    return "\n\n".join([*parts, "\n".join(told)]) + "\n"


def page(found: Comparison, conditions: Json) -> str:
    """The whole comparison as one HTML page that needs no other file.

    Args:
        found: the result of `compare`.
        conditions: what a reader needs to judge it: model, weights, inputs, versions.
    """
    return render(
        "comparison.html",
        title="JAX and PyTorch compared",
        within=found.first_difference is None,
        verdict=verdict(found),
        conditions=conditions,
        plot=inline_svg(plot(found), "differences"),
        tables=sections(found),
    )


@drawing
def plot(found: Comparison) -> Picture:
    """Relative differences by layer, and of the losses by step."""
    figure = new_figure(9, 3.2)
    panels = figure.subplots(1, 2 if found.training else 1, squeeze=False)[0]
    smallest = 1e-9  # a difference of zero has no place on a logarithmic axis
    by_tap: dict[str, list[float]] = {}
    for row in found.rows:
        if row.name.startswith("layer "):  # layer 3 mssa
            by_tap.setdefault(row.name.split(" ")[2], []).append(max(row.relative, smallest))
    bars = dict(color=INK, ls="--", lw=1, label="tolerance")
    for tap, values in by_tap.items():
        panels[0].semilogy(range(1, len(values) + 1), values, marker="o", ms=3, label=tap)
    if found.dtype == "float32":
        panels[0].axhline(TOLERANCES["layers"], **bars)
    panels[0].set(xlabel="layer", ylabel="relative difference", title="tensors")
    for name, run in found.training.items():
        steps = range(1, len(run["relative"]) + 1)
        values = [max(v, smallest) for v in run["relative"]]
        panels[1].semilogy(steps, values, marker="o", ms=3, label=name)
    if found.training:
        panels[1].axhline(found.loss_tolerance, **bars)
        panels[1].set(xlabel="step", title="loss while training")
    for axes in panels:
        axes.grid()
        axes.legend(fontsize=7)
    rows = [row for row in found.rows if row.name.startswith("layer ")]
    worst = max((row.relative for row in rows), default=0.0)
    alt = (
        f"Relative differences of {len(by_tap)} tensors over the layers, at most {worst:.1e}, and "
        f"of the loss of {len(found.training)} trainings over the steps."
    )
    table = {"name": [row.name for row in rows], "relative": [row.relative for row in rows]}
    return Picture(figure, alt, table)
