"""ReduNet: a network whose layers are gradient steps on ΔR, built from data without training.

Each layer is computed from the features that enter it and from their classes. The features then go
through it, and the next layer is computed. Nothing is differentiated. Features are vectors, or
signals: then a layer is a circular convolution, which is one operator for each frequency, and a
shifted signal gives shifted features.
Source: arXiv 2105.10446 and its code.

m counts the examples, C the channels, F the frequencies, J the classes, L the layers. A vector is a
signal of one frequency. The paper's examples are columns; here they are rows, channels last.
Differs from official: ``eps`` is ε, and enters squared; there it stands for ε².
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from crate_jax import placement
from crate_jax.models.redunet_layer import ReduLayer, apply_layer, build_layer, unit_length
from crate_jax.objective import class_coding_rate, coding_rate


class ReduNet(NamedTuple):
    """A network that `build` made, with its constants: η, ε and λ."""

    layers: ReduLayer
    eta: float
    eps: float
    lmbda: float


class Passed(NamedTuple):
    """The values that go through a network.

    Attributes:
        features: after the last layer, in the shape of the examples, each of length one.
        memberships_LxmxJ: π̂ of every layer. The classes that the network predicts are
            ``memberships_LxmxJ[-1].argmax(-1)``.
        rates_Lx2: R and R^c after every layer in nats, the mean over the frequencies. For R^c every
            example is of the classes that it is given, or else of those of π̂.
    """

    features: Array
    memberships_LxmxJ: Array
    rates_Lx2: Array


def build(
    X: Array,
    labels_m: Array,
    *,
    num_classes: int,
    depth: int,
    eps: float,
    eta: float = 0.5,
    lmbda: float = 500.0,
) -> tuple[ReduNet, Passed]:
    """A network for examples of known classes, layer by layer.

    The defaults of η and λ are the official code's for MNIST; there ε² is 0.1, and L is 50.

    Args:
        X: vectors (m, C), or signals (m, T, C) or (m, H, W, C), of any float dtype.
        labels_m: classes 0, …, J − 1, each of which some example has.
        num_classes: J.
        depth: L.
        eps: quantisation precision ε, of features of length one.
        eta: step size η.
        lmbda: how sharply π̂ decides, λ.

    Returns:
        The network, and what it makes of the examples. The rates are of their labels. Float32.

    Raises:
        ValueError: the shapes do not fit, or a class has no example.
    """
    Pi_mxJ = _memberships(X, labels_m, num_classes)

    def layer(V_mxFxC: Array, _: None) -> tuple[Array, tuple[ReduLayer, Array, Array]]:
        built = build_layer(V_mxFxC, Pi_mxJ, eps=eps)
        V_mxFxC, guess_mxJ = apply_layer(built, V_mxFxC, eta=eta, lmbda=lmbda)
        return V_mxFxC, (built, guess_mxJ, _rates(V_mxFxC, Pi_mxJ, eps=eps))

    last, (layers, *seen) = jax.lax.scan(layer, _frequencies(X), length=depth)
    return ReduNet(layers, eta, eps, lmbda), Passed(_signals(last, X.shape), *seen)


def apply(net: ReduNet, X: Array) -> Passed:
    """Apply a network to examples of unknown classes; see `build` for their shapes."""

    def layer(V_mxFxC: Array, built: ReduLayer) -> tuple[Array, tuple[Array, Array]]:
        V_mxFxC, guess_mxJ = apply_layer(built, V_mxFxC, eta=net.eta, lmbda=net.lmbda)
        return V_mxFxC, (guess_mxJ, _rates(V_mxFxC, guess_mxJ, eps=net.eps))

    last, seen = jax.lax.scan(layer, _frequencies(X), net.layers)
    return Passed(_signals(last, X.shape), *seen)


def update(net: ReduNet, X: Array, labels_m: Array, *, tau: float = 0.1) -> ReduNet:
    """The network moved towards that of further examples: E ← E + τ (E' − E), and C_j likewise.

    A layer moves before the examples go through it. The classes keep their shares.
    Source: the code of arXiv 2105.10446.

    Args:
        net: a network.
        X: further examples.
        labels_m: their classes, each of which some example has.
        tau: share of the way, τ.

    Raises:
        ValueError: see `build`.
    """
    Pi_mxJ = _memberships(X, labels_m, net.layers.gamma_J.shape[-1])

    def layer(V_mxFxC: Array, built: ReduLayer) -> tuple[Array, ReduLayer]:
        new = build_layer(V_mxFxC, Pi_mxJ, eps=net.eps)._replace(gamma_J=built.gamma_J)
        moved = jax.tree.map(lambda old, new: old + tau * (new - old), built, new)
        return apply_layer(moved, V_mxFxC, eta=net.eta, lmbda=net.lmbda)[0], moved

    return net._replace(layers=jax.lax.scan(layer, _frequencies(X), net.layers)[1])


def lift(X: Array, filters: Array) -> Array:
    """Signals in more channels: circular convolutions, then a ReLU; a shift stays a shift.

    Few channels leave the classes little room. The paper draws the filters from N(0, 1).

    Args:
        X: signals (m, T, c) or (m, H, W, c).
        filters: (k, c, C) or (k, k, c, C). Value i of a filter meets what lies i places further on.

    Returns:
        Signals (m, T, C) or (m, H, W, C).
    """
    around = [(0, size - 1) for size in filters.shape[:-2]]
    padded = jnp.pad(X, [(0, 0), *around, (0, 0)], mode="wrap")
    numbers = ("NHWC", "HWIO", "NHWC") if X.ndim == 4 else ("NWC", "WIO", "NWC")
    ones = (1,) * len(around)
    convolved = jax.lax.conv_general_dilated(
        padded, filters, ones, "VALID", dimension_numbers=numbers, precision="highest"
    )
    return jax.nn.relu(convolved)


def _rates(V_mxFxC: Array, Pi_mxJ: Array, *, eps: float) -> Array:
    """R and R^c (2,)."""
    V_FxmxC = V_mxFxC.swapaxes(0, 1) / jnp.asarray(eps, V_mxFxC.dtype)  # so that ε is one of those
    R_F = coding_rate(V_FxmxC, eps=1.0)
    Rc_F = class_coding_rate(placement.after(V_FxmxC, R_F), Pi_mxJ, eps=1.0)
    return jnp.stack([R_F.mean(), Rc_F.mean()])


def _frequencies(X: Array) -> Array:
    """Examples of length one, by frequency (m, F, C): complex, and of vectors real."""
    X = X.astype(jnp.float32)
    places = tuple(range(1, X.ndim - 1))
    V = jnp.fft.fftn(X, axes=places, norm="ortho") if places else X
    return unit_length(V.reshape(len(X), -1, X.shape[-1]))


def _signals(V_mxFxC: Array, shape: tuple[int, ...]) -> Array:
    """The other way."""
    V, places = V_mxFxC.reshape(shape), tuple(range(1, len(shape) - 1))
    return jnp.fft.ifftn(V, axes=places, norm="ortho").real if places else V


def _memberships(X: Array, labels_m: Array, num_classes: int) -> Array:
    """One at the class of each example, (m, J)."""
    if not 2 <= X.ndim <= 4 or labels_m.shape != X.shape[:1]:
        raise ValueError(
            "examples must be (m, C), (m, T, C) or (m, H, W, C), and their labels (m,); got "
            f"{X.shape} and {labels_m.shape}. Put the channels last."
        )
    Pi_mxJ = jax.nn.one_hot(labels_m, num_classes)
    if isinstance(Pi_mxJ, Tracer):  # within a program nobody can tell
        return Pi_mxJ
    if not bool((Pi_mxJ.sum(axis=1) > 0).all()):
        raise ValueError(
            f"labels must be >= 0 and < {num_classes}; got others too. Number the classes from 0."
        )
    if not bool((Pi_mxJ.sum(axis=0) > 0).all()):
        raise ValueError(
            f"labels must name each of the {num_classes} classes; got none of some. "
            "A layer has an operator for each class."
        )
    return Pi_mxJ
