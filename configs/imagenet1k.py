"""CRATE on ImageNet-1K, from scratch: ``imagenet1k.py:SIZE`` or ``imagenet1k.py:SIZE-PRESET``.

Sizes tiny, small, base, large; presets ``paper`` (the default) and ``readme``, which disagree:

paper   arXiv 2306.01129: Lion, lr 2.4e-4, weight decay 0.5, batch 2048, 150 epochs, 5 epochs of
        linear warm-up, cosine to 0, label smoothing 0.1.
readme  the official repository's README: Lion, lr 2e-4, weight decay 0.05, batch 512, 200
        epochs; its code steps the schedule once an epoch, with a warm-up of 20 epochs. Label
        smoothing 0.1 as in the paper.

Both: random resized crop to 224 and horizontal flip, evaluation on the central 224 of 256,
ImageNet's mean and deviation, decay on every parameter, no clipping (the official code defines a
clip and never uses it). Ours computes in bfloat16 where the official code trains in float16.

Expected top-1 / ReaL (arXiv 2306.01129); not yet run here:
tiny 66.7 / 74.0, small 69.2 / 76.0, base 70.8 / 76.5, large 71.3 / 77.4.
"""

from typing import Any

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

SIZES = ("tiny", "small", "base", "large")

PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(
        batch_size=2048,
        total_epochs=150,
        optim=dict(lr=2.4e-4, weight_decay=0.5, schedule="cosine", warmup_epochs=5),
    ),
    "readme": dict(
        batch_size=512,
        total_epochs=200,
        optim=dict(lr=2e-4, weight_decay=0.05, schedule="official_readme", warmup_epochs=20),
    ),
}


RECIPES = {f"{size}-{preset}": (size, preset) for size in SIZES for preset in PRESETS}
RECIPES |= {size: (size, "paper") for size in SIZES}


def get_config(arg: str | None = None) -> TrainConfig:
    """The recipe for SIZE or SIZE-PRESET."""
    size, preset = choose(arg, RECIPES, "small")
    values = PRESETS[preset]
    return TrainConfig(
        name=f"imagenet1k_{size}_{preset}",
        batch_size=values["batch_size"],
        eval_batch_size=2048,
        total_epochs=values["total_epochs"],
        log_every_steps=100,
        log_objective_every_steps=5000,
        eval_every_steps=5000,
        checkpoint_every_steps=1000,
        model=ModelConfig(name=f"crate_{size}_patch16_224", dtype="bfloat16"),
        data=DataConfig(
            dataset="imagenet2012",
            eval_split="validation",
            train_transforms="random_resized_crop(224)|random_flip()",
            eval_transforms=IMAGENET_EVAL,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            num_workers=16,
            num_threads=2,
            prefetch_mib=2048,
        ),
        # b2 0.99 is Lion's own default; neither source states another.
        optim=OptimConfig(optimizer="lion", b2=0.99, label_smoothing=0.1, **values["optim"]),
    )
