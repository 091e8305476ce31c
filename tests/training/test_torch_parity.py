"""Optimizers, schedule and loss, step for step beside PyTorch's own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.config import OptimConfig
from crate_jax.tasks.losses import cross_entropy
from crate_jax.training.optimizer import make_optimizer, make_schedule

torch = pytest.importorskip("torch")
from crate_jax.parity.torch_reference import Lion  # noqa: E402 (needs PyTorch)

EPOCHS, STEPS_PER_EPOCH, WARMUP = 6, 4, 3


def official_factor(epoch):
    """What the official training script hands to LambdaLR."""
    return min((epoch + 1) / WARMUP, 0.5 * (math.cos(math.pi * epoch / EPOCHS) + 1))


def torch_optimizer(optim, parameters):
    common = dict(lr=optim.lr, betas=(optim.b1, optim.b2), weight_decay=optim.weight_decay)
    if optim.optimizer == "lion":
        return Lion(parameters, **common)
    return torch.optim.AdamW(parameters, eps=optim.eps, **common)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_run_of_the_official_schedule(optimizer):
    optim = OptimConfig(
        optimizer=optimizer,
        lr=0.02,
        weight_decay=0.3,
        b2=0.99,
        schedule="official_readme",
        warmup_epochs=WARMUP,
    )
    total = EPOCHS * STEPS_PER_EPOCH
    tx = make_optimizer(
        optim, make_schedule(optim, total_steps=total, steps_per_epoch=STEPS_PER_EPOCH)
    )
    rng = np.random.default_rng(0)
    start = {"D": rng.normal(size=(5, 5)), "norm": {"bias": rng.normal(size=7)}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state = tx.init(params)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(params)]
    torch_opt = torch_optimizer(optim, theirs)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch_opt, official_factor)
    for step in range(total):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for parameter, grad in zip(theirs, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(grad)
        torch_opt.step()
        if (step + 1) % STEPS_PER_EPOCH == 0:
            scheduler.step()
        for ours, parameter in zip(jax.tree.leaves(params), theirs, strict=True):
            np.testing.assert_allclose(ours, parameter.detach(), rtol=2e-6, atol=2e-7)
    moved = np.abs(np.asarray(params["D"]) - start["D"])
    assert moved.mean() > 0.02  # the parameters went somewhere


def test_the_official_schedule_is_lambda_lr_to_the_last_bit():
    optim = OptimConfig(lr=2e-4, schedule="official_readme", warmup_epochs=WARMUP)
    schedule = make_schedule(
        optim, total_steps=EPOCHS * STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, official_factor)
    for epoch in range(EPOCHS):
        expected = np.float32(scheduler.get_last_lr()[0])
        for step in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH):
            assert float(schedule(jnp.int32(step))) == expected, step
        optimizer.step()
        scheduler.step()


def test_without_warm_up_it_is_cosine_annealing_once_an_epoch():
    optim = OptimConfig(lr=0.5, schedule="official_readme")
    schedule = make_schedule(
        optim, total_steps=EPOCHS * STEPS_PER_EPOCH, steps_per_epoch=STEPS_PER_EPOCH
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        rate = float(schedule(jnp.int32(epoch * STEPS_PER_EPOCH)))
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_and_its_gradient(smoothing):
    rng = np.random.default_rng(1)
    logits = (5 * rng.normal(size=(6, 11))).astype(np.float32)
    labels = rng.integers(0, 11, 6)

    def mean_loss(z):
        return cross_entropy(z, jnp.asarray(labels), label_smoothing=smoothing).mean()

    loss, grad = jax.value_and_grad(mean_loss)(jnp.asarray(logits))
    z = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(z, torch.tensor(labels), label_smoothing=smoothing)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(grad, z.grad, rtol=1e-5, atol=1e-7)


def test_lion_by_hand():
    theta = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    lion = Lion([theta], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    for grad in ([0.3, 0.2, 0.0], [-0.1, -3.0, 1.0]):
        theta.grad = torch.tensor(grad, dtype=torch.float64)
        lion.step()
    # m after the first step: (0.15, 0.1, 0); signs (+, +, 0), then of 0.9 m + 0.1 g: (+, -, +).
    first = [1 - 0.1 * (1 + 0.2), -2 - 0.1 * (1 - 0.4), 0.5 - 0.1 * 0.1]
    second = [first[0] * 0.98 - 0.1, first[1] * 0.98 + 0.1, first[2] * 0.98 - 0.1]
    np.testing.assert_allclose(theta.detach(), second, rtol=1e-12)
