"""Meshes by their specs, where each leaf of a state lies, and batches that do not divide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from crate_jax.parallel import (
    batch_sharding,
    check_batch_size,
    check_shares,
    make_mesh,
    replicated,
    state_shardings,
)


@pytest.mark.parametrize(
    "spec, data, fsdp",
    [
        ("data:-1", 8, 1),
        ("fsdp:-1", 1, 8),
        ("data:8", 8, 1),
        ("data:2,fsdp:4", 2, 4),
        (" fsdp:2 , data:-1 ", 4, 2),
        ("data:4,fsdp:-1", 4, 2),
        ("data:8,fsdp:-1", 8, 1),
    ],
)
def test_mesh_sizes(spec, data, fsdp):
    mesh = make_mesh(spec)
    assert dict(mesh.shape) == {"data": data, "fsdp": fsdp}
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)  # linen raises under Explicit axes
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_default_mesh_and_some_devices():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1}
    some = jax.devices()[2:5]
    mesh = make_mesh("data:-1", some)
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in some]


@pytest.mark.parametrize("spec", ["model:8", "", "data:8,", "Data:8", "8"])
def test_unknown_axis(spec):
    with pytest.raises(KeyError) as caught:
        make_mesh(spec)
    assert caught.value.args == (f"parallel.mesh must name axes out of data, fsdp; got {spec}.",)


@pytest.mark.parametrize("spec", ["data:0", "data:-2", "data:x", "data:", "data", "data:2.5"])
def test_malformed_size(spec):
    with pytest.raises(ValueError) as caught:
        make_mesh(spec)
    assert str(caught.value) == (
        f"parallel.mesh must be axis:size,… with sizes > 0 or -1; got {spec}."
    )


@pytest.mark.parametrize("spec", ["data:4", "data:16", "data:3,fsdp:-1", "data:16,fsdp:-1"])
def test_sizes_that_are_not_the_number_of_devices(spec):
    with pytest.raises(ValueError) as caught:
        make_mesh(spec)
    assert str(caught.value) == (
        f"parallel.mesh must multiply to the 8 devices; got {spec}. Give one axis the size -1."
    )


@dataclasses.dataclass(frozen=True)
class OfSlice:
    """What a device says of itself on hosts that a slower network joins."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"


