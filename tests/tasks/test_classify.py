"""Loss, top-1 and top-5 against NumPy in float64, whatever the batches and the devices."""

import functools
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.analysis import layerwise
from crate_jax.config import DataConfig, ModelConfig, TrainConfig
from crate_jax.data.images.labelled import open_labelled_images
from crate_jax.data.loader import eval_batches
from crate_jax.evaluation.sums import add_up
from crate_jax.parallel import batch_sharding, make_mesh, replicated
from crate_jax.planning.collectives import collectives
from crate_jax.tasks.classify import Classify
from crate_jax.tasks.labels import rank_of_label
from crate_jax.training.run import evaluate_split, inspect_split, set_up

EXAMPLES = 297


class Readout:
    """A model whose logits are the first pixel row, scaled: any logits, by choice of images."""

    def apply(self, variables, images, train):
        assert train is False
        return images[:, 0, :, 0] * variables["params"]["scale"]


SCALE = {"scale": jnp.float32(1.0)}


def expected_metrics(logits, labels):
    """Means in float64; of equal logits the lower class ranks first."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    rows = np.arange(len(labels))
    ranked = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return {
        "loss": float(np.mean(log_sum - shifted[rows, labels])),
        "top1": float(np.mean(ranked[:, 0] == labels)),
        "top5": float(np.mean((ranked == labels[:, None]).any(axis=1))),
        "examples": len(labels),
    }


def assert_metrics(found, expected, rtol=2e-6):
    assert set(found) == {"loss", "top1", "top5", "examples"}
    assert found["loss"] == pytest.approx(expected["loss"], rel=rtol)
    for name in ("top1", "top5", "examples"):  # counts: exact
        assert found[name] == expected[name], name


def batches_of(logits, labels, mask=None, size=50):
    mask = np.ones(len(labels), np.float32) if mask is None else mask
    for i in range(0, len(labels), size):
        rows = slice(i, i + size)
        yield {
            "image": jnp.asarray(logits[rows, None, :, None]),
            "label": jnp.asarray(labels[rows], jnp.int32),
            "mask": jnp.asarray(mask[rows]),
        }


def evaluate(task, params, batches):
    """Metrics over batches, as a run computes them, and the number of examples."""
    totals = add_up(functools.partial(jax.jit(task.sums), params, ()), batches)
    return task.metrics(totals) | {"examples": int(totals["examples"])}


@pytest.fixture(scope="module")
def readout_step():
    return Classify(Readout())


def draw(classes, count=200, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)).astype(np.float32) * 4
    return logits, rng.integers(classes, size=count)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4, 5, 6, 100])
def test_metrics(readout_step, classes):
    logits, labels = draw(classes)
    expected = expected_metrics(logits, labels)
    assert_metrics(evaluate(readout_step, SCALE, batches_of(logits, labels)), expected)
    assert (expected["top5"] == 1.0) == (classes <= 5)
    assert expected["top1"] < expected["top5"]


def test_metrics_by_hand(readout_step):
    logits = np.log(np.array([[6, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6], [1, 7, 1, 1, 1, 1]]))
    labels = np.array([0, 0, 2])  # first; last; tied for second
    found = evaluate(readout_step, SCALE, batches_of(logits.astype(np.float32), labels, size=3))
    assert found["top1"] == 1 / 3
    assert found["top5"] == 2 / 3
    assert found["loss"] == pytest.approx(np.mean([np.log(11 / 6), np.log(21), np.log(12)]), 1e-6)
    assert found["examples"] == 3
    assert isinstance(found["examples"], int)


def test_masked_rows_do_not_count(readout_step):
    logits, labels = draw(10)
    mask = (np.arange(200) % 3 > 0).astype(np.float32)
    real = mask == 1
    expected = expected_metrics(logits[real], labels[real])
    assert expected["top1"] != expected_metrics(logits, labels)["top1"]
    assert_metrics(evaluate(readout_step, SCALE, batches_of(logits, labels, mask)), expected)
    # Whatever filling holds.
    spoilt = np.where(real[:, None], logits, np.float32(np.nan))
    assert_metrics(evaluate(readout_step, SCALE, batches_of(spoilt, labels, mask)), expected)


def test_constant_logits_are_a_guess_of_one_class(readout_step):
    labels = np.repeat(np.arange(10), [5, 11, 3, 7, 9, 2, 8, 6, 4, 45])
    found = evaluate(readout_step, SCALE, batches_of(np.zeros((100, 10), np.float32), labels))
    assert found["top1"] == 5 / 100  # class 0, and not every class
    assert found["top5"] == 35 / 100  # classes 0 … 4
    assert found["loss"] == pytest.approx(np.log(10), 1e-6)


def test_huge_logits_stay_finite(readout_step):
    logits = np.array([[1e4, -1e4, 0.0]], np.float32)
    found = evaluate(readout_step, SCALE, batches_of(logits, np.array([1])))
    assert found["loss"] == pytest.approx(2e4)


def test_diverged_model_shows(readout_step):
    logits, labels = draw(10)
    found = evaluate(readout_step, {"scale": jnp.float32(np.nan)}, batches_of(logits, labels))
    assert np.isnan(found["loss"])
    assert found["top1"] == found["top5"] == 0


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_logit_that_is_not_a_number_is_never_a_hit(label):
    logits = jnp.asarray([[3.0, np.nan, 1.0]])
    rank = rank_of_label(logits, jnp.asarray([label]))
    assert rank.tolist() == [{0: 1, 1: 2**31 - 1, 2: 2}[label]]


def test_evaluation_sends_no_logits():
    """Sums alone travel between the devices."""
    step = jax.jit(Classify(Readout()).sums)
    rows = batch_sharding(make_mesh("data:8"))
    batch = jax.device_put(next(batches_of(*draw(10, count=16), size=16)), rows)
    scale = jax.device_put(SCALE, replicated(make_mesh("data:8")))
    found = collectives(step.lower(scale, (), batch).compile().as_text(), devices=8)
    assert {c.kind for c in found} == {"all-reduce"}
    assert sum(n * c.bytes for c, n in found.items()) == 4 * 4


def test_stored_pixels_are_normalised_before_the_model():
    # No two of an example are equal: a compiler may round equal values in more than one way.
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.choice(256, 10, replace=False) for _ in range(200)]).astype(np.uint8)
    _, labels = draw(10)
    task = Classify(Readout(), mean=(0.9,), std=(0.01,))
    expected = expected_metrics((pixels / 255 - 0.9) / 0.01, labels)
    assert_metrics(evaluate(task, SCALE, batches_of(pixels, labels)), expected, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_no_example(readout_step, masked):
    logits, labels = draw(10, count=8)
    batches = batches_of(logits, labels, np.zeros(8, np.float32)) if masked else []
    with pytest.raises(ValueError, match=r"batches must hold at least one example; got none\. Cho"):
        evaluate(readout_step, SCALE, batches)


# --- batches and devices --------------------------------------------------------------------------

SYNTHETIC = DataConfig(dataset="synthetic")


class Few:
    """The first rows of others."""

    def __init__(self, rows):
        self.name, self.shapes, self.row = rows.name, rows.shapes, rows.row

    def __len__(self):
        return EXAMPLES


@pytest.fixture(scope="module")
def synthetic():
    rows = open_labelled_images(
        SYNTHETIC, "test", train=False, image_shape=(16, 16, 3), num_classes=7
    )
    return Few(rows)


@pytest.fixture(scope="module")
def reference(tiny_model, tiny_params, synthetic):
    """Of the model's own logits, all examples at once on one device."""
    examples = [synthetic.row(i, None) for i in range(EXAMPLES)]
    images = (np.stack([e["image"] for e in examples]) / np.float32(255) - 0.5) / 0.25
    apply = jax.jit(lambda params, x: tiny_model.apply({"params": params}, x, train=False))
    logits = apply(tiny_params, images.astype(np.float32))
    return expected_metrics(logits, np.array([e["label"] for e in examples]))


