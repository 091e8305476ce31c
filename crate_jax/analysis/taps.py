"""One forward pass that returns named per-layer tensors."""

from collections.abc import Iterable

from jax import Array

from crate_jax.models.block import chosen_taps
from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.image_sizes import at_image_size
from crate_jax.models.parameters import Params, variables_of
from crate_jax.models.stacked import BlockModel


def taps(
    model: BlockModel,
    params: Params,
    images: Array,
    names: str | Iterable[str] | None = None,
    *,
    positions: str = "right",
) -> tuple[Array, dict[str, Array]]:
    """Run the model and return what its layers computed on the way.

    Images may have another size than those that the model was made for, if the patches fit: learned
    positions are resized, see `crate_jax.models.image_sizes.at_image_size`.

    Args:
        model: a model of `crate_jax.create_model`.
        params: its parameters; of a model with running statistics its variables.
        images: (B, H, W, C), normalised; for a model of text, token ids (B, N).
        names: out of ``model.tap_names``, or one; only these are stored. Those of a CRATE are
            ``subspace_tokens`` (L, B, N, K, p), ``attention`` (L, B, K, N, N), ``mssa``,
            ``z_half``, ``ista`` and ``out`` (L, B, N, d). TSSA has ``membership`` (L, B, K, N) in
            the place of the attention, CBSA ``contraction`` (L, B, K, m, N). None: all of them.
        positions: how they are resized: "right"; or "official_maps", as behind the published
            attention maps, which resamples those of the trained size too.

    Returns:
        Logits, float32, of each image (B, Y) or of each token (B, N, V); and
        {name: array} in the model's dtype, layers on axis 0.

    Raises:
        KeyError: an unknown name.
        ValueError: no name, images that do not fit the model, or a way of resizing that the model's
            positions do not heed.
    """
    chosen = model.tap_names if names is None else chosen_taps(names, model.tap_names)
    if not chosen:
        raise ValueError(f"names must hold at least one of {', '.join(model.tap_names)}; got none.")
    if positions != "right" and not isinstance(model, ImageClassifier):
        raise ValueError(
            f"positions must be right for a {type(model).__name__}, which takes no images; got "
            f"{positions}. Leave it out."
        )
    if isinstance(model, ImageClassifier) and getattr(images, "ndim", 0) == 4:
        height, width = images.shape[1:3]
        if (height, width) != model.input_shape[:2] or positions != "right":
            model, params = at_image_size(model, params, (height, width), positions=positions)
    variables = variables_of(params)
    found = model.apply(variables, images, train=False, taps=chosen, method="forward")
    return found  # type: ignore[return-value]
