"""The TPU's kernels by its real compiler, without a TPU: the extra ``tpu-compiler`` brings it."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from crate_jax.cli.recipes import load_recipe
from crate_jax.models import tpu
from crate_jax.models.attention import attend_by
from crate_jax.parallel import make_mesh, on_mesh
from crate_jax.planning.plan import lower_step
from crate_jax.planning.program import account
from crate_jax.planning.topology import find_topology

pytest.importorskip("libtpu", reason="needs pip install 'crate-jax[tpu-compiler]'")

SLICES = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def forward_and_back(V, dO):
    O_BxNxKxp, *of_rows = tpu.attend(V)
    return O_BxNxKxp, tpu.attend_backward(V, *of_rows, dO)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "shape",  # subspaces taken four at a time, all at a time, of odd sizes, and in blocks
    [(4, 197, 12, 64), (4, 197, 3, 64), (2, 65, 2, 33), (2, 50, 8, 48), (1, 642, 1, 128)],
)
@pytest.mark.parametrize("slice_", SLICES)
def test_the_kernels_compile(slice_, shape, dtype):
    device = find_topology(slice_).devices[0]
    V = jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
    text = jax.jit(forward_and_back).lower(V, V).compile().as_text()
    assert [x.opcode for x in account(text)].count("tpu_custom_call") == 2


@pytest.mark.parametrize(
    ("slice_", "shape", "dtype", "precision"),
    [
        ("v4:2x2x1", (50, 8, 48), jnp.bfloat16, None),
        ("v4:2x2x1", (197, 12, 64), jnp.float32, None),
        ("v4:2x2x1", (257, 4, 128), jnp.bfloat16, None),
        ("v4:2x2x1", (577, 12, 64), jnp.bfloat16, None),
        ("v5e:2x2", (197, 12, 64), jnp.float32, "highest"),
        ("v5e:2x2", (320, 8, 32), jnp.float32, None),
        ("v5e:2x2", (642, 4, 128), jnp.bfloat16, None),
    ],
)
def test_the_memory_that_a_program_needs_is_known(slice_, shape, dtype, precision, monkeypatch):
    """The compiler gets by with it, and not with 1.6 times less."""
    device = find_topology(slice_).devices[0]
    # So many images that none is in the core's memory before the program begins.
    V = jax.ShapeDtypeStruct((1024, *shape), dtype, sharding=SingleDeviceSharding(device))

    def compile_within(limit):
        monkeypatch.setattr(tpu, "_limit", lambda V: limit)
        jax.jit(lambda V, dO: forward_and_back(V, dO)).lower(V, V).compile()

    with jax.default_matmul_precision(precision):
        need = tpu._memory(V)
        compile_within(need)
        with pytest.raises(jax.errors.JaxRuntimeError, match="exceeded scoped vmem limit"):
            compile_within(int(need / 1.6))


@pytest.mark.slow
@pytest.mark.parametrize("slice_", SLICES[1:])
def test_two_layers_on_four_chips(slice_):
    """Each chip attends for its own rows: in the layout of the projections, and without scores."""
    config = load_recipe("imagenet1k:tiny")
    config.model.image_size, config.model.patch_size = (32, 32), (8, 8)
    config.model.depth, config.batch_size = 2, 64
    step = lower_step(config, "data:4", find_topology(slice_))
    N, width = step.model.num_tokens, step.model.width
    text = step.lowered.compile().as_text()
    operations = account(text)
    kernels = [x for x in operations if x.opcode == "tpu_custom_call"]
    assert sum(x.trips for x in kernels) == 2 * 2  # forward and backward, of each layer
    calls = [line for line in text.splitlines() if 'target="tpu_custom_call"' in line]
    assert all(f"bf16[16,{N},{width}]" in line for line in calls)
    assert not re.search(rf"\[[\d,]*{N},{N}\]", text) and "all-gather" not in text
    of_tokens = [x for x in operations if x.trips == 2 and x.values == 16 * N * width]
    assert of_tokens and not any(x.is_copy for x in of_tokens)


def test_a_model_too_long_for_a_core_is_refused_by_name_and_left_to_the_compiler():
    """Of a TPU v4 a core holds less than of others: the mesh says for which it is traced."""
    attended = functools.partial(attend_by, "pallas")
    V = jax.ShapeDtypeStruct((4, 1025, 16, 64), jnp.bfloat16)
    for slice_, taken in (("v4:2x2x1", False), ("v5e:2x2", True)):
        mesh = make_mesh("data:4", find_topology(slice_).devices)
        run = functools.partial(jax.eval_shape, on_mesh(mesh, attended), V)
        if taken:
            assert run().shape == V.shape
        else:
            with pytest.raises(ValueError, match=r"a core's memory must hold an image, in bfl"):
                run()
