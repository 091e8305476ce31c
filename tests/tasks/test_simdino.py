"""SimDINO: the loss against the official code; teacher, bank, backbones, runs, mistakes."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objectives import small

from crate_jax import Crate, ToST, ViT, create_model
from crate_jax.cli.recipes import load_recipe
from crate_jax.config import validate
from crate_jax.objective import coding_rate
from crate_jax.parallel import batch_sharding, make_mesh, replicated
from crate_jax.tasks.coding_losses import (
    Coding,
    compression,
    effective_rank,
    expansion,
    masked_agreement,
    mean_cosine,
    official_gamma,
    spectral_rank,
)
from crate_jax.tasks.distillation import ProjectionHead, followed, momentum_at, resized
from crate_jax.tasks.masking import masks_of_one_view
from crate_jax.tasks.neighbours import EMPTY, empty_bank, nearest_class, pushed
from crate_jax.tasks.rates import unit
from crate_jax.tasks.simdino import SimDino
from crate_jax.training.optimizer import make_optimizer
from crate_jax.training.run import jit_train_step, set_up
from crate_jax.training.state import init_sharded

GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = json.loads((GOLDEN / "simdino_loss.json").read_text())["settings"]
MODEL = Crate(16, 4, 0, width=16, depth=1, num_heads=2, in_channels=1, pool="mean")
FIELDS = dict(head_hidden=16, head_features=8, local_crops=2, local_size=8, bank_size=12)
TASK = SimDino(MODEL, **FIELDS)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "simdino_loss.npz"))


def features(shape, seed=0):
    return unit(jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32))


def batch_of(task, rows=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.integers(0, 200, (rows, *x.shape[1:])).astype(x.dtype))
        for name, x in task.blank().items()
    }


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting["key"])
def test_the_loss_is_the_official_one(setting, golden):
    """v1 agrees by cosines and expands what it is given; v2 takes unit vectors, or makes them."""
    ending = "" if setting["normalised_inputs"] else "_unnormalised"
    student, teacher = (
        jnp.asarray(golden[name + ending]).swapaxes(0, 1) for name in ("student", "teacher")
    )
    expanded = ("student", "both")[setting["expa_type"]]
    coding = Coding(eps=setting["eps"], coeff=setting["coeff"], expanded=expanded)

    def loss(s):
        if setting["version"] == "v2":
            return coding(unit(s), unit(teacher)) if ending else coding(s, teacher)
        F = s[:, :2] if expanded == "student" else (s[:, :2] + teacher) / 2
        found = {"compression": compression(unit(s), unit(teacher))}
        found["expansion"] = official_gamma(8, 6) * expansion(F, eps=setting["eps"])
        return -setting["coeff"] * found["compression"] - found["expansion"], found

    (value, found), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    key = setting["key"]
    close = dict(rtol=0, atol=1e-4)
    np.testing.assert_allclose(value, golden[f"{key}/loss"], **close)
    np.testing.assert_allclose(found["compression"], golden[f"{key}/comp_loss"], **close)
    np.testing.assert_allclose(found["expansion"], golden[f"{key}/expa_loss"], **close)
    np.testing.assert_allclose(slope.swapaxes(0, 1), golden[f"{key}/grad_student"], **close)


def test_the_patch_term_is_the_official_one(golden):
    teacher, masked = (jnp.asarray(golden[f"patch/{name}"]) for name in ("teacher", "mask"))

    def loss(student):
        return -masked_agreement(unit(student), unit(teacher), masked)

    value, slope = jax.value_and_grad(loss)(jnp.asarray(golden["patch/student"]))
    for ending in ("", "_masked"):
        np.testing.assert_allclose(value, golden[f"patch/loss{ending}"], atol=1e-6)
    np.testing.assert_allclose(slope, golden["patch/grad_student"], atol=1e-6)


def test_the_loss_is_a_sum_of_its_parts():
    s, t = features((6, 4, 8)), features((6, 2, 8), 1)
    patches = (features((12, 5, 8), 2), features((12, 5, 8), 3), jnp.ones((6, 2, 5), bool))
    loss, found = Coding(coeff=2.0, gamma=0.5, patch_weight=3.0)(s, t, patches)
    both = np.asarray(s[:, :2] + t, np.float64) / 2
    rates = [
        np.linalg.slogdet(np.eye(8) + 8 / (6 * 0.05) * F.T @ F)[1] / 2 for F in both.swapaxes(0, 1)
    ]
    assert found["expansion"] == pytest.approx(0.5 * np.mean(rates), rel=1e-5)
    told = float(masked_agreement(patches[0], patches[1], patches[2].reshape(12, 5)))
    assert found["patches"] == pytest.approx(told)
    total = 2 * found["compression"] + found["expansion"] + 3 * told
    assert float(loss) == pytest.approx(-float(total), rel=1e-6)
    alone, found = Coding(gamma=0.0)(s, t)
    assert float(alone) == -float(found["compression"]) and float(found["expansion"]) == 0


@pytest.mark.parametrize(("rows", "group"), [(12, 0), (12, 4), (12, 12), (12, 1), (32, 16)])
def test_groups_are_expanded_apart_and_scaled_together(rows, group):
    F = features((rows, 2, 8))
    m = group or rows
    rates = [
        np.linalg.slogdet(np.eye(8) + 8 / (rows * 0.05) * G.T @ G)[1] / 2
        for view in np.asarray(F, np.float64).swapaxes(0, 1)
        for G in view.reshape(rows // m, m, 8)
    ]
    found = expansion(F, eps=0.05, group_size=group)
    assert float(found) == pytest.approx(np.mean(rates), rel=1e-5)
    if m == rows:
        whole = coding_rate(F.swapaxes(0, 1), eps=0.05**0.5).mean()
        assert float(found) == pytest.approx(float(whole), rel=1e-5)


def test_collapse_is_measured():
    F = np.asarray(features((20, 8)), np.float64)
    pairs = [F[i] @ F[j] for i in range(20) for j in range(20) if i != j]
    shares = np.linalg.eigvalsh(F.T @ F) / np.trace(F.T @ F)
    given = jnp.asarray(F, jnp.float32)
    assert float(mean_cosine(given)) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert float(effective_rank(given)) == pytest.approx(1 / np.sum(shares**2), rel=1e-5)
    shannon = np.exp(-np.sum(shares * np.log(shares)))
    for rows in (given, given[:5]):  # the smaller Gram, of either shape
        values = np.linalg.svd(np.asarray(rows, np.float64))[1] ** 2
        shares = values[values > 1e-9] / values.sum()
        shannon = np.exp(-np.sum(shares * np.log(shares)))
        assert float(spectral_rank(rows)) == pytest.approx(shannon, rel=1e-4)
    collapsed = jnp.tile(given[:1], (20, 1))
    for measure in (mean_cosine, effective_rank, spectral_rank):
        assert float(measure(collapsed)) == pytest.approx(1, abs=1e-4)
    assert float(effective_rank(jnp.eye(8))) == pytest.approx(8)
    assert float(spectral_rank(jnp.eye(8))) == pytest.approx(8)


# --- student and teacher --------------------------------------------------------------------------


def test_the_head_is_three_maps_and_a_unit_vector():
    X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    head = ProjectionHead(7, 4)
    params = head.init(jax.random.key(0), jnp.asarray(X))["params"]
    Y = X.astype(np.float64)
    for i in range(3):
        Y = Y * np.vectorize(lambda x: 0.5 * (1 + math.erf(x / 2**0.5)))(Y) if i else Y
        Y = Y @ np.asarray(params[f"linear{i}"]["kernel"]) + np.asarray(
            params[f"linear{i}"]["bias"]
        )
        assert np.all(np.asarray(params[f"linear{i}"]["bias"]) == 0)
    Y /= np.linalg.norm(Y, axis=1, keepdims=True)
    np.testing.assert_allclose(head.apply({"params": params}, jnp.asarray(X)), Y, atol=1e-5)
    wide = ProjectionHead(512, 4).init(jax.random.key(0), jnp.zeros((1, 256)))["params"]
    assert np.std(wide["linear1"]["kernel"]) == pytest.approx(0.02, rel=0.02)


def test_small_views_have_the_official_positions():
    golden = np.load(GOLDEN / "simdino_step.npz")
    model = ViT(32, 8, 0, width=24, depth=1, num_heads=2)
    torch = pytest.importorskip("torch")
    state = torch.load(GOLDEN / "simdino_step.pth", weights_only=False)["student"]
    pos = jnp.asarray(state["module.backbone.pos_embed"].numpy()[0])
    params = {"embedding": {"pos_embedding": pos, "other": 1}, "blocks": 2}
    found = resized(params, model, model.clone(image_size=16))
    np.testing.assert_allclose(
        found["embedding"].pop("pos_embedding"), golden["pos_embed_local"][0], atol=1e-6
    )
    assert found == {"embedding": {"other": 1}, "blocks": 2}
    assert resized(params, model, model) is params  # of the trained size, nothing is interpolated
    assert resized({"blocks": 2}, model, model.clone(image_size=16)) == {"blocks": 2}


@pytest.mark.parametrize("ends", [(0.996, 1.0), (0.9, 0.9), (0.5, 0.7)])
def test_the_momentum_rises_by_half_a_cosine(ends):
    steps = np.arange(50)
    expected = ends[1] + 0.5 * (ends[0] - ends[1]) * (1 + np.cos(np.pi * steps / 50))
    found = [momentum_at(jnp.int32(step), ends, total_steps=50) for step in steps]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert float(momentum_at(jnp.int32(99), ends, total_steps=50)) == pytest.approx(ends[1])


def test_the_teacher_follows_and_no_gradient_reaches_it():
    task = dataclasses.replace(TASK, momentum=0.75, end_momentum=1.0, total_steps=10)
    params, extra = jax.jit(task.init)(jax.random.key(0))
    assert extra["teacher"].keys() == {"params"} and "statistics" not in extra
    moved = jax.tree.map(lambda x: x + 1, params)
    first = task.after(moved, extra, jnp.int32(1))
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old + 0.25, atol=1e-6),
        first["teacher"]["params"],
        params,
    )
    last = task.after(moved, extra, jnp.int32(11))
    jax.tree.map(np.testing.assert_array_equal, last["teacher"]["params"], params)
    half = followed({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, jnp.float32(0.5))
    np.testing.assert_array_equal(half["a"], [0.5, 0.5])
    other = task.init(jax.random.key(1))[1] | {"bank": extra["bank"]}
    batch, key = batch_of(task), jax.random.key(2)
    _, (kept, _) = task.loss(params, other, batch, key)
    jax.tree.map(np.testing.assert_array_equal, kept["teacher"], other["teacher"])
    t = task.network.see(other["teacher"], batch["global"]).features
    s = [
        task.network.see({"params": params}, batch[name], key).features
        for name in ("global", "local")
    ]
    expected = task.coding(jnp.concatenate(s, axis=1), t)[0]  # nothing here is random
    assert float(task.loss(params, other, batch, key)[0]) == pytest.approx(float(expected))


BACKBONES = {
    "crate": MODEL,
    "vit": ViT(16, 4, 0, width=16, depth=2, num_heads=2, registers=2, layer_scale=0.1),
    "tost": ToST(16, 4, 0, width=16, depth=1, num_heads=2),
    "alpha": create_model(
        "crate_alpha_tiny_patch16_224",
        **dict(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=0),
    ),
    "cbt": Crate(
        16, 4, 0, width=16, depth=1, num_heads=2, attention="cbsa", stem="convolutions",
        representatives=2,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_learns_and_hides_patches(name):
    task = SimDino(BACKBONES[name], coding=Coding(patch_weight=1.0), **FIELDS)
    params, extra = jax.jit(task.init)(jax.random.key(0))
    batch = task.on_device(batch_of(task), jax.random.key(1))
    assert batch["masked"].shape == (4, 2, 16)

    def loss(params, batch):
        return task.loss(params, extra, batch, jax.random.key(2))

    (value, (new, scalars)), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    assert np.isfinite(value) and "patches" in scalars
    assert np.abs(slope["head"]["mask_token"]).max() > 0
    assert jax.tree.structure(task.after(params, new, jnp.int32(1))) == jax.tree.structure(extra)
    silent = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree.leaves_with_path(slope)
        if not np.abs(g).max() > 0
    ]
    assert silent == []
    statistics = jax.tree.leaves(extra.get("statistics", {}))
    moved = jax.tree.leaves(new.get("statistics", {}))
    assert bool(statistics) == (name in ("tost", "cbt"))
    assert all((a != b).any() for a, b in zip(statistics, moved, strict=True))


def test_hidden_patches_are_not_seen():
    params, extra = SimDino(MODEL, coding=Coding(patch_weight=1.0), **FIELDS).init(
        jax.random.key(0)
    )
    del extra
    network, images = TASK.network, np.asarray(batch_of(TASK)["global"][:, :1])
    masked = np.zeros((4, 1, 16), bool)
    masked[:, 0, 5] = True  # row 1, column 1 of 4 x 4
    changed = images.copy()
    changed[:, :, 4:8, 4:8] = 255
    variables = {"params": params}
    seen = [
        network.see(variables, jnp.asarray(x), masked=jnp.asarray(masked)).features
        for x in (images, changed)
    ]
    np.testing.assert_array_equal(*seen)
    assert (network.see(variables, jnp.asarray(changed)).features != seen[0]).any()


def test_a_run_out_of_a_file_begins_with_two_equal_networks():
    for name in ("crate", "tost"):
        task = SimDino(BACKBONES[name], **FIELDS)
        _, extra = task.init(jax.random.key(0))
        params, other = task.init(jax.random.key(1))
        moved = {
            k: jax.tree.map(lambda x: x + 2, v) for k, v in other.get("statistics", {}).items()
        }
        begun = task.begun(params, extra, moved)
        assert jax.tree.structure(begun) == jax.tree.structure(extra)
        expected = {"params": params, **moved}
        jax.tree.map(np.testing.assert_array_equal, begun["teacher"], expected)
        jax.tree.map(np.testing.assert_array_equal, begun.get("statistics", {}), moved)
        jax.tree.map(np.testing.assert_array_equal, begun["bank"], extra["bank"])


def test_masks_hide_a_share_of_one_view():
    masked = np.asarray(masks_of_one_view(jax.random.key(0), (400, 20), least=0.1, most=0.5))
    counts = masked.sum(axis=2)
    assert (counts.min(axis=1) == 0).all()
    hidden = counts.max(axis=1)
    assert hidden.min() == 2 and hidden.max() == 9  # ⌊0.1 · 20⌋ … just below ⌊0.5 · 20⌋
    assert abs(hidden.mean() - 5.5) < 0.4 and abs((counts[:, 1] > 0).mean() - 0.5) < 0.1
    assert (masked.sum(axis=(0, 1)) > 60).all()  # any patch
    few = np.asarray(masks_of_one_view(jax.random.key(0), (9, 4), least=0.0, most=0.1))
    assert (few.sum(axis=(1, 2)) == 1).all()


# --- the bank -------------------------------------------------------------------------------------


def test_the_newest_are_kept():
    bank = empty_bank(5, 2)
    for i in range(3):
        bank = pushed(bank, jnp.full((2, 2), i, jnp.float32), jnp.array([i, i + 10]))
    assert bank["labels"].tolist() == [2, 12, 1, 11, 0]
    assert bank["features"][:, 0].tolist() == [2, 2, 1, 1, 0]


def test_the_nearest_vote_by_their_cosines():
    rng = np.random.default_rng(0)
    F, Q = np.asarray(features((40, 6))), np.asarray(features((30, 6), 1))
    labels = rng.integers(0, 4, 40)
    labels[::5] = EMPTY
    expected = []
    for q in Q:
        order = [i for i in np.argsort(-F @ q, kind="stable") if labels[i] != EMPTY][:7]
        votes = np.zeros(4)
        np.add.at(votes, labels[order], np.exp((F @ q)[order] / 0.07))
        expected.append(votes.argmax())
    bank = {"features": jnp.asarray(F), "labels": jnp.asarray(labels, jnp.int32)}
    np.testing.assert_array_equal(nearest_class(jnp.asarray(Q), bank, k=7), expected)
    nobody = nearest_class(jnp.asarray(Q), empty_bank(3, 6), k=20)
    assert set(nobody.tolist()) == {EMPTY}


def test_sums_count_the_rows_that_the_bank_knows():
    params, extra = TASK.init(jax.random.key(0))
    images = batch_of(TASK, 12)["global"][:, 0]
    labels = jnp.arange(12, dtype=jnp.int32) % 3
    batch = {"image": images, "label": labels, "mask": jnp.ones(12).at[0].set(0)}
    found = TASK.features(params, extra, batch)
    assert found.shape == (12, 16) and found.dtype == jnp.float32
    teacher = extra["teacher"]["params"]
    pixels = images.astype(jnp.float32) / 255 * 2 - 1
    np.testing.assert_allclose(
        found, MODEL.apply({"params": teacher}, pixels, train=False), atol=1e-5
    )
    extra = extra | {"bank": pushed(extra["bank"], unit(found), (labels + 1) % 3)}
    near = dataclasses.replace(TASK, neighbours=1)
    assert near.sums(params, extra, batch) == {"knn": 0.0, "examples": 11.0}
    extra["bank"]["labels"] = labels.at[3].set(7)
    assert near.sums(params, extra, batch) == {"knn": 10.0, "examples": 11.0}
    assert near.metrics({"knn": 10.0, "examples": 11.0}) == {"knn": 10 / 11}


# --- runs -----------------------------------------------------------------------------------------


def losses(config, spec, devices):
    """Of six steps on a mesh, with what they are made of."""
    mesh = make_mesh(spec, devices)
    tx = make_optimizer(config.optim, lambda step: 3e-3)
    run = dataclasses.replace(set_up(config), mesh=mesh, tx=tx)
    state, shardings = init_sharded(run.task, run.tx, run.key, mesh)
    step, key = jit_train_step(run, shardings), jax.device_put(run.key, replicated(mesh))
    found = []
    for i in range(6):
        batch = jax.device_put(batch_of(run.task, 16, seed=i), batch_sharding(mesh))
        state, metrics = step(state, batch, key)
        found.append([float(metrics[name]) for name in ("loss", "expansion", "mean_cosine")])
    return np.array(found)


@pytest.mark.slow
def test_groups_do_not_hang_on_the_number_of_devices():
    config = small("simdino", batch_size=16, simdino__group_size=4, simdino__patch_weight=0.5)
    alone = losses(config, "data:1", jax.devices()[:1])
    for spec, devices in (("data:2", 2), ("data:8", 8), ("data:2,fsdp:4", 8)):
        found = losses(config, spec, jax.devices()[:devices])
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5, err_msg=spec)
    config.simdino.group_size = 0
    assert np.abs(losses(config, "data:1", jax.devices()[:1]) - alone)[0, 1] > 0.01


def test_what_is_looked_at():
    params, extra = TASK.init(jax.random.key(0))
    batch = batch_of(TASK, 12)
    scalars, pictures = TASK.inspect(params, extra, batch)
    assert scalars.keys() == {"collapse/mean_cosine", "collapse/effective_rank"}
    shown = np.asarray(pictures["views"])
    assert shown.shape == (8, 16, 32, 1)
    np.testing.assert_array_equal(shown[3, :, 16:], batch["global"][3, 1])
    F = TASK.network.see(extra["teacher"], batch["global"][:, :1]).features[:, 0]
    assert scalars["collapse/mean_cosine"] == mean_cosine(F)
    whole = {"image": batch["global"][:, 0], "label": batch["label"]}
    again, pictures = TASK.inspect(params, extra, whole)  # of an evaluation batch
    assert again == scalars and pictures["views"].shape == (8, 16, 16, 1)


def test_operations_of_all_views_are_counted():
    both = TASK.step_flops()
    without = dataclasses.replace(TASK, local_crops=0)
    assert 0 < without.step_flops() < both
    small_view = 6 * (both - without.step_flops()) / 12
    assert both == pytest.approx(16 / 2 * (without.step_flops() / 8) + 2 * small_view)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(group_size=48),
            "simdino.group_size must divide batch_size; got 48 and 50. Set "
            "--config.simdino.group_size, or 0 for the whole batch.",
        ),
        (
            dict(local_size=12),
            "simdino.local_size must be a multiple of model.patch_size; got 12 and 8x8. Set "
            "--config.simdino.local_size.",
        ),
        (
            dict(min_masked=0.6),
            "simdino.min_masked must be at most simdino.max_masked; got 0.6 and 0.5. Set one of "
            "them.",
        ),
    ],
)
def test_sections_that_do_not_fit(changes, message):
    config = load_recipe("digits:simdino")
    config.simdino = dataclasses.replace(config.simdino, **changes)
    with pytest.raises(ValueError) as caught:
        SimDino.from_config(validate(config))
    assert str(caught.value) == message


def test_models_of_text_and_micro_batches():
    with pytest.raises(ValueError, match=r"^model must classify images here; got a CrateCausal"):
        SimDino(create_model("crate_causal_base"))
    with pytest.raises(
        ValueError, match=r"^model\.decoder_depth must be 0 for simdino, which.* 12\."
    ):
        SimDino(create_model("crate_mae_tiny_patch16_224", num_classes=0))
    config = small("simdino", batch_size=16, optim__accumulate_steps=2)
    run = set_up(config)
    with pytest.raises(ValueError, match=r"optim\.accumulate_steps must be 1 for SimDino, whose"):
        jit_train_step(run, None)
