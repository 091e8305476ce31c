"""The formulas of what a model costs, against its program and against the published table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

from crate_jax import Crate, CrateMae, ToST, ViT, create_model
from crate_jax.models.cost import (
    activation_bytes,
    count_parameters,
    multiply_adds,
    step_flops,
)
from crate_jax.models.crate_alpha import CrateAlpha
from crate_jax.models.hyper_set import HyperSet

# Every size differs, so that no product of two of them stands for another.
SIZES = dict(image_size=(8, 24), patch_size=(2, 4), num_classes=5, width=20, depth=2)
OTHERS = {  # the ablations, and the other families
    "mhsa": functools.partial(Crate, **SIZES, num_heads=3, head_dim=8, attention="mhsa"),
    "mlp": functools.partial(Crate, **SIZES, num_heads=3, head_dim=8, nonlinearity="mlp"),
    "tied": functools.partial(Crate, **SIZES, num_heads=3, head_dim=8, tied_output=True),
    "steps": functools.partial(
        Crate, **SIZES, num_heads=3, head_dim=8, ista_steps=2, threshold="soft"
    ),
    "learned": functools.partial(Crate, **SIZES, num_heads=3, head_dim=8, step_sizes="per_layer"),
    "alpha": functools.partial(CrateAlpha, **SIZES, num_heads=3, head_dim=8, overcompleteness=2),
    "vit": functools.partial(ViT, **SIZES, num_heads=3, head_dim=8, mlp_ratio=3),
    "hyper_set": functools.partial(HyperSet, **SIZES, num_heads=3, head_dim=8, mlp_ratio=2),
    "tssa": functools.partial(Crate, **SIZES, num_heads=3, head_dim=8, attention="tssa"),
    "cbsa": functools.partial(
        Crate, **SIZES, num_heads=3, head_dim=8, attention="cbsa", representatives=(2, 3)
    ),
    "aot": functools.partial(Crate, **SIZES, num_heads=3, head_dim=8, nonlinearity="none"),
    "tssa alone": functools.partial(
        Crate, **SIZES, num_heads=3, head_dim=8, attention="tssa", nonlinearity="none"
    ),
    "convolutions": functools.partial(
        Crate, **SIZES | {"patch_size": 4}, num_heads=3, head_dim=8, stem="convolutions"
    ),
    "tost": functools.partial(
        ToST, **SIZES | {"patch_size": 4}, num_heads=3, head_dim=8, mlp_ratio=3
    ),
    "mae": functools.partial(CrateMae, **SIZES, num_heads=3, head_dim=8),
}
# Multiply-adds of a forward pass, and of one with gradients, that are made once for all examples:
# the code of two depths, from 512 numbers that nothing is learned of; and the positions of a ToST,
# from 64 waves.
ONCE = {
    "hyper_set": (2 * (512 * 20 + 20 * 20), 2 * (2 * 512 * 20 + 3 * 20 * 20)),
    "tost": (2 * 6 * 64 * 20, 2 * 2 * 6 * 64 * 20),
}
HEADS = [dict(num_heads=3, head_dim=8), dict(num_heads=1), dict(num_heads=1, head_dim=12)]


def test_tokens_are_the_patches_and_the_class_token():
    assert Crate(**SIZES, num_heads=4).num_tokens == 4 * 6 + 1
    assert create_model("crate_base_patch8_224").num_tokens == 28 * 28 + 1


def test_a_sample_fits_the_model():
    images = Crate(**SIZES, num_heads=4, in_channels=2).sample_input()
    assert (images.shape, images.dtype) == ((1, 8, 24, 2), jnp.float32)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("crate_tiny_patch16_224", 1.81),
        ("crate_small_patch16_224", 3.76),
        ("crate_base_patch16_224", 6.41),
        ("crate_large_patch16_224", 21.89),
    ],
)
def test_multiply_adds_of_the_published_models(name, published):
    assert round(multiply_adds(create_model(name)) / 1e9, 2) == published


@pytest.fixture
def count_multiply_adds(equations):
    """Of the matrix products that a function's results need, and with a flag of convolutions."""

    def count(function, *args, convolutions=False):
        program = jax.make_jaxpr(function)(*args).jaxpr
        live, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
        counted = 0
        for equation, times in equations(live):
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                length = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
                counted += times * int(length) * equation.outvars[0].aval.size
            if convolutions and equation.primitive.name == "conv_general_dilated":
                kernel, out = equation.invars[1].aval, equation.outvars[0].aval
                counted += times * out.size * int(np.prod(kernel.shape[:3]))
        return counted

    return count


def abstract_variables(model):
    """They do not depend on how the model computes."""
    return _abstract_variables(model.clone(remat="none", dtype=jnp.float32, backward="derived"))


@functools.cache
def _abstract_variables(model):
    init = lambda key: model.init(key, model.sample_input(), train=False)  # noqa: E731
    return jax.eval_shape(init, jax.random.key(0))


# What is recomputed, in which dtype, and how the backward pass is had: each with each other, but
# not all three at once; tracing takes its time.
WAYS = [
    *(dict(remat=remat) for remat in ("none", "dots", "full")),
    *(dict(remat=remat, dtype="bfloat16") for remat in ("none", "dots")),
    *(dict(remat=remat, backward="autodiff") for remat in ("none", "dots")),
    dict(dtype="bfloat16", backward="autodiff"),
]


