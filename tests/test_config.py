"""Every rule of the schema, at and beyond its bounds, and configs there and back through JSON."""

import dataclasses
import json
import math

import pytest

from crate_jax import config as schema
from crate_jax.config import (
    IDENTITY,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
    choose,
    did_you_mean,
    differences,
    from_dict,
    get_field,
    to_dict,
    validate,
)

# field: (values to accept, values to refuse)
AT_LEAST_ONE = ([1, 10**9], [0, -1])
AT_LEAST_ZERO = ([0, 10**9], [-1])
SHARE = ([0.0, 0.999], [1.0, 1.5, -0.001, math.nan])
AMOUNT = ([0.0, 7.5], [-0.001, math.inf, math.nan])
POSITIVE = ([1e-12, 1e6], [0.0, -0.1, math.inf, math.nan])
BOUNDS = {
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "batch_size": AT_LEAST_ONE,
    "eval_batch_size": AT_LEAST_ONE,
    "total_epochs": POSITIVE,
    "total_steps": AT_LEAST_ONE,
    "log_every_steps": AT_LEAST_ONE,
    "log_objective_every_steps": AT_LEAST_ZERO,
    "eval_every_steps": AT_LEAST_ZERO,
    "checkpoint_every_steps": AT_LEAST_ZERO,
    "keep_latest": AT_LEAST_ONE,
    "keep_best": AT_LEAST_ZERO,
    "model.num_classes": AT_LEAST_ONE,
    "model.width": AT_LEAST_ONE,
    "model.depth": AT_LEAST_ONE,
    "model.num_heads": AT_LEAST_ONE,
    "model.head_dim": AT_LEAST_ONE,
    "model.in_channels": AT_LEAST_ONE,
    "model.eta": POSITIVE,
    "model.lmbda": AMOUNT,
    "model.dropout": SHARE,
    "model.scan_unroll": AT_LEAST_ONE,
    "parallel.num_processes": AT_LEAST_ONE,
    "parallel.process_id": AT_LEAST_ZERO,
    "parallel.heartbeat_timeout_seconds": AT_LEAST_ONE,
    "data.num_workers": AT_LEAST_ZERO,
    "data.num_threads": AT_LEAST_ONE,
    "data.prefetch_mib": AT_LEAST_ONE,
    "data.mixup_alpha": AMOUNT,
    "data.cutmix_alpha": AMOUNT,
    "data.mix_switch": ([0, 0.5, 1], [-0.001, 1.001, math.nan]),
    "data.max_bad_share": ([0, 0.5, 1], [-0.001, 1.001, math.nan]),
    "optim.lr": POSITIVE,
    "optim.weight_decay": AMOUNT,
    "optim.b1": SHARE,
    "optim.b2": SHARE,
    "optim.eps": POSITIVE,
    "optim.warmup_epochs": AMOUNT,
    "optim.label_smoothing": SHARE,
    "optim.clip_norm": AMOUNT,
    "optim.accumulate_steps": ([1, 2], [0, -1]),
    "optim.ema_decay": SHARE,
}
# field: (every legal value, an illegal one, the legal one nearest to it)
CHOICES = {
    "model.pool": ([None, "cls", "mean"], "means", "mean"),
    "model.dtype": (["float32", "bfloat16"], "float16", "bfloat16"),
    "model.backward": ([None, "derived", "autodiff"], "derivd", "derived"),
    "model.remat": ([None, "none", "dots", "full"], "dot", "dots"),
    "optim.optimizer": (["adamw", "lion"], "adam", "adamw"),
    "optim.schedule": (["cosine", "official_readme"], "cosin", "cosine"),
    "data.on_bad_example": (["raise", "skip"], "skipp", "skip"),
    "optim.mu_dtype": (["float32", "bfloat16"], "bfloat61", "bfloat16"),
    "on_failed_save": (["stop", "continue"], "contnue", "continue"),
}
# Free text, paths, switches and layouts: read, and checked, where they are used.
UNRULED = {
    "name",
    "init_weights",
    "init_fit",
    "model.name",
    "data.dataset",
    "data.data_dir",
    "data.train_split",
    "data.eval_split",
    "data.download",
    "data.check_crc",
    "data.index_dir",
    "data.train_transforms",
    "data.eval_transforms",
    "data.mean",
    "optim.no_decay",
    "parallel.mesh",
    "parallel.coordinator",
}
SIZES = {"model.image_size", "model.patch_size"}
SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "parallel": ParallelConfig,
}


def changed(path, value):
    config = TrainConfig()
    section, _, name = path.rpartition(".")
    setattr(getattr(config, section) if section else config, name, value)
    return config


