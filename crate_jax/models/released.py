"""The weights that authors released, one row a file. docs/zoo.md shows the table.

Nothing here imports JAX, and nothing here is computed. `crate_jax.interop.pretrained` loads them.
"""

import dataclasses
import difflib

HUB = "hf://"


@dataclasses.dataclass(frozen=True)
class Released:
    """One file of released weights.

    Attributes:
        model: the named model that it fits.
        tag: tells it from other files of the same model.
        file: where it lies: hf://owner/repository/path on the Hugging Face hub, or a page that
            leads to it.
        licence: that its owner states.
        classes: outputs of its head; 0: it has none.
        bytes: its size; None: not known to the byte.
        sha256: the first digits of its digest; "": not known.
        crop_share: of the shorter side, which the central crop keeps at evaluation.
        note: what a reader must know besides; "": nothing.
        dead: whether its link leads nowhere.
    """

    model: str
    tag: str
    file: str
    licence: str
    classes: int
    bytes: int | None = None
    sha256: str = ""
    crop_share: float = 0.875
    note: str = ""
    dead: bool = False

    @property
    def name(self) -> str:
        """The name for `load_pretrained`: the model, a dot and the tag."""
        return f"{self.model}.{self.tag}"

    @property
    def by_program(self) -> bool:
        """True if a program can download it."""
        return self.file.startswith(HUB) and not self.dead


_ALPHA = f"{HUB}UCSC-VLAA/CRATE-alpha"
_IN21K = 19_167
# The JAX files are complete training states: parameters, and Adam's moments.
RELEASED = tuple(
    Released(
        f"crate_alpha_{model}_224", tag, f"{_ALPHA}/{file}", "Apache-2.0", classes, size, sha256
    )
    for model, tag, file, classes, size, sha256 in (
        ("base_patch16", "in1k", "jax/crate_alpha_B16_in1k.npz", 1000, 723_400_850, "5d84b128"),
        ("base_patch8", "in1k", "jax/crate_alpha_B8_in1k.npz", 1000, 723_493_010, "0ffd17cc"),
        ("large_patch14", "in1k", "jax/crate_alpha_L14_in1k.npz", 1000, 2_536_725_406, "09f7412c"),
        ("large_patch8", "in1k", "jax/crate_alpha_L8_in1k.npz", 1000, 2_538_077_086, "5f641413"),
        ("base_patch16", "torch_in1k", "torch/crate_alpha_B16.pth", 1000, None, ""),
        ("large_patch14", "torch_in1k", "torch/crate_alpha_L14.pth", 1000, None, ""),
        *(
            (model, "in21k", f"torch/in21k_Pretrain/crate_alpha_{file}", _IN21K, None, "")
            for model, file in (
                ("base_patch32", "B32_in21k.pth"),
                ("base_patch16", "B16_IN21K"),
                ("base_patch8", "B8_IN21K"),
                ("large_patch32", "L32_in21k.pth"),
                ("large_patch14", "L14_IN21K"),
                ("large_patch8", "L8_IN21K"),
            )
        ),
    )
)
# The towers of images of two models of images and texts. The head is the projection into the
# common space.
RELEASED += tuple(
    Released(
        f"crate_alpha_{size}_patch14_224",
        "clipa",
        f"{_ALPHA}/torch/crate_alpha_CLIPA_{letter}14.pth",
        "Apache-2.0",
        1024,
        crop_share=1.0,
        note="images and texts; the tower of images is read",
    )
    for size, letter in (("large", "L"), ("huge", "H"))
)
_DRIVE = "https://drive.google.com/file/d"
RELEASED += tuple(
    Released(f"cbsa_{size}_patch16_224", "in1k", f"{_DRIVE}/{page}/view", "MIT", 1000)
    for size, page in {
        "tiny": "1GovOGBPDkHJDpOYX8KVJJeDrjwQvHfhb",
        "small": "1sKZBbIxvgPJmfO89TKaggKD0EdUJ7jSu",
        "base": "1CouOjiy3T9YRhYJFk4gL8PVOgiJ-bFgn",
        "large": "1xdEClU6xb5qSwxvDZROKfLac8mJ7R6vb",
    }.items()
)
# If nobody stated the licence of the files, the code's licence stands here, and says so.
_MIT = "not stated; the code is MIT"
_BY_README = "by the link in the authors' README"
_CRATE, _SIMDINO = (
    "https://github.com/Ma-Lab-Berkeley/CRATE",
    "https://github.com/RobinWu218/SimDINO",
)
RELEASED += (
    Released("crate_small_patch16_224", "in1k", _CRATE, _MIT, 1000, note=_BY_README, dead=True),
    Released("crate_mae_base_patch16_224", "in1k", _CRATE, _MIT, 0, note=_BY_README),
    *(
        Released(f"vit_{model}_224", tag, _SIMDINO, _MIT, 0, note=_BY_README)
        for model, tag in (
            ("base_patch16", "simdino_in1k"),
            ("large_patch16", "simdino_in1k"),
            ("base_patch16_reg4", "simdinov2_in1k"),
            ("large_patch16_reg4", "simdinov2_in1k"),
        )
    ),
)
# The repository of these is known, but not the names of its files.
_WHOLE = "a repository; the name of its file is not known here"
RELEASED += (
    Released(
        "crate_causal_base",
        "openwebtext",
        f"{HUB}JackBAI/CRATE-GPT2-Base",
        "not known",
        0,
        note=_WHOLE,
    ),
    Released(
        "crate_lm_base",
        "pile",
        f"{HUB}JackBAI/CRATE-GPT-12L-Pile-600000steps",
        "not known",
        0,
        note=_WHOLE,
    ),
)


def of_address(address: str) -> Released | None:
    """The row of a file on the hub; None: it is none of the table."""
    return next((row for row in RELEASED if row.by_program and row.file == address), None)


def find_released(name: str) -> Released:
    """The row of a model's name, with a tag after a dot or without: then the first.

    Raises:
        KeyError: there is no such row; those that exist are named.
    """
    rows = [row for row in RELEASED if name in (row.name, row.model)]
    if rows:
        return rows[0]
    model, _, tag = name.partition(".")
    tags = [row.tag for row in RELEASED if row.model == model]
    if tags:
        raise KeyError(
            f"the tag of {model} must be one of {', '.join(tags)}; got {tag}. Choose one, or leave "
            "it out."
        )
    known = list(dict.fromkeys(row.model for row in RELEASED if row.by_program))
    near = difflib.get_close_matches(model, known, n=1, cutoff=0.9)
    meant = f"Did you mean {near[0]}? " if near else ""
    raise KeyError(
        f"load_pretrained must get a model with released weights; got {model}, of which none are "
        f"released. {meant}Models with some: {', '.join(known)}."
    )