@pytest.mark.parametrize("heads", HEADS)
def test_multiply_adds_are_those_of_the_program(heads, count_multiply_adds):
    model = Crate(**SIZES, **heads, in_channels=2)
    apply = lambda variables, images: model.apply(variables, images, train=False)  # noqa: E731
    counted = count_multiply_adds(apply, abstract_variables(model), model.sample_input())
    assert multiply_adds(model) == counted


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("way", [way for way in WAYS if "dtype" not in way], ids=str)
def test_step_flops_are_those_of_loss_and_gradient(heads, way, count_multiply_adds):
    model = Crate(**SIZES, **heads, in_channels=2, **way)
    images = model.sample_input()
    loss = lambda variables: model.apply(variables, images, train=False).sum()  # noqa: E731
    counted = count_multiply_adds(jax.value_and_grad(loss), abstract_variables(model))
    assert step_flops(model) == 2 * counted


@pytest.mark.parametrize("name", OTHERS)
def test_products_of_the_other_operators_are_those_of_the_program(name, count_multiply_adds):
    model = OTHERS[name]()
    apply = lambda variables, images: model.apply(variables, images, train=False)  # noqa: E731
    of_one_image = (abstract_variables(model), model.sample_input())
    counted = count_multiply_adds(apply, *of_one_image, convolutions=True)
    forward, both = ONCE.get(name, (0, 0))
    assert multiply_adds(model) == counted - forward
    # The gradient of a convolution is none of the same size, and is not counted.
    stem = sum(products for _, products in model.stages)
    stem_step = 6 * stem - 2 * model.first_products * bool(stem)
    for remat in ("none", "dots", "full"):
        again = model.clone(remat=remat)
        loss = lambda variables, of=again: (  # noqa: E731
            of.apply(variables, of.sample_input(), train=False).sum()
        )
        counted = count_multiply_adds(jax.value_and_grad(loss), abstract_variables(again))
        assert step_flops(again) - stem_step == 2 * (counted - both), remat


@pytest.mark.parametrize("heads", HEADS)
def test_cost_of_a_decoder(heads, count_multiply_adds):
    """Of encoder and decoder together, as `reconstruct` calls them."""
    model = CrateMae(**SIZES | {"num_classes": 0}, **heads, decoder_depth=3)
    images, masked = jnp.zeros((7, *model.input_shape)), np.ones((7, 24), bool)

    def reconstruct(variables, of=model):
        return of.apply(variables, images, masked, train=False, method="reconstruct").sum()

    counted = count_multiply_adds(reconstruct, abstract_variables(model))
    assert 7 * multiply_adds(model) == counted
    for way in (dict(remat=remat) for remat in ("none", "dots", "full")):
        again = model.clone(**way)
        gradient = jax.value_and_grad(functools.partial(reconstruct, of=again))
        counted = count_multiply_adds(gradient, abstract_variables(again))
        assert 7 * step_flops(again) == 2 * counted, way
        keep = lambda v, of=again: jax.vjp(functools.partial(reconstruct, of=of), v)[1]  # noqa: E731
        residuals = jax.tree.leaves(jax.eval_shape(keep, abstract_variables(again)))
        rows = {7, 7 * model.num_tokens, 7 * model.num_heads}
        of_decoder = [a for a in residuals if a.shape[:1] == (3,) and rows & {*a.shape[1:]}]
        held = sum(a.size * a.dtype.itemsize for a in of_decoder) / 7
        np.testing.assert_allclose(4 * again.kept_outside, held, rtol=0.03)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_activation_bytes_are_what_the_backward_pass_holds(heads, way):
    check_activation_bytes(Crate(**SIZES, **heads, **way))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("way", WAYS[:5], ids=str)
def test_activation_bytes_of_the_other_operators(name, way):
    check_activation_bytes(OTHERS[name](**way))


def check_activation_bytes(model):
    """The formula, against the residuals of `jax.vjp` that every layer has."""
    model = model.clone(depth=3)
    images = jax.ShapeDtypeStruct((7, 8, 24, 3), jnp.float32)

    def keep(params, images):
        loss = lambda params: model.apply(params, images, train=False).sum()  # noqa: E731
        return jax.vjp(loss, params)[1]

    residuals = jax.tree.leaves(jax.eval_shape(keep, abstract_variables(model), images))
    # One array for all images of the batch, or for all their tokens, or for all their heads.
    rows = {7, 7 * model.num_tokens, 7 * model.num_heads}
    stacked = [a for a in residuals if a.shape[:1] == (3,) and rows & {*a.shape[1:]}]
    held = sum(a.size * a.dtype.itemsize for a in stacked) / 7
    assert held > 0
    outside = model.kept_outside * jnp.dtype(model.dtype).itemsize
    np.testing.assert_allclose(activation_bytes(model) - outside, held, rtol=0.03)
    return residuals, outside


def test_activation_bytes_of_the_compiled_gradient(tiny_model, tiny_params):
    """The memory XLA sets aside grows with depth as the formula says: it keeps no less."""

    def set_aside(remat, depth):
        model = tiny_model.clone(remat=remat, depth=depth)
        params = jax.tree.map(lambda leaf: leaf, tiny_params)
        params["blocks"] = jax.tree.map(
            lambda leaf: jnp.concatenate([leaf] * (depth // 3)), tiny_params["blocks"]
        )
        images = jnp.zeros((8, 16, 16, 3))
        loss = lambda p, x: model.apply({"params": p}, x, train=False).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(params, images).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 8, activation_bytes(model)

    for remat in ("none", "full"):
        (few, few_formula), (many, many_formula) = set_aside(remat, 6), set_aside(remat, 12)
        np.testing.assert_allclose(many_formula - few_formula, many - few, rtol=0.25)


def test_parameters_are_those_that_init_makes(tiny_model, tiny_params):
    counted = sum(leaf.size for leaf in jax.tree.leaves(tiny_params))
    assert count_parameters(tiny_model) == counted
