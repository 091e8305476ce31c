"""Types of results: of gradients, on meshes of every kind of axis, and under jax_enable_x64."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import crate_jax
from crate_jax import create_model
from crate_jax.analysis import layerwise, taps
from crate_jax.models.attention import attend_by
from crate_jax.models.cost import abstract_variables
from crate_jax.models.crate_alpha import odl
from crate_jax.models.derivatives import BACKWARD, NORMALISE, attend
from crate_jax.models.layers import ista_step
from crate_jax.models.parameters import variables_of
from crate_jax.tasks import Classify
from crate_jax.tasks.mixing import make_mix
from crate_jax.training.state import init_state
from crate_jax.training.step import make_train_step

P = PartitionSpec
SIZES = dict(image_size=16, patch_size=8, width=16, depth=2, num_heads=2, num_classes=3)
MODELS = {
    "crate": create_model("crate_tiny_patch16_224", **SIZES),
    "crate_alpha": create_model(
        "crate_alpha_tiny_patch16_224", **SIZES, layer_scale=0.1, drop_path=0.2
    ),
    "vit": create_model("vit_tiny_patch16_224", **SIZES, pool="patches"),
    "grid": create_model("crate_mhsa_mlp_small_384_patch8_224", **SIZES),
    "hyper_set": create_model("hyperset_patch16_224", **SIZES),
    "tost": create_model("tost_tiny_patch16_224", **SIZES, drop_path=0.2),
    "cbsa": create_model("cbsa_tiny_patch16_224", **SIZES, representatives=2),
}
IMAGES = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
LABELS = np.arange(8, dtype=np.int32) % 3
BATCH = {"image": IMAGES, "label": LABELS}


@functools.cache
def params():
    """Of the first model."""
    model = MODELS["crate"]
    return jax.jit(lambda key: model.init(key, IMAGES, train=False))(jax.random.key(0))["params"]


def loss(params, images, model=MODELS["crate"]):
    return (model.apply(variables_of(params), images, train=False) ** 2).mean()


def assert_near(got, expected, rtol=1e-5):
    """Every leaf within a share of the largest entry of what is expected, as test_derivatives."""
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        g, e = (np.asarray(x, np.float64) for x in (g, e))
        assert g.shape == e.shape
        assert np.linalg.norm(g - e) <= rtol * max(np.linalg.norm(e), 1e-6)


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def auto_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


# --- dtypes ---------------------------------------------------------------------------------------

HALF, SINGLE, DOUBLE, SHORT = jnp.bfloat16, jnp.float32, jnp.float64, jnp.float16


def attended(V, backward, mask=None):
    """O of tokens (B, N, K, p), either way."""
    if backward == "autodiff":
        return attend(V.swapaxes(1, 2), mask)[0].swapaxes(1, 2)
    return attend_by("auto", V, mask)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize(
    ("tokens", "parameters"),
    [(HALF, SINGLE), (SINGLE, HALF), (SHORT, SHORT), (DOUBLE, SINGLE), (SINGLE, DOUBLE)],
)
def test_gradients_have_the_dtypes_of_their_arguments(tokens, parameters, backward):
    with jax.enable_x64(DOUBLE in (tokens, parameters)):
        shapes = ((2, 3, 8), tokens), ((8,), parameters), ((8,), tokens)
        inputs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        normalise = lambda *inputs: NORMALISE[backward](*inputs, SINGLE, 1e-5).sum()  # noqa: E731
        got = jax.eval_shape(jax.grad(normalise, (0, 1, 2)), *inputs)
        assert [x.dtype for x in got] == [x.dtype for x in inputs]
        V = jax.ShapeDtypeStruct((1, 2, 5, 4), tokens)
        total = lambda V: attended(V, backward).sum()  # noqa: E731
        assert jax.eval_shape(jax.grad(total), V).dtype == tokens
        assert jax.eval_shape(lambda V: attended(V, backward), V).dtype == tokens
        assert {x.dtype for x in jax.eval_shape(attend, V)} == {jnp.dtype(tokens)}


@pytest.mark.parametrize("dtype", [HALF, DOUBLE])
def test_gradients_of_other_parameters_by_value(dtype):
    """Half the bits cost half the digits; twice the bits are used, so differences show none."""
    with jax.enable_x64(dtype == DOUBLE):
        values = [normal(i, *shape, dtype=dtype) for i, shape in enumerate([(2, 3, 8), (8,), (8,)])]
        V = normal(4, 1, 2, 5, 4, dtype=dtype)

        def total(X, scale, bias, V, dtype=dtype, backward="derived"):
            Y = NORMALISE[backward](X, scale, bias, dtype, 1e-5)
            return sum(jnp.sin(x).sum() for x in (Y, attended(V, backward)))

        wide = SINGLE if dtype == HALF else DOUBLE
        plain = functools.partial(total, dtype=wide, backward="autodiff")
        got = jax.jit(jax.grad(total, (0, 1, 2, 3)))(*values, V)
        expected = jax.jit(jax.grad(plain, (0, 1, 2, 3)))(*[x.astype(wide) for x in (*values, V)])
        assert_near(got, expected, 2e-2 if dtype == HALF else 1e-13)


@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(MODELS, [HALF, SINGLE, HALF, SINGLE, HALF, HALF, SINGLE], strict=True)]
)
def test_gradients_of_half_precision_parameters(name, dtype):
    model = MODELS[name].clone(dtype=dtype)
    half = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, HALF), abstract_variables(MODELS[name])
    )
    gradient = jax.eval_shape(jax.grad(functools.partial(loss, model=model)), half, IMAGES)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(HALF)}


def test_a_scan_over_steps_carries_half_precision_parameters():
    task, tx = Classify(MODELS["crate"].clone(dtype=HALF)), optax.adamw(1e-3)

    def start():
        state = init_state(task, tx, jax.random.key(0), ema=True)
        half = jax.tree.map(lambda x: x.astype(HALF), state.params)
        return state.replace(params=half, opt_state=tx.init(half), ema_params=half)

    step = make_train_step(task, tx, ema_decay=np.float64(0.5))

    def run(state):
        return jax.lax.scan(
            lambda state, _: step(state, BATCH, jax.random.key(1)), state, None, length=2
        )

    _, metrics = jax.eval_shape(run, jax.eval_shape(start))  # a carry of another type is refused
    assert {x.dtype for x in metrics.values()} == {jnp.dtype(SINGLE)}


def test_numbers_of_numpy_leave_the_tokens_their_dtype():
    Y, D = jnp.ones((1, 2, 4), HALF), jnp.ones((4, 4), HALF)
    for make in (lambda **n: ista_step(Y, D, **n), lambda **n: odl(Y, D, D, **n)):
        got = make(eta=np.float64(0.1), lmbda=np.float32(0.2))
        assert got.dtype == HALF
        np.testing.assert_array_equal(got, make(eta=0.1, lmbda=np.float32(0.2).item()))


# --- jax.shard_map --------------------------------------------------------------------------------


@functools.cache
def plain_gradients(scale=1.0):
    """Of automatic differentiation on one device, at so many times the parameters."""
    return plain_gradient(jax.tree.map(lambda x: scale * x, params()), IMAGES)


plain_gradient = jax.jit(
    jax.grad(functools.partial(loss, model=MODELS["crate"].clone(backward="autodiff")), (0, 1))
)


def test_a_gradient_through_shard_map_is_the_plain_one():
    axes = ("data", "model")
    mean = jax.shard_map(
        lambda params, images: jax.lax.pmean(loss(params, images), axes),
        mesh=auto_mesh(data=2, model=2),
        in_specs=(P(), P(axes)),
        out_specs=P(),
    )
    assert_near(jax.jit(jax.grad(mean, (0, 1)))(params(), IMAGES), plain_gradients())


def test_a_gradient_inside_shard_map_is_the_sum_over_the_devices():
    """Of parameters that are the same on all; that of a device's own rows is its own."""
    gradients = jax.shard_map(
        jax.grad(loss, (0, 1)),
        mesh=auto_mesh(data=2),
        in_specs=(P(), P("data")),
        out_specs=(P(), P("data")),
    )
    sums = jax.tree.map(lambda x: x / 2, jax.jit(gradients)(params(), IMAGES))
    assert_near(sums, plain_gradients())


