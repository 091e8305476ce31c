"""Models of no known family: their weights go into files under our own paths and back."""

import flax.linen as nn
import numpy as np
import pytest
from weights import MODEL, assert_equal_trees, random_params

from crate_jax import load_weights, save_weights
from crate_jax.interop.tree import tree_of


class Pixels(nn.Module):
    """A linear map of all pixels: no patches, no blocks, no head."""

    outputs: int = 3
    input_shape = (4, 4, 1)

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(self.outputs, name="map")(images.reshape(len(images), -1))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_it_comes_back_to_the_bit(tmp_path, suffix):
    model = Pixels()
    assert tree_of(model).patch is None
    params, path = random_params(model), tmp_path / f"w{suffix}"
    save_weights(path, params, model)
    assert_equal_trees(load_weights(path, model), params)
    with pytest.raises(ValueError, match=r"nothing else; of another shape: map/bias \(3,\) inst"):
        load_weights(path, Pixels(outputs=2))
    with pytest.raises(ValueError, match=r"must be of a known family, .*; got Pixels\. Use"):
        load_weights(path, model, fit=("head",))


def test_what_it_cannot_do_is_one_line(tmp_path):
    model = Pixels()
    params = random_params(model)
    with pytest.raises(ValueError, match=r"Pixels in PyTorch files must have an official layout"):
        save_weights(tmp_path / "w.pth", params, model)
    with pytest.raises(ValueError, match=r"must have an input_shape, .*; Dense has none\. Add"):
        save_weights(tmp_path / "w.npz", params, nn.Dense(3))
    save_weights(tmp_path / "crate.npz", random_params(MODEL), MODEL)
    with pytest.raises(ValueError, match=r"missing: map/bias, map/kernel; unknown: blocks/"):
        load_weights(tmp_path / "crate.npz", model)


def test_the_classes_of_a_run_are_those_of_its_head_if_it_has_one(tmp_path, monkeypatch):
    from crate_jax.config import ModelConfig, TrainConfig, to_dict
    from crate_jax.interop.contents import read_contents

    name = "crate_tiny_patch16_224"
    record = {"config": to_dict(TrainConfig(model=ModelConfig(name=name, num_classes=8)))}
    (tmp_path / "checkpoints").mkdir()
    trees = [{"head": {"bias": np.zeros(5, "f4")}}, {"map": {"bias": np.zeros(3, "f4")}}]
    for params, classes in zip(trees, (5, 8), strict=True):
        monkeypatch.setattr(
            "crate_jax.checkpoint.reading.read_trained",
            lambda *_, params=params: (params, (), record),
        )
        assert read_contents(tmp_path).fields["num_classes"] == classes
