"""MCR²: the loss against NumPy and the official code, memberships, metrics, runs, mistakes."""

import dataclasses
import json
import math
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax import Crate, create_model
from crate_jax.checkpoint.reading import restore_trained
from crate_jax.cli import main as cli
from crate_jax.config import DataConfig, Mcr2Config, ModelConfig, OptimConfig, TrainConfig
from crate_jax.data.images.labelled import open_labelled_images
from crate_jax.data.images.views import repeated
from crate_jax.evaluation.sums import add_up
from crate_jax.objective import class_coding_rate, coding_rate
from crate_jax.tasks import TASKS
from crate_jax.tasks.mcr2 import Mcr2
from crate_jax.tasks.rates import (
    class_rates,
    class_sums,
    half_logdet,
    largest_regularizer,
    mcr2_loss,
    metrics_of_sums,
    picture_of_cosines,
    unit,
)
from crate_jax.training.loop import train
from crate_jax.training.run import set_up

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = Crate(16, 8, 0, width=32, depth=1, num_heads=2, in_channels=1, pool="mean")
OPTIONS = Mcr2Config(dimension=8, hidden=12)
TASK = Mcr2(MODEL, 3, options=OPTIONS)
EPS = 0.5**0.5


def config(**changes):
    """A run of four steps over the real digits."""
    made = TrainConfig(
        name="mcr2",
        task="mcr2",
        batch_size=48,
        eval_batch_size=104,
        total_steps=4,
        log_every_steps=1,
        log_objective_every_steps=4,
        model=ModelConfig(
            image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=32, depth=1, num_heads=2
        ),
        data=DataConfig(
            train_transforms="resize(16)|random_affine(degrees=10)",
            eval_transforms="resize(16)",
            num_threads=2,
        ),
        optim=OptimConfig(lr=3e-3),
        mcr2=Mcr2Config(dimension=16),
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def state():
    return jax.jit(TASK.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (8, 16, 16, 1)).astype(np.uint8)


def draw(B=9, p=4, J=3, seed=0):
    """Features, and memberships of labels in which one class has no row."""
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(B, p)).astype(np.float32)
    return Z, np.eye(J + 1, dtype=np.float32)[rng.integers(0, J, B)]


def paper_rates(Z, Pi, eps=EPS, gamma=1.0):
    """R and R^c as arXiv 2006.08558 writes them, in float64."""
    Z, (B, p) = Z.astype(np.float64), Z.shape

    def half_logdet(scale, Z):
        return np.linalg.slogdet(np.eye(p) + scale * Z.T @ Z)[1] / 2

    class_rate = 0.0
    for members in Pi.T.astype(np.float64):
        if m_j := members.sum():
            class_rate += m_j / B * half_logdet(p / (m_j * eps**2), np.sqrt(members)[:, None] * Z)
    return half_logdet(gamma * p / (B * eps**2), Z), class_rate


# --- rates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "p"), [(9, 4), (4, 9), (6, 6)])
def test_rates_are_those_of_the_paper(B, p):
    Z, Pi = draw(B, p)
    shares = np.random.default_rng(1).dirichlet(np.ones(3), size=B).astype(np.float32)
    for memberships in (Pi, shares):
        arrays = jnp.asarray(Z), jnp.asarray(memberships)
        (wide, rate), class_rate = class_rates(*arrays, eps=EPS, gammas=(20.0, 1.0))
        expected = paper_rates(Z, memberships)
        np.testing.assert_allclose((rate, class_rate), expected, rtol=1e-5)
        np.testing.assert_allclose(wide, paper_rates(Z, memberships, gamma=20)[0], rtol=1e-5)
        np.testing.assert_allclose(rate, coding_rate(Z, eps=EPS), rtol=1e-5)
        np.testing.assert_allclose(class_rate, class_coding_rate(*arrays, eps=EPS), rtol=1e-5)


