"""Render a template of this folder as a page."""

from typing import TYPE_CHECKING, Any

from crate_jax.pages.mathml import mathml

if TYPE_CHECKING:
    import jinja2


def render(template: str, **context: Any) -> str:
    """A rendered template; every value is escaped, unless it says that it is markup.

    Templates know `crate_jax.pages.mathml.mathml` as the filter ``math``, and ``markup`` for
    figures.

    Args:
        template: the name of a file in ``templates``.
        **context: what it asks for; a name that it asks for and that is not given is an error.

    Raises:
        ValueError: Jinja is missing.
    """
    return templates().get_template(template).render(**context)


def templates() -> "jinja2.Environment":
    """All templates.

    Raises:
        ValueError: Jinja is missing.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise ValueError(
            "pages must have Jinja2 to be written with; it is missing. "
            "Install it: pip install 'crate-jax[report]'"
        ) from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crate_jax.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["math"] = lambda text: Markup(mathml(text))
    environment.filters["markup"] = Markup
    return environment
