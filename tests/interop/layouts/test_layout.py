"""Tables of names: every official array finds its place, and comes back as it was."""

import numpy as np
import pytest

from crate_jax.interop.faults import faults
from crate_jax.interop.layouts import LAYOUTS
from crate_jax.interop.layouts.crate_alpha import CLIPA, JAX, TORCH
from crate_jax.interop.layouts.layout import Tree
from crate_jax.interop.layouts.own import own_paths
from crate_jax.interop.layouts.vit import CRATE_BASELINE, TIMM

NORM = {"scale": (6,), "bias": (6,)}
EMBEDDING = {
    "cls_token": (6,),
    "pos_embedding": (5, 6),
    "projection": {"kernel": (36, 6), "bias": (6,)},
}
STACKED = {"scale": (3, 6), "bias": (3, 6)}
HEAD = {"head_norm": NORM, "head": {"kernel": (6, 7), "bias": (7,)}}
TREES = {
    "crate_alpha": {
        "embedding": EMBEDDING,
        "blocks": {
            "mssa_norm": STACKED,
            "mssa": {"U": (3, 6, 2, 5), "W_out": (3, 2, 5, 6)},
            "odl_norm": STACKED,
            "odl": {"D": (3, 6, 24), "D1": (3, 6, 24)},
        },
        **HEAD,
    },
    "vit": {
        "embedding": EMBEDDING,
        "blocks": {
            "mhsa_norm": STACKED,
            "mhsa": {
                "W_qkv": (3, 6, 3, 2, 5),
                "b_qkv": (3, 3, 2, 5),
                "W_out": (3, 2, 5, 6),
                "b_out": (3, 6),
            },
            "mlp_norm": STACKED,
            "mlp": {"W_in": (3, 6, 9), "b_in": (3, 9), "W_out": (3, 9, 6), "b_out": (3, 6)},
        },
        **HEAD,
    },
}
GUESTS = [("crate_alpha", TORCH), ("crate_alpha", JAX), ("vit", TIMM), ("vit", CRATE_BASELINE)]
ALL = [*GUESTS, ("crate_alpha", CLIPA)]


def flat_shapes(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat_shapes(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = value
    return found


def guest(family):
    """The tree of a small guest of patches 3 x 4 with 3 channels, all its sizes different."""
    return Tree(flat_shapes(TREES[family]), (3, 4, 3))


def random_arrays(tree, zeros=()):
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=shape).astype(np.float32) for path, shape in tree.shapes.items()}
    return flat | {path: np.zeros(tree.shapes[path], np.float32) for path in zeros}


@pytest.mark.parametrize(("family", "layout"), ALL, ids=lambda x: getattr(x, "name", x))
def test_there_and_back_to_the_bit(family, layout):
    tree = guest(family)
    flat = random_arrays(tree, layout.zeros)
    official = layout.to_official(flat, tree)
    assert layout.recognised(official) == len(official)
    assert all(a.flags.c_contiguous and a.flags.owndata for a in official.values())
    back = layout.to_ours(official, tree)
    assert back.keys() == flat.keys()
    for path, array in flat.items():
        np.testing.assert_array_equal(back[path], array, err_msg=path)
        assert back[path].dtype == np.float32
    shapes = {name: array.shape for name, array in official.items()}
    assert shapes == {name: entry.official for name, entry in layout.entries(tree).items()}
    assert not set(layout.in_groups(official, ["head"])) & set(layout.entries(tree, ["head"]))


@pytest.mark.parametrize(("family", "layout"), ALL, ids=lambda x: getattr(x, "name", x))
def test_shapes_of_no_model_in_particular(family, layout):
    tree = guest(family)
    official = layout.to_official(random_arrays(tree, layout.zeros), tree)
    told = layout.tree_shapes({name: array.shape for name, array in official.items()})
    assert told.keys() == tree.shapes.keys() - set(layout.zeros)
    assert told["embedding/projection/kernel"] == (3, 4, 3, 6)
    for path, shape in told.items():
        assert np.prod(shape) == np.prod(tree.shapes[path]), path
        assert shape[-1] in (tree.shapes[path][-1], 10, 30), path  # subspaces joined
        if path.startswith("blocks/"):
            assert shape[0] == 3


