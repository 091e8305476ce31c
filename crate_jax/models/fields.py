"""The fields of every family of models, a dataclass each.

The section `model` of a config and the Flax module read the same fields. Nothing here imports JAX.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from crate_jax.options import option

Size = int | tuple[int, ...]
DType = str | type | np.dtype


@dataclasses.dataclass(eq=False, repr=False)
class ModelFields:
    """The fields of every model that is a stack of blocks."""

    USUAL: ClassVar[Mapping[str, object]] = {}  # what `create_model` takes where nothing is said

    width: int = option(..., "d, the length of a token", low=1)
    depth: int = option(..., "L, the number of layers", low=1)
    num_heads: int = option(..., "K, the number of subspaces", low=1)
    head_dim: int | None = option(
        None, "p, the dimension of a subspace; width / num_heads if unset", low=1
    )
    dropout: float = option(
        0.0, "share of entries dropped while training", low=0, below=1, how=True
    )
    dtype: DType = option(
        np.float32, "dtype of the computation", choices=("float32", "bfloat16"), how=True
    )
    backward: str = option(
        "derived",
        "the backward pass of LayerNorms and of MSSA; forward mode (jax.jvp) needs autodiff",
        choices=("derived", "autodiff"),
        how=True,
    )
    remat: str = option(
        "none",
        "values that the backward pass computes again; dots: all but matrix products",
        choices=("none", "dots", "full"),
        how=True,
    )
    scan_unroll: int | None = option(
        None,
        "layers per iteration of the compiled loop; if unset, all on GPUs without remat, else one",
        low=1,
        how=True,
    )


@dataclasses.dataclass(eq=False, repr=False)
class _Classifier:
    """The input and output of an image classifier. It stands before `ModelFields` by position."""

    image_size: Size = option(..., "pixels of a side, or height and width", low=1, lengths=(1, 2))
    patch_size: Size = option(
        ..., "pixels of a side, or height and width; divides image_size", low=1, lengths=(1, 2)
    )
    num_classes: int = option(
        ..., "Y, the number of logits; of the data set if unset; 0: no head, features", low=0
    )


@dataclasses.dataclass(eq=False, repr=False)
class ImageFields(ModelFields, _Classifier):
    """The fields of every image classifier. Sizes in pixels are a side, or (height, width)."""

    USUAL: ClassVar[Mapping[str, object]] = {"image_size": 224, "num_classes": 1000}

    pool: str = option(
        "cls", "input of the head: the class token, or the mean", choices=("cls", "mean")
    )
    in_channels: int = option(3, "channels; 1 (grey) or 3 (RGB) for decoded images", low=1)


@dataclasses.dataclass(eq=False, repr=False)
class _Text:
    """The input and output of a model of text. It stands before `ModelFields` by position."""

    context_length: int = option(..., "T, the largest number of tokens at once", low=1)
    vocab_size: int = option(..., "V, the number of different tokens", low=1)


@dataclasses.dataclass(eq=False, repr=False)
class LanguageFields(ModelFields, _Text):
    """The fields of every model of text."""

    tied: bool = option(True, "whether the head uses the table of the embedding")


@dataclasses.dataclass(eq=False, repr=False)
class SubspaceFields(ModelFields):
    """The fields of every model with MSSA."""

    attention_kernel: str = option(
        "auto",
        "program that computes MSSA; auto: a kernel if the device has one",
        choices=("auto", "xla", "pallas", "cudnn"),
        how=True,
    )

    @property
    def kernel(self) -> str | None:
        """The program that computes MSSA; None for the plain function, which JAX differentiates."""
        return self.attention_kernel if self.backward == "derived" else None


@dataclasses.dataclass(eq=False, repr=False)
class CrateFields(SubspaceFields, ImageFields):
    """CRATE, arXiv 2306.01129, and the operators that other papers put in place of its own."""

    eta: float = option(0.1, "step size of ISTA", above=0)
    lmbda: float = option(0.1, "sparsity weight of ISTA", low=0)
    attention: str = option(
        "mssa", "the first half of a layer", choices=("mssa", "mhsa", "tssa", "cbsa")
    )
    nonlinearity: str = option(
        "ista", "the second half of a layer; none: there is none", choices=("ista", "mlp", "none")
    )
    attention_sign: str = option(
        "plus", "sign of the attention's step; minus: CRATE-N", choices=("plus", "minus")
    )
    tied_output: bool = option(
        False, "whether MSSA has U and a scalar step in place of W_out; CRATE-T"
    )
    threshold: str = option(
        "relu", "threshold of ISTA; soft: the code may be negative", choices=("relu", "soft")
    )
    ista_steps: int = option(1, "steps of ISTA in a layer", low=1)
    step_sizes: str = option(
        "fixed",
        "eta and lmbda: as set, learned for all layers, or learned for each",
        choices=("fixed", "shared", "per_layer"),
    )
    stem: str = option(
        "patches",
        "embedding of images; convolutions: stages of stride two with BatchNorm",
        choices=("patches", "convolutions"),
    )
    representatives: Size = option(
        8, "cbsa's cells of the grid, a side, or down and across", low=1, lengths=(1, 2)
    )


@dataclasses.dataclass(eq=False, repr=False)
class AlphaFields(SubspaceFields, ImageFields):
    """CRATE-α, arXiv 2405.20299, with a switch for each step of its ablation."""

    pool: str = option("cls", "the token that the head reads", choices=("cls",))
    eta: float = option(0.1, "step size of ISTA", above=0)
    lmbda: float = option(0.1, "sparsity weight of ISTA", low=0)
    nonlinearity: str = option("odl", "the second half of a layer", choices=("odl", "ista"))
    overcompleteness: int = option(4, "atoms of odl's dictionary over the width", low=1)
    decoupled: bool = option(True, "whether odl decodes the code with a dictionary of its own")
    residual: bool = option(True, "whether the second half's output is added to the tokens")
    layer_scale: float | None = option(None, "start of learned factors on both halves", above=0)
    drop_path: float = option(
        0.0, "rate of stochastic depth at the last layer", low=0, below=1, how=True
    )


@dataclasses.dataclass(eq=False, repr=False)
class VitFields(ImageFields):
    """The ViT of arXiv 2010.11929, as timm builds it and as CRATE's repository trains it."""

    pool: str = option(
        "cls", "the token that the head reads", choices=("cls", "patches", "patches_twice")
    )
    mlp_ratio: int = option(4, "hidden units of the MLP over the width", low=1)
    registers: int = option(0, "learned tokens behind the class token, without positions", low=0)
    layer_scale: float | None = option(None, "start of learned factors on both halves", above=0)
    drop_path: float = option(
        0.0, "rate of stochastic depth at the last layer", low=0, below=1, how=True
    )
    drop_path_uniform: bool = option(
        False, "whether every layer has drop_path; else it grows from 0 at the first", how=True
    )


