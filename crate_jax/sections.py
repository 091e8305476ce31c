"""The sections of a config beside the model's: data, optimizer, objectives, devices.

Nothing here imports JAX.
"""

import dataclasses

from crate_jax.options import option


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """The source of the examples, and their way to the device."""

    dataset: str = option(
        "digits",
        "digits, folder, tar, synthetic, or a TFDS name; for text: text, tokens or pydoc",
        identity=True,
    )
    data_dir: str | None = option(None, "TFDS directory or folder root; unset: TFDS's", path=True)
    train_split: str = option(
        "train", "TFDS split, or a folder or file under data_dir", identity=True
    )
    eval_split: str = option("test", "the split that is evaluated, named as train_split")
    image_key: str = option("image", "TFDS feature of the image; a/b is b within a", identity=True)
    label_key: str = option("label", "TFDS feature of the label, named as image_key", identity=True)
    download: bool = option(False, "whether TFDS may download and prepare a missing data set")
    train_transforms: str = option(
        "", "name(arguments)|name(arguments), see data/images/augment.py", identity=True
    )
    eval_transforms: str = option("", "as train_transforms, without random ones")
    mean: tuple[float, ...] = option(
        (0.5,), "mean of the pixels in [0, 1], subtracted; one, or one a channel"
    )
    std: tuple[float, ...] = option(
        (0.5,), "deviation that pixels are divided by; one, or one a channel", above=0
    )
    repeats: int = option(
        1, "copies of an example in a row, each augmented anew", low=1, identity=True
    )
    num_workers: int = option(0, "loader processes; 0: threads of this process", low=0)
    num_threads: int = option(4, "reading threads per loader process", low=1)
    prefetch_mib: int = option(256, "host memory for rows made ahead, over all workers, MiB", low=1)
    mixup_alpha: float = option(0.0, "Beta(α, α) of blended images; 0: none", low=0, identity=True)
    cutmix_alpha: float = option(0.0, "Beta(α, α) of pasted boxes; 0: none", low=0, identity=True)
    mix_switch: float = option(
        0.5, "share of CutMix, if Mixup is on too", low=0, high=1, identity=True
    )
    on_bad_example: str = option(
        "raise",
        "raise stops; skip takes the next good one (evaluation leaves it out)",
        choices=("raise", "skip"),
    )
    max_bad_share: float = option(
        0.01, "largest share of the examples that may be skipped", low=0, high=1
    )
    check_crc: bool = option(False, "whether TFRecord checksums are verified at each read")
    index_dir: str | None = option(
        None, "folder of TFRecord and tar indices; unset: beside the files", path=True
    )


@dataclasses.dataclass(kw_only=True)
class TextConfig:
    """The tokens of next_token, made of text. The section data says where the text lies."""

    tokenizer: str | None = option(
        "bytes",
        "bytes, a tokenizer.json, or a name on huggingface.co; unset: unknown, for token files",
        path=True,
    )
    end_token: str = option(
        "<|endoftext|>", "token of such a tokenizer that ends a text", identity=True
    )


@dataclasses.dataclass(kw_only=True)
class OptimConfig:
    """The optax chain and its schedule."""

    optimizer: str = option("adamw", "the update rule", choices=("adamw", "lion"), identity=True)
    lr: float = option(1e-3, "peak learning rate", above=0)
    weight_decay: float = option(0.05, "decoupled weight decay", low=0)
    end_weight_decay: float | None = option(
        None, "weight decay at the end, by half a cosine; unset: constant", low=0, identity=True
    )
    decay_only: tuple[str, ...] = option(
        (), "names of the only parameters that decay; none: no_decay decides", identity=True
    )
    no_decay: tuple[str, ...] = option(
        (), "names of parameters without decay; none: decay on every one", identity=True
    )
    b1: float = option(0.9, "AdamW's and Lion's first β", low=0, below=1)
    b2: float = option(0.999, "AdamW's and Lion's second β", low=0, below=1)
    eps: float = option(1e-8, "ε of AdamW's denominator", above=0)
    mu_dtype: str = option(
        "float32",
        "dtype of the first moment; bfloat16 halves its memory",
        choices=("float32", "bfloat16"),
        identity=True,
    )
    schedule: str = option(
        "cosine",
        "cosine steps once a step, official_readme once an epoch",
        choices=("cosine", "official_readme"),
        identity=True,
    )
    warmup_epochs: float = option(0.0, "linear warm-up, epochs", low=0)
    warmup_lr: float = option(
        0.0, "first learning rate of the warm-up, with schedule cosine", low=0
    )
    end_lr: float = option(0.0, "last learning rate, with schedule cosine", low=0)
    cooldown_epochs: float = option(
        0.0, "last epochs of the run, at end_lr, with schedule cosine", low=0
    )
    label_smoothing: float = option(0.0, "share of a label spread over all classes", low=0, below=1)
    clip_norm: float = option(
        0.0, "largest global gradient norm; 0: no clipping", low=0, identity=True
    )
    clip_each: float = option(
        0.0, "largest gradient norm of each parameter of a layer; 0: none", low=0, identity=True
    )
    layer_decay: float = option(
        1.0,
        "factor on the learning rate from a layer to the one before it; 1: none",
        above=0,
        high=1,
        identity=True,
    )
    patch_lr_scale: float = option(
        1.0, "factor on the learning rate of the patch embedding", low=0, identity=True
    )
    orthonormal: tuple[str, ...] = option(
        (), "names of parameters that each step projects, such as U,D; none: none", identity=True
    )
    accumulate_steps: int = option(1, "micro-batches per optimizer step", low=1)
    ema_decay: float = option(
        0.0, "decay of the averaged parameters; 0: no average", low=0, below=1, identity=True
    )