def test_the_slope_of_a_determinant_is_an_inverse():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2, 5, 3)).astype(np.float32)
    G = jnp.asarray(X @ X.swapaxes(1, 2))
    found = jax.grad(lambda G: half_logdet(G).sum())(G)
    np.testing.assert_allclose(found, np.linalg.inv(np.eye(5) + np.asarray(G)) / 2, atol=1e-6)
    assert np.isnan(half_logdet(-2 * jnp.eye(3)))


@pytest.mark.parametrize("setting", [0, 1, 2])
def test_loss_and_gradient_are_the_official_ones(setting):
    given = json.loads((GOLDEN / "mcr2.json").read_text())["settings"][setting]
    with np.load(GOLDEN / "mcr2.npz") as file:
        expected = {key.removeprefix(f"s{setting}/"): file[key] for key in file}
    Pi = jax.nn.one_hot(expected["labels"], 3)
    factors = dict(eps=given["eps"] ** 0.5, gamma1=given["gam1"], gamma2=given["gam2"])

    def loss(Z):
        return mcr2_loss(Z, Pi, **factors)

    Z = jnp.asarray(expected["features"])
    (found, scalars), slope = jax.value_and_grad(loss, has_aux=True)(Z)
    np.testing.assert_allclose(found, expected["loss"], rtol=1e-5)
    rates = [scalars["rate"], scalars["class_rate"]]
    np.testing.assert_allclose(rates, expected["theoretical"], rtol=1e-5)
    (wide, *_), compressed = class_rates(Z, Pi, eps=factors["eps"], gammas=(given["gam1"],))
    np.testing.assert_allclose(
        (wide, compressed), expected["discriminative_compressive"], rtol=1e-5
    )
    np.testing.assert_allclose(slope, expected["grad"], atol=1e-5)


def test_the_regularised_loss_pays_for_the_norm():
    Z, Pi = draw()
    rate, class_rate = paper_rates(Z, Pi)
    arrays = jnp.asarray(Z), jnp.asarray(Pi)
    loss, scalars = mcr2_loss(*arrays, eps=EPS, regularizer=0.3)
    np.testing.assert_allclose(loss, class_rate - rate + 0.15 * np.square(Z).sum(), rtol=1e-5)
    np.testing.assert_allclose(scalars["rate_reduction"], rate - class_rate, rtol=1e-5)


def test_below_the_bound_ascent_ends_with_orthogonal_classes():
    """The landscape of arXiv 2406.01909, on features that nothing else binds."""
    N, p, eps = 12, 6, 0.5
    Pi = jnp.asarray(np.eye(2, dtype=np.float32)[np.arange(N) % 2])
    most = float(largest_regularizer(N, 0.5, p=p, eps=eps))
    assert most == pytest.approx(p * (2**0.5 - 1) / (N * (2**0.5 + 1) * eps**2), rel=1e-6)
    slope = jax.grad(lambda Z: mcr2_loss(Z, Pi, eps=eps, regularizer=0.3 * most)[0])
    Z = jnp.asarray(np.random.default_rng(0).normal(size=(N, p)).astype(np.float32))
    start = mcr2_loss(Z, Pi, eps=eps)[1]
    Z = jax.lax.fori_loop(0, 4000, lambda i, Z: Z - 0.2 * slope(Z), Z)
    end = mcr2_loss(Z, Pi, eps=eps)[1]
    assert end["cosine"] < 1e-3 < 0.1 < start["cosine"]
    for j in range(2):  # of each class the spectrum is flat: all that is not zero is equal
        values = np.linalg.svd(np.asarray(Z)[j::2], compute_uv=False)
        kept = values[values > 1e-2]
        assert len(kept) == 3 and np.ptp(kept) < 1e-2 * kept.max()


