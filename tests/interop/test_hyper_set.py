"""Hyper-SET's official names: one block, no positions, and three scales that lie apart."""

import numpy as np
import pytest
from weights import assert_equal_trees, random_params

from crate_jax import ViT, create_model, load_weights, save_weights
from crate_jax.interop import from_state_dict, load_fitted, to_state_dict
from crate_jax.interop.layouts.hyper_set import OFFICIAL
from crate_jax.models.hyper_set import HyperSet

MODEL = HyperSet(8, 4, 5, width=6, depth=3, num_heads=2, head_dim=4, mlp_ratio=2)

# Every entry of a file, from the official code: d = 6, K p = 8, m = 12, 4 x 4 x 3 pixels.
NORM = {"weight": (6,), "bias": (6,)}
OFFICIAL_SHAPES = {
    "cls_token": (1, 1, 6),
    "emb.0.weight": (48,),
    "emb.0.bias": (48,),
    "emb.1.weight": (6, 48),
    "emb.1.bias": (6,),
    **{f"emb.2.{name}": shape for name, shape in NORM.items()},
    "enc.0.mlp.weight": (12, 6),
    "enc.0.attn.qkv.weight": (8, 6),
    **{f"enc.0.attn.ln1_{i}.weight": (4,) for i in (1, 2, 3)},
    "enc.0.ln2.weight": (12,),
    "ln_inp.weight": (6,),
    "time_mlp.0.1.weight": (6, 512),
    "time_mlp.0.1.bias": (6,),
    "time_mlp.0.2.weight": (6,),
    "time_mlp.0.4.weight": (6,),
    "time_mlp.0.5.weight": (6, 6),
    "time_mlp.0.5.bias": (6,),
    "time_mlp.0.6.weight": (6,),
    "time_mlp.1.1.weight": (12, 6),
    "time_mlp.1.1.bias": (12,),
    **{f"fc.0.{name}": shape for name, shape in NORM.items()},
    "fc.1.weight": (5, 6),
    "fc.1.bias": (5,),
}


def test_there_and_back_to_the_bit():
    params = random_params(MODEL)
    state = to_state_dict(params, MODEL)
    assert {name: array.shape for name, array in state.items()} == OFFICIAL_SHAPES
    assert OFFICIAL.recognised(state) == len(state)
    assert_equal_trees(from_state_dict(state, MODEL), params)
    U = params["block"]["bisoftmax"]["U"]
    np.testing.assert_array_equal(state["enc.0.attn.qkv.weight"][4 + 3], U[:, 1, 3])
    np.testing.assert_array_equal(
        state["enc.0.attn.ln1_2.weight"], params["block"]["bisoftmax"]["k_scale"]
    )


@pytest.mark.parametrize("file", ["w.npz", "w.safetensors", "w.pth"])
def test_files_load_and_the_depth_is_free(file, tmp_path):
    if file.endswith("pth"):
        pytest.importorskip("torch")
    params, path = random_params(MODEL), tmp_path / file
    save_weights(path, params, MODEL)
    assert_equal_trees(load_weights(path, MODEL), params)
    if not file.endswith("safetensors"):  # that file states its model, and other depths differ
        assert_equal_trees(load_weights(path, MODEL.clone(depth=7, image_size=16)), params)


def test_weights_for_another_head(tmp_path):
    params = random_params(MODEL)
    np.savez(tmp_path / "w.npz", **to_state_dict(params, MODEL))
    other = MODEL.clone(num_classes=9)
    with pytest.raises(ValueError, match="num_classes 5 where the model has 9"):
        load_weights(tmp_path / "w.npz", other)
    loaded = load_fitted(tmp_path / "w.npz", other, fit=("head",))
    assert_equal_trees(loaded.params["block"], params["block"])
    assert loaded.params["head"]["kernel"].shape == (6, 9)


def test_weights_of_another_family_or_width_are_told(tmp_path):
    np.savez(tmp_path / "vit.npz", **to_state_dict(random_params(VIT), VIT))
    with pytest.raises(ValueError, match=r"its names are those of the family vit; missing: enc"):
        load_weights(tmp_path / "vit.npz", MODEL)
    np.savez(tmp_path / "w.npz", **to_state_dict(random_params(MODEL), MODEL))
    named = create_model("hyperset_patch16_224", num_classes=5)
    with pytest.raises(
        ValueError, match=r"width 6 where the model has 512, num_heads x head_dim 8"
    ):
        load_weights(tmp_path / "w.npz", named)


VIT = ViT(8, 4, 5, width=6, depth=2, num_heads=2)