@pytest.mark.parametrize(
    "devices, batch_size", [(1, 304), (1, 32), (8, 8), (8, 32), (8, 304)], ids=str
)
def test_same_metrics_on_any_devices_in_any_batches(
    tiny_model, tiny_params, synthetic, reference, devices, batch_size
):
    mesh = make_mesh("data:-1", jax.devices()[:devices])
    sharding = batch_sharding(mesh)
    stream = eval_batches(synthetic, SYNTHETIC, batch_size=batch_size, sharding=sharding)
    with closing(stream):
        batches = list(stream)
    assert len(batches) == -(-EXAMPLES // batch_size)
    assert {len(batch["image"].sharding.device_set) for batch in batches} == {devices}
    task = Classify(tiny_model, mean=(0.5,), std=(0.25,))
    found = evaluate(task, jax.device_put(tiny_params, replicated(mesh)), batches)
    assert_metrics(found, reference, rtol=1e-5)
    assert 0 < found["top1"] < found["top5"] < 1


# --- a whole split --------------------------------------------------------------------------------


def digits_config(**model):
    return TrainConfig(
        eval_batch_size=104,
        model=ModelConfig(
            name="crate_tiny_patch16_224",
            image_size=(8, 8),
            patch_size=(4,),
            in_channels=1,
            width=24,
            depth=2,
            num_heads=3,
            **model,
        ),
        data=DataConfig(dataset="digits", mean=(0.3,), std=(0.4,)),
    )


def init(model):
    images = jnp.zeros((1, 8, 8, 1))
    return jax.jit(lambda key: model.init(key, images, train=False)["params"])(jax.random.key(0))


@pytest.fixture(scope="module")
def digits():
    """Normalised images and labels of the test split, in its order."""
    rows = open_labelled_images(
        digits_config().data, "test", train=False, image_shape=(8, 8, 1), num_classes=10
    )
    found = [rows.row(i, np.random.default_rng(0)) for i in range(len(rows))]
    images = np.stack([r["image"] for r in found]).astype(np.float32) / 255
    return (images - np.float32(0.3)) / np.float32(0.4), np.array([r["label"] for r in found])


def test_a_split_is_evaluated_as_the_config_says(digits):
    images, labels = digits
    run = set_up(digits_config(), "eval")
    model = run.task.model
    assert (model.num_classes, model.width, model.image_size) == (10, 24, (8, 8))
    assert list(run.rows) == ["eval"] and run.total_steps == 0
    found = evaluate_split(run, init(model), ())
    assert found.pop("examples_per_s") > 0
    logits = jax.jit(functools.partial(model.apply, train=False))({"params": init(model)}, images)
    assert_metrics(found, expected_metrics(logits, labels), rtol=1e-5)


def test_a_split_is_inspected_by_its_first_batch_without_filling(digits):
    images, _ = digits
    config = digits_config()
    config.eval_batch_size = 304  # 297 examples and 7 of filling
    run = set_up(config, "eval")
    scalars, pictures = inspect_split(run, init(run.task.model), ())
    expected = jax.jit(functools.partial(layerwise, run.task.model))(init(run.task.model), images)
    assert len(scalars) == 2 * len(expected) and pictures == {}
    for name, values in expected.items():
        found = [scalars[f"objective/{name}/layer{layer:02d}"] for layer in (0, 1)]
        np.testing.assert_allclose(found, values, rtol=2e-4, err_msg=name)


def test_model_takes_the_classes_of_the_data():
    task, (rows,) = Classify.open(digits_config(), ("train[:10]", True))
    assert (task.model.num_classes, rows.num_classes, len(rows)) == (10, 10, 10)
    task, _ = Classify.open(digits_config(num_classes=10), ("test", False))
    assert task.model.num_classes == 10
    assert Classify.from_config(digits_config()).model.num_classes == 1000  # no data was asked


def test_other_number_of_classes_is_refused():
    with pytest.raises(ValueError) as caught:
        Classify.open(digits_config(num_classes=7), ("test", False))
    assert str(caught.value) == (
        "model.num_classes must equal the 10 classes of digits/test; got 7. "
        "Leave model.num_classes unset."
    )


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("eval_batch_size", 100, r"eval_batch_size must be a multiple of 8, .*; got 100\. Nearest"),
        ("seed", -1, r"seed must be >= 0"),
    ],
)
def test_config_is_checked_before_data_is_opened(field, value, message):
    config = digits_config()
    config.data.dataset = "no such data set"
    setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        set_up(config, "eval")


def test_a_classifier_needs_classes():
    message = r"^model\.num_classes must be at least 1 for a classifier; got 0, features\."
    with pytest.raises(ValueError, match=message):
        Classify.from_config(TrainConfig(model=ModelConfig(num_classes=0)))


@pytest.mark.parametrize("name", ["crate_tiny_patch16_224", "tost_tiny_patch16_224"])
def test_features_are_what_the_head_reads(name):
    sizes = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=32, num_heads=2)
    task = Classify.from_config(TrainConfig(model=ModelConfig(name=name, depth=1, **sizes)), 3)
    params, extra = jax.jit(task.init)(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 1)).astype(np.uint8)
    found = jax.jit(task.features)(params, extra, {"image": jnp.asarray(images)})
    logits = task.model.apply(
        {"params": params, **dict(extra)}, task.normalized(jnp.asarray(images)), train=False
    )
    assert found.shape == (4, 32)
    assert found.dtype == jnp.float32
    head = params["head"]
    again = np.asarray(found) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(again, logits, atol=1e-5)


def test_a_model_of_others_has_no_features():
    with pytest.raises(ValueError, match="got Classify of a Readout"):
        Classify(Readout()).features({}, (), {})
