"""Models without MSSA or ISTA train through the loop, and are inspected as far as they can be."""

import json
import math

import pytest

from crate_jax.config import ModelConfig
from crate_jax.training.loop import train

# The model, and what is measured of its layers while it trains.
FAMILIES = {
    "vit_tiny_patch16_224": {"rate_mean"},
    "hyperset_patch16_224": {"rate_mean"},
    "crate_mlp_small_384_patch8_224": {
        "rate_mean",
        "rate_reduction_mean",
        "coding_rate_mean",
        "coding_rate_std",
    },
}


def tiny_model(name):
    sizes = dict(image_size=(16, 16), patch_size=(8, 8), width=24, depth=2, num_heads=3)
    return ModelConfig(name=name, in_channels=1, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_of_two_steps(name, tiny_config, tmp_path):
    config = tiny_config(total_steps=2, log_objective_every_steps=1, model=tiny_model(name))
    summary = train(config, tmp_path)
    assert summary["step"] == 2 and summary["test/examples"] == 297
    assert math.isfinite(summary["test/loss"]) and 0 <= summary["test/top1"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = {key.split("/")[1] for line in lines for key in line if key.startswith("objective/")}
    assert seen == FAMILIES[name]
    assert train(config, tmp_path)["test/loss"] == summary["test/loss"]  # complete: read back