def test_parameters_of_each_device_have_gradients_of_their_own():
    """Two models on the same images."""
    both = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), params())

    def inside(both, images):
        own = jax.tree.map(lambda x: x[0], both)
        gradient, of_images = jax.grad(loss, (0, 1))(own, images)
        return jax.tree.map(lambda x: x[None], gradient), of_images

    gradients = jax.shard_map(
        inside, mesh=auto_mesh(model=2), in_specs=(P("model"), P()), out_specs=(P("model"), P())
    )
    got, of_images = jax.jit(gradients)(both, IMAGES)
    each = [plain_gradients(), plain_gradients(1.5)]
    assert_near(got, jax.tree.map(lambda *both: jnp.stack(both), each[0][0], each[1][0]))
    assert_near(of_images, each[0][1] + each[1][1])


def test_axes_vary_argument_by_argument():
    """X along data, scale along model, bias along none; and a mask along another than its V."""
    X, scale, bias = normal(0, 4, 3, 8), normal(1, 2, 8), normal(2, 8)
    V, masks = normal(3, 2, 5, 2, 4), jnp.stack([jnp.ones((5, 5), bool), jnp.eye(5, dtype=bool)])

    def total(X, scale, bias, V, masks, backward="derived", gather=lambda x: x):
        Y = NORMALISE[backward](X, scale.reshape(8), bias, SINGLE, 1e-5)
        O_BxNxKxp = attended(V, backward, masks[:, None])
        return gather(jnp.sin(Y).sum() + jnp.sin(O_BxNxKxp).sum())

    specs = (P("data"), P("model"), P(), P(), P("model"))
    spread = jax.shard_map(
        functools.partial(total, gather=lambda x: jax.lax.psum(x, ("data", "model"))),
        mesh=auto_mesh(data=2, model=2),
        in_specs=specs,
        out_specs=P(),
    )

    def alone(X, scale, bias, V, masks):
        each = [(x, s, m) for x in jnp.split(X, 2) for s, m in zip(scale, masks, strict=True)]
        return sum(total(x, s, bias, V, m[None], "autodiff") for x, s, m in each)

    values = (X, scale, bias, V, masks)
    grads = [jax.jit(jax.grad(f, (0, 1, 2, 3)))(*values) for f in (spread, alone)]
    assert_near(*grads)


