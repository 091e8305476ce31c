"""The figures of the papers: pure functions from arrays to pictures.

Each returns a `crate_jax.analysis.figures.canvas.Picture`: the figure, a sentence with its numbers,
and its data. They need matplotlib, and import it when they draw.
"""

from crate_jax.analysis.figures.attention import (
    class_token_maps,
    heads_by_kind,
    picture_rows,
    saliency,
)
from crate_jax.analysis.figures.canvas import (
    Picture,
    check_matplotlib,
    check_output,
    inline_svg,
    save,
    write_csv,
)
from crate_jax.analysis.figures.layers import Curve, Measure, by_layer
from crate_jax.analysis.figures.operators import side_by_side
from crate_jax.analysis.figures.parts import segments, shared_components
from crate_jax.analysis.figures.tokens import (
    atoms_as_patches,
    dictionary_gram,
    subspace_grams,
    token_maps,
)
from crate_jax.analysis.figures.training import confusion, curves

__all__ = [
    "Curve",
    "Measure",
    "Picture",
    "atoms_as_patches",
    "by_layer",
    "check_matplotlib",
    "check_output",
    "class_token_maps",
    "confusion",
    "curves",
    "dictionary_gram",
    "heads_by_kind",
    "inline_svg",
    "picture_rows",
    "saliency",
    "save",
    "segments",
    "shared_components",
    "side_by_side",
    "subspace_grams",
    "token_maps",
    "write_csv",
]
