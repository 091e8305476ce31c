"""What stands before and within names and around a state dict goes where the rest is known."""

import flax.linen as nn
import numpy as np
import pytest
from weights import MODEL, assert_equal_trees, random_params, random_state

from crate_jax import load_weights
from crate_jax.interop import load_fitted
from crate_jax.interop.names import Known, bare_names, unwrap
from crate_jax.interop.tree import flatten, tree_of

NAME = "transformer.layers.0.0.fn.qkv.weight"


@pytest.mark.parametrize(
    "name",
    [
        f"module.{NAME}",
        f"_orig_mod.module.{NAME}",
        f"model._orig_mod.{NAME}",
        f"ema_model.module.{NAME}",
        f"student.backbone.{NAME}",
        f"net.network.{NAME}",
        f"_fsdp_wrapped_module.{NAME}",
        "transformer.module.layers._orig_mod.0.0.fn._checkpoint_wrapped_module.qkv.weight",
        "backbone.transformer.model.layers.0.net.0.fn.qkv.module.weight",
    ],
)
def test_parts_that_wrap_a_known_name_are_stripped(name):
    assert Known().bare(name) == NAME


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("mymodule.x", "mymodule.x"),  # no whole part
        ("head.module", "head.module"),
        ("model.fc.weight", "model.fc.weight"),  # not known either way
        ("module.model.fc.weight", "model.fc.weight"),  # PyTorch's part is no model's
        ("params/head/kernel", "head/kernel"),
        ("module.mlp_head.3.weight", "mlp_head.3.weight"),  # further layers of a head
        ("model.token_embedding.weight", "token_embedding.weight"),  # CLIPA's text tower
    ],
)
def test_what_is_stripped_of_other_names(name, bare):
    assert Known().bare(name) == bare


class Net(nn.Module):
    """Paths of its own that are called like wrappers."""

    input_shape = (4, 4, 1)

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Dense(3, name="backbone")(images.reshape(len(images), -1))
        return nn.Dense(2, name="module")(x)


def test_a_model_whose_own_names_hold_such_parts_keeps_them(tmp_path):
    params = random_params(Net())
    paths = flatten(params)
    for prefix in ("", "params/", "module."):
        np.savez(tmp_path / "w.npz", **{prefix + path: leaf for path, leaf in paths.items()})
        assert_equal_trees(load_weights(tmp_path / "w.npz", Net()), params)
    assert unwrap(params, "w", Known(paths)).where == ()
    assert unwrap({"model": {"params": params}}, "w", Known(paths)).where == ("model", "params")


def test_names_with_dots_for_slashes_are_our_paths_if_all_are_there():
    paths = tree_of(MODEL).shapes
    dotted = {f"params.{path.replace('/', '.')}": None for path in paths}
    assert set(bare_names(dotted, "w", Known(paths))) == set(paths)
    assert set(bare_names({"head.bias": 1}, "w", Known(paths))) == {"head.bias"}


def test_two_names_that_become_the_same_are_both_named(tmp_path):
    state = random_state(MODEL)
    both = {f"{before}.{name}": v for before in ("student", "teacher") for name, v in state.items()}
    np.savez(tmp_path / "w.npz", **both)
    line = r"once; got (\S+) twice, as student\.\1 and as teacher\.\1\. Save the one that you"
    with pytest.raises(ValueError, match=line):
        load_weights(tmp_path / "w.npz", MODEL)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_counters_are_left_aside_and_named(tmp_path, suffix):
    from safetensors.numpy import save_file

    state = {f"module.{name}": array for name, array in random_state(MODEL).items()}
    state |= {"module.bn.num_batches_tracked": np.array(3), "n_averaged": np.array(5)}
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else np.savez(path, **state)
    loaded = load_fitted(path, MODEL)
    assert_equal_trees(loaded.params, random_params(MODEL))
    assert loaded.report == ["left aside bn (1), n_averaged (1): no floats, so no parameters"]


def test_floats_that_are_no_parameters_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "w.npz", **random_state(MODEL), **{"criterion.weight": np.ones(3, "f4")})
    with pytest.raises(ValueError, match=r"unknown: criterion\.weight\."):
        load_weights(tmp_path / "w.npz", MODEL)


STATE = {NAME: np.ones((2, 2))}


@pytest.mark.parametrize(
    ("content", "where", "said"),
    [
        (STATE, (), []),
        ({"epoch": 3, "state_dict": STATE, "optimizer": {"state": {}}}, ("state_dict",), []),
        ({"net": {"model": STATE}}, ("net", "model"), []),
        ({"teacher": STATE, "epoch": 3}, ("teacher",), []),
        ({"model": STATE, "ema": {"decay": 0.9, "shadow": [1]}, "model_ema": None}, ("model",), []),
        (
            {"state_dict": STATE, "state_dict_ema": {f"module.{NAME}": STATE[NAME]}},
            ("state_dict_ema",),
            ["took state_dict_ema, averaged weights, and left aside state_dict"],
        ),
        (
            {"model": STATE, "teacher": STATE},
            ("model",),
            ["took model, and left aside teacher"],
        ),
        ({"state_dict": {"conv1.weight": 1}}, ("state_dict",), []),  # of another model
    ],
)
def test_where_the_weights_are(content, where, said):
    found = unwrap(content, "w", Known())
    assert (found.where, found.said) == (where, said)
    assert len(found.state) == 1 or not where


def test_several_sets_of_weights_none_of_which_comes_first():
    both = {"student": STATE, "other": {f"module.{NAME}": STATE[NAME]}, "epoch": 3}
    with pytest.raises(ValueError, match="must hold one set of weights; got student, other"):
        unwrap(both, "w", Known())


def test_a_teacher_comes_before_its_student_unless_another_is_asked_for():
    both = {"student": STATE, "teacher": {f"module.{NAME}": STATE[NAME]}, "epoch": 3}
    found = unwrap(both, "w", Known())
    assert found.where == ("teacher",)
    assert found.said == ["took teacher, averaged weights, and left aside student"]
    found = unwrap({"model": both}, "w", Known(which="student"))
    assert found.where == ("model", "student")
    assert found.said == ["took student, and left aside teacher"]
    message = "^w must hold weights under pupil; it has none. Leave which out, or name another.$"
    with pytest.raises(ValueError, match=message):
        unwrap(both, "w", Known(which="pupil"))


def test_parts_of_the_layers_are_no_part_of_a_name():
    known = Known()
    for name in ("blocks.0.3.ls1.gamma", "backbone.blocks.12.3.ls1.gamma", "blocks.3.ls1.gamma"):
        assert known.bare(name) == "blocks.3.ls1.gamma"
    assert known.bare("blocks.0.3.unheard.of") == "blocks.0.3.unheard.of"
    with pytest.raises(ValueError, match=r"got blocks.3.ls1.gamma twice, as blocks.0.3.ls1.gamma"):
        bare_names({"blocks.0.3.ls1.gamma": 0, "blocks.1.3.ls1.gamma": 1}, "w", known)
