"""The names of a ViT's last norm tell its pooling, which no shape shows."""

import numpy as np
import pytest
from weights import assert_equal_trees, random_params

from crate_jax import ViT, load_weights, save_weights
from crate_jax.interop import from_state_dict, load_fitted, to_state_dict
from crate_jax.interop.convert import find_layout

MODEL = ViT(8, 4, 5, width=6, depth=2, num_heads=2)
POOLS = {"cls": "timm", "patches": "crate_baseline", "patches_twice": "crate_baseline"}
NORMS = {"timm": "norm", "crate_baseline": "fc_norm"}


@pytest.mark.parametrize("pool", POOLS)
def test_the_pooling_chooses_the_layout_and_is_asked_for(pool, tmp_path):
    model, path = MODEL.clone(pool=pool), tmp_path / "w.npz"
    params, norm = random_params(model), NORMS[POOLS[pool]]
    assert find_layout(model).name == POOLS[pool]
    state = to_state_dict(params, model)
    assert f"{norm}.weight" in state
    np.savez(path, **state)
    for other, layout in POOLS.items():
        theirs = MODEL.clone(pool=other)
        if layout == POOLS[pool]:
            assert_equal_trees(load_weights(path, theirs), params)
            assert_equal_trees(from_state_dict(state, theirs), params)
            continue
        message = rf"^model\.pool must be .* for weights with {norm}; got {other}\. Set model\.pool"
        with pytest.raises(ValueError, match=message + ", or ask to fit: pool"):
            load_weights(path, theirs)
        with pytest.raises(ValueError, match=message):
            from_state_dict(state, theirs)
        with pytest.raises(ValueError, match=rf"got {pool}\. Choose another layout"):
            save_weights(tmp_path / "other.npz", params, model, layout=layout)
        loaded = load_fitted(path, theirs, fit=("pool",))
        assert_equal_trees(loaded.params, params)
        assert len(loaded.report) == 1
        assert loaded.report[0].startswith(f"pool: {other}, where weights with {norm} have ")
