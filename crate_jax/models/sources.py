"""The sources of the named models: papers, code, published results; see `released` for weights.

One table, which docs/zoo.md is made from. Nothing here imports JAX, and nothing here is computed.
"""

import dataclasses
import fnmatch


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a group of models.

    Attributes:
        title: what the group is called.
        pattern: a shell pattern of their names.
        paper: its number on arXiv.
        code: the official repository, and its licence; "": none was released.
        note: what a reader should know besides; "": nothing.
    """

    title: str
    pattern: str
    paper: str
    code: str
    note: str = ""


SOURCES = (
    Source(
        "CRATE",
        "crate_[tsbl]*_patch16_224",
        "2306.01129",
        "Ma-Lab-Berkeley/CRATE, MIT",
        "The link to the small weights is dead. The authors released no others.",
    ),
    Source(
        "CRATE on 8-pixel patches",
        "crate_[sb]*_patch8_224",
        "2308.16271",
        "LeslieTrue/crate-emergence-notebooks, no licence",
        "The demo's base model has 6 heads.",
    ),
    Source("MSSA or MHSA, ISTA or MLP", "crate_m*_patch8_224", "2308.16271", ""),
    Source(
        "CRATE-α",
        "crate_alpha_*",
        "2405.20299",
        "UCSC-VLAA/CRATE-alpha, no licence; headers Apache-2.0",
    ),
    Source(
        "Causal CRATE",
        "crate_causal_*",
        "2311.13110",
        "Ma-Lab-Berkeley/CRATE, pull request 13, MIT",
        "The authors' weights of the base model are JackBAI/CRATE-GPT2-Base on the Hugging Face "
        "hub.",
    ),
    Source(
        "CRATE-LM",
        "crate_lm_*",
        "2410.16443",
        "crate-lm/crate-lm, MIT",
        "The authors' weights of the base model are JackBAI/CRATE-GPT-12L-Pile-600000steps on the "
        "Hugging Face hub.",
    ),
    Source(
        "ToST for text",
        "tost_lm_*",
        "2412.17810",
        "RobinWu218/ToST, MIT",
        "No weights were released.",
    ),
    Source(
        "CRATE-BERT",
        "crate_bert_*",
        "2311.13110",
        "huggingface/transformers, pull request 27759, Apache-2.0",
    ),
    Source(
        "ToST",
        "tost_*_patch16_224",
        "2412.17810",
        "RobinWu218/ToST, MIT; its image models Apache-2.0",
        "The authors released no weights.",
    ),
    Source(
        "CBSA (the authors call the models CBT)",
        "cbsa_*",
        "2509.16875",
        "QishuaiWen/CBSA, MIT",
        "In the same frame TSSA reaches 61.2 and 68.5 (tiny and small), MSSA 64.7 and 72.1.",
    ),
    Source(
        "CRATE-MAE",
        "crate_mae_*",
        "2404.02446",
        "Ma-Lab-Berkeley/CRATE, MIT",
        "Cost is that of encoder and decoder. The official model also holds two fixed tables of "
        "positions, and a map that it never reads: parameters that are not counted here. The "
        "authors released the base weights, by a link in their README.",
    ),
    Source(
        "ViT, the baseline",
        "vit_*",
        "2010.11929",
        "timm, Apache-2.0",
        "Those with four registers and LayerScale are SimDINOv2's, arXiv 2502.10385 "
        "(RobinWu218/SimDINO, MIT). SimDINO's weights are released by links in that README.",
    ),
    Source(
        "Hyper-SET",
        "hyperset_*",
        "2502.11646",
        "huyunzhe/hyper-set, MIT",
        "Its names count the patches of a side: 16 of them, of 14 pixels each. The authors' "
        "weights are in Yunzhe/Hyper-SET on the Hugging Face hub. The names of its files are not "
        "known here.",
    ),
)

# By model and by what was measured. Top-1 in percent, of models trained on ImageNet-1K alone; and
# cross-entropy in nats, where it is called a loss.
IN1K, IN21K, REAL = "ImageNet-1K", "ImageNet-21K → 1K", "ImageNet ReaL"
CIFAR10, CIFAR100 = "CIFAR-10, fine-tuned", "CIFAR-100, fine-tuned"
FLOWERS, PETS = "Flowers-102, fine-tuned", "Oxford Pets, fine-tuned"
_PROBED = ("CIFAR-10", "CIFAR-100", "Flowers-102", "Oxford Pets")  # by a linear probe
_FROZEN = ("ImageNet-1K without labels, k-NN", "and linear probe")
_TRANSFER = (IN1K, REAL, CIFAR10, CIFAR100, FLOWERS, PETS)
RESULTS: dict[str, dict[str, float]] = {
    name: dict(zip(_TRANSFER, numbers, strict=True))
    for name, numbers in {
        "crate_tiny_patch16_224": (66.7, 74.0, 95.5, 78.9, 84.6, 81.4),
        "crate_small_patch16_224": (69.2, 76.0, 96.0, 81.0, 87.1, 84.9),
        "crate_base_patch16_224": (70.8, 76.5, 96.8, 82.7, 88.7, 85.3),
        "crate_large_patch16_224": (71.3, 77.4, 97.2, 83.6, 88.3, 87.4),
        "tost_tiny_patch16_224": (67.3, 72.2, 95.5, 78.3, 88.6, 85.6),
        "tost_small_patch16_224": (77.9, 84.1, 96.5, 82.7, 92.8, 91.1),
        "tost_medium_patch16_224": (80.3, 85.6, 97.5, 84.5, 94.2, 92.8),
        # The ViT-T and ViT-S that CRATE's paper compares with.
        "vit_tiny_patch16_224": (71.5, 78.3, 96.6, 81.8, 85.1, 88.5),
        "vit_small_patch16_224": (72.4, 78.4, 97.2, 83.2, 88.5, 88.6),
    }.items()
}
# Frozen backbones of 100 epochs without labels: SimDINO, and with registers SimDINOv2.
RESULTS |= {
    name: dict(zip(_FROZEN, numbers, strict=True))
    for name, numbers in {
        "vit_base_patch16_224": (74.9, 77.3),
        "vit_large_patch16_224": (75.6, 77.4),
        "vit_base_patch16_reg4_224": (78.1, 79.7),
        "vit_large_patch16_reg4_224": (81.1, 82.4),
    }.items()
}
RESULTS |= {
    "crate_small_384_patch8_224": {
        **{IN21K: 74.2, CIFAR10: 97.2, CIFAR100: 84.1, FLOWERS: 92.2, PETS: 86.4}
    },
    "crate_base_patch8_224": {
        **{IN21K: 79.5, CIFAR10: 98.1, CIFAR100: 87.9, FLOWERS: 96.7, PETS: 91.8}
    },
}
RESULTS |= {
    f"crate_alpha_{name}_224": {IN21K: top1}
    for name, top1 in {
        "base_patch32": 76.5,
        "base_patch16": 81.2,
        "base_patch8": 83.2,
        "large_patch32": 80.2,
        "large_patch14": 83.9,
        "large_patch8": 85.1,
    }.items()
}
RESULTS |= {
    f"cbsa_{size}_patch16_224": {IN1K: top1}
    for size, top1 in dict(tiny=63.2, small=71.4, base=73.4, large=74.4).items()
}
RESULTS |= {
    f"crate_mae_{size}_patch16_224": {
        f"{name}, linear probe": top1 for name, top1 in zip(_PROBED, numbers, strict=True)
    }
    for size, numbers in {
        "small": (79.4, 56.6, 57.7, 40.6),
        "base": (80.9, 60.1, 61.8, 46.2),
    }.items()
}
# Results on text: of the training's own kind, and zero-shot.
_TEXT = ("OpenWebText loss", "LAMBADA loss", "WikiText loss", "PTB loss")
RESULTS |= {
    name: dict(zip(_TEXT, losses, strict=True))
    for name, losses in {
        "crate_causal_base": (3.37, 4.91, 4.61, 5.53),
        "tost_lm_base": (3.20, 4.98, 4.77, 6.39),
        "tost_lm_medium": (2.88, 4.45, 4.30, 5.64),
        "tost_lm_large": (2.72, 4.32, 3.99, 5.03),
    }.items()
}


def source_of(model: str) -> Source:
    """The source of a named model.

    Raises:
        KeyError: the table does not say; every named model has one row of `SOURCES`.
    """
    for source in SOURCES:
        if fnmatch.fnmatch(model, source.pattern):
            return source
    raise KeyError(f"model must be of a known source; got {model}. Add a row to SOURCES.")
