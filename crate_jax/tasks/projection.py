"""Images to the features of a loss: a backbone, and a head behind it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.models.layers import Linear
from crate_jax.models.parameters import Variables
from crate_jax.tasks.pixels import normalized
from crate_jax.tasks.task import Extra, Params


class Projection(nn.Module):
    """A linear map, or one behind a hidden layer: W₂ relu(W₁ x + b₁) + b₂.

    Attributes:
        features: p, of the result.
        hidden: values between the two maps; 0: there is one map.
    """

    features: int
    hidden: int = 0

    @nn.compact
    def __call__(self, X: Array) -> Array:
        """Pooled tokens (B, d) to features (B, p), float32."""
        X = X.astype(jnp.float32)
        if self.hidden:
            X = jax.nn.relu(Linear(self.hidden, name="hidden")(X))
        return Linear(self.features, name="features")(X)


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A model without classes, and a head, whose parameters take the place of a classifier's head.

    Attributes:
        model: a Flax module with ``input_shape``, from normalised images to what a head reads.
        head: from that to features.
        mean: the mean of `crate_jax.tasks.pixels.normalize`.
        std: the deviation of `crate_jax.tasks.pixels.normalize`.
    """

    model: Any
    head: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def init(self, key: Array) -> tuple[Params, Extra]:
        """Parameters, those of the head under ``head``; the model's other collections, or ()."""
        images = jnp.zeros((1, *self.model.input_shape), jnp.float32)
        variables = dict(self.model.init(key, images, train=False))
        pooled = jax.eval_shape(lambda: self.model.apply(variables, images, train=False))
        head = self.head.init(jax.random.fold_in(key, 1), jnp.zeros_like(pooled))["params"]
        return {**variables.pop("params"), "head": head}, variables or ()

    def normalized(self, stored: Array) -> Array:
        """Images (B V, H, W, c) as the model takes them, of (B, H, W, c) or V views of each."""
        flat = stored.reshape(-1, *stored.shape[-3:])
        return normalized(flat, mean=self.mean, std=self.std)

    def variables(self, params: Params, extra: Extra) -> Variables:
        """The variables of the model."""
        own = {name: group for name, group in params.items() if name != "head"}
        return {"params": own, **dict(extra)}

    def __call__(
        self, params: Params, extra: Extra, stored: Array, key: Array | None = None
    ) -> tuple[Array, Extra]:
        """Features (B V, p), and the extra after this pass.

        Args:
            params: the parameters of `init`.
            extra: the extra of `init`.
            stored: images, of bytes or normalised.
            key: of dropout, in training mode; None: evaluation mode.
        """
        train, images = key is not None, self.normalized(stored)
        pooled_Bxd, updated = self.model.apply(
            self.variables(params, extra),
            images,
            train=train,
            rngs={"dropout": key} if train else {},
            mutable=list(extra) if train else [],
        )
        Z_Bxp: Any = self.head.apply({"params": params["head"]}, pooled_Bxd)
        return Z_Bxp, updated or ()
