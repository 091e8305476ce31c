"""A student, its teacher, and the head behind both, whatever the backbone."""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.nn import initializers as init
from jax.typing import DTypeLike

from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.cost import has_formula, multiply_adds
from crate_jax.models.image_sizes import at_image_size, resizes_positions
from crate_jax.models.layers import Linear
from crate_jax.models.parameters import Params, Variables
from crate_jax.models.transformer import kernel_init
from crate_jax.parallel import PyTree
from crate_jax.tasks.pixels import normalized
from crate_jax.tasks.rates import unit
from crate_jax.tasks.task import Inside


class ProjectionHead(nn.Module):
    """Linear, GELU, Linear, GELU, Linear, and then vectors of length one.

    Weights start from N(0, 0.02²), biases from zero. Source: the code of arXiv 2502.10385, whose
    head is that of DINO without the last layer.

    Attributes:
        hidden: values between two maps.
        features: p, of the result.
        dtype: the dtype of the maps; the length is computed in float32.
    """

    hidden: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, X: Array) -> Array:
        """Tokens (…, d) to features (…, p), float32."""
        for i, width in enumerate((self.hidden, self.hidden, self.features)):
            if i:
                X = jax.nn.gelu(X, approximate=False)
            X = Linear(width, self.dtype, kernel_init, init.zeros, name=f"linear{i}")(X)
        return unit(X)


def resized(params: Params, model: ImageClassifier, other: ImageClassifier) -> Params:
    """Parameters for the same model of another image size: its learned positions, if it has any.

    Positions are interpolated as the official code does, see `at_image_size`; a
    gradient reaches them.
    """
    if model.grid == other.grid:
        return params
    how = "official_maps" if resizes_positions(model, params) else "right"
    return at_image_size(model, params, other.input_shape[:2], positions=how)[1]


class Seen(NamedTuple):
    """The outputs of a network for V views of B images.

    Attributes:
        features: the features of the head (B, V, p), unit vectors, float32.
        pooled: what the head reads (B, V, d), float32.
        tokens: of the last block (B V, N, d).
        variables: running statistics after this pass; {} in evaluation mode.
    """

    features: Array
    pooled: Array
    tokens: Array
    variables: Variables


