"""CRATE-BERT: the names of transformers' pull request 27759, with its head for masked tokens."""

from crate_jax.interop.layouts.forms import Leading, Linear, Same
from crate_jax.interop.layouts.layout import Layout

_LAYER = "crate.encoder.layer.{i}"

TRANSFORMERS = Layout(
    name="transformers",
    table={
        "embedding/tokens": ("crate.embeddings.word_embeddings.weight", Same()),
        "embedding/positions": ("crate.embeddings.position_embeddings.weight", Same()),
        "embedding/token_type": ("crate.embeddings.token_type_embeddings.weight", Leading(1)),
        "embedding/norm/scale": ("crate.embeddings.LayerNorm.weight", Same()),
        "embedding/norm/bias": ("crate.embeddings.LayerNorm.bias", Same()),
        "blocks/mssa_norm/scale": (f"{_LAYER}.attention.self.prenorm.weight", Same()),
        "blocks/mssa_norm/bias": (f"{_LAYER}.attention.self.prenorm.bias", Same()),
        "blocks/mssa/U": (f"{_LAYER}.attention.self.qkv.weight", Linear()),
        "blocks/mssa/W_out": (f"{_LAYER}.attention.output.dense.weight", Linear(in_axes=2)),
        "blocks/ista_norm/scale": (f"{_LAYER}.output.prenorm.weight", Same()),
        "blocks/ista_norm/bias": (f"{_LAYER}.output.prenorm.bias", Same()),
        "blocks/ista/D": (f"{_LAYER}.output.weight", Same()),
        "head/dense/kernel": ("lm_head.dense.weight", Linear()),
        "head/dense/bias": ("lm_head.dense.bias", Same()),
        "head/norm/scale": ("lm_head.layer_norm.weight", Same()),
        "head/norm/bias": ("lm_head.layer_norm.bias", Same()),
        "head/decoder/tokens": ("lm_head.decoder.weight", Same()),
        "head/bias": ("lm_head.bias", Same()),
    },
    copies={
        "lm_head.decoder.weight": "crate.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
)

LAYOUTS = (TRANSFORMERS,)