def all_fields():
    top = {f.name for f in dataclasses.fields(TrainConfig)} - set(SECTIONS)
    below = {f"{s}.{f.name}" for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    return top | below


def test_every_field_has_its_rule_or_needs_none():
    groups = [set(BOUNDS), set(CHOICES), SIZES, UNRULED, {"data.std"}]
    assert set().union(*groups) == all_fields()
    assert sum(map(len, groups)) == len(all_fields())
    assert set(CHOICES) == set(schema._CHOICES)
    assert set(BOUNDS) == set(schema._RANGES) | set(schema._POSITIVE) | set(schema._SHARES)


def test_the_default_is_legal_and_comes_back():
    config = TrainConfig()
    assert validate(config) is config


# --- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BOUNDS)
def test_bounds(path):
    accepted, refused = BOUNDS[path]
    for value in accepted:
        validate(changed(path, value))
    for value in refused:
        with pytest.raises(ValueError) as caught:
            validate(changed(path, value))
        message = str(caught.value)
        assert message.startswith((f"{path} must be >", f"{path} must be in [0, 1]")), message
        assert f"; got {value}. Set --config.{path}." in message
        assert "\n" not in message


@pytest.mark.parametrize(
    "path, value, rule",
    [
        ("seed", 2**32, "seed must be >= 0 and < 4294967296; got 4294967296. Set --config.seed."),
        ("model.depth", 0, "model.depth must be >= 1; got 0. Set --config.model.depth."),
        ("optim.b1", 1.0, "optim.b1 must be >= 0 and < 1; got 1.0. Set --config.optim.b1."),
        ("optim.lr", 0.0, "optim.lr must be > 0; got 0.0. Set --config.optim.lr."),
    ],
)
def test_message_states_the_rule(path, value, rule):
    with pytest.raises(ValueError) as caught:
        validate(changed(path, value))
    assert str(caught.value) == rule


@pytest.mark.parametrize("path", sorted(p for p in BOUNDS if p.startswith("model.")))
def test_unset_fields_of_the_model_break_no_rule(path):
    config = changed(path, None)
    assert validate(config) is config


@pytest.mark.parametrize("path", CHOICES)
def test_choices(path):
    legal, illegal, nearest = CHOICES[path]
    for value in legal:
        validate(changed(path, value))
    names = ", ".join(value for value in legal if value is not None)
    with pytest.raises(ValueError) as caught:
        validate(changed(path, illegal))
    assert str(caught.value) == (
        f"{path} must be one of {names}; got {illegal}. Did you mean {nearest}?"
    )


def test_choice_that_resembles_none_lists_them():
    with pytest.raises(ValueError, match=r"got sgd\. Known: adamw, lion\."):
        validate(changed("optim.optimizer", "sgd"))


@pytest.mark.parametrize("path", sorted(SIZES))
def test_sizes(path):
    for value in (None, (1,), (224,), (32, 64)):
        validate(changed(path, value))
    for value in ((), (0,), (32, -1), (8, 8, 3)):
        with pytest.raises(ValueError) as caught:
            validate(changed(path, value))
        assert str(caught.value) == (
            f"{path} must be one or two positive sizes in pixels; got {value}. "
            f"Set --config.{path}=HEIGHT,WIDTH."
        )


def test_std():
    for value in ((0.5,), (0.1, 2.0, 1e-6)):
        validate(changed("data.std", value))
    for value in ((0.0,), (0.5, -0.5, 0.5), (math.nan, 0.5, 0.5)):
        with pytest.raises(ValueError) as caught:
            validate(changed("data.std", value))
        assert str(caught.value) == f"data.std must be > 0; got {value}. Set --config.data.std."


def test_micro_batches_divide_the_batch():
    config = TrainConfig(batch_size=96)
    config.optim.accumulate_steps = 3
    validate(config)
    config.optim.accumulate_steps = 5
    with pytest.raises(ValueError) as caught:
        validate(config)
    assert str(caught.value) == (
        "batch_size must be a multiple of optim.accumulate_steps; got 96 and 5. Change one of them."
    )


# --- there and back -------------------------------------------------------------------------------


def unusual():
    """No field has its default."""
    config = TrainConfig(
        name="x",
        seed=5,
        batch_size=64,
        eval_batch_size=8,
        total_epochs=2.5,
        total_steps=9,
        init_weights="weights.npz",
        init_fit=("head",),
        log_every_steps=1,
        log_objective_every_steps=2,
        eval_every_steps=3,
        checkpoint_every_steps=4,
        keep_latest=5,
        keep_best=0,
        on_failed_save="continue",
    )
    config.model = ModelConfig(
        name="crate_tiny_patch16_224",
        num_classes=3,
        image_size=(32, 48),
        patch_size=(8,),
        width=24,
        depth=2,
        num_heads=3,
        head_dim=4,
        pool="mean",
        in_channels=1,
        eta=0.2,
        lmbda=0.3,
        dropout=0.4,
        dtype="bfloat16",
        backward="autodiff",
        remat="dots",
        scan_unroll=2,
    )
    config.data = DataConfig(
        dataset="folder",
        data_dir="images",
        train_split="a",
        eval_split="b",
        download=True,
        train_transforms="resize(8)",
        eval_transforms="resize(9)",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        num_workers=1,
        num_threads=2,
        prefetch_mib=3,
        mixup_alpha=0.8,
        cutmix_alpha=0.7,
        mix_switch=0.6,
        on_bad_example="skip",
        max_bad_share=0.2,
        check_crc=True,
        index_dir="indices",
    )
    config.optim = OptimConfig(
        optimizer="lion",
        lr=0.1,
        weight_decay=0.2,
        no_decay=("bias", "scale"),
        b1=0.3,
        b2=0.4,
        eps=0.5,
        mu_dtype="bfloat16",
        schedule="official_readme",
        warmup_epochs=0.6,
        label_smoothing=0.7,
        clip_norm=0.8,
        accumulate_steps=2,
        ema_decay=0.9,
    )
    config.parallel = ParallelConfig(
        mesh="fsdp:-1",
        coordinator="host:1234",
        num_processes=4,
        process_id=3,
        heartbeat_timeout_seconds=9,
    )
    return config


@pytest.mark.parametrize("config", [TrainConfig(), unusual()], ids=["default", "unusual"])
def test_round_trip_through_json(config):
    text = json.dumps(to_dict(config), allow_nan=False)
    back = from_dict(json.loads(text))
    assert back == config
    assert type(back.model) is ModelConfig and type(back.optim) is OptimConfig
    assert all(isinstance(v, tuple) for v in (back.data.mean, back.data.std, back.optim.no_decay))


def test_to_dict_is_plain_and_whole():
    values = to_dict(unusual())
    assert values["model"]["image_size"] == [32, 48]
    assert values["optim"]["no_decay"] == ["bias", "scale"]
    assert values["total_epochs"] == 2.5
    flat = {k for k in values if k not in SECTIONS}
    assert flat | {f"{s}.{k}" for s in SECTIONS for k in values[s]} == all_fields()


def test_missing_keys_take_their_defaults():
    assert from_dict({}) == TrainConfig()
    assert from_dict({"model": {"depth": 3}}) == changed("model.depth", 3)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"batchsize": 3}, "batchsize must name a field. Did you mean batch_size?"),
        (
            {"optim": {"weight_decey": 3}},
            "optim.weight_decey must name a field. Did you mean weight_decay?",
        ),
        (
            {"parallel": {"qqq": 1}},
            "parallel.qqq must name a field. Known: coordinator, heartbeat_timeout_seconds, mesh, "
            "num_processes, process_id.",
        ),
    ],
)
def test_from_dict_of_an_unknown_key(values, message):
    with pytest.raises(KeyError) as caught:
        from_dict(values)
    assert caught.value.args == (message,)