def test_where_the_arrays_of_the_guests_land():
    tree = guest("crate_alpha")
    flat = random_arrays(tree, CLIPA.zeros)
    kernel = flat["embedding/projection/kernel"].reshape(3, 4, 3, 6)
    for layout, name in ((TORCH, "conv1.weight"), (CLIPA, "visual.conv1.weight")):
        assert layout.to_official(flat, tree)[name][5, 2, 1, 3] == kernel[1, 3, 2, 5]
    jax = JAX.to_official(flat, tree)
    assert jax["embedding/kernel"][1, 3, 2, 5] == kernel[1, 3, 2, 5]
    U = flat["blocks/mssa/U"]
    mssa = "Transformer/encoderblock_2/MultiHeadDotProductSubspaceAttention_0"
    np.testing.assert_array_equal(jax[f"{mssa}/proj/kernel"], U[2])
    clipa = CLIPA.to_official(flat, tree)["visual.transformer.resblocks.2.attn.in_proj_weight"]
    assert clipa.shape == (30, 6)
    for copy in range(3):  # row k·p + i is the i-th basis vector of subspace k
        np.testing.assert_array_equal(clipa[10 * copy + 7], U[2, :, 1, 2])

    tree = guest("vit")
    flat = random_arrays(tree)
    timm = TIMM.to_official(flat, tree)
    # Rows of qkv: queries, keys, values; in each, head after head.
    row = 2 * 10 + 1 * 5 + 3
    np.testing.assert_array_equal(
        timm["blocks.1.attn.qkv.weight"][row], flat["blocks/mhsa/W_qkv"][1, :, 2, 1, 3]
    )
    assert timm["blocks.1.attn.qkv.bias"][row] == flat["blocks/mhsa/b_qkv"][1, 2, 1, 3]
    np.testing.assert_array_equal(
        timm["blocks.1.attn.proj.weight"][:, 8], flat["blocks/mhsa/W_out"][1, 1, 3]
    )
    np.testing.assert_array_equal(timm["blocks.0.mlp.fc1.weight"], flat["blocks/mlp/W_in"][0].T)
    np.testing.assert_array_equal(timm["blocks.0.mlp.fc2.weight"], flat["blocks/mlp/W_out"][0].T)


def test_copies_that_differ_are_refused():
    tree = guest("crate_alpha")
    official = CLIPA.to_official(random_arrays(tree, CLIPA.zeros), tree)
    name = "visual.transformer.resblocks.1.attn.in_proj_weight"
    official[name][29, 0] = np.nextafter(official[name][29, 0], np.float32(np.inf))
    with pytest.raises(ValueError, match=rf"{name} must be 3 equal copies of one matrix; got"):
        CLIPA.to_ours(official, tree)


def test_what_a_layout_has_no_place_for():
    tree = guest("crate_alpha")
    with pytest.raises(ValueError, match=r"embedding/projection/bias must be zero in the layout "):
        CLIPA.to_official(random_arrays(tree, ["head/bias"]), tree)
    scaled = Tree({**tree.shapes, "blocks/odl_scale": (3, 6)}, tree.patch)
    with pytest.raises(ValueError, match=r"blocks/odl_scale must have a name in the layout torch"):
        TORCH.entries(scaled)


def test_the_text_tower_of_clipa_is_left_aside_and_nothing_else():
    tree = guest("crate_alpha")
    visual = list(CLIPA.to_official(random_arrays(tree, CLIPA.zeros), tree))
    text = [
        "transformer.resblocks.23.attn.in_proj_weight",
        "transformer.resblocks.0.mlp.c_fc.bias",
        "token_embedding.weight",
        "positional_embedding",
        "ln_final.weight",
        "text_projection",
        "logit_scale",
    ]
    assert CLIPA.set_aside([*visual, *text, "visual.extra"]) == text
    assert CLIPA.in_groups(visual, ["head"]) == ["visual.proj"]
    official = CLIPA.to_official(random_arrays(tree, CLIPA.zeros), tree)
    without = CLIPA.to_ours(official, tree, ["head"])
    assert tree.shapes.keys() - without.keys() == {"head/kernel", "head/bias"}
    assert not without["embedding/projection/bias"].any()


def test_our_own_paths_are_a_layout_too():
    tree = guest("vit")
    flat, own = random_arrays(tree), own_paths(tree.shapes)
    assert own.recognised(flat) == len(flat)
    assert own.to_ours(flat, tree) == flat
    assert own.in_groups([*flat, "head/more/kernel"], ["head"])[-1] == "head/more/kernel"


def test_layouts_of_a_family_are_told_apart():
    for family, layouts in LAYOUTS.items():
        assert len({layout.name for layout in layouts}) == len(layouts)
        assert layouts[0].in_torch, family
    tree = guest("crate_alpha")
    for layout in LAYOUTS["crate_alpha"]:
        names = list(layout.to_official(random_arrays(tree, layout.zeros), tree))
        best = max(LAYOUTS["crate_alpha"], key=lambda other: other.recognised(names))
        assert best is layout


def test_faults_join_names_that_differ_by_the_layer():
    got = {f"blocks.{i}.norm1.bias": (6,) for i in (0, 1, 2, 4)}
    expected = {f"blocks.{i}.norm1.bias": (7,) for i in range(6)} | {"a/encoderblock_3/D": (1,)}
    assert faults(got, expected) == (
        "missing: blocks.{3,5}.norm1.bias, a/encoderblock_3/D; "
        "of another shape: blocks.{0-2,4}.norm1.bias (6,) instead of (7,)"
    )
    assert faults(got, got) == "" == faults(got, dict.fromkeys(got, (7,)), shapes=False)
