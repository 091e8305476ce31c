"""A run small enough to compile in seconds, over the real digits."""

import pytest

from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig


@pytest.fixture
def tiny_config():
    """A function: the config of a four-step run, changed by dotted path."""

    def make(**changes):
        config = TrainConfig(
            name="tiny",
            batch_size=48,
            eval_batch_size=104,
            total_steps=4,
            log_every_steps=1,
            eval_every_steps=2,
            model=ModelConfig(
                name="crate_tiny_patch16_224",
                image_size=(16, 16),
                patch_size=(8, 8),
                in_channels=1,
                width=24,
                depth=2,
                num_heads=3,
            ),
            data=DataConfig(
                train_transforms="resize(16)|random_affine(degrees=10)",
                eval_transforms="resize(16)",
                num_threads=2,
            ),
            optim=OptimConfig(lr=3e-3, label_smoothing=0.1),
        )
        for path, value in changes.items():
            *sections, field = path.split("__")
            target = config
            for section in sections:
                target = getattr(target, section)
            setattr(target, field, value)
        return config

    return make
