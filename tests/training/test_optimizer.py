"""Schedules, masks and the chain, against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crate_jax.config import OptimConfig
from crate_jax.training.optimizer import decay_mask, make_optimizer, make_schedule

PARAMS = {
    "blocks": {"ista": {"D": jnp.ones((2, 3, 3))}, "ista_norm": {"scale": jnp.ones((2, 3))}},
    "head": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones((4,))},
}


def rates(schedule, steps):
    with jax.numpy_dtype_promotion("standard"):  # as in the step
        return np.array([float(schedule(jnp.asarray(s, jnp.int32))) for s in steps])


def test_cosine_warms_up_linearly_and_ends_at_zero():
    optim = OptimConfig(lr=0.5, warmup_epochs=2)
    schedule = make_schedule(optim, total_steps=100, steps_per_epoch=10)
    steps = np.arange(0, 101, 5)
    expected = np.where(
        steps < 20, 0.5 * steps / 20, 0.25 * (1 + np.cos(np.pi * (steps - 20) / 80))
    )
    np.testing.assert_allclose(rates(schedule, steps), expected, atol=1e-6)


def test_cosine_without_warm_up_starts_at_its_peak():
    schedule = make_schedule(OptimConfig(lr=0.5), total_steps=100, steps_per_epoch=10)
    np.testing.assert_allclose(rates(schedule, [0, 50, 100]), [0.5, 0.25, 0], atol=1e-7)


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_cosine_ends_where_it_is_told_to(warmup_epochs):
    optim = OptimConfig(lr=0.5, end_lr=0.1, warmup_epochs=warmup_epochs)
    schedule = make_schedule(optim, total_steps=100, steps_per_epoch=10)
    start = 10 * warmup_epochs
    expected = [0.5, 0.3, 0.1]
    got = rates(schedule, [start, (start + 100) // 2, 100])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_warm_up_starts_and_cool_down_stays_where_they_are_told_to():
    optim = OptimConfig(lr=1e-3, warmup_epochs=2, warmup_lr=1e-4, end_lr=2e-4, cooldown_epochs=3.5)
    schedule = make_schedule(optim, total_steps=80, steps_per_epoch=8)
    # Two epochs up, 4.5 epochs (36 steps) of half a cosine, 3.5 epochs (28 steps) at its end.
    by_hand = {0: 1e-4, 8: 5.5e-4, 15: 1e-4 + 9e-4 * 15 / 16, 16: 1e-3}
    by_hand |= {
        25: 2e-4 + 4e-4 * (1 + np.sqrt(0.5)),
        34: 6e-4,
        43: 2e-4 + 4e-4 * (1 - np.sqrt(0.5)),
    }
    by_hand |= dict.fromkeys((52, 53, 66, 79), 2e-4)
    np.testing.assert_allclose(rates(schedule, by_hand), list(by_hand.values()), rtol=1e-5)
    assert rates(schedule, [51]) > 2e-4
    optim.warmup_epochs = optim.warmup_lr = 0
    schedule = make_schedule(optim, total_steps=80, steps_per_epoch=8)
    np.testing.assert_allclose(
        rates(schedule, [0, 26, 52, 79]), [1e-3, 6e-4, 2e-4, 2e-4], rtol=1e-5
    )


def test_official_schedule_steps_once_an_epoch():
    optim = OptimConfig(lr=2e-4, schedule="official_readme", warmup_epochs=20)
    schedule = make_schedule(optim, total_steps=200 * 7, steps_per_epoch=7)
    epochs = np.arange(200)
    expected = 2e-4 * np.minimum((epochs + 1) / 20, 0.5 * (np.cos(np.pi * epochs / 200) + 1))
    first, last = rates(schedule, epochs * 7), rates(schedule, epochs * 7 + 6)
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-12)
    np.testing.assert_array_equal(first, last)


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError) as caught:
        make_schedule(OptimConfig(warmup_epochs=5), total_steps=30, steps_per_epoch=10)
    assert str(caught.value) == (
        "optim.warmup_epochs must be shorter than the run; got 50 steps of 30. Lower it, or raise "
        "total_epochs (total_steps, if that is set)."
    )


@pytest.mark.parametrize("cooldown", [2, 3])
def test_a_cool_down_that_leaves_no_cosine_is_refused(cooldown):
    optim = OptimConfig(warmup_epochs=1, cooldown_epochs=cooldown)
    with pytest.raises(ValueError) as caught:
        make_schedule(optim, total_steps=30, steps_per_epoch=10)
    assert str(caught.value) == (
        "optim.cooldown_epochs must be shorter than what follows the warm-up; got "
        f"{10 * cooldown} steps of 20. Lower it, or raise total_epochs."
    )


def test_every_parameter_decays_by_default_and_names_exempt():
    optim = OptimConfig(lr=0.1, weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for no_decay, kept in (((), ()), (("bias", "ista_norm"), ("bias", "scale"))):
        optim.no_decay = no_decay
        tx = make_optimizer(optim, lambda count: 0.1)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
        for path, update in jax.tree.leaves_with_path(updates):
            expected = 0.0 if path[-1].key in kept else -0.1 * 0.5
            np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_mask_follows_names_and_not_ranks():
    mask = decay_mask(PARAMS, ("scale",))
    assert mask["blocks"]["ista_norm"]["scale"] is False
    assert mask["blocks"]["ista"]["D"] is True


def test_a_list_of_those_that_decay_leaves_out_all_others():
    mask = decay_mask(PARAMS, ("bias",), ("D", "ista_norm"))
    assert mask["blocks"]["ista"]["D"] is True
    assert mask["blocks"]["ista_norm"]["scale"] is True
    assert sum(jax.tree.leaves(mask)) == 2
    with pytest.raises(KeyError, match=r"optim.decay_only must name .* got kernels"):
        decay_mask(PARAMS, decay_only=("kernels",))


def test_a_name_that_matches_nothing_is_refused():
    with pytest.raises(KeyError, match=r"optim.no_decay .* got biass. Did you mean bias"):
        decay_mask(PARAMS, ("biass",))


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_first_update_by_hand(optimizer):
    optim = OptimConfig(optimizer=optimizer, lr=0.1, weight_decay=0.2, b1=0.9, b2=0.99, eps=1e-3)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.004), PARAMS)
    tx = make_optimizer(optim, lambda count: 0.1)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    direction = {"adamw": 0.004 / (0.004 + 1e-3), "lion": 1.0}[optimizer]
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(update, -0.1 * (direction + 0.2), rtol=1e-5)


def test_clipping_scales_the_gradient_to_the_norm():
    optim = OptimConfig(optimizer="adamw", weight_decay=0.0, eps=10.0, b1=0.0, b2=0.0)
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 3.0), PARAMS)
    norm = 3.0 * np.sqrt(sum(p.size for p in jax.tree.leaves(PARAMS)))
    for clip, value in ((0.0, 3.0), (1.0, 3.0 / norm)):
        optim.clip_norm = clip
        tx = make_optimizer(optim, lambda count: 1.0)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(updates["head"]["bias"], -value / (value + 10.0), rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_first_moment_in_half_the_memory(optimizer):
    grads = jax.tree.map(lambda p: jnp.full(p.shape, 0.004), PARAMS)
    updates, moments = {}, {}
    for dtype in ("float32", "bfloat16"):
        optim = OptimConfig(optimizer=optimizer, mu_dtype=dtype, b2=0.99)
        tx = make_optimizer(optim, lambda count: 0.1)
        state = tx.init(PARAMS)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(3):
                updates[dtype], state = tx.update(grads, state, PARAMS)
        moments[dtype] = [
            x.dtype
            for path, x in jax.tree.leaves_with_path(state)
            if "mu" in jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        ]
        others = {x.dtype.name for x in jax.tree.leaves(state)} - {dtype}
        assert others <= {"float32", "int32"}
    assert [len(moments[d]) for d in moments] == [4, 4]
    assert {d.name for d in moments["bfloat16"]} == {"bfloat16"}
    for a, b in zip(
        jax.tree.leaves(updates["float32"]), jax.tree.leaves(updates["bfloat16"]), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-2)
