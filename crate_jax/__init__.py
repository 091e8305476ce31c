"""CRATE, the white-box transformer of sparse rate reduction, in JAX and Flax.

The names of `crate_jax.api` are imported when the first of them is asked for. A command can so heed
Ctrl-C before JAX is imported, which takes seconds.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from crate_jax.version import VERSION

if TYPE_CHECKING:
    from crate_jax.api import *  # noqa: F403
    from crate_jax.api import __all__ as __all__

__version__ = VERSION


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # A module alone, where it is one: others of the package ask for it while they are imported.
    if importlib.util.find_spec(f"{__name__}.{name}"):
        return importlib.import_module(f"{__name__}.{name}")
    api = importlib.import_module("crate_jax.api")
    if name not in (*api.__all__, "__all__"):
        # Python adds the nearest of `__dir__` where nobody catches it.
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}",
            name=name,
            obj=sys.modules[__name__],
        )
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*importlib.import_module("crate_jax.api").__all__, "__version__"])
