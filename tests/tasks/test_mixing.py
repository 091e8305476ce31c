"""Mixup and CutMix: what is mixed, with what weight, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.tasks.losses import cross_entropy
from crate_jax.tasks.mixing import make_mix

B, H, W, Y = 6, 12, 16, 5


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    images = rng.uniform(1, 2, (B, H, W, 3)).astype(np.float32)
    return images, np.array([0, 1, 2, 3, 4, 0], np.int32)


def draws(batch, count, **options):
    """Many mixed batches, as arrays (count, …)."""
    mix = make_mix(num_classes=Y, **options)
    images, labels = batch
    keys = jax.random.split(jax.random.key(3), count)
    mixed, targets = jax.jit(jax.vmap(lambda key: mix(key, images, labels)))(keys)
    assert (mixed.shape, mixed.dtype) == ((count, B, H, W, 3), np.float32)
    assert (targets.shape, targets.dtype) == ((count, B, Y), np.float32)
    np.testing.assert_allclose(targets.sum(axis=2), 1, atol=1e-6)
    return np.asarray(mixed), np.asarray(targets)


def weights_of(targets, labels):
    """λ of each draw: example 1 has another class than its partner, 4."""
    lam = targets[:, 1, labels[1]]
    np.testing.assert_allclose(targets[:, 1, labels[4]], 1 - lam, atol=1e-6)
    return lam


def test_off_is_off():
    assert make_mix(num_classes=Y, mixup_alpha=0, cutmix_alpha=0) is None


def test_mixup_is_a_weighted_sum(batch):
    images, labels = batch
    mixed, targets = draws(batch, 400, mixup_alpha=0.8, cutmix_alpha=0)
    lam = weights_of(targets, labels)
    one_hot = np.eye(Y, dtype=np.float32)[labels]
    for k in range(400):
        expected = lam[k] * images + (1 - lam[k]) * images[::-1]
        np.testing.assert_allclose(mixed[k], expected, rtol=1e-5)
        soft = lam[k] * one_hot + (1 - lam[k]) * one_hot[::-1]
        np.testing.assert_allclose(targets[k], soft, atol=1e-6)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 · 2.6).
    assert abs(lam.mean() - 0.5) < 0.06
    assert abs(lam.var() - 1 / (4 * 2.6)) < 0.02


def test_cutmix_pastes_one_box(batch):
    images, labels = batch
    mixed, targets = draws(batch, 600, mixup_alpha=0, cutmix_alpha=1.0)
    lam = weights_of(targets, labels)
    heights, middles = [], []
    for k in range(600):
        own = (mixed[k] == images).all(axis=(0, 3))
        pasted = (mixed[k] == images[::-1]).all(axis=(0, 3))
        assert (own ^ pasted).all()  # every pixel is one or the other, in all images alike
        assert lam[k] == pytest.approx(own.mean(), abs=1e-6)
        rows, columns = np.nonzero(pasted)
        if len(rows):
            h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(rows) == h * w
            heights.append(h)
            middles.append(rows.mean())
    assert max(heights) == 10 and min(heights) == 1  # half the side to either side, cut off
    assert 4.5 < np.mean(middles) < 6.6  # the middle is uniform over the image
    # Uniform λ, but boxes are cut off at the border: more is left than one half on average.
    assert 0.55 < lam.mean() < 0.75


@pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
def test_switch_is_how_often_cutmix(batch, switch):
    images, _ = batch
    mixed, _ = draws(batch, 500, mixup_alpha=0.8, cutmix_alpha=1.0, switch=switch)
    either = (mixed == images[None]) | (mixed == images[::-1][None])
    share = either.all(axis=(1, 2, 3, 4)).mean()
    assert abs(share - switch) < 0.08


def test_soft_targets_give_the_weighted_loss(batch):
    _, labels = batch
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(B, Y)), jnp.float32)
    lam = np.float32(0.3)
    one_hot = jax.nn.one_hot(labels, Y)
    soft = lam * one_hot + (1 - lam) * one_hot[::-1]
    for smoothing in (0.0, 0.1):
        found = cross_entropy(logits, soft, label_smoothing=smoothing)
        own = cross_entropy(logits, jnp.asarray(labels), label_smoothing=smoothing)
        other = cross_entropy(logits, jnp.asarray(labels[::-1]), label_smoothing=smoothing)
        np.testing.assert_allclose(found, lam * own + (1 - lam) * other, rtol=1e-5)
        p = (1 - smoothing) * np.asarray(soft) + smoothing / Y
        plain = -(p * np.asarray(jax.nn.log_softmax(logits))).sum(axis=1)
        np.testing.assert_allclose(found, plain, rtol=1e-5)