def test_cosines_are_of_pairs_of_different_classes():
    Z, Pi = draw()
    U = Z / np.linalg.norm(Z, axis=1, keepdims=True)
    labels = Pi.argmax(axis=1)
    pairs = [abs(U[a] @ U[b]) for a in range(9) for b in range(9) if labels[a] != labels[b]]
    scalars = mcr2_loss(jnp.asarray(Z), jnp.asarray(Pi), eps=EPS)[1]
    np.testing.assert_allclose(scalars["cosine"], np.mean(pairs), rtol=1e-5)
    alone = mcr2_loss(jnp.asarray(Z), jnp.ones((9, 1)), eps=EPS)[1]
    assert alone["cosine"] == 0
    picture = picture_of_cosines(jnp.asarray(3 * Z), jnp.asarray(labels))
    order = np.argsort(labels, kind="stable")
    np.testing.assert_allclose(picture[0, :, :, 0], 1 - np.abs(U[order] @ U[order].T), atol=1e-5)
    np.testing.assert_array_equal(unit(jnp.zeros((1, 4))), np.zeros((1, 4)))


def test_sums_of_batches_give_the_rates_of_all_rows():
    """However the rows are cut into batches, and whatever rows hold that do not count."""
    Z, Pi = draw(B=20, p=5)
    parts = []
    for rows in (slice(0, 7), slice(7, 8), slice(8, 20)):
        filled_Z = np.concatenate([Z[rows], np.full((2, 5), np.nan, np.float32)])
        filled_Pi = np.concatenate([Pi[rows], np.zeros((2, 4), np.float32)])
        parts.append({"Z_Bxp": jnp.asarray(filled_Z), "Pi_BxJ": jnp.asarray(filled_Pi)})

    def sums(batch):
        return class_sums(**batch) | {"examples": batch["Pi_BxJ"].sum()}

    totals = add_up(sums, parts)
    assert totals["examples"] == 20 and totals["moments"].dtype == np.float64
    found = metrics_of_sums(totals, eps=EPS)
    rate, class_rate = paper_rates(Z, Pi)
    np.testing.assert_allclose(
        [found["rate"], found["class_rate"], found["rate_reduction"]],
        [rate, class_rate, rate - class_rate],
        rtol=1e-6,
    )
    U, labels = Z / np.linalg.norm(Z, axis=1, keepdims=True), Pi.argmax(axis=1)
    batches = [range(7), range(7, 8), range(8, 20)]
    pairs = [
        abs(U[a] @ U[b])
        for batch in batches
        for a in batch
        for b in batch
        if labels[a] != labels[b]
    ]
    assert found["cosine"] == pytest.approx(np.mean(pairs), rel=1e-5)


# --- the task -------------------------------------------------------------------------------------


def test_the_loss_is_that_of_unit_features(state, images):
    labels = np.arange(8) % 3
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
    features = np.asarray(TASK.features(*state, batch), np.float64)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    loss, (extra, scalars) = jax.jit(TASK.loss)(*state, batch, jax.random.key(0))
    rate, class_rate = paper_rates(features.astype(np.float32), np.eye(3)[labels])
    np.testing.assert_allclose(loss, class_rate - rate, rtol=1e-4)
    assert extra == () and scalars["rate"] == pytest.approx(rate, rel=1e-4)
    head = state[0]["head"]
    assert head["hidden"]["kernel"].shape == (32, 12)
    assert head["features"]["kernel"].shape == (12, 8)
    pooled = MODEL.apply(
        {"params": {k: v for k, v in state[0].items() if k != "head"}},
        jnp.asarray(images / 127.5 - 1, jnp.float32),
        train=False,
    )
    hidden = np.maximum(pooled @ head["hidden"]["kernel"] + head["hidden"]["bias"][None], 0)
    Z = hidden @ head["features"]["kernel"] + head["features"]["bias"][None]
    np.testing.assert_allclose(features, Z / np.linalg.norm(Z, axis=1, keepdims=True), atol=1e-5)


