"""The shared parts of all figures: ink and colours, a sentence and a table beside each, and files.

A figure is read in light and in dark. Its ground is transparent. Its ink is a grey that has a
contrast of 4.5 with white and with black; in a page it takes the colour of the text around it. Heat
maps of signed values are ink of a hue as strong as the value, and nothing where it is zero.
"""

import csv
import functools
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

import numpy as np

from crate_jax.files import check_writable, located, written_aside

if TYPE_CHECKING:  # imported where it is used: models and measures do without it
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

INK = "#767676"
COLOURS = ("#3b82c4", "#c96a15", "#2e9360", "#a05fb4", "#d04848", "#8a7d1c", "#2b93a0", "#b0568c")
MARKERS = "osD^vPX*"
FORMATS = (".svg", ".png", ".pdf")
LARGEST_SIDE = 96  # of a matrix that is drawn; a larger one is averaged over cells

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "crate_jax",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.6,
    "image.interpolation": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
    **dict.fromkeys(("grid.color", "legend.labelcolor"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
}


class Picture(NamedTuple):
    """A figure, and what stands beside it.

    Attributes:
        figure: of matplotlib.
        alt: what it shows, a sentence with the numbers.
        table: its data, columns of the same length by name.
    """

    figure: "Figure"
    alt: str
    table: Mapping[str, Sequence[Any] | np.ndarray]


P = ParamSpec("P")


def drawing(draw: Callable[P, Picture]) -> Callable[P, Picture]:
    """Give a function the style of this file.

    Raises:
        ValueError: by the function, where matplotlib is missing.
    """

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Picture:
        with _style()():
            return draw(*args, **kwargs)

    return styled


def check_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        ValueError: it is missing.
    """
    _style()


def _style() -> Callable[[], Any]:
    """Make the context in which figures are drawn and written."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(
            "figures must have matplotlib to be drawn with; it is missing. "
            "Install it: pip install 'crate-jax[report]'"
        ) from error
    return lambda: matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches; to be made within `drawing`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def grid_of_axes(rows: int, columns: int, *, side: float, top: float = 0.3) -> Any:
    """A figure of square panels without axes: the figure, and the panels (rows, columns).

    Args:
        rows: of panels.
        columns: of panels.
        side: the side of a panel, in inches.
        top: room for titles above each row, in inches.
    """
    figure = new_figure(columns * (side + 0.08), rows * (side + top))
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    return figure, panels


def signed() -> "Colormap":
    """From −1, orange, to 1, blue, with nothing at 0."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    blue, orange = to_rgb(COLOURS[0]), to_rgb(COLOURS[1])
    stops = [(0.0, (*orange, 1.0)), (0.5, (*orange, 0.0)), (0.5, (*blue, 0.0)), (1.0, (*blue, 1.0))]
    return LinearSegmentedColormap.from_list("signed", stops)


def show_matrix(axes: "Axes", values: np.ndarray, *, largest: float | None = None) -> Any:
    """Draw a matrix by `signed`, in a frame.

    Args:
        axes: to draw on.
        values: of any sign.
        largest: the absolute value of full ink; None: the largest one.
    """
    most = float(np.abs(values).max()) if largest is None else largest
    most = most or 1.0
    image = axes.imshow(values, cmap=signed(), vmin=-most, vmax=most, aspect="auto")
    framed(axes)
    return image


def framed(axes: "Axes") -> None:
    """A panel with its frame and without ticks."""
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.6)


def cells(matrix: np.ndarray, *, largest: int = LARGEST_SIDE) -> tuple[np.ndarray, int]:
    """A matrix averaged over square cells, so that no side is above the largest; a cell's side.

    Of a side that is no multiple of the cell's the last cell is the mean of what is left.
    """
    n = -(-max(matrix.shape) // largest)
    if n == 1:
        return matrix, 1
    starts = [np.arange(0, side, n) for side in matrix.shape]
    sums = np.add.reduceat(np.add.reduceat(matrix, starts[0], axis=0), starts[1], axis=1)
    sizes = [np.diff([*start, side]) for start, side in zip(starts, matrix.shape, strict=True)]
    return sums / np.outer(*sizes), n


def long_table(names: Sequence[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """An array as columns: its indices, counted from 1, and the value.

    Args:
        names: the names of the axes, then of the value.
        values: as many axes as names but one.
    """
    indices = np.indices(values.shape).reshape(values.ndim, -1) + 1
    return dict(zip(names, [*indices, values.ravel()], strict=True))


def number(value: float) -> str:
    """A number as a sentence has it: three digits, no exponent where it can do without."""
    if not np.isfinite(value):
        return "not a number"
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        return f"{value:.2e}"
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{decimals}f}"


def write_csv(picture: Picture, path: str | Path) -> None:
    """The table of a picture, a column each, with one line of names."""
    columns = list(picture.table.values())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(picture.table)
    writer.writerows(
        [f"{v:.7g}" if isinstance(v, float | np.floating) else v for v in row]
        for row in zip(*columns, strict=True)
    )
    with written_aside(path) as aside:
        aside.write_text(text.getvalue(), encoding="utf-8")


def check_output(path: str | Path) -> Path:
    """The path of a picture, of which `save` can write it and its table.

    Raises:
        ValueError: the file's ending is none of `FORMATS`, or matplotlib is missing.
        OSError: a file cannot be written there.
    """
    path = located(path, "--output")
    if path.suffix not in FORMATS:
        raise ValueError(
            f"--output must end in one of {', '.join(FORMATS)}; got {path}. Name such a file."
        )
    _style()
    for each in (path, path.with_suffix(".csv")):
        check_writable(each)
    return path


def save(picture: Picture, path: str | Path) -> Path:
    """Write a picture, and its table as CSV beside it; return the path of the table.

    Raises:
        ValueError, OSError: see `check_output`.
    """
    path = check_output(path)
    with written_aside(path) as aside, _style()():
        how = {"Date": None} if path.suffix == ".svg" else None
        picture.figure.savefig(aside, format=path.suffix[1:], metadata=how, transparent=True)
    table = path.with_suffix(".csv")
    write_csv(picture, table)
    return table


def inline_svg(picture: Picture, name: str) -> str:
    """A picture as an element of a page, with its sentence; all its ids start with the name."""
    out = io.StringIO()
    with _style()():
        picture.figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    given: dict[str, int] = {}

    def own(found: re.Match[str]) -> str:
        """An id of the page; what is drawn twice alike has one id twice in matplotlib's file."""
        given[found[1]] = given.get(found[1], 0) + 1
        again = f"-{given[found[1]]}" if given[found[1]] > 1 else ""
        return f'id="{name}-{found[1]}{again}"'

    text = re.sub(r'\bid="([^"]*)"', own, text)
    text = re.sub(r'((?:xlink:)?href=")#', rf"\1#{name}-", text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    label = f'role="img" aria-label="{html.escape(picture.alt)}"'
    return text.replace("<svg ", f"<svg {label} ", 1)