@dataclasses.dataclass(eq=False, repr=False)
class SparseTextFields(SubspaceFields, LanguageFields):
    """The fields of every model of text that makes its tokens sparse."""

    eta: float = option(0.1, "step size of ISTA", above=0)
    lmbda: float = option(0.1, "sparsity weight of ISTA", low=0)


@dataclasses.dataclass(eq=False, repr=False)
class CausalFields(SparseTextFields):
    """Causal CRATE, arXiv 2311.13110; without its second half AoT, arXiv 2506.03790."""

    nonlinearity: str = option(
        "ista", "the second half of a layer; none: there is none", choices=("ista", "none")
    )


@dataclasses.dataclass(eq=False, repr=False)
class CrateLMFields(SparseTextFields):
    """CRATE-LM, arXiv 2410.16443."""

    overcompleteness: int = option(4, "atoms of the dictionary over the width", low=1)


@dataclasses.dataclass(eq=False, repr=False)
class TostLMFields(LanguageFields):
    """ToST for text, arXiv 2412.17810."""

    bias: bool = option(False, "whether linear maps and LayerNorms have biases")
    layer_scale: float = option(1e-5, "start of the learned factors on both halves", above=0)
    mlp_ratio: int = option(4, "hidden units of the MLP over the width", low=1)


@dataclasses.dataclass(eq=False, repr=False)
class BertFields(SparseTextFields):
    """CRATE-BERT, arXiv 2311.13110."""

    dropout: float = option(
        0.1, "share of entries dropped while training", low=0, below=1, how=True
    )
    pad_token: int = option(1, "id of padding; positions count from the next one", low=0)


@dataclasses.dataclass(eq=False, repr=False)
class HyperSetFields(ImageFields):
    """Hyper-SET, arXiv 2502.11646: one block, applied depth times."""

    pool: str = option("cls", "the token that the head reads", choices=("cls",))
    mlp_ratio: int = option(1, "hidden units of the tied MLP over the width", low=1)


@dataclasses.dataclass(eq=False, repr=False)
class TostFields(SubspaceFields, ImageFields):
    """ToST, arXiv 2412.17810."""

    pool: str = option("cls", "the token that the head reads", choices=("cls",))
    attention: str = option("tssa", "the first half of a layer", choices=("tssa", "mssa", "cbsa"))
    mlp_ratio: int = option(4, "hidden units of the MLP over the width", low=1)
    layer_scale: float = option(1.0, "start of the learned factors on all halves", above=0)
    class_layers: int = option(2, "blocks of class attention after the layers", low=1)
    tokens_norm: bool = option(
        True,
        "whether the second LayerNorm of class attention takes all tokens, or its class token",
    )
    representatives: Size = option(
        8, "cbsa's cells of the grid, a side, or down and across", low=1, lengths=(1, 2)
    )
    drop_path: float = option(
        0.0, "rate of stochastic depth at every layer", low=0, below=1, how=True
    )


@dataclasses.dataclass(eq=False, repr=False)
class MaeFields(SubspaceFields, ImageFields):
    """CRATE-MAE, arXiv 2404.02446: an autoencoder, or its encoder as a classifier."""

    USUAL: ClassVar[Mapping[str, object]] = {"image_size": 224, "num_classes": 0}

    eta: float = option(0.1, "step size of ISTA", above=0)
    lmbda: float = option(0.5, "sparsity weight of ISTA", low=0)
    decoder_depth: int = option(
        0, "layers of the decoder; 0: none, the encoder alone, which may classify", low=0
    )
    position_size: Size = option(
        0,
        "image size whose positions are resized, as officially; 0: computed for image_size",
        low=0,
        lengths=(1, 2),
    )


FAMILIES: dict[str, type[ModelFields]] = {
    "crate": CrateFields,
    "crate_alpha": AlphaFields,
    "vit": VitFields,
    "crate_causal": CausalFields,
    "crate_lm": CrateLMFields,
    "crate_bert": BertFields,
    "tost_lm": TostLMFields,
    "hyper_set": HyperSetFields,
    "tost": TostFields,
    "crate_mae": MaeFields,
}


def fields_of(family: str) -> dict[str, dataclasses.Field]:
    """The fields of a family by name."""
    return {field.name: field for field in dataclasses.fields(FAMILIES[family])}
