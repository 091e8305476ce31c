"""The named models, a row each.

Nothing here imports JAX.
"""

import dataclasses
import functools
from collections.abc import Mapping

from crate_jax.options import did_you_mean


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named model: its family, and the values of its fields."""

    family: str
    fields: Mapping[str, object]


# width, depth, number of heads
_ALPHA = {
    "tiny": (192, 12, 3),
    "small": (576, 12, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_VIT = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def _variant(
    family: str, patch_size: int, width: int, depth: int, num_heads: int, **fields: object
) -> Variant:
    sizes = dict(patch_size=patch_size, width=width, depth=depth, num_heads=num_heads)
    return Variant(family, sizes | fields)


_crate = functools.partial(_variant, "crate")


# Sizes from arXiv 2306.01129, and the 8-pixel models of arXiv 2308.16271.
VARIANTS: dict[str, Variant] = {
    "crate_tiny_patch16_224": _crate(16, width=384, depth=12, num_heads=6),
    "crate_small_patch16_224": _crate(16, width=576, depth=12, num_heads=12),
    "crate_base_patch16_224": _crate(16, width=768, depth=12, num_heads=12),
    "crate_large_patch16_224": _crate(16, width=1024, depth=24, num_heads=16),
    "crate_small_384_patch8_224": _crate(8, width=384, depth=12, num_heads=6),
    "crate_base_patch8_224": _crate(8, width=768, depth=12, num_heads=12),
}
# The other three models of arXiv 2308.16271, section 4.3: {MSSA, MHSA} x {ISTA, MLP}.
for _name, _operators in {
    "crate_mhsa": dict(attention="mhsa"),
    "crate_mlp": dict(nonlinearity="mlp"),
    "crate_mhsa_mlp": dict(attention="mhsa", nonlinearity="mlp"),
}.items():
    VARIANTS[f"{_name}_small_384_patch8_224"] = _crate(8, 384, 12, 6, **_operators)
# arXiv 2405.20299: of each size all patches that its configurations know.
VARIANTS |= {
    f"crate_alpha_{size}_patch{patch}_224": _variant("crate_alpha", patch, *shape)
    for size, shape in _ALPHA.items()
    for patch in (32, 16, 14, 8)
}
VARIANTS |= {f"vit_{size}_patch16_224": _variant("vit", 16, *shape) for size, shape in _VIT.items()}
# As SimDINOv2 trains them, arXiv 2502.10385.
VARIANTS |= {
    f"vit_{size}_patch16_reg4_224": _variant("vit", 16, *_VIT[size], registers=4, layer_scale=0.1)
    for size in ("base", "large")
}
# arXiv 2502.11646: 16 patches a side, of 14 pixels. Its configurations count patches, not pixels.
VARIANTS["hyperset_patch16_224"] = _variant("hyper_set", 14, 512, 12, 8)


def _text(family: str, width: int, depth: int, num_heads: int, **fields: object) -> Variant:
    """A model of texts of 1,024 tokens, of GPT-2's 50,257 padded to a multiple of 64."""
    sizes = dict(width=width, depth=depth, num_heads=num_heads)
    return Variant(family, dict(context_length=1024, vocab_size=50_304) | sizes | fields)


# arXiv 2311.13110, 2410.16443 and 2412.17810: GPT-2's sizes, and those of the study of neurons.
VARIANTS |= {
    "crate_causal_base": _text("crate_causal", 768, 12, 12),
    "crate_causal_medium": _text("crate_causal", 1024, 24, 16),
    "crate_causal_large": _text("crate_causal", 1280, 36, 20),
    "crate_causal_xl": _text("crate_causal", 1600, 48, 25),
    "crate_lm_1l": _text("crate_lm", 128, 1, 4),
    "crate_lm_2l": _text("crate_lm", 128, 2, 4),
    "crate_lm_3l": _text("crate_lm", 128, 3, 4),
    "crate_lm_small": _text("crate_lm", 768, 6, 12),
    "crate_lm_base": _text("crate_lm", 768, 12, 12),
    "tost_lm_base": _text("tost_lm", 768, 12, 12),
    "tost_lm_medium": _text("tost_lm", 1024, 24, 16),
    "tost_lm_large": _text("tost_lm", 1280, 36, 20),
    "crate_bert_base": _text("crate_bert", 768, 12, 12, context_length=512, vocab_size=50_265),
}
# arXiv 2412.17810. LayerScale starts at 1 for 12 layers and at 1e-5 for 24.
VARIANTS |= {
    "tost_tiny_patch16_224": _variant("tost", 16, width=192, depth=12, num_heads=4),
    "tost_small_patch16_224": _variant("tost", 16, width=384, depth=12, num_heads=8),
    "tost_medium_patch16_224": _variant(
        "tost", 16, width=512, depth=24, num_heads=8, layer_scale=1e-5
    ),
}
# arXiv 2509.16875, where the models are called CBT.
_CBT = dict(attention="cbsa", stem="convolutions")
VARIANTS |= {
    "cbsa_tiny_patch16_224": _crate(16, width=192, depth=12, num_heads=3, **_CBT),
    "cbsa_small_patch16_224": _crate(16, width=384, depth=12, num_heads=6, **_CBT),
    "cbsa_base_patch16_224": _crate(16, width=768, depth=12, num_heads=12, **_CBT),
    "cbsa_large_patch16_224": _crate(16, width=1024, depth=24, num_heads=16, **_CBT),
}
# The sizes in the code of arXiv 2404.02446; the decoder is as deep as the encoder.
VARIANTS |= {
    f"crate_mae_{size}_patch16_224": _variant("crate_mae", 16, d, L, K, decoder_depth=L)
    for size, (d, L, K) in {
        "tiny": (384, 12, 6),
        "small": (576, 12, 12),
        "base": (768, 12, 12),
        "large": (1024, 24, 16),
    }.items()
}


def find(name: str) -> Variant:
    """The variant of a name.

    Raises:
        KeyError: there is none; the nearest is suggested.
    """
    if name not in VARIANTS:
        raise KeyError(
            f"model.name must be a known model; got {name}. " + did_you_mean(name, VARIANTS)
        )
    return VARIANTS[name]