@pytest.mark.parametrize(
    ("spec", "slices", "rows"),
    [
        ("data:-1,fsdp:4", 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # fsdp within a slice
        ("data:-1", 2, [[i] for i in range(8)]),
        ("fsdp:-1", 2, [list(range(8))]),  # no other way
        ("data:4,fsdp:2", 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("data:2,fsdp:4", 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_slices_divide_the_axis_along_which_least_is_sent(spec, slices, rows):
    n = 8 // slices
    devices = [OfSlice(i, i // n, i // n) for i in range(8)]
    mesh = make_mesh(spec, devices[::-1])  # in whatever order they come
    assert mesh.axis_names == ("data", "fsdp") and set(mesh.axis_types) == {AxisType.Auto}
    found = [sorted(device.id for device in row) for row in mesh.devices]
    assert found == rows


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip of a TPU slice says of itself."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5", "TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_a_torus_is_split_as_the_mesh_asks(kind, slices, fsdp):
    chips = [
        Chip(16 * s + i, (i % 4, i // 4, 0), s, 4 * s + i // 4, kind)
        for s in range(slices)
        for i in range(16)
    ]
    mesh = make_mesh(f"data:-1,fsdp:{fsdp}", chips)
    assert mesh.devices.shape == (16 * slices // fsdp, fsdp)
    assert {chip.id for chip in mesh.devices.flat} == set(range(16 * slices))
    assert all(len({chip.slice_index for chip in row}) == 1 for row in mesh.devices)


@pytest.mark.parametrize("spec", ["data:-1,fsdp:-1", "data:2,data:4", "data:-1,data:8"])
def test_axes_and_open_sizes_are_named_once(spec):
    message = rf"parallel\.mesh must name an axis once and -1 once; got {spec}\. Leave one out\."
    for devices in (jax.devices(), jax.devices()[:1]):
        with pytest.raises(ValueError, match=message):
            make_mesh(spec, devices)


def test_slices_of_different_sizes_are_refused():
    devices = [OfSlice(i, int(i > 2), int(i > 2)) for i in range(8)]
    message = r"devices must be equally many on every slice or host for fsdp; got \[3, 5\]\. Start"
    with pytest.raises(ValueError, match=message):
        make_mesh("data:-1,fsdp:2", devices)
    assert make_mesh("data:-1", devices).devices.shape == (8, 1)  # every device is alike there


@pytest.mark.parametrize(("width", "share"), [(768, None), (42, "100%")])
def test_fsdp_that_divides_nothing_is_refused(width, share):
    state = {
        "w": jax.ShapeDtypeStruct((width, width), jnp.float32),
        "b": jax.ShapeDtypeStruct((width,), jnp.float32),
    }
    mesh = make_mesh("fsdp:8")
    shardings = state_shardings(state, mesh)
    if share is None:
        return check_shares(state, shardings, mesh)
    message = rf"divides the widths of the model; with fsdp:8 a device would hold {share} of the"
    with pytest.raises(ValueError, match=message):
        check_shares(state, shardings, mesh)


# --- where arrays lie -----------------------------------------------------------------------------

LEAVES = {
    "wide": ((64, 1024), 0),  # its shortest axis
    "tall": ((1024, 64), 1),
    "square": ((64, 64), 0),  # the first of two equals
    "bases": ((96, 6, 16), 2),  # 6 divides by neither 4 nor 8
    "odd_shortest": ((24, 15), 0),  # 15 divides by none of 2, 4, 8
    "nothing_divides": ((63, 65), None),
    "vector": ((1024,), None),
    "scalar": ((), None),
    "blocks/matrix": ((16, 8, 8), 1),  # 16 layers
    "blocks/vector": ((16, 64), None),
}


def state_of(make):
    """{"params": leaves} with what is below ``blocks`` below it."""
    params = {k: make(shape) for k, (shape, _) in LEAVES.items() if "/" not in k}
    below = {k[7:]: make(shape) for k, (shape, _) in LEAVES.items() if "/" in k}
    return {"params": params | {"blocks": below}}


@pytest.mark.parametrize("spec, n", [("fsdp:-1", 8), ("data:2,fsdp:4", 4)])
def test_matrices_are_split_and_vectors_are_not(spec, n):
    state = state_of(lambda shape: jnp.zeros(shape, jnp.float32))
    shardings = state_shardings(jax.eval_shape(lambda: state), make_mesh(spec))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    laid = jax.device_put(state, shardings)["params"]
    for name, (shape, axis) in LEAVES.items():
        array = laid["blocks"][name[7:]] if "/" in name else laid[name]
        expected = list(shape)
        if axis is None:
            assert array.sharding.spec == PartitionSpec(), name
        else:
            assert list(array.sharding.spec)[axis] == "fsdp", name
            expected[axis] //= n
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            assert shard.data.shape == tuple(expected), name
            assert shard.data.nbytes * (1 if axis is None else n) == array.nbytes, name


def test_without_fsdp_everything_is_replicated():
    mesh = make_mesh("data:-1")
    state = state_of(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32))
    for sharding in jax.tree.leaves(state_shardings(state, mesh)):
        assert sharding == replicated(mesh)
        assert sharding.is_fully_replicated


def test_batches_are_spread_over_both_axes():
    for spec in ("data:-1", "data:2,fsdp:4", "fsdp:-1"):
        sharding = batch_sharding(make_mesh(spec))
        rows = jax.device_put(np.arange(24).reshape(24, 1), sharding)
        held = sorted(tuple(s.data.ravel().tolist()) for s in rows.addressable_shards)
        assert held == [(3 * i, 3 * i + 1, 3 * i + 2) for i in range(8)]


# --- batch sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, shards, nearest", [(100, 8, 96), (101, 8, 104), (3, 8, 8), (30, 16, 32), (7, 2, 8)]
)
def test_batch_that_does_not_divide(size, shards, nearest):
    with pytest.raises(ValueError) as caught:
        check_batch_size("eval_batch_size", size, shards)
    assert str(caught.value) == (
        f"eval_batch_size must be a multiple of {shards}, the devices (times "
        f"optim.accumulate_steps); got {size}. Nearest: {nearest}."
    )


@pytest.mark.parametrize("size, shards", [(8, 8), (304, 8), (5, 1)])
def test_batch_that_divides(size, shards):
    check_batch_size("batch_size", size, shards)