def test_differences_name_every_changed_field():
    assert differences(TrainConfig(), TrainConfig()) == {}
    found = differences(TrainConfig(), unusual())
    assert set(found) == all_fields()
    assert found["batch_size"] == (128, 64)
    assert found["optim.no_decay"] == ([], ["bias", "scale"])
    assert found["model.image_size"] == (None, [32, 48])
    assert differences(unusual(), TrainConfig())["optim.lr"] == (0.1, 1e-3)


def test_identity_names_fields_or_sections():
    assert set(IDENTITY) <= all_fields() | set(SECTIONS)


# --- names ----------------------------------------------------------------------------------------


def test_get_field():
    config = unusual()
    assert get_field(config, "seed") == 5
    assert get_field(config, "optim.lr") == 0.1
    assert get_field(config, "data") is config.data


@pytest.mark.parametrize(
    "path, message",
    [
        ("sead", "sead must name a field. Did you mean seed?"),
        ("optim.lrr", "optim.lrr must name a field. Did you mean lr?"),
        ("optm.lr", "optm.lr must name a field. Did you mean optim?"),
        ("seed.low", "seed.low must name a field; seed has none below it."),
        ("model.width.half", "model.width.half must name a field; model.width has none below it."),
        ("parallel.mash", "parallel.mash must name a field. Did you mean mesh?"),
    ],
)
def test_get_field_of_no_field(path, message):
    with pytest.raises(KeyError) as caught:
        get_field(TrainConfig(), path)
    assert caught.value.args == (message,)


def test_choose():
    recipes = {"tiny": 1, "base": 2}
    assert choose("tiny", recipes, "base") == 1
    assert choose(None, recipes, "base") == 2
    assert choose("", recipes, "base") == 2
    for arg, remedy in (("tinny", "Did you mean tiny?"), ("x", "Known: base, tiny.")):
        with pytest.raises(KeyError) as caught:
            choose(arg, recipes, "base")
        assert caught.value.args == (f"the recipe must be known; got {arg}. {remedy}",)


def test_did_you_mean():
    known = ["zeta", "alpha", "alphabet"]
    assert did_you_mean("alpah", known) == "Did you mean alpha?"
    assert did_you_mean("qqq", known) == "Known: alpha, alphabet, zeta."
    assert did_you_mean("alpha", iter(known)) == "Did you mean alpha?"


def test_names_that_a_flag_gave_as_one_string_become_several():
    config = TrainConfig(init_fit=("head, image_size", "eta"))
    config.optim.no_decay = ("bias,scale",)
    validate(config)
    assert config.init_fit == ("head", "image_size", "eta")
    assert config.optim.no_decay == ("bias", "scale")
