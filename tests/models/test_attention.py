"""Attention by every kernel against the plain function in float32.

On a CPU the kernels are interpreted, with the blocks that run on the chip; where they run they run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from crate_jax import create_model, placement
from crate_jax.models import attention, gpu, gpu_norm, tpu
from crate_jax.models.attention import attend_by
from crate_jax.models.derivatives import NORMALISE, attend, normalise
from crate_jax.models.tpu_programs import Group
from crate_jax.parallel import make_mesh, on_mesh

CLOSE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2, jnp.float16: 1e-2}
BACKEND = jax.default_backend()
KERNELS = {"gpu": gpu, "tpu": tpu}
# jaxlib 0.11 leaves products of bfloat16 to a library. Where it then folds a transpose into one,
# the library does not take it, and XLA itself refuses it when it runs.
INTERPRETED = {"xla_disable_hlo_passes": "transpose-folding"}
# B, N, K, p: a class token more than a square, one token, blocks that are full and blocks that have
# one row; more tokens than fit at once; subspaces of 1, and of no power of two.
FEW = [(2, 17, 3, 8), (1, 1, 2, 32), (2, 197, 2, 64), (1, 64, 1, 48), (3, 4, 2, 1), (1, 65, 2, 33)]
MANY = [(1, 257, 2, 64), (1, 1025, 1, 128)]


def normal(seed, *shape, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32).astype(dtype)


def plain(V, mask=None):
    return attend(V.swapaxes(1, 2), mask)[0].swapaxes(1, 2)


def pulled(function, V, dO):
    """O, and the gradient of V; one program."""

    def run(V, dO):
        O_BxNxKxp, pull = jax.vjp(function, V)
        return O_BxNxKxp, pull(dO)[0]

    return jax.jit(run)(V, dO)


def by_kernel(platform, V, dO):
    """A platform's kernels, wherever this runs."""
    kernels, interpret = KERNELS[platform], platform != BACKEND
    O_BxNxKxp, *of_rows = kernels.attend(V, interpret=interpret)
    return O_BxNxKxp, kernels.attend_backward(V, *of_rows, dO, interpret=interpret)


def assert_near(got, expected, dtype):
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and g.dtype == dtype
        g, e = (np.asarray(x.astype(jnp.float32), np.float64) for x in (g, e))
        assert np.linalg.norm(g - e) <= CLOSE[dtype] * max(np.linalg.norm(e), 1e-6)


