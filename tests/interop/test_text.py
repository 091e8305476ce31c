"""Official weights of the models of text, both ways: one array under two names, and masks."""

from pathlib import Path

import numpy as np
import pytest
from weights import assert_equal_trees, random_params

from crate_jax import (
    CrateBert,
    CrateCausal,
    CrateLM,
    TostLM,
    create_model,
    load_weights,
    save_weights,
)
from crate_jax.interop import from_state_dict, load_fitted, to_state_dict

GOLDEN = Path(__file__).parent.parent / "golden"
TINY = dict(context_length=5, vocab_size=7, width=6, depth=2, num_heads=2)
GOLDEN_SIZES = dict(context_length=16, vocab_size=61, width=32, depth=2, num_heads=4)
MODELS = {
    "crate_causal": CrateCausal,
    "crate_lm": CrateLM,
    "tost_lm": TostLM,
    "crate_bert": CrateBert,
}
FILES = {
    "crate_gpt": CrateCausal(**GOLDEN_SIZES),
    "crate_lm": CrateLM(**GOLDEN_SIZES),
    "tost_lang": TostLM(**GOLDEN_SIZES, bias=True),
}
# The table of the embedding, and the name under which it lies there again.
TABLES = {
    CrateCausal: ("transformer.wte.weight", "lm_head.weight"),
    CrateLM: ("transformer.wte.weight", "lm_head.weight"),
    TostLM: ("transformer.wte.weight", "lm_head.weight"),
    CrateBert: ("crate.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
}


@pytest.mark.parametrize("name", FILES)
def test_official_files_come_back_entry_for_entry(name, tmp_path):
    """What the official program wrote is written again, masks and the second table too."""
    torch = pytest.importorskip("torch")
    model = FILES[name]
    path = GOLDEN / f"{name}.pth"
    params = load_weights(path, model)
    theirs = torch.load(path, weights_only=True)["model"]
    assert_equal_trees(from_state_dict({k: v.numpy() for k, v in theirs.items()}, model), params)
    save_weights(tmp_path / "w.pth", params, model)
    ours = torch.load(tmp_path / "w.pth", weights_only=True)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].shape == value.shape and (ours[key] == value).all(), key


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
def test_there_and_back(family, tied, suffix, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    model = MODELS[family](**TINY, tied=tied)
    params, path = random_params(model), tmp_path / f"w{suffix}"
    save_weights(path, params, model)
    assert_equal_trees(load_weights(path, model), params)
    state = to_state_dict(params, model)
    assert_equal_trees(from_state_dict(state, model), params)
    table, again = TABLES[type(model)]
    assert np.array_equal(state[table], state[again]) == tied
    if suffix == ".safetensors":
        loaded = load_fitted(path, None)
        assert (type(loaded.model), loaded.model.tied) == (type(model), tied)
        assert loaded.model.context_length == 5


@pytest.mark.parametrize("family", MODELS)
def test_either_name_of_a_table_will_do_and_both_must_agree(family):
    model = MODELS[family](**TINY)
    params = random_params(model)
    state, (table, again) = to_state_dict(params, model), TABLES[type(model)]
    for missing in (table, again):
        rest = {name: array for name, array in state.items() if name != missing}
        assert_equal_trees(from_state_dict(rest, model), params)
    neither = {name: array for name, array in state.items() if name not in (table, again)}
    with pytest.raises(ValueError, match=rf"missing: {table}"):
        from_state_dict(neither, model)
    other = state | {again: state[again] + 1}
    with pytest.raises(ValueError, match=rf"^{again} must equal {table} in .*: tied=False\."):
        from_state_dict(other, model)
    untied = from_state_dict(other, model.clone(tied=False))
    assert np.array_equal(untied["embedding"]["tokens"], params["embedding"]["tokens"])


def test_a_mask_that_is_another_is_refused_and_one_of_another_size_is_told_by_the_positions(
    tmp_path,
):
    model = CrateCausal(**TINY)
    state = to_state_dict(random_params(model), model)
    mask = state["transformer.h.1.attn.bias"]
    np.testing.assert_array_equal(mask[0, 0], np.tri(5))
    wrong = state | {"transformer.h.1.attn.bias": np.ones_like(mask)}
    np.savez(tmp_path / "w.npz", **wrong)
    message = r"w\.npz: transformer\.h\.1\.attn\.bias must be as the model computes it"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w.npz", model)
    without = {name: array for name, array in state.items() if "attn.bias" not in name}
    assert_equal_trees(from_state_dict(without, model), random_params(model))
    np.savez(tmp_path / "w.npz", **state)
    message = r"these weights differ: positions in a text 5 where the model has 4\. Build the model"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w.npz", model.clone(context_length=4))


def test_crate_lm_has_no_masks_and_its_atoms_are_rows_there():
    model = CrateLM(**TINY)
    params = random_params(model)
    state = to_state_dict(params, model)
    assert not any("attn.bias" in name for name in state)
    D = np.asarray(params["blocks"]["odl"]["D"])
    assert state["transformer.h.1.ista.weight"].shape == (24, 6)
    np.testing.assert_array_equal(state["transformer.h.1.ista.weight"], D[1].T)


def test_names_of_crate_bert():
    """Those of transformers' pull request: a prefix, and biases that lie there twice."""
    model = CrateBert(**TINY)
    state = to_state_dict(random_params(model), model)
    layer = {
        f"crate.encoder.layer.1.{name}"
        for name in (
            *("attention.self.prenorm.weight", "attention.self.prenorm.bias"),
            *("attention.self.qkv.weight", "attention.output.dense.weight"),
            *("output.weight", "output.prenorm.weight", "output.prenorm.bias"),
        )
    }
    assert {name for name in state if ".layer.1." in name} == layer
    assert state["crate.embeddings.position_embeddings.weight"].shape == (7, 6)
    assert state["crate.embeddings.token_type_embeddings.weight"].shape == (1, 6)
    np.testing.assert_array_equal(state["lm_head.decoder.bias"], state["lm_head.bias"])


def test_weights_of_another_family_are_told(tmp_path):
    lm = CrateLM(**TINY)
    np.savez(tmp_path / "w.npz", **to_state_dict(random_params(lm), lm))
    with pytest.raises(ValueError, match=r"its names are those of the family crate_lm"):
        load_weights(tmp_path / "w.npz", CrateCausal(**TINY))
    small = dict(context_length=4, vocab_size=9)
    base = create_model("crate_lm_1l", **small)
    save_weights(tmp_path / "w.npz", random_params(base), base)
    message = r"these weights are crate_lm_1l's: depth 1 where the model has 2"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "w.npz", create_model("crate_lm_2l", **small))


def test_only_constants_can_be_fitted(tmp_path):
    model = CrateCausal(**TINY)
    params, path = random_params(model), tmp_path / "w.safetensors"
    save_weights(path, params, model)
    loaded = load_fitted(path, model.clone(eta=0.5), fit=("eta",))
    assert_equal_trees(loaded.params, params)
    assert loaded.report == ["eta: 0.5, where the weights had 0.1"]
    with pytest.raises(ValueError, match=r"they have eta 0\.1 where the model has 0\.5"):
        load_weights(path, model.clone(eta=0.5))
    for fit in ("head", "image_size", "pool"):
        message = rf"^fit must be among eta, lmbda for a model of text; got {fit}\. Build"
        with pytest.raises(ValueError, match=message):
            load_weights(path, model, fit=(fit,))
    with pytest.raises(ValueError, match=r"^class_names must be one for each of the 0 outputs"):
        save_weights(path, params, model, class_names=["a"])