@dataclasses.dataclass(kw_only=True)
class PenaltyConfig:
    """Penalties that a training loss has besides its task; see crate_jax/tasks/penalties.py."""

    orthogonality: float = option(0.0, "weight of ‖UᵀU − I‖² and ‖DᵀD − I‖²; 0: none", low=0)
    srr: float = option(0.0, "weight of R^c − R + λ‖Z‖₁ of a layer, per token; 0: none", low=0)
    srr_layer: str = option(
        "random",
        "layers that srr penalises: a random one at each step, or all",
        choices=("random", "all"),
    )
    srr_lmbda: float = option(0.1, "λ of srr", low=0)
    srr_eps: float = option(0.1, "quantisation precision ε of srr, in the unit of tokens", above=0)


@dataclasses.dataclass(kw_only=True)
class MaskingConfig:
    """The patches that masked_autoencoding hides of an image, and the units of its predictions."""

    ratio: float = option(
        0.75, "share of the patches that are hidden", above=0, below=1, identity=True
    )
    normalize: bool = option(
        True, "whether pixels are predicted in units of their patch's deviation", identity=True
    )


@dataclasses.dataclass(kw_only=True)
class Mcr2Config:
    """The features of mcr2, and the loss that spreads and sorts them; see tasks/mcr2.py."""

    mode: str = option(
        "supervised",
        "a class is the images of a label, or the views of an image",
        choices=("supervised", "self_supervised"),
        identity=True,
    )
    dimension: int = option(128, "p, the dimension of the features", low=1, identity=True)
    hidden: int = option(
        0, "width of a layer between model and features; 0: a linear map", low=0, identity=True
    )
    eps: float = option(
        0.5**0.5, "quantisation precision ε; the official eps is ε²", above=0, identity=True
    )
    gamma1: float = option(1.0, "factor within the determinant of R", above=0, identity=True)
    gamma2: float = option(1.0, "weight of R in the loss", above=0, identity=True)
    regularizer: float = option(
        0.0, "λ of λ/2 ‖Z‖²; 0: features of norm 1 instead", low=0, identity=True
    )
    views: int = option(1, "augmented views of an image in a row", low=1, identity=True)


@dataclasses.dataclass(kw_only=True)
class SimDinoConfig:
    """The settings of simdino for the views of an image; see crate_jax/tasks/simdino.py."""

    eps: float = option(
        0.05, "ε of the expansion; it stands in the place of ε²", above=0, identity=True
    )
    coeff: float = option(1.0, "weight of the compression", low=0, identity=True)
    gamma: float | None = option(
        None, "weight of the expansion; unset: (p + n)/(p n); 0: collapse", low=0, identity=True
    )
    expanded: str = option(
        "both",
        "features that are expanded: of the student, or its mean with the teacher (expa_type 0, 1)",
        choices=("student", "both"),
        identity=True,
    )
    group_size: int = option(
        0, "images of a covariance; 0: all of the batch, as reduce_cov 1", low=0, identity=True
    )
    head_hidden: int = option(2048, "hidden units of the head", low=1, identity=True)
    head_features: int = option(256, "p, the number of features", low=1, identity=True)
    momentum: float = option(0.996, "the teacher's momentum at first", low=0, high=1, identity=True)
    end_momentum: float = option(
        1.0, "the teacher's momentum at last, half a cosine later", low=0, high=1, identity=True
    )
    local_crops: int = option(
        10, "small views of an image, beside two global ones", low=0, identity=True
    )
    local_size: int = option(96, "side of a small view, pixels", low=1, identity=True)
    second_transforms: str = option(
        "", "transforms of the second global view; unset: data.train_transforms", identity=True
    )
    local_transforms: str = option("", "transforms of the small views", identity=True)
    patch_weight: float = option(
        0.0, "weight of the loss of patches that are hidden from the student", low=0, identity=True
    )
    min_masked: float = option(0.1, "least share of hidden patches", low=0, high=1, identity=True)
    max_masked: float = option(0.5, "largest share of hidden patches", low=0, high=1, identity=True)
    bank_size: int = option(
        4096, "recent training images that vote in evaluation", low=1, identity=True
    )
    neighbours: int = option(20, "nearest images that vote", low=1)


@dataclasses.dataclass(kw_only=True)
class ParallelConfig:
    """The layout of the devices."""

    mesh: str = option(
        "data:-1", "axis:size,… of data and fsdp; one size may be -1, the rest of the devices"
    )
    coordinator: str | None = option(
        None, "host:port of process 0; auto: TPU pod, SLURM, …; unset: one process"
    )
    num_processes: int | None = option(
        None, "number of processes; with coordinator=host:port", low=1
    )
    process_id: int | None = option(
        None, "number of this process, from 0; with coordinator=host:port", low=0
    )
    heartbeat_timeout_seconds: int = option(
        30, "a process that is silent for longer ends the others", low=1
    )