@dataclasses.dataclass(frozen=True)
class Network:
    """A backbone with a head behind it, for views of two sizes. Student and teacher are of it.

    Its variables are ``params``, the backbone's, with those of the head under ``head``, and the
    backbone's running statistics, if it has any.

    Attributes:
        model: the backbone, without classes.
        head: behind it.
        mean: the mean of `crate_jax.tasks.pixels.normalize`.
        std: the deviation of `crate_jax.tasks.pixels.normalize`.
        local_size: pixels, the side of small views.
    """

    model: ImageClassifier
    head: ProjectionHead
    mean: tuple[float, ...]
    std: tuple[float, ...]
    local_size: int

    @property
    def local(self) -> ImageClassifier:
        """The backbone for small views."""
        return self.model.clone(image_size=self.local_size)

    def check(self, local_crops: int) -> None:
        """Refuse a decoder, which nothing would train, and small views that make no whole patches.

        Raises:
            ValueError: there is one, or the side of small views is not a multiple of the patch's.
        """
        if depth := getattr(self.model, "decoder_depth", 0):
            raise ValueError(
                f"model.decoder_depth must be 0 for simdino, which trains no decoder; got {depth}. "
                "Set model.decoder_depth=0: the encoder alone."
            )
        side, (h, w) = self.local_size, pair(self.model.patch_size)
        if local_crops and (side % h or side % w):
            raise ValueError(
                "simdino.local_size must be a multiple of model.patch_size; got "
                f"{side} and {h}x{w}. Set --config.simdino.local_size."
            )

    def init(self, key: Array, *, mask_token: bool) -> dict[str, Any]:
        """Variables; with a token for hidden patches, of zeros, if it is asked for."""
        images = self.model.sample_input()
        variables = dict(self.model.init(key, images, train=False))
        pooled_1xd, _ = self._tokens(self.model, variables, images)[:2]
        head = self.head.init(jax.random.fold_in(key, 1), pooled_1xd)["params"]
        if mask_token:
            head = {**head, "mask_token": jnp.zeros((self.model.width,), jnp.float32)}
        return variables | {"params": {**variables["params"], "head": head}}

    def blank(self, local_crops: int) -> dict[str, Any]:
        """Black views: ``global``, and ``local`` if there are any; and ``label`` 0."""
        (H, W, c), side = self.model.input_shape, self.local_size
        views: dict[str, Any] = {"global": np.zeros((1, 2, H, W, c), np.uint8)}
        if local_crops:
            views["local"] = np.zeros((1, local_crops, side, side, c), np.uint8)
        return views | {"label": np.zeros(1, np.int32)}

    def see(
        self,
        variables: Variables,
        views: Array,
        key: Array | None = None,
        masked: Array | None = None,
    ) -> Seen:
        """The network on views of one size.

        Args:
            variables: the variables of the network.
            views: (B, V, H, W, c), stored pixels or normalised.
            key: in training mode, of dropout and stochastic depth; None: evaluation mode.
            masked: patches that it does not see (B, V, P); None: it sees all.
        """
        (B, V), shape = views.shape[:2], views.shape[2:]
        model, params = self.model, variables["params"]
        if shape != model.input_shape:
            model, params = self.local, resized(params, self.model, self.local)
        hidden = None
        if masked is not None:
            hidden = (masked.reshape(B * V, -1), params["head"]["mask_token"])
        images = normalized(views.reshape(-1, *shape), mean=self.mean, std=self.std)
        variables = {**variables, "params": params}
        pooled, tokens, changed = self._tokens(model, variables, images, key, hidden)
        features = self._projected(variables, pooled)
        return Seen(features.reshape(B, V, -1), pooled.reshape(B, V, -1), tokens, changed)

    def inside(self, variables: Variables, views: Array) -> Inside:
        """The backbone's layers, of views (B, V, H, W, c) of its own size."""
        own = {k: v for k, v in variables["params"].items() if k != "head"}
        images = views.reshape(-1, *views.shape[2:])
        images = normalized(images, mean=self.mean, std=self.std)
        return Inside(self.model, {**variables, "params": own}, images)

    def patches(self, variables: Variables, tokens: Array) -> Array:
        """Features (B V, P, p) of the patches among the tokens of the last block."""
        tokens = tokens[:, -self.model.num_patches :]
        normed: Any = self.model.apply(variables, tokens, method="forward_norm")
        return self._projected(variables, normed)

    def step_flops(self, local_crops: int) -> float:
        """The operations of a training step for one image; 0 if there is no formula."""
        if not has_formula(self.model):
            return 0.0
        d, h, p = self.model.width, self.head.hidden, self.head.features
        head = h * (d + h + p)
        whole = multiply_adds(self.model) + head
        small = multiply_adds(self.local) + head if local_crops else 0
        return 6.0 * (2 * whole + local_crops * small) + 2.0 * 2 * whole

    def _tokens(
        self,
        model: ImageClassifier,
        variables: Variables,
        images: Array,
        key: Array | None = None,
        hidden: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array, dict[str, Any]]:
        """The token that a head reads, float32, all tokens, and changed collections."""
        train = key is not None
        tokens_BxNxd, changed = model.apply(
            variables,
            images,
            train=train,
            hidden=hidden,
            method="forward_features",
            rngs={"dropout": key} if train else {},
            mutable=[name for name in variables if name != "params"] if train else [],
        )
        pooled_Bxd: Any = model.apply(
            variables, tokens_BxNxd, pre_logits=True, method="forward_head"
        )
        return pooled_Bxd, tokens_BxNxd, dict(changed)

    def _projected(self, variables: Variables, X: Array) -> Array:
        features: Any = self.head.apply({"params": variables["params"]["head"]}, X)
        return features


def momentum_at(step: Array, ends: tuple[float, float], *, total_steps: int) -> Array:
    """The momentum of a teacher: half a cosine; a float32 scalar.

    Args:
        step: optimizer steps done before this one, int32.
        ends: what it is at step 0, and at the end of the run.
        total_steps: of the run.
    """
    start, end = ends
    share = jnp.minimum(step.astype(jnp.float32) / max(1, total_steps), 1.0)
    return end + (start - end) * 0.5 * (1 + jnp.cos(math.pi * share))


def followed(teacher: PyTree, student: PyTree, momentum: Array) -> PyTree:
    """The moving average: m · teacher + (1 − m) · student, leaf by leaf."""
    return jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, teacher, student)


def kept(statistics: Params) -> dict[str, Params]:
    """The running statistics of a student as the extra holds them, if there are any."""
    return {"statistics": statistics} if statistics else {}