def test_gradients_under_vmap_and_checkpoint():
    X, scale, bias, V = normal(0, 2, 4, 3, 8), normal(1, 8), normal(2, 8), normal(3, 2, 1, 2, 5, 4)

    def each(backward):
        def total(X, scale, bias, V):
            Y = NORMALISE[backward](X, scale, bias, SINGLE, 1e-5)
            return sum(jnp.sin(x).sum() for x in (Y, attended(V, backward)))

        gradient = jax.grad(jax.checkpoint(total), (0, 1, 2, 3))
        return jax.jit(jax.vmap(gradient, in_axes=(0, None, None, 0)))(X, scale, bias, V)

    assert_near(each("derived"), each("autodiff"))


# --- Explicit axes --------------------------------------------------------------------------------


def spread(params, mesh):
    """Shardings of an fsdp of one's own: the last axis of each leaf that divides, not a layer's."""

    def sharding(x):
        axes = [i for i in range(x.ndim) if x.shape[i] % 2 == 0 and (i or x.ndim == 1)]
        spec = P(*[("fsdp" if i in axes[-1:] else None) for i in range(x.ndim)])
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, params)


def test_explicit_meshes_compute_the_same():
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"))
    shared = jax.device_put(params(), spread(params(), mesh))
    images = jax.device_put(IMAGES, NamedSharding(mesh, P(("data", "fsdp"))))
    got = jax.jit(jax.grad(loss, (0, 1)))(shared, images)
    assert_near(got, plain_gradients())
    for g, p in zip(jax.tree.leaves(got), jax.tree.leaves((shared, images)), strict=True):
        assert g.sharding.is_equivalent_to(p.sharding, g.ndim)


