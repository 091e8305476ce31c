"""Parameters for tests of files: small models, and different numbers in every entry."""

import jax
import numpy as np

from crate_jax import Crate
from crate_jax.interop import to_state_dict
from crate_jax.models.cost import abstract_parameters

MODELS = {
    "plain": Crate(8, 4, 5, width=6, depth=3, num_heads=2),
    "wide subspaces": Crate((4, 8), 4, 2, width=4, depth=1, num_heads=3, head_dim=5),
    "no projection": Crate(8, 4, 5, width=6, depth=2, num_heads=1),
}
MODEL = MODELS["plain"]


def random_params(model: Crate):
    """Different numbers in every entry, so that no two could be swapped unseen."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), abstract_parameters(model)
    )


def random_state(model: Crate) -> dict[str, np.ndarray]:
    return to_state_dict(random_params(model), model)


def assert_equal_trees(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
