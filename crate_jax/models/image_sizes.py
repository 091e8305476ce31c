"""A model and its parameters, changed to another image size."""

from typing import Any

from crate_jax.models.classifier import ImageClassifier, pair
from crate_jax.models.embedding import resize_positions, resize_positions_as_official_maps
from crate_jax.models.parameters import Params, variables_of

# Positions of another grid, by the ways there are; see `crate_jax.models.embedding`.
POSITIONS = {"right": resize_positions, "official_maps": resize_positions_as_official_maps}


def resizes_positions(model: ImageClassifier, params: Params) -> bool:
    """True if a model has positions that can be resized: learned ones, or a field for their size.

    Args:
        model: an image classifier.
        params: its parameters or variables.
    """
    embedding = variables_of(params)["params"].get("embedding", {})
    return "pos_embedding" in embedding or hasattr(model, "position_size")


def at_image_size(
    model: ImageClassifier,
    params: Params,
    image_size: tuple[int, int],
    *,
    positions: str = "right",
) -> tuple[ImageClassifier, Params]:
    """The same layers for images of another size: only learned positions are resized.

    It computes with JAX alone, so it runs under `jax.jit` and is differentiable. A model with fixed
    positions computes those of the new grid. Where the way is another, it resizes them too, if it
    has a field for that.

    Args:
        model: an image classifier.
        params: its parameters; of a model with running statistics its variables.
        image_size: (height, width) in pixels, multiples of the patch's.
        positions: "right", bicubic, and at the trained size the model's own; "official_maps", as
            behind the published attention maps, which resamples those of the trained size too.

    Returns:
        The model for that size, and its parameters or variables.

    Raises:
        ValueError: an unknown way, one that the model's positions do not heed, or a size that the
            patches do not fit.
    """
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}; got {positions}.")
    if positions != "right" and not resizes_positions(model, params):
        raise ValueError(
            f"positions must be right for a {type(model).__name__}, whose positions are not "
            f"resized; got {positions}. Leave it out."
        )
    patch = pair(model.patch_size)
    if any(side < p or side % p for side, p in zip(image_size, patch, strict=True)):
        raise ValueError(
            f"images must have sides that are multiples of the patch, {patch[0]} x {patch[1]}; got "
            f"{image_size[0]} x {image_size[1]}. Resize or crop them."
        )
    fields: dict[str, Any] = dict(image_size=tuple(image_size))
    if positions == "official_maps" and hasattr(model, "position_size"):
        fields["position_size"] = model.image_size  # fixed ones, which are then resized
    resized = model.clone(**fields)
    variables: dict[str, Any] = {**variables_of(params)}
    tree = variables["params"]
    table = tree.get("embedding", {}).get("pos_embedding")
    if table is not None and (resized.grid != model.grid or positions != "right"):
        table = POSITIONS[positions](table, model.grid, resized.grid)
        tree = {**tree, "embedding": {**tree["embedding"], "pos_embedding": table}}
    return resized, {**variables, "params": tree} if "params" in params else tree
