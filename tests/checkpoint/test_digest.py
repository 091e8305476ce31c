"""A fingerprint changes with any bit, with the place of any element, and with nothing else."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from crate_jax.checkpoint.digest import changed, digest
from crate_jax.parallel import make_mesh, state_shardings

U32 = 2**32


def fingerprint(x):
    """The same in Python's whole numbers, element by element."""
    x = x.astype(np.uint8) if x.dtype == bool else x
    total = 0
    bits = np.ascontiguousarray(x).view(f"u{min(4, x.dtype.itemsize)}").ravel()
    for place, value in enumerate(bits.tolist()):
        h = value ^ (place * 0x9E3779B1 % U32)
        h = (h ^ (h >> 16)) * 0x85EBCA6B % U32
        h = (h ^ (h >> 13)) * 0xC2B2AE35 % U32
        total += h ^ (h >> 16)
    return total % U32


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": {"float": rng.normal(size=(5, 7, 3)).astype(np.float32)},
        "half": rng.normal(size=64).astype(ml_dtypes.bfloat16),
        "count": np.int32(-5),
        "flags": rng.random(9) < 0.5,
        "none": np.zeros((0, 4), np.float32),
        "special": np.array([np.nan, np.inf, -0.0, 0.0, 1e-45], np.float32),
    }


def test_value_is_that_of_plain_arithmetic():
    tree = arrays()
    expected = {
        "a/float": tree["a"]["float"],
        "count": np.asarray(tree["count"]).reshape(1),
        "flags": tree["flags"],
        "half": tree["half"],
        "none": tree["none"],
        "special": tree["special"],
    }
    found = digest(tree)
    assert found == {path: fingerprint(x) for path, x in expected.items()}
    assert len(set(found.values())) == 6


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_counts(bit):
    tree = {"w": np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)}
    before = digest(tree)
    tree["w"].view(np.uint32)[2, 3] ^= np.uint32(1 << bit)
    assert changed(tree, before) == ["w"]


def test_order_counts():
    x = np.arange(12, dtype=np.float32)
    swapped = x.copy()
    swapped[[3, 8]] = swapped[[8, 3]]
    assert digest({"x": x}) != digest({"x": swapped})
    assert digest({"x": np.zeros(5, np.float32)}) != digest({"x": np.zeros(6, np.float32)})


@pytest.mark.parametrize("spec", ["data:-1", "data:2,fsdp:4", "fsdp:-1"])
def test_layout_does_not_count(spec):
    tree = {"w": np.random.default_rng(2).normal(size=(64, 48)).astype(np.float32)}
    placed = jax.device_put(tree, state_shardings(jax.tree.map(jnp.asarray, tree), make_mesh(spec)))
    assert digest(placed) == digest(tree) == {"w": fingerprint(tree["w"])}


def test_part_of_a_tree_is_compared_by_its_paths():
    tree = arrays()
    expected = digest(tree)
    assert changed({"a": tree["a"]}, expected) == []
    assert changed({"half": arrays(3)["half"]}, expected) == ["half"]
    assert changed({"other": tree["half"]}, expected) == ["other"]


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_64_bits_count_as_two_elements_of_32_whatever_the_mode(bit):
    rng = np.random.default_rng(4)
    tree = {"f": rng.normal(size=(3, 5)), "i": rng.integers(-(2**62), 2**62, 4), "n": np.int64(-7)}
    expected = {path: fingerprint(np.atleast_1d(x)) for path, x in tree.items()}
    assert digest(tree) == expected
    with jax.enable_x64(True):
        on_device = jax.tree.map(jnp.asarray, tree)
        assert on_device["f"].dtype == jnp.float64
        assert digest(on_device) == digest(tree) == expected
    tree["f"].view(np.uint64)[1, 2] ^= np.uint64(1 << bit)
    assert changed(tree, expected) == ["f"]
