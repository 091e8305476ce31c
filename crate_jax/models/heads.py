"""The head of an image classifier: a new one, for other classes, or none."""

import numbers
from typing import Any

import jax
from jax import Array

from crate_jax.models.classifier import ImageClassifier, of_images
from crate_jax.models.parameters import Params, variables_of


def new_head(model: ImageClassifier, key: Array) -> Params:
    """The initial parameters of a model's head."""

    def init(key: Array) -> Params:
        return model.init(key, model.sample_input(), train=False)["params"]["head"]

    return jax.jit(init)(key)


def reset_classifier(
    model: ImageClassifier, params: Params, num_classes: int, *, key: Array | None = None
) -> tuple[ImageClassifier, Params]:
    """The same layers with a new head for so many classes, or without a head.

    Nothing that was given is changed. The decoder of a `crate_jax.CrateMae` is left out where
    there are classes, for nothing trains both.

    Args:
        model: an image classifier.
        params: its parameters; of a model with running statistics its variables.
        num_classes: Y; 0: no head, so that a call gives features (B, d).
        key: the key of the new head; None: ``jax.random.key(0)``.

    Returns:
        The model, and its parameters or variables.

    Raises:
        ValueError: the model takes no images, or the number is none.
    """
    of_images(model)
    whole = isinstance(num_classes, numbers.Integral) and not isinstance(num_classes, bool)
    if not whole or num_classes < 0:
        raise ValueError(
            f"num_classes must be a whole number >= 0; got {num_classes!r}. 0 leaves the head out."
        )
    fields: dict[str, Any] = {"num_classes": int(num_classes)}
    gone = {"head"}
    if num_classes and getattr(model, "decoder_depth", 0):
        fields["decoder_depth"] = 0
        gone |= {*model.OPTIONAL["decoder_depth"]}
    model = model.clone(**fields)
    variables: dict[str, Any] = {**variables_of(params)}
    tree = {name: group for name, group in variables["params"].items() if name not in gone}
    if num_classes:
        tree["head"] = new_head(model, jax.random.key(0) if key is None else key)
    return model, {**variables, "params": tree} if "params" in params else tree
