"""Fine-tuning of all weights of an ImageNet CRATE: ``finetune.py:DATASET`` or ``:DATASET-SIZE``.

Data sets cifar10, cifar100, flowers, pets; sizes tiny, small (the default), base, large. Give the
weights with ``--config.init_weights=FILE_OR_RUN``; the head starts anew.

Source (arXiv 2306.01129 and the official fine-tuning script): AdamW, lr 5e-5, weight
decay 0.01, batch 256, 200 epochs, images as 224 x 224 squares; Flowers trains on ``train`` alone
(1,020 images), Pets on ``trainval``. Like the script, this decays the rate once an epoch by a
cosine, and augments by random resized crop, flip and RandAugment(2, 14).

Expected top-1 (arXiv 2306.01129), tiny / small / base / large; not yet run here:
cifar10   95.5 / 96.0 / 96.8 / 97.2
cifar100  78.9 / 81.0 / 82.7 / 83.6
flowers   84.6 / 87.1 / 88.7 / 88.3
pets      81.4 / 84.9 / 85.3 / 87.4
"""

from crate_jax.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    choose,
)

SIZES = ("tiny", "small", "base", "large")

# name: (TFDS name, training split, test split)
DATASETS = {
    "cifar10": ("cifar10", "train", "test"),
    "cifar100": ("cifar100", "train", "test"),
    "flowers": ("oxford_flowers102", "train", "test"),
    "pets": ("oxford_iiit_pet", "train", "test"),  # TFDS calls trainval "train"
}


RECIPES = {f"{name}-{size}": (name, size) for name in DATASETS for size in SIZES}
RECIPES |= {name: (name, "small") for name in DATASETS}


def get_config(arg: str | None = None) -> TrainConfig:
    """The recipe for DATASET or DATASET-SIZE."""
    name, size = choose(arg, RECIPES, "cifar10")
    dataset, train_split, eval_split = DATASETS[name]
    return TrainConfig(
        name=f"finetune_{name}_{size}",
        batch_size=256,
        eval_batch_size=256,
        total_epochs=200,
        init_fit=("head",),
        eval_every_steps=500,
        model=ModelConfig(name=f"crate_{size}_patch16_224", dtype="bfloat16"),
        data=DataConfig(
            dataset=dataset,
            train_split=train_split,
            eval_split=eval_split,
            train_transforms="random_resized_crop(224)|random_flip()|randaugment(2, 14)",
            eval_transforms="resize(224)",
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            num_workers=8,
        ),
        optim=OptimConfig(lr=5e-5, weight_decay=0.01, schedule="official_readme"),
    )
