"""Masked autoencoding: the loss against NumPy, masks that keys and pixels draw, runs, mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from crate_jax import CrateMae, create_model
from crate_jax.checkpoint.reading import restore_trained
from crate_jax.config import DataConfig, MaskingConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.interop import load_fitted
from crate_jax.tasks import TASKS, Classify
from crate_jax.tasks.masked_autoencoding import MaskedAutoencoding
from crate_jax.tasks.masking import hidden_errors, hidden_patches, own_noise, seeds_of
from crate_jax.training.loop import train
from crate_jax.training.run import set_up

MODEL = CrateMae(16, 4, 0, width=32, depth=2, num_heads=2, decoder_depth=1, in_channels=1)
TASK = MaskedAutoencoding(MODEL)


def config(**changes):
    """A run of four steps over the real digits."""
    made = TrainConfig(
        name="mae",
        task="masked_autoencoding",
        batch_size=48,
        eval_batch_size=104,
        total_steps=4,
        log_every_steps=1,
        eval_every_steps=2,
        log_objective_every_steps=2,
        model=ModelConfig(
            name="crate_mae_tiny_patch16_224",
            image_size=(16, 16),
            patch_size=(4, 4),
            in_channels=1,
            width=32,
            depth=2,
            num_heads=2,
            decoder_depth=1,
        ),
        data=DataConfig(
            train_transforms="resize(16)|random_affine(degrees=10)",
            eval_transforms="resize(16)",
            num_threads=2,
        ),
        optim=OptimConfig(lr=3e-3),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def params():
    return jax.jit(TASK.init)(jax.random.key(0))[0]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1)).astype(np.uint8)


# --- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_are_the_mean_of_normalised_patch_tokens_of_whole_images(params, images, pool):
    task = dataclasses.replace(TASK, model=MODEL.clone(pool=pool), mean=(0.3,), std=(0.2,))
    found = jax.jit(task.features)(params, (), {"image": images})
    whole = (images / 255 - 0.3) / 0.2
    Z = MODEL.apply({"params": params}, whole, train=False, method="forward_features")
    patches = np.asarray(Z, np.float64)[:, 1:]
    centred = patches - patches.mean(axis=2, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=2, keepdims=True) + 1e-6)
    scale, bias = (np.asarray(params["head_norm"][name]) for name in ("scale", "bias"))
    normed = normed * scale + bias
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, normed.mean(axis=1), atol=1e-4)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_patches_of_the_least_noise_stay(kept):
    noise = np.random.default_rng(0).integers(0, 5, (50, 7)).astype(np.float32)  # many are equal
    ranks = np.argsort(np.argsort(noise, axis=1, kind="stable"), axis=1)
    np.testing.assert_array_equal(hidden_patches(jnp.asarray(noise), kept), ranks >= kept)


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.75, 4), (0.7, 4), (0.5, 8), (0.9, 1), (0.01, 15), (0.9375, 1)]
)
def test_as_many_patches_stay_as_the_ratio_says(ratio, kept, images):
    task = MaskedAutoencoding(MODEL, ratio=ratio)
    assert task.kept == kept
    batch = {"image": jnp.asarray(images)}
    first, again, other = (
        task.on_device(batch, jax.random.key(key))["masked"] for key in (0, 0, 1)
    )
    assert first.shape == (8, 16) and (np.asarray(first).sum(axis=1) == 16 - kept).all()
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first != other)) and len({row.tobytes() for row in first}) > 1


def test_one_tenth_of_ten_patches_is_one():
    model = CrateMae((4, 40), 4, 0, width=8, depth=1, num_heads=1, decoder_depth=1)
    assert MaskedAutoencoding(model, ratio=0.9).kept == 1  # 10 · (1 − 0.9) is 0.99…


def test_in_evaluation_an_image_draws_its_own_mask(images):
    noise = np.asarray(own_noise(jnp.asarray(images), 16))
    order = np.random.default_rng(1).permutation(8)
    np.testing.assert_array_equal(own_noise(jnp.asarray(images[order]), 16), noise[order])
    assert len({row.tobytes() for row in noise}) == 8
    moved = images.copy()
    moved[0, 3, 2, 0] ^= 1
    assert (seeds_of(jnp.asarray(moved)) != seeds_of(jnp.asarray(images))).tolist() == (
        [True] + [False] * 7
    )
    floats = jnp.asarray(images / 255, jnp.float32)
    assert len(set(np.asarray(seeds_of(floats)).tolist())) == 8


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_errors_are_those_of_numpy(normalize):
    rng = np.random.default_rng(0)
    told, X = rng.normal(size=(2, 3, 5, 8))
    masked = np.array([[1, 0, 1, 0, 0], [0, 0, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
    error, of_means = np.zeros(3), np.zeros(3)
    for b, p in np.argwhere(masked):
        patch = X[b, p]
        centred = patch - patch.mean()
        if normalize:
            patch = centred = centred / np.sqrt(patch.var(ddof=1) + 1e-6)
        error[b] += np.mean((told[b, p] - patch) ** 2) / 2
        of_means[b] += np.mean(centred**2) / 2
    arrays = (jnp.asarray(told, jnp.float32), jnp.asarray(X, jnp.float32), jnp.asarray(masked))
    found = hidden_errors(*arrays, normalize=normalize)
    np.testing.assert_allclose(found[0], error, rtol=1e-5)
    np.testing.assert_allclose(found[1], of_means, rtol=1e-5)


def test_evaluation_hangs_on_each_image_alone(params, images):
    sums = jax.jit(TASK.sums)
    whole = sums(params, (), {"image": jnp.asarray(images), "mask": jnp.ones(8)})
    total = {name: 0.0 for name in whole}
    for i in range(0, 8, 2):  # the second row of each does not count
        rows = jnp.asarray(images[[i, (i + 3) % 8]])
        for shown in (rows, rows.at[1].set(7)):
            part = sums(params, (), {"image": shown, "mask": jnp.array([1.0, 0.0])})
        total = {name: total[name] + float(part[name]) for name in total}
    for i in range(1, 8, 2):
        part = sums(params, (), {"image": jnp.asarray(images[[i, 0]]), "mask": jnp.array([1.0, 0])})
        total = {name: total[name] + float(part[name]) for name in total}
    assert total == pytest.approx({name: float(value) for name, value in whole.items()}, rel=1e-5)
    found = TASK.metrics(total)
    assert found["loss"] == total["loss"] / 8
    assert found["loss_of_means"] == pytest.approx(15 / 16, rel=1e-3)  # of deviations: 1 − 1/k


def test_pictures_are_original_masked_and_reconstruction(params, images):
    for normalize in (True, False):
        task = MaskedAutoencoding(MODEL, normalize=normalize)
        scalars, pictures = jax.jit(task.inspect)(params, (), {"image": jnp.asarray(images)})
        assert "objective/coding_rate_mean/layer01" in scalars
        (shown,) = pictures.values()
        assert shown.shape == (8, 16, 48, 1) and shown.min() >= 0 and shown.max() <= 1
        original, seen, told = np.split(np.asarray(shown), 3, axis=2)
        np.testing.assert_allclose(original, images / 255, atol=1e-6)
        hidden = np.abs(seen - original) > 1e-6
        assert 0.5 < hidden.mean() <= 0.75 and np.allclose(seen[hidden], 0.5)
        np.testing.assert_allclose(told[~hidden], original[~hidden], atol=1e-6)
        assert np.abs(told - original)[hidden].mean() > 0.01


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mae")
    return workdir, train(config(), workdir)


def state_of(workdir):
    run = set_up(config(), "eval")
    return restore_trained(workdir, *jax.eval_shape(run.task.init, run.key))


def test_a_run_shows_its_reconstructions(trained):
    workdir, summary = trained
    assert summary["step"] == 4 and summary["test/examples"] == 297
    assert summary["test/loss"] > 0 and 0.5 < summary["test/loss_of_means"] < 1
    shown = set()
    for path in workdir.glob("events.out.tfevents*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            images = (value.tag for value in event.summary.value if value.HasField("image"))
            shown |= {(event.step, tag) for tag in images}
            at += length + 16
    assert shown == {(step, f"reconstruction/{i}") for step in (2, 4) for i in range(8)}


def test_micro_batches_take_the_same_step(params, images):
    """Masks are drawn of the whole batch."""
    batch = TASK.on_device({"image": jnp.asarray(images)}, jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda p, b: TASK.loss(p, (), b, jax.random.key(0))[0]))
    parts = [gradient(params, {k: v[i::2] for k, v in batch.items()}) for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        mean,
        gradient(params, batch),
    )


def test_the_encoder_of_a_run_is_fine_tuned(trained, tmp_path):
    workdir, _ = trained
    pretrained = state_of(workdir)[0]
    made = config(task="classify", init_weights=str(workdir), init_fit=("head", "pool"))
    made.model = dataclasses.replace(made.model, decoder_depth=0, pool="mean")
    run = set_up(made, "train", "eval")
    assert isinstance(run.task, Classify) and run.task.model.num_classes == 10
    loaded = load_fitted(workdir, run.task.model, fit=made.init_fit)
    np.testing.assert_array_equal(
        loaded.params["blocks"]["ista"]["D"], pretrained["blocks"]["ista"]["D"]
    )
    assert "decoder" not in loaded.params and loaded.params["head"]["kernel"].shape == (32, 10)
    summary = train(dataclasses.replace(made, total_steps=2), tmp_path)
    assert 0 <= summary["test/top1"] <= 1
    with pytest.raises(ValueError, match=r"model\.decoder_depth must be 0 for a model that class"):
        set_up(config(task="classify"), "train")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "kept"), [(0.97, "leaves 0"), (0.999, "leaves 0"), (1e-9, "leaves 16")]
)
def test_a_ratio_that_leaves_or_hides_no_patch(ratio, kept):
    wrong = config(masking=MaskingConfig(ratio=ratio))
    with pytest.raises(ValueError) as caught:
        set_up(wrong, "train")
    assert str(caught.value) == (
        f"masking.ratio must leave a patch and hide one of the 16 of an image; got {ratio}, which "
        f"{kept}. Set --config.masking.ratio, or smaller patches."
    )


@pytest.mark.parametrize(
    "model",
    [
        create_model("crate_tiny_patch16_224"),
        create_model("crate_mae_tiny_patch16_224", decoder_depth=0),
        create_model("crate_causal_base"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_without_a_decoder(model):
    message = r"^model must be an autoencoder with a decoder for masked_autoencoding; got \w+ with"
    with pytest.raises(ValueError, match=message):
        TASKS["masked_autoencoding"](model)


def test_sizes_that_do_not_fit():
    made = config()
    made.model = dataclasses.replace(made.model, patch_size=(5, 5))
    with pytest.raises(
        ValueError, match=r"^model\.image_size must be a multiple of model\.patch_s"
    ):
        set_up(made, "train")