def test_views_of_an_image_are_a_class_of_their_own(state, images):
    several = dict(mode="self_supervised", views=4, gamma1=20.0, gamma2=0.05)
    task = dataclasses.replace(TASK, options=dataclasses.replace(OPTIONS, **several))
    views = jnp.asarray(images.reshape(2, 4, 16, 16, 1))
    batch = {"image": views, "label": jnp.zeros(2, jnp.int32)}
    flat = {"image": jnp.asarray(images), "label": jnp.zeros(8, jnp.int32)}
    features = np.asarray(TASK.features(*state, flat))
    Pi = np.eye(2)[np.arange(8) // 4]
    (wide, class_rate), (rate, _) = paper_rates(features, Pi, gamma=20), paper_rates(features, Pi)
    loss, (_, scalars) = jax.jit(task.loss)(*state, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, class_rate - 0.05 * wide, rtol=1e-4)
    np.testing.assert_allclose(scalars["rate_reduction"], rate - class_rate, rtol=1e-3)
    pictures = jax.jit(task.inspect)(*state, batch)[1]
    assert pictures["cosines"].shape == (1, 8, 8, 1)
    supervised = dataclasses.replace(task, options=dataclasses.replace(OPTIONS, views=4))
    label = paper_rates(features, np.ones((8, 1)))
    loss = jax.jit(supervised.loss)(*state, batch, jax.random.key(0))[0]
    np.testing.assert_allclose(loss, label[1] - label[0], atol=1e-5)  # all are of label 0
    assert task.step_flops() == 4 * TASK.step_flops() > 0


def test_regularised_features_keep_their_norm(state, images):
    options = dataclasses.replace(OPTIONS, regularizer=0.01)
    task = dataclasses.replace(TASK, options=options)
    labels = np.arange(8) % 2
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels, jnp.int32)}
    loss, (_, scalars) = jax.jit(task.loss)(*state, batch, jax.random.key(0))
    Z = np.asarray(task._embed(*state, batch["image"])[0])
    rate, class_rate = paper_rates(Z, np.eye(2)[labels])
    expected = class_rate - rate + 0.005 * np.square(Z).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    bound = 8 * (math.sqrt(2) - 1) / (8 * (math.sqrt(2) + 1) * 0.5)
    np.testing.assert_allclose(scalars["largest_regularizer"], bound, rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(task.features(*state, batch), axis=1), np.ones(8), atol=1e-6
    )


def test_running_statistics_of_a_backbone_are_kept(images):
    sizes = dict(image_size=16, patch_size=8, width=16, depth=1, num_heads=2, in_channels=1)
    model = create_model("tost_tiny_patch16_224", num_classes=0, **sizes)
    task = Mcr2(model, 3, options=Mcr2Config(dimension=4))
    params, extra = jax.jit(task.init)(jax.random.key(0))
    batch = {"image": jnp.asarray(images), "label": jnp.zeros(8, jnp.int32)}
    _, (updated, _) = jax.jit(task.loss)(params, extra, batch, jax.random.key(0))
    changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a != b))), extra, updated)
    assert any(jax.tree.leaves(changed))


@pytest.mark.parametrize("encoded", [False, True])
def test_a_row_holds_several_views(encoded, tmp_path):
    data = config().data
    if encoded:
        pixels = np.random.default_rng(0).integers(0, 256, (20, 24)).astype(np.uint8)
        for name in "ab":
            (tmp_path / "train" / name).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "train" / name / "0.png"), pixels)
        data = dataclasses.replace(data, dataset="folder", data_dir=str(tmp_path))
    size = dict(image_shape=(16, 16, 1), num_classes=10)
    images = open_labelled_images(data, "train", train=True, **size)
    rows = repeated(images, 3)
    assert repeated(images, 1) is images
    assert len(rows) == len(images) and rows.listing == images.listing
    assert rows.class_names == images.class_names
    row, rng = rows.row(1, np.random.default_rng(0)), np.random.default_rng(0)
    assert {name: (x.shape, x.dtype) for name, x in row.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in rows.shapes.items()
    }
    expected = [images.row(1, rng) for _ in range(3)]  # the random numbers go on
    np.testing.assert_array_equal(row["image"], [one["image"] for one in expected])
    assert row["label"] == expected[0]["label"]
    assert len({view.tobytes() for view in row["image"]}) == 3


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_without_labels(tmp_path):
    factors = dict(gamma1=2.0, gamma2=0.5)
    options = Mcr2Config(mode="self_supervised", dimension=16, views=5, **factors)
    made = config(batch_size=8, mcr2=options)
    summary = train(made, tmp_path)
    assert summary["step"] == 4 and summary["test/examples"] == 297
    assert summary["test/rate_reduction"] == pytest.approx(
        summary["test/rate"] - summary["test/class_rate"]
    )
    assert 0 < summary["test/cosine"] <= 1
    args = cli.parse(["report", f"--workdir={tmp_path}", "--examples=32"])
    page = Path(args.function(args)["output"]).read_text()
    assert "What the task shows" in page and "cosines" in page


