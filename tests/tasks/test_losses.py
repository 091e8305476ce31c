"""The loss of texts by value; that of images is in test_mixing.py."""

import jax.numpy as jnp
import numpy as np

from crate_jax.tasks.losses import token_cross_entropy


def test_the_loss_of_a_text_is_the_mean_over_its_tokens():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 5, 7)).astype(np.float32), rng.integers(0, 7, (2, 5))
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    own = np.take_along_axis(shares, tokens[..., None], axis=-1)[..., 0]
    found = token_cross_entropy(jnp.asarray(logits, jnp.bfloat16), jnp.asarray(tokens))
    assert found.shape == (2,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, -np.log(own).mean(axis=1), rtol=1e-2)
    found = token_cross_entropy(jnp.asarray(logits), jnp.asarray(tokens))
    np.testing.assert_allclose(found, -np.log(own).mean(axis=1), rtol=1e-6)
