"""Images that a model does not take: each is refused in one line that says what is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, analysis
from crate_jax.models.cost import abstract_parameters
from crate_jax.models.images import check_images
from crate_jax.tasks import Classify

SHAPE = (16, 12, 3)
MODEL = Crate(SHAPE[:2], 4, 5, width=12, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, "f4"), abstract_parameters(MODEL))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_floats_pass(dtype):
    check_images(np.zeros((2, *SHAPE), jnp.dtype(dtype)), SHAPE)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int8", "bool", "complex64", "O"])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError) as caught:
        check_images(np.zeros((2, *SHAPE), dtype), SHAPE)
    values = "images / 255" if dtype == "uint8" else "values in [0, 1]"
    assert str(caught.value) == (
        f"images must be floats, normalised; got {np.dtype(dtype)}. Normalise them as the weights "
        f"were trained: ({values} - mean) / std."
    )


FIRST = "Put channels last: numpy.moveaxis(images, -3, -1)."
BATCH = "Add the batch axis: images[None]."
RESIZE = "Resize them, or set image_size and in_channels."


@pytest.mark.parametrize(
    ("got", "shape", "remedy"),
    [
        ((16, 12, 3), SHAPE, BATCH),
        ((2, 3, 16, 12), SHAPE, FIRST),
        ((3, 16, 12), SHAPE, f"{FIRST} {BATCH}"),
        ((2, 3, 32, 32), SHAPE, f"{FIRST} {RESIZE}"),
        ((2, 16, 16, 3), SHAPE, RESIZE),
        ((2, 16, 12, 1), SHAPE, RESIZE),
        ((20, 20, 3), SHAPE, f"{BATCH} {RESIZE}"),
        (
            (8, 2, 16, 12, 3),
            SHAPE,
            "Merge the axes in front: images.reshape(-1, *images.shape[-3:]).",
        ),
        ((2, 1, 8, 8), (8, 8, 1), FIRST),
        ((2, 8, 8), (8, 8, 1), "Add the axes that lack: images.reshape(-1, 8, 8, 1)."),
        ((8, 8), (8, 8, 1), "Add the axes that lack: images.reshape(-1, 8, 8, 1)."),
        ((), SHAPE, RESIZE),
    ],
)
def test_another_shape_is_told_with_its_remedy(got, shape, remedy):
    with pytest.raises(ValueError) as caught:
        check_images(np.zeros(got, np.float32), shape)
    wanted = f"(B, {', '.join(map(str, shape))})"
    expected = f"images must be {wanted} for this model; got {got}. {remedy}"
    assert str(caught.value) == expected


def test_what_is_no_array_is_told_its_type():
    image = np.zeros(SHAPE, np.float32)
    message = "^images must be one array of NumPy or JAX; got list. Make it one: numpy.stack"
    with pytest.raises(ValueError, match=message):
        check_images([image, image], SHAPE)
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"got Tensor\. Make it one: numpy\.asarray\(images\)\."):
        check_images(torch.zeros(2, *SHAPE), SHAPE)


CALLS = {
    "call": lambda p, x: MODEL.apply({"params": p}, x, train=False),
    "forward": lambda p, x: MODEL.apply({"params": p}, x, train=False, method="forward"),
    "features": lambda p, x: MODEL.apply({"params": p}, x, train=True, method="forward_features"),
    "taps": lambda p, x: analysis.taps(MODEL, p, x, names="out"),
    "layerwise": lambda p, x: analysis.layerwise(MODEL, p, x),
    "init": lambda p, x: MODEL.init(jax.random.key(0), x, train=False),
}


@pytest.mark.parametrize("call", CALLS)
def test_whatever_calls_the_model_refuses_pixels(call, params):
    pixels = jnp.zeros((2, *SHAPE), jnp.uint8)
    for run in (CALLS[call], jax.jit(CALLS[call])):
        with pytest.raises(ValueError, match=r"^images must be floats, normalised; got uint8"):
            run(params, pixels)


@pytest.mark.parametrize("lift", [jax.vmap, jax.pmap])
def test_the_image_of_a_lifted_call_has_to_have_a_batch_axis_of_its_own(lift, params):
    apply = lift(lambda x: CALLS["call"](params, x))
    with pytest.raises(ValueError, match=r"got \(16, 12, 3\)\. Add the batch axis"):
        apply(jnp.zeros((2, *SHAPE)))
    with pytest.raises(ValueError, match="must be floats, normalised; got uint8"):
        apply(jnp.zeros((2, 1, *SHAPE), jnp.uint8))


def test_classify_normalises_bytes_and_refuses_other_integers():
    task = Classify(MODEL, mean=(0.5,), std=(0.25,))
    pixels = jnp.full((1, *SHAPE), 255, jnp.uint8)
    np.testing.assert_array_equal(task.normalized(pixels), jnp.full((1, *SHAPE), 2.0))
    normal = jnp.full((1, *SHAPE), 0.3, jnp.bfloat16)
    assert task.normalized(normal) is normal
    mixed = Classify(MODEL, mixup_alpha=0.2)
    labels = jnp.zeros(1, jnp.int32)
    for dtype in ("uint16", "int32", "bool"):
        batch = {"image": pixels.astype(dtype), "label": labels}
        with pytest.raises(ValueError, match=rf"^images must be stored pixels .*; got {dtype}"):
            mixed.on_device(batch, jax.random.key(0))
