"""CRATE-α from ImageNet-21K to ImageNet-1K: ``alpha_imagenet1k.py:SIZE-PATCH``.

Sizes tiny, small, base, large, huge; patches 32, 16, 14, 8; ``base-32`` is the default. Give the
weights with ``--config.init_weights=FILE_OR_RUN``; the head starts anew. Weights of other patches,
as those of L/32 for L/14, are fitted with ``--config.init_fit=head,patch_size,image_size``;
``--config.init_method=crate_alpha`` resizes as the official code does.

Source: the configuration of the official JAX code; what the paper states of it could not be read.
As ``alpha_imagenet21k.py``, but lr 1e-5 · 4096/256 = 1.6e-4, timm's RandAugment(2, 9) and label
smoothing 0.1.

Expected top-1 (the official repository), B/32 76.5, B/16 81.2, B/8 83.2, L/32 80.2, L/14 83.9, L/8
85.1. Ablation of B/32: CRATE 68.5, overcomplete 73.8, decoupled 75.8, residual 76.5; its models are
``--config.model.nonlinearity=ista --config.model.residual=False``, then
``--config.model.decoupled=False --config.model.residual=False``, then
``--config.model.residual=False``. Not yet run here.
"""

from crate_jax.config import (
    IMAGENET_EVAL,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    choose,
)

SIZES = ("tiny", "small", "base", "large", "huge")
PATCHES = (32, 16, 14, 8)

KERNELS = ("kernel", "U", "W_out")
DECAY = {"": KERNELS, "-decay": (*KERNELS, "D", "D1")}

RECIPES = {
    f"{size}-{patch}{suffix}": (size, patch, names)
    for size in SIZES
    for patch in PATCHES
    for suffix, names in DECAY.items()
}


def get_config(arg: str | None = None) -> TrainConfig:
    """The recipe for SIZE-PATCH or SIZE-PATCH-decay."""
    size, patch, decayed = choose(arg, RECIPES, "base-32")
    batch_size = 4096
    return TrainConfig(
        name=f"alpha_imagenet1k_{(arg or 'base-32').replace('-', '_')}",
        batch_size=batch_size,
        eval_batch_size=2048,
        total_epochs=91,
        init_fit=("head",),
        log_every_steps=100,
        log_objective_every_steps=5000,
        eval_every_steps=5000,
        checkpoint_every_steps=1000,
        model=ModelConfig(name=f"crate_alpha_{size}_patch{patch}_224", dtype="bfloat16"),
        data=DataConfig(
            dataset="imagenet2012",
            eval_split="validation",
            train_transforms=(
                "random_resized_crop(224)|random_flip()"
                "|timm_randaugment(2, 9, 0.5, fill=(124, 116, 104))"
            ),
            eval_transforms=IMAGENET_EVAL,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            num_workers=16,
            num_threads=2,
            prefetch_mib=2048,
            mixup_alpha=0.8,
            cutmix_alpha=1.0,
        ),
        optim=OptimConfig(
            lr=1e-5 * (batch_size // 256),
            end_lr=1e-6,
            weight_decay=0.1,
            decay_only=decayed,
            b2=0.95,
            mu_dtype="bfloat16",
            clip_norm=1.0,
            warmup_epochs=10,
            label_smoothing=0.1,
        ),
    )