def assert_exact(way, shape, scale, dtype):
    """Half precision is held against the float32 of the same, rounded, numbers."""
    V, dO = scale * normal(0, *shape, dtype=dtype), normal(1, *shape, dtype=dtype)
    if way in KERNELS:
        options = INTERPRETED if way != BACKEND else {}
        got = jax.jit(functools.partial(by_kernel, way), compiler_options=options)(V, dO)
    else:
        got = pulled(functools.partial(attend_by, way), V, dO)
    expected = pulled(plain, V.astype(jnp.float32), dO.astype(jnp.float32))
    assert_near(got, expected, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", FEW)
# Of the tokens: 2 makes the attention peaked. Scores grow with the square, and a score of some
# hundred is rounded by 1e-5 in float32, in one order of operations and not in another.
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("way", ["xla", *KERNELS])
def test_equal_to_automatic_differentiation_in_float32(way, shape, scale, dtype):
    assert_exact(way, shape, scale, dtype)


@pytest.mark.parametrize("way", ["xla", "gpu"])
def test_half_precision_of_the_other_kind(way):
    assert_exact(way, FEW[0], 1, jnp.float16)


@pytest.mark.parametrize(("shape", "dtype"), [(MANY[0], jnp.float32), (MANY[1], jnp.bfloat16)])
@pytest.mark.parametrize("way", ["xla", *KERNELS])
def test_more_tokens_than_a_block(way, shape, dtype):
    assert_exact(way, shape, 2, dtype)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("way", list(KERNELS))
def test_random_shapes(way, seed):
    """Up to 1,025 tokens, an odd number of them, in subspaces of 32 to 128 dimensions."""
    draw = np.random.default_rng(seed)
    N = min(2 * int(draw.integers(8 ** (seed + 1) // 8, 8 ** (seed + 1) // 4)), 1024) + 1
    K, p = int(draw.integers(1, 4)), int(draw.integers(32, 129))
    for dtype in (jnp.float32, jnp.bfloat16):
        assert_exact(way, (1, N, K, p), 1, dtype)


def test_a_tpu_takes_subspaces_together_whose_lanes_begin_at_a_multiple_of_128():
    def sizes(N, K, p):
        group = Group(N, K, p)
        assert group.size * group.count == K and (group.count == 1 or group.lanes % 128 == 0)
        return group.size, group.block

    assert sizes(197, 12, 64) == (4, 197) and sizes(197, 6, 64) == (2, 197)
    assert sizes(197, 3, 64) == (3, 197)  # all
    assert sizes(577, 12, 64) == (2, 577)  # more tokens are enough work by themselves
    assert sizes(65, 16, 48) == (8, 65) and sizes(65, 4, 128) == (4, 65)
    for N in range(641, 4097):
        assert N % sizes(N, 4, 64)[1] != 1  # Mosaic has no product over one token


@pytest.mark.parametrize(
    ("shape", "dtype", "taken"),
    [
        ((1, 197, 12, 64), jnp.bfloat16, True),
        ((1, 197, 6, 64), jnp.float32, True),
        ((1, 197, 12, 64), jnp.float16, False),
        ((1, 1, 12, 64), jnp.float32, False),
        ((1, 4097, 1, 8), jnp.bfloat16, False),
        ((1, 577, 12, 64), jnp.bfloat16, True),  # CRATE-B at 384 pixels
        ((1, 577, 12, 64), jnp.float32, False),  # more than the memory of a TPU v4
        ((1, 577, 16, 64), jnp.bfloat16, False),
        ((1, 4096, 16, 64), jnp.bfloat16, False),
    ],
)
def test_what_the_kernels_of_a_tpu_take(shape, dtype, taken):
    assert tpu.takes(jax.ShapeDtypeStruct(shape, dtype)) == taken


def test_a_tpu_has_its_arrays_in_tiles():
    """Of 8 x 128 words of four bytes; a word has two rows of bfloat16."""
    assert tpu._padded(8, 128, 4) == tpu._padded(1, 1, 4) == 8 * 128 * 4
    assert tpu._padded(197, 768, 4) == 200 * 768 * 4
    assert tpu._padded(197, 768, 2) == 208 * 768 * 2
    assert tpu._padded(577, 577, 4) == 584 * 640 * 4
    # Of CRATE-B at 384 pixels, two subspaces at a time. Tokens, and six groups of numbers a row;
    # twice, while the next ones come. The group transposed; 2.2 of its scores; and a quarter of 1.
    tokens, rows = 592 * 768 * 2, 6 * 8 * 640 * 4
    transposed, scores = 128 * 640 * (2 + 2 + 4), 2 * 584 * 640 * 4
    need = 2 * (3 * tokens + 2 * rows) + transposed + int(2.2 * scores) + 2**18
    assert tpu._memory(jax.ShapeDtypeStruct((1, 577, 12, 64), jnp.bfloat16)) == need


def test_finite_differences():
    attended = functools.partial(attend_by, "xla")
    V = normal(0, 2, 7, 2, 4)
    check_grads(attended, (V,), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_what_is_kept_is_the_same_whoever_keeps_it():
    """A backward pass may run on another kind of device than its forward pass did."""
    V, dO = 2 * normal(0, 2, 37, 3, 8), normal(1, 2, 37, 3, 8)
    S = jnp.einsum("bnkp,bmkp->bknm", V, V, precision="highest") * 8**-0.5
    highest = S.max(-1)
    total = jnp.exp(S - highest[..., None]).sum(-1)
    gradient = pulled(plain, V, dO)[1]
    ways = {
        name: (
            functools.partial(of.attend, interpret=name != BACKEND),
            functools.partial(of.attend_backward, interpret=name != BACKEND),
        )
        for name, of in KERNELS.items()
    }
    ways["xla"] = (attention._attend_by_xla, attention._backward_by_xla)
    for forward, _ in ways.values():
        _, *of_rows = forward(V)
        for got, expected in zip(of_rows, (highest, total), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5)
        for _, backward in ways.values():
            assert_near([backward(V, *of_rows, dO)], [gradient], jnp.float32)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_a_few_images_at_a_time_are_all(images, monkeypatch):
    """A CPU keeps the scores of some images in its cache; how many makes no difference."""
    V, dO = normal(0, 6, 17, 2, 8), normal(1, 6, 17, 2, 8)
    monkeypatch.setattr(attention, "_CACHED", images * 2 * 17 * 17)
    assert attention._images_at_a_time(V, None) == images
    assert attention._images_at_a_time(V, jnp.ones((17, 17), bool)) == 6
    got = pulled(functools.partial(attend_by, "auto"), V, dO)
    assert_near(got, pulled(plain, V, dO), jnp.float32)
    loops = str(
        jax.make_jaxpr(lambda V, dO: jax.vjp(functools.partial(attend_by, "xla"), V)[1](dO))(V, dO)
    )
    assert f"length={6 // images}" in loops


def test_no_image_is_no_work():
    V = jnp.zeros((0, 5, 2, 8), jnp.bfloat16)
    got = pulled(functools.partial(attend_by, "auto"), V, V)
    assert [x.shape for x in got] == [V.shape, V.shape]


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", [(3, 64), (1, 197, 384), (5, 9, 2, 33), (16, 8), (1, 1)])
def test_the_gradient_of_a_layer_norm(shape, dtype, monkeypatch):
    """More rows than programs, as many, fewer, and a length that is no power of two."""
    monkeypatch.setattr(gpu_norm, "_PROGRAMS", 16)
    d = shape[-1]
    X, dY = 2 * normal(0, *shape, dtype=dtype) + 1, normal(1, *shape, dtype=dtype)
    scale, bias = normal(2, d), normal(3, d)
    wide = lambda X, scale, bias: normalise(X, scale, bias, jnp.float32, 1e-5)  # noqa: E731
    inputs = (X.astype(jnp.float32), scale, bias)
    expected = jax.jit(lambda dY: jax.vjp(wide, *inputs)[1](dY))(dY.astype(jnp.float32))
    mean = inputs[0].mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(inputs[0].var(-1, keepdims=True) + 1e-5)
    kernel = functools.partial(gpu_norm.normalise_backward, interpret=BACKEND != "gpu")
    dX, dscale, dbias = jax.jit(kernel)(X, mean, inverse, dY, scale)
    assert_near([dX], expected[:1], dtype)
    assert_near([dscale.sum(0), dbias.sum(0)], expected[1:], jnp.float32)


# --- On a mesh ------------------------------------------------------------------------------------


def gathers(compiled):
    return [line for line in compiled.as_text().splitlines() if "all-gather" in line]


@pytest.mark.parametrize("kernels", [gpu, tpu])
def test_each_device_attends_for_its_own_rows(kernels):
    """Nothing is gathered for a kernel, which the compiler could not split."""
    mesh = make_mesh("data:2,fsdp:2", jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    V, dO = (jax.device_put(normal(i, 8, 17, 2, 16), rows) for i in range(2))

    def on_rows(V, dO):
        forward = functools.partial(kernels.attend, interpret=True)
        O_BxNxKxp, *of_rows = placement.by_rows(forward, V)
        kernel = functools.partial(kernels.attend_backward, interpret=True)
        return O_BxNxKxp, placement.by_rows(kernel, V, *of_rows, dO)

    compiled = jax.jit(on_mesh(mesh, on_rows)).lower(V, dO).compile()
    got = compiled(V, dO)
    assert all(x.sharding.is_equivalent_to(rows, 4) for x in got) and not gathers(compiled)
    assert_near(got, pulled(plain, V, dO), jnp.float32)
    # Without the mesh around it they are gathered, so the above would notice.
    assert gathers(jax.jit(on_rows).lower(V, dO).compile())


def test_each_device_normalises_its_own_rows():
    mesh = make_mesh("data:4", jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    X, dY = (jax.device_put(normal(i, 8, 5, 16), rows) for i in range(2))
    mean, inverse = X.mean(-1, keepdims=True), 1 / X.std(-1, keepdims=True)
    scale = normal(2, 16)
    kernel = functools.partial(gpu_norm.normalise_backward, interpret=True)

    def on_rows(X, mean, inverse, dY):
        dX, *sums = placement.by_rows(kernel, X, mean, inverse, dY, whole=(scale,))
        return dX, *(x.sum(0) for x in sums)

    compiled = jax.jit(on_mesh(mesh, on_rows)).lower(X, mean, inverse, dY).compile()
    assert not gathers(compiled)
    dX, *sums = kernel(X, mean, inverse, dY, scale)
    expected = (dX, *(x.sum(0) for x in sums))
    assert_near(compiled(X, mean, inverse, dY), expected, jnp.float32)


@pytest.mark.parametrize(("spec", "own"), [("data:2,fsdp:2", ("fsdp",)), ("data:4", ())])
def test_rows_that_are_mapped_over_one_axis_lie_on_the_other(spec, own):
    mesh = make_mesh(spec, jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    V = jax.device_put(normal(0, 4, 4, 5, 2, 16), rows)

    def of_group(V):
        with placement.rows_within("data"):
            assert placement.rows_over(V) == own
            return placement.by_rows(functools.partial(gpu.attend, interpret=True), V)[0]

    run = on_mesh(mesh, lambda V: jax.vmap(of_group, spmd_axis_name="data")(V))
    compiled = jax.jit(run).lower(V).compile()
    assert not gathers(compiled)
    np.testing.assert_allclose(compiled(V), jax.vmap(plain)(V), rtol=1e-5, atol=1e-5)


def test_rows_shared_by_type():
    mesh = jax.make_mesh(
        (4,), ("rows",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4]
    )
    V = normal(0, 8, 5, 2, 16)
    shared = jax.device_put(V, NamedSharding(mesh, PartitionSpec("rows")))
    run = lambda V: placement.by_rows(functools.partial(gpu.attend, interpret=True), V)[0]  # noqa: E731
    with jax.set_mesh(mesh):
        got = jax.jit(run)(shared)
    assert got.sharding.spec[0] == "rows"
    np.testing.assert_allclose(got, plain(V), rtol=1e-5, atol=1e-5)


def bfloat16_gradient(V, dO):
    return jax.vjp(functools.partial(attend_by, "auto"), V)[1](dO)[0]


@pytest.mark.parametrize("rows", [1, 6, 8])
def test_rows_that_cannot_be_dealt_out_take_the_compilers_program(rows):
    mesh = make_mesh("data:4", jax.devices()[:4])
    V, dO = (normal(i, rows, 5, 2, 16, dtype=jnp.bfloat16) for i in range(2))
    got = jax.jit(on_mesh(mesh, bfloat16_gradient))(V, dO)
    assert_near([got], [jax.jit(bfloat16_gradient)(V, dO)], jnp.bfloat16)


@pytest.mark.parametrize(
    "spec", [("rows", None, "cols"), (None, None, "cols"), ("rows", None, None)]
)
def test_other_axes_may_be_shared_by_type(spec):
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("rows", "cols"), axis_types=kinds, devices=jax.devices()[:4])
    V, dO = (normal(i, 4, 5, 2, 16, dtype=jnp.bfloat16) for i in range(2))
    with jax.set_mesh(mesh):
        shared = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x in (V, dO)]
        got = jax.jit(bfloat16_gradient)(*shared)
    assert_near([got], [jax.jit(bfloat16_gradient)(V, dO)], jnp.bfloat16)


def test_a_backward_pass_outside_of_the_mesh_goes_the_way_of_its_forward_pass(monkeypatch):
    """Who has the kernels for one has them for the other."""
    asked = []
    monkeypatch.setattr(attention, "_backward_by_platform", lambda *inputs: asked.append(inputs))
    mesh = make_mesh("data:4", jax.devices()[:4])
    V, dO = (normal(i, 6, 5, 2, 16, dtype=jnp.bfloat16) for i in range(2))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # six rows: XLA's
        _, pull = jax.vjp(functools.partial(attend_by, "auto"), V)
    assert attention._with_kernel(V, None, "auto")
    (got,) = pull(dO)
    assert not asked
    expected = pulled(plain, V.astype(jnp.float32), dO.astype(jnp.float32))[1]
    assert_near([got], [expected], jnp.bfloat16)


def test_inside_a_shard_map_over_one_of_two_axes():
    mesh = make_mesh("data:2,fsdp:2", jax.devices()[:4])
    V, dO = (normal(i, 4, 5, 2, 16, dtype=jnp.bfloat16) for i in range(2))
    rows = PartitionSpec("data")
    part = jax.shard_map(
        bfloat16_gradient, mesh=mesh, in_specs=(rows, rows), out_specs=rows, axis_names={"data"}
    )
    assert_near([jax.jit(part)(V, dO)], [jax.jit(bfloat16_gradient)(V, dO)], jnp.bfloat16)


def test_gradients_of_gradients():
    """Kernels have none; there the compiler's functions stand in."""
    V, dO = normal(0, 2, 5, 2, 16), normal(1, 2, 5, 2, 16)

    def slope(attended, V):
        loss = lambda V: jnp.sum(attended(V).astype(jnp.float32) * dO)  # noqa: E731
        return jnp.sum(jnp.sin(jax.grad(loss)(V).astype(jnp.float32)))

    expected = jax.jit(jax.grad(functools.partial(slope, plain)))(V)
    attended = functools.partial(attend_by, "auto")
    half = jax.jit(jax.grad(functools.partial(slope, attended)))(V.astype(jnp.bfloat16))
    half = half.astype(jnp.float32)
    error = jnp.linalg.norm((half - expected).ravel()) / jnp.linalg.norm(expected.ravel())
    assert error < 3e-2
    X, g = normal(2, 3, 8), normal(3, 8)

    def of_norm(dtype, X):
        normed = NORMALISE["derived"]
        loss = lambda X: jnp.sum(  # noqa: E731
            jnp.sin(normed(X, g, g, dtype, 1e-5).astype(jnp.float32))
        )
        return jnp.sum(jnp.sin(jax.grad(loss)(X).astype(jnp.float32)))

    half = jax.grad(functools.partial(of_norm, jnp.bfloat16))(X.astype(jnp.bfloat16))
    half = half.astype(jnp.float32)
    expected = jax.grad(functools.partial(of_norm, jnp.float32))(X)
    assert jnp.linalg.norm(half - expected) < 5e-2 * jnp.linalg.norm(expected)


# --- In a model -----------------------------------------------------------------------------------

SIZES = dict(image_size=16, patch_size=4, num_classes=3, width=16, depth=2, num_heads=2)


def test_a_tap_of_the_attention_takes_the_plain_function(tiny_images):
    """The logits are those of a kernel, and the rows sum to one."""
    model = create_model("crate_tiny_patch16_224", **SIZES)
    variables = jax.jit(lambda: model.init(jax.random.key(0), tiny_images, train=False))()
    logits, seen = model.apply(
        variables, tiny_images, train=False, taps=("attention", "mssa"), method="forward"
    )
    np.testing.assert_allclose(seen["attention"].sum(-1), 1, rtol=1e-5)
    without, alone = model.apply(variables, tiny_images, train=False, taps="mssa", method="forward")
    np.testing.assert_allclose(logits, without, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["mssa"], alone["mssa"], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="where they run they are not refused")
@pytest.mark.parametrize("kernel", ["pallas", "cudnn"])
def test_a_kernel_that_does_not_run_here_is_refused(kernel, tiny_images):
    model = create_model("crate_tiny_patch16_224", **SIZES, attention_kernel=kernel)
    line = f"attention_kernel={kernel} must fit; it runs on NVIDIA's GPUs.*; here is a cpu. Set it"
    with pytest.raises(ValueError, match=line):
        model.init(jax.random.key(0), tiny_images, train=False)


@pytest.mark.parametrize(
    ("shape", "dtype", "mask", "reason"),
    [
        (
            (1, 5, 2, 64),
            jnp.float32,
            None,
            "it takes bfloat16 and float16; these tokens are float32",
        ),
        ((1, 5, 2, 64), jnp.bfloat16, jnp.ones((5, 5), bool), "it knows no mask"),
        (
            (1, 5, 2, 256),
            jnp.bfloat16,
            None,
            "it takes subspaces of .* 128 dim.* here are 256",
        ),
    ],
)
def test_tokens_that_a_kernel_does_not_take_are_refused(shape, dtype, mask, reason, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "is_new_enough", lambda: True)
    for kernel in ("pallas", "cudnn"):
        with pytest.raises(ValueError, match=f"attention_kernel={kernel} must fit; {reason}"):
            jax.eval_shape(functools.partial(attend_by, kernel, mask=mask), jnp.zeros(shape, dtype))


def test_subspaces_that_cudnn_alone_does_not_take(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu, "is_new_enough", lambda: True)
    V = jnp.zeros((1, 5, 2, 12), jnp.bfloat16)
    with pytest.raises(
        ValueError, match=r"takes subspaces of 8, 16, … 128 dimensions; here are 12"
    ):
        jax.eval_shape(functools.partial(attend_by, "cudnn"), V)
    assert jax.eval_shape(functools.partial(attend_by, "pallas"), V).shape == V.shape


@pytest.mark.parametrize(
    ("capability", "new"), [("7.5", False), ("8.0", True), ("9.0", True), ("gfx90a", False)]
)
def test_old_gpus_take_the_compilers_program(capability, new, monkeypatch):
    class Device:
        compute_capability, device_kind = capability, "a GPU"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    V = jnp.zeros((1, 5, 2, 16), jnp.bfloat16)
    assert gpu.is_new_enough() is ("cuda" in attention._with_kernel(V, None, "auto")) is new
    if not new:
        with pytest.raises(
            ValueError, match=r"it needs compute capability 8\.0; this GPU is older"
        ):
            attend_by("pallas", V)
    # A program for other GPUs, which are not here, and one for TPUs.
    for other in (AbstractDevice("NVIDIA H100", 132, "gpu"), AbstractDevice("TPU v5e", 1, "tpu")):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=other)):
            assert gpu.is_new_enough()
    mine = AbstractDevice(Device.device_kind, 40, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=mine)):
        assert gpu.is_new_enough() is new


@pytest.mark.parametrize("changes", [dict(backward="autodiff"), dict(attention="mhsa")])
def test_a_kernel_where_nothing_would_use_it_is_refused(changes, tiny_images):
    model = create_model("crate_tiny_patch16_224", **SIZES, attention_kernel="cudnn", **changes)
    with pytest.raises(
        ValueError, match=r"must be auto or xla without MSSA, and with .* got cudnn"
    ):
        model.init(jax.random.key(0), tiny_images, train=False)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"must be one of auto, xla, pallas, cudnn; got palas\."):
        attend_by("palas", jnp.zeros((1, 5, 2, 8)))


def test_gpus_and_tpus_get_their_kernels_and_other_devices_the_compilers_program():
    """One program for all: what it is lowered for decides. Of float32 GPUs have no kernel."""

    def lowered(dtype, platform, kernel="auto"):
        V = jax.ShapeDtypeStruct((2, 5, 2, 16), dtype)
        run = jax.jit(lambda V, dO: jax.vjp(functools.partial(attend_by, kernel), V)[1](dO))
        # jax 0.11 has no kernel lowered for a GPU without knowing which one.
        device = AbstractDevice("NVIDIA H100", 132, "gpu") if platform == "cuda" else None
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return run.trace(V, V).lower(lowering_platforms=(platform,)).as_text()

    names = {
        "cuda": ["attend", "attend_deltas", "attend_backward"],
        "tpu": ["attend", "attend_backward"],
    }
    for dtype, platform, kernel, runs in (
        (jnp.bfloat16, "cuda", "auto", True),
        (jnp.bfloat16, "cuda", "xla", False),
        (jnp.float32, "cuda", "auto", False),
        (jnp.bfloat16, "cpu", "auto", False),
        (jnp.bfloat16, "tpu", "auto", True),
        (jnp.float32, "tpu", "auto", True),
        (jnp.float16, "tpu", "auto", False),
        (jnp.bfloat16, "tpu", "xla", False),
    ):
        text = lowered(dtype, platform, kernel)
        found = [name for name in names["cuda"] if f'"{name}"' in text]
        assert found == (names[platform] if runs else []), (dtype, platform, kernel)


@pytest.mark.parametrize(("kind", "new"), [("TPU v3", False), ("TPU v4", True), ("TPU7x", True)])
def test_old_tpus_take_the_compilers_program(kind, new, monkeypatch):
    monkeypatch.setattr(placement, "platform", lambda: "tpu")
    monkeypatch.setattr(placement, "device_kind", lambda: kind)
    V = jnp.zeros((1, 5, 2, 16), jnp.bfloat16)
    assert ("tpu" in attention._with_kernel(V, None, "auto")) is new
    if not new:
        with pytest.raises(
            ValueError, match=r"it needs TPU v4; this one is older\. Set it to auto"
        ):
            attend_by("pallas", V)


def test_several_tpus_without_a_mesh_take_the_compilers_program(monkeypatch):
    """Nothing says what they share, and their compiler refuses a kernel that it has to split."""
    V = jnp.zeros((4, 5, 2, 16), jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert jax.device_count() > 1 and "tpu" not in attention._with_kernel(V, None, "auto")
    with pytest.raises(ValueError, match=r"without a mesh around it nothing says what several"):
        attend_by("pallas", V)
    mesh = make_mesh("data:4", jax.devices()[:4])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert "tpu" in attention._with_kernel(V, None, "auto")


@pytest.mark.parametrize(
    ("asked", "half", "single"),
    [(None, True, True), ("highest", True, True), ("high", True, False)],
)
def test_the_precision_of_products_that_is_asked_for(asked, half, single):
    with jax.default_matmul_precision(asked):
        for dtype, taken in ((jnp.bfloat16, half), (jnp.float32, single)):
            V = jax.ShapeDtypeStruct((2, 5, 2, 16), dtype)
            run = jax.jit(lambda V: jax.vjp(functools.partial(attend_by, "auto"), V)[1](V))
            text = run.trace(V).lower(lowering_platforms=("tpu",)).as_text()
            assert ("tpu_custom_call" in text) is taken, dtype


def test_what_a_tpu_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(placement, "platform", lambda: "tpu")
    V = jnp.zeros((1, 5000, 1, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"memory must hold an image.* here are 5000 x 1 x 16 num"):
        attend_by("pallas", V)


def test_all_layers_in_one_iteration_where_the_devices_are_gpus(monkeypatch):
    model = create_model("crate_tiny_patch16_224", **SIZES)
    assert model.scan_unroll is None
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert model.layers_at_once == 2
    assert model.clone(remat="dots").layers_at_once == 1  # a loop forgets for certain
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert model.layers_at_once == 1 and model.clone(scan_unroll=2).layers_at_once == 2


def test_what_is_computed_again_stays_apart_without_a_loop(tiny_images):
    """Else a compiler merges it with the first time, and keeps what it was to forget."""
    model = create_model("crate_tiny_patch16_224", **SIZES)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), tiny_images, train=False)["params"]
    )

    def barriers(**changes):
        one = model.clone(**changes)
        loss = lambda params: one.apply({"params": params}, tiny_images, train=True).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).as_text().count("optimization_barrier")

    assert barriers(remat="full", scan_unroll=2) >= 1
    assert barriers(remat="full") == barriers(scan_unroll=2) == 0
