"""Pages of HTML that need no other file, no script and no network, from templates."""

from crate_jax.pages.mathml import mathml
from crate_jax.pages.render import render, templates

__all__ = ["mathml", "render", "templates"]