@pytest.mark.parametrize(
    ("name", "spec", "around"),  # whether `jax.set_mesh` is around it, too
    [
        ("crate", P("data", "fsdp"), True),
        ("crate_alpha", P(("data", "fsdp")), False),
        ("vit", P("data"), True),
        ("grid", P(("data", "fsdp")), False),
        ("hyper_set", P("data"), False),
        ("tost", P("data"), True),
        ("cbsa", P(("data", "fsdp")), False),
    ],
)
def test_everything_runs_on_explicit_meshes(name, spec, around):
    """Types alone are looked at: JAX refuses a wrong one before anything is computed."""
    mesh, model = jax.make_mesh((2, 2), ("data", "fsdp")), MODELS[name]

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    rows = NamedSharding(mesh, P(spec[0]))
    images, labels = placed(IMAGES, NamedSharding(mesh, spec)), placed(LABELS, rows)
    task, tx = Classify(model.clone(dropout=0.1), mixup_alpha=0.8, cutmix_alpha=1.0), optax.sgd(0.1)
    with jax.set_mesh(mesh) if around else contextlib.nullcontext():
        state = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(0), ema=True))
        state = jax.tree.map(placed, state, spread(state, mesh))
        variables = {"params": state.params, **dict(state.extra)}
        seen = jax.eval_shape(functools.partial(taps, model), variables, images)[1]
        assert all(x.sharding.spec[:2] == (None, spec[0]) for x in seen.values())
        jax.eval_shape(functools.partial(layerwise, model), variables, images)
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
        step = make_train_step(task, tx, accumulate_steps=2, ema_decay=0.9)
        batch = {"image": images, "label": labels}
        after, _ = jax.eval_shape(step, state, batch, jax.random.key(1))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert new.sharding.spec == old.sharding.spec


# --- jax_enable_x64 -------------------------------------------------------------------------------


def doubles(jaxpr, equations):
    """The arrays of double precision in a program, scalars apart."""
    values = (v.aval for e, _ in equations(jaxpr) for v in (*e.invars, *e.outvars))
    return [a for a in values if getattr(a, "dtype", None) == np.float64 and a.ndim]


def test_parameters_are_the_same_under_x64():
    with jax.enable_x64(True):
        init = jax.jit(functools.partial(MODELS["crate"].init, train=False))
        made = init(jax.random.key(0), IMAGES.astype(np.float64))["params"]
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(SINGLE)}
    assert_near(made, params(), 1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(MODELS, [HALF, SINGLE, SINGLE, HALF, HALF, SINGLE, HALF], strict=True)]
)
def test_nothing_is_computed_in_double_precision(name, dtype, equations):
    """Of float64 images there is no more than the images."""
    model = MODELS[name].clone(dtype=dtype, dropout=0.1)
    task, tx = Classify(model, mixup_alpha=0.8, cutmix_alpha=1.0), optax.adamw(1e-3)
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        state = jax.eval_shape(lambda: init_state(task, tx, jax.random.key(0), ema=True))
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
        step = make_train_step(task, tx, ema_decay=0.9)
        program, (after, metrics) = jax.make_jaxpr(step, return_shape=True)(
            state, BATCH, jax.random.key(1)
        )
        assert not doubles(program.jaxpr, equations)
        assert jax.tree.map(jnp.dtype, after) == jax.tree.map(jnp.dtype, state)
        assert {x.dtype.name for x in metrics.values()} == {"float32"}
        apply = functools.partial(model.apply, train=False)
        variables = {"params": state.params, **dict(state.extra)}
        logits = jax.eval_shape(apply, variables, IMAGES.astype(np.float64))
    assert logits.dtype == np.float32


def test_images_are_mixed_by_the_same_draws_under_x64(equations):
    mix = make_mix(num_classes=3, mixup_alpha=0.8, cutmix_alpha=1.0)
    with jax.enable_x64(True):
        program = jax.make_jaxpr(mix)(jax.random.key(0), IMAGES, LABELS)
    drawn = {
        v.aval.dtype.itemsize
        for e, _ in equations(program.jaxpr)
        if e.primitive.name in ("random_bits", "random_gamma")
        for v in e.outvars
    }
    assert drawn == {4}
    assert {x.dtype.name for x in program.out_avals} == {"float32"}


def test_the_objective_is_float32_under_x64():
    rates = functools.partial(
        crate_jax.objective.sparse_rate_reduction, lmbda=np.float64(0.1), eps=np.float64(0.5)
    )
    with jax.enable_x64(True):
        found = jax.eval_shape(rates, jnp.ones((2, 5, 8), DOUBLE), jnp.ones((8, 2, 4), SINGLE))
    assert found.dtype == np.float32
