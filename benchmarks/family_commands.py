"""What every family of models has in every command: the matrix of docs/zoo.md.

`tests/cli/test_family_commands.py` runs the command of every cell. Nothing here imports JAX.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Family(NamedTuple):
    """A row of the matrix.

    Attributes:
        model: a named model.
        fields: those in which the row differs from it.
        cells: by name of `COMMANDS`: yes, or what the command gives, or a key of `REFUSALS`.
    """

    model: str
    fields: Mapping[str, object]
    cells: Mapping[str, str]


class Refusal(NamedTuple):
    """Why a command does not apply.

    Attributes:
        words: in the one line that the command ends with.
        why: for the page.
    """

    words: str
    why: str


COMMANDS = ("taps", "layerwise", "summary", "plan", "convert", "official names", "compare")
YES, ALL = "yes", "R, Rᶜ, zeros"
# What `layerwise` measures, as a cell names it.
MEASURES = {
    "R": {"rate_mean"},
    "Rᶜ": {"coding_rate_mean", "coding_rate_std", "rate_reduction_mean"},
    "zeros": {"zero_fraction"},
}
REFUSALS = {
    "no names": Refusal(
        "for weights with the official names",
        "the official code of CRATE has no such operator or switch. `convert` keeps the weights "
        "under our own paths, as `.safetensors` or `.npz`.",
    ),
    "no twin": Refusal(
        "PyTorch twin",
        "the official code of CRATE, or timm's plain ViT, has no such operator or switch, so "
        "`compare` has no PyTorch model of it.",
    ),
    "no task": Refusal(
        "must be a causal model of text for next_token",
        "`plan` needs a loss to train by. The task of text tells the next token, which this model "
        "sees.",
    ),
}


def _images(model: str, layerwise: str, names: str, compare: str, **fields: object) -> Family:
    cells = {"layerwise": layerwise, "official names": names, "compare": compare}
    return Family(model, fields, dict.fromkeys(COMMANDS, YES) | cells)


def _text(model: str, layerwise: str, names: str, causal: bool = True) -> Family:
    plan = {} if causal else {"plan": "no task"}
    cells = {"layerwise": layerwise, "official names": names} | plan
    return Family(model, {}, dict.fromkeys(COMMANDS, YES) | cells)


_CRATE, _CBSA = "crate_tiny_patch16_224", "cbsa_tiny_patch16_224"
_MAE = "crate_mae_tiny_patch16_224"
_SWITCHES = dict(attention_sign="minus", tied_output=True, threshold="soft", ista_steps=2)
FAMILIES = {
    "CRATE": _images(_CRATE, ALL, "official", YES),
    "CRATE with an MLP": _images("crate_mlp_small_384_patch8_224", "R, Rᶜ", "no names", "no twin"),
    "CRATE with MHSA": _images(
        "crate_mhsa_small_384_patch8_224", "R, zeros", "no names", "no twin"
    ),
    "CRATE with both": _images("crate_mhsa_mlp_small_384_patch8_224", "R", "no names", "no twin"),
    "CRATE without nonlinearity (AoT)": _images(
        _CRATE, "R, Rᶜ", "no names", "no twin", nonlinearity="none"
    ),
    "CRATE with the theory's switches": _images(
        _CRATE, ALL, "no names", "no twin", **_SWITCHES, step_sizes="per_layer"
    ),
    "CRATE-α": _images("crate_alpha_tiny_patch16_224", ALL, "torch, jax, clipa", YES),
    "ViT": _images("vit_tiny_patch16_224", "R", "timm, simdino", YES),
    "ViT with registers": _images("vit_base_patch16_reg4_224", "R", "dinov2, simdinov2", "no twin"),
    "ViT of CRATE's authors": _images(
        "vit_tiny_patch16_224", "R", "crate_baseline", YES, pool="patches_twice"
    ),
    "ToST": _images("tost_tiny_patch16_224", "R, Rᶜ", "official", YES),
    "CBSA": _images(_CBSA, ALL, "frame_cbsa", YES),
    "CBSA's frame with TSSA": _images(_CBSA, ALL, "frame_tssa", YES, attention="tssa"),
    "CBSA's frame with MSSA": _images(_CBSA, ALL, "frame_mssa", YES, attention="mssa"),
    "Hyper-SET": _images("hyperset_patch16_224", "R", "official", YES),
    "CRATE-MAE": _images(_MAE, ALL, "official", YES),
    "CRATE-MAE's encoder": _images(_MAE, ALL, "official", YES, decoder_depth=0, num_classes=3),
    "Causal CRATE": _text("crate_causal_base", ALL, "official"),
    "CRATE-LM": _text("crate_lm_1l", ALL, "official"),
    "ToST for text": _text("tost_lm_base", "R, Rᶜ", "official"),
    "CRATE-BERT": _text("crate_bert_base", ALL, "transformers", causal=False),
}
