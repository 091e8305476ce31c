"""What flags of several commands write into a config."""

import argparse

import pytest

from crate_jax.cli.arguments import add_data, override_data, path
from crate_jax.config import DataConfig


def overridden(*flags, **data):
    parser = argparse.ArgumentParser()
    add_data(parser)
    config = DataConfig(**data)
    override_data(config, parser.parse_args(flags))
    return config.dataset, config.image_key, config.label_key


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], ("mine", "img", "kind")),
        (["--dataset=mine"], ("mine", "img", "kind")),
        (["--dataset=other"], ("other", "image", "label")),
        (["--dataset=other", "--label_key=fine"], ("other", "image", "fine")),
        (["--image_key=photo"], ("mine", "photo", "kind")),
    ],
)
def test_keys_are_those_of_a_data_set(flags, expected):
    assert overridden(*flags, dataset="mine", image_key="img", label_key="kind") == expected


def test_a_path_names_something():
    assert path("runs/mine") == "runs/mine"
    with pytest.raises(argparse.ArgumentTypeError, match="must name a file or folder; got nothing"):
        path("")