def test_labels_keep_their_numbers(tmp_path):
    """A split whose classes are some of those that were trained on, in another order."""
    for split, names in (("train", "abc"), ("some", "cb")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.full((16, 16), ord(name), np.uint8)
            cv2.imwrite(str(tmp_path / split / name / "0.png"), pixels)
    data = DataConfig(dataset="folder", data_dir=str(tmp_path), eval_split="some")
    made = config(batch_size=8, eval_batch_size=8, data=data)
    task, (rows,) = Mcr2.open(made, ("train", True))
    facts = task.facts(rows)
    assert facts["labels"] == ["a", "b", "c"] and facts["examples"] == 3
    again, (some,) = Mcr2.reopen(made, ("some", False), facts=facts)
    assert again.num_classes == 3
    assert {int(some.row(i, np.random.default_rng(0))["label"]) for i in range(2)} == {1, 2}


@pytest.mark.slow
def test_a_backbone_goes_from_classes_to_features_and_back(tmp_path):
    first = tmp_path / "classes"
    train(config(task="classify"), first)
    made = config(init_weights=str(first), init_fit=("head",))
    made.mcr2 = dataclasses.replace(made.mcr2, hidden=8)
    train(made, tmp_path / "features")
    run = set_up(made, "eval")
    params = restore_trained(tmp_path / "features", *jax.eval_shape(run.task.init, run.key))[0]
    assert params["head"]["features"]["kernel"].shape == (8, 16)
    back = config(
        task="classify", init_weights=str(tmp_path / "features"), init_fit=("head",), total_steps=1
    )
    assert 0 <= train(back, tmp_path / "again")["test/top1"] <= 1


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(mode="self_supervised"),
            "mcr2.views must be at least 2 if mcr2.mode is self_supervised; got 1. Set "
            "--config.mcr2.views.",
        ),
        (
            dict(regularizer=0.01, gamma1=2.0),
            "mcr2.gamma1 and mcr2.gamma2 must be 1 if mcr2.regularizer is set; got 2.0 and 1.0. "
            "Set --config.mcr2.regularizer=0, or these to 1.",
        ),
        (
            dict(regularizer=0.7, dimension=16),
            "mcr2.regularizer must be at most 0.3463 for 10 classes in a batch; got 0.7. Set "
            "--config.mcr2.regularizer.",
        ),
        (
            dict(regularizer=0.5, dimension=16, mode="self_supervised", views=2),
            "mcr2.regularizer must be at most 0.2492 for 48 classes in a batch; got 0.5. Set "
            "--config.mcr2.regularizer.",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError) as caught:
        set_up(config(mcr2=Mcr2Config(**options)), "train")
    assert str(caught.value) == message


def test_micro_batches_are_refused():
    made = config(optim=OptimConfig(accumulate_steps=2))
    with pytest.raises(
        ValueError, match=r"^optim\.accumulate_steps must be 1 for Mcr2, whose loss"
    ):
        train(made, "/nowhere/written")


def test_it_is_known_by_name():
    assert TASKS["mcr2"] is Mcr2 and not Mcr2.by_row
