"""SimDINO and SimDINOv2 on ImageNet-1K, without labels: ``simdino_imagenet1k.py:FORM``.

Forms base (the default) and large are SimDINO of a ViT, v2-base and v2-large SimDINOv2 of a ViT
with registers. For a CRATE add ``--config.model.name=crate_base_patch16_224`` and
``--config.optim.no_decay=bias,scale,b_out``.

Source (arXiv 2502.10385 and its code, on 8 devices of 64 images each): batch 512, 100 epochs, of
which 10 warm up, then a cosine to 1e-6; weight decay 0.04, which rises to 0.4 by a cosine, on
neither biases nor norms; two crops of 224 pixels and ten of 96. The covariance is that of each
device's 64 images. SimDINO: the rate is 5e-4 · batch / 256, each parameter's gradient is clipped to
3, the teacher's momentum rises from 0.996. SimDINOv2: 4e-3 · √(batch / 1024), 0.9 of it for each
layer below another and 0.2 for the patches; clipped to 3; the momentum rises from 0.9; hidden
patches count as much.

Expected after 100 epochs, k-NN and linear probe: base 74.9 and 77.3, large 75.6 and 77.4, v2-base
78.1 and 79.7, v2-large 81.1 and 82.4. Not yet run here.
"""

import math

from crate_jax.config import (
    IMAGENET_EVAL,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataConfig,
    ModelConfig,
    OptimConfig,
    SimDinoConfig,
    TrainConfig,
    choose,
)

BATCH, GROUP = 512, 64
RECIPES = {
    "base": dict(name="vit_base_patch16_224", drop_path=0.1),
    "large": dict(name="vit_large_patch16_224", drop_path=0.1),
    "v2-base": dict(name="vit_base_patch16_reg4_224", drop_path=0.2, drop_path_uniform=True),
    "v2-large": dict(name="vit_large_patch16_reg4_224", drop_path=0.2, drop_path_uniform=True),
}
CROP = "random_resized_crop({}, min_area={}, max_area={}, interpolation='bicubic')|random_flip()|"
CROP += "color_jitter(0.4, 0.4, 0.2, 0.1, probability=0.8)|random_grayscale(0.2)|"
CROP += "random_blur(probability={})"
BIASES_AND_NORMS = ("bias", "scale", "b_qkv", "b_out", "b_in")


def get_config(arg: str | None = None) -> TrainConfig:
    """The recipe of a form of `RECIPES`."""
    form, model = arg or "base", choose(arg, RECIPES, "base")
    config = TrainConfig(
        name=f"simdino_imagenet1k_{form}",
        task="simdino",
        batch_size=BATCH,
        eval_batch_size=BATCH,
        total_epochs=100,
        log_objective_every_steps=5000,
        eval_every_steps=5000,
        model=ModelConfig(dtype="bfloat16", **model),
        data=DataConfig(
            dataset="imagenet2012",
            eval_split="validation",
            train_transforms=CROP.format(224, 0.4, 1, 1.0),
            eval_transforms=IMAGENET_EVAL,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            num_workers=16,
        ),
        simdino=SimDinoConfig(
            group_size=GROUP,
            second_transforms=CROP.format(224, 0.4, 1, 0.1) + "|random_solarize(probability=0.2)",
            local_transforms=CROP.format(96, 0.05, 0.4, 0.5),
        ),
        optim=OptimConfig(
            lr=5e-4 * BATCH / 256,
            end_lr=1e-6,
            warmup_epochs=10,
            weight_decay=0.04,
            end_weight_decay=0.4,
            no_decay=BIASES_AND_NORMS,
            clip_each=3.0,
        ),
    )
    if form.startswith("v2"):
        _second(config)
    return config


def _second(config: TrainConfig) -> None:
    """What SimDINOv2 does otherwise."""
    config.optim.lr = 4e-3 * math.sqrt(BATCH / 1024)
    config.optim.clip_each, config.optim.clip_norm = 0.0, 3.0
    config.optim.layer_decay, config.optim.patch_lr_scale = 0.9, 0.2
    config.optim.no_decay += ("mhsa_scale", "mlp_scale")
    config.simdino.momentum, config.simdino.patch_weight = 0.9, 1.0
