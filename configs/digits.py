"""Handwritten digits, 8 x 8 scans from scikit-learn: the runs that need no download.

Each form trains a small model of another family (width 96, 4 layers) on scans enlarged to 32
pixels, in about a minute on two cores. Enlarged, because a LayerNorm over a 2 x 2 patch of flat
paper amplifies noise. All share data, schedule and sizes; docs/zoo.md compares the classifiers.

``simdino`` learns without labels that a scan, moved in two ways, and two small crops are of one
scan: 50 epochs of 30 batches. Of frozen features k-NN (k = 200) is right on 0.939 of the test
images, of pixels on 0.892, of random weights on 0.811. With `--config.simdino.gamma=0` the features
collapse: the effective rank goes to 1, and so does the mean cosine.

``mae`` hides half of the patches, of a pixel of the scan each, and learns to tell them, without
labels: 40 epochs, 64 patches. Its error (``loss``) ends at less than half that of whoever knows the
mean of each hidden patch and nothing else (``loss_of_means``). Half, because the encoder then knows
more of the classes than where three quarters are hidden (docs/evaluation.md).

``mcr2`` learns features of 30 values by the coding rates of their classes: 60 epochs. On the test
images the rate reduction goes from 1.38 to 7.72 nats, and the mean |cosine| between classes from
0.81 to 0.07 (docs/self_supervised.md).
"""

from crate_jax.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    SimDinoConfig,
    TrainConfig,
    choose,
)

# By form: the model, beside the sizes that all share.
CLASSIFIERS = {
    "crate": dict(name="crate_tiny_patch16_224", pool="mean"),
    "alpha": dict(name="crate_alpha_tiny_patch16_224"),
    "vit": dict(name="vit_tiny_patch16_224"),
    "hyper_set": dict(name="hyperset_patch16_224"),
    "tost": dict(name="tost_tiny_patch16_224"),
    "cbsa": dict(name="cbsa_tiny_patch16_224", representatives=(2,)),
    "aot": dict(name="crate_tiny_patch16_224", pool="mean", nonlinearity="none"),
}
RECIPES = CLASSIFIERS | {
    "mae": dict(name="crate_mae_tiny_patch16_224", decoder_depth=2, lmbda=0.1),
    "mcr2": dict(name="crate_tiny_patch16_224", pool="mean"),
    "simdino": dict(name="crate_tiny_patch16_224", pool="mean"),
}


def get_config(arg: str | None = None) -> TrainConfig:
    """The recipe of a form of `RECIPES`."""
    form, model = arg or "crate", choose(arg, RECIPES, "crate")
    config = TrainConfig(
        name="digits" if form == "crate" else f"digits_{form}",
        batch_size=100,
        eval_batch_size=304,
        total_epochs=80,
        log_every_steps=50,
        log_objective_every_steps=300,
        eval_every_steps=300,
        model=ModelConfig(
            image_size=(32, 32),
            patch_size=(4, 4) if form == "mae" else (8, 8),
            in_channels=1,
            width=96,
            depth=4,
            num_heads=3,
            **model,
        ),
        data=DataConfig(
            dataset="digits",
            train_transforms=(
                "resize(32)|random_affine(degrees=15, shift=0.15, scale=0.15, shear=10)"
            ),
            eval_transforms="resize(32)",
        ),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, label_smoothing=0.1, warmup_epochs=5),
    )
    if form == "simdino":
        _views(config)
    if form == "mae":
        config.task, config.total_epochs = "masked_autoencoding", 40
        config.optim.b2, config.optim.label_smoothing = 0.95, 0.0
        config.masking.ratio = 0.5
    if form == "mcr2":
        config.task, config.batch_size, config.total_epochs = "mcr2", 250, 60
        config.mcr2.dimension, config.optim.label_smoothing = 30, 0.0
        config.eval_every_steps = config.log_objective_every_steps = 120
    return config


def _views(config: TrainConfig) -> None:
    """Small crops beside the scans, and what makes them agree."""
    crop = "random_resized_crop(16, min_area=0.3, max_area=0.7)|"
    config.task, config.batch_size, config.total_epochs = "simdino", 50, 50
    config.optim.label_smoothing = 0.0
    config.simdino = SimDinoConfig(
        gamma=0.003,
        head_hidden=192,
        head_features=64,
        momentum=0.9,
        local_crops=2,
        local_size=16,
        local_transforms=f"{crop}random_affine(degrees=15, shift=0.1, scale=0.1, shear=10)",
        bank_size=1500,
    )
