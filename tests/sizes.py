"""The smallest sizes of each family of models, for tests that build one of every family."""

from crate_jax.models.fields import FAMILIES, ImageFields, fields_of

WIDTHS = dict(width=8, depth=1, num_heads=2)
IMAGES = dict(image_size=8, patch_size=4, num_classes=3) | WIDTHS
AUTOENCODER = dict(num_classes=0, decoder_depth=1)  # a decoder goes without a head
TEXT = dict(context_length=6, vocab_size=11) | WIDTHS


def sizes_of(family: str) -> dict[str, int]:
    """Sizes that its class, and `create_model` of one of its names, take."""
    sizes = dict(IMAGES if issubclass(FAMILIES[family], ImageFields) else TEXT)
    return sizes | AUTOENCODER if "decoder_depth" in fields_of(family) else sizes
