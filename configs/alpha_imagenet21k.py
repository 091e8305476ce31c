"""CRATE-α on ImageNet-21K, from scratch: ``alpha_imagenet21k.py:SIZE-PATCH``.

Sizes tiny, small, base, large, huge; patches 32, 16, 14, 8; ``base-32`` is the default.

Source: the configuration of the official JAX code; what the paper states of it could not be read.
Adam (b1 0.9, b2 0.95, first moment bfloat16), batch 4096, lr 5e-5 · 4096/256 = 8e-4, weight decay
0.1, clipping at 1.0, 91 epochs, 10 epochs of linear warm-up, cosine to 1e-6, random resized crop to
224 (area 8 % and more) and flip, Mixup 0.8 and CutMix 1.0, each half of the time, ImageNet's mean
and deviation; 19,167 classes. Decay acts on what the official code calls ``kernel``: the embedding,
U, W_out and the head, and so not on D and D1. ``SIZE-PATCH-decay`` decays these too.
Differs from official: our Mixup and CutMix mix an image with its partner from the batch's end.

Expected: no ImageNet-21K figure is published; see ``alpha_imagenet1k.py`` for what follows. Not yet
run here.
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
        name=f"alpha_imagenet21k_{(arg or 'base-32').replace('-', '_')}",
        batch_size=batch_size,
        eval_batch_size=2048,
        total_epochs=91,
        log_every_steps=100,
        log_objective_every_steps=5000,
        eval_every_steps=5000,
        checkpoint_every_steps=1000,
        model=ModelConfig(name=f"crate_alpha_{size}_patch{patch}_224", dtype="bfloat16"),
        data=DataConfig(
            dataset="imagenet21k",
            train_split="train[1%:]",
            eval_split="train[:1%]",
            train_transforms="random_resized_crop(224)|random_flip()",
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
            lr=5e-5 * (batch_size // 256),
            end_lr=1e-6,
            weight_decay=0.1,
            decay_only=decayed,
            b2=0.95,
            mu_dtype="bfloat16",
            clip_norm=1.0,
            warmup_epochs=10,
        ),
    )
