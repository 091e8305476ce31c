"""Every rule of the schema, at and beyond its bounds, and configs there and back through JSON."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest

from crate_jax.config import (
    DataConfig,
    MaskingConfig,
    Mcr2Config,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PenaltyConfig,
    SimDinoConfig,
    TextConfig,
    TrainConfig,
    choose,
    did_you_mean,
    differences,
    from_dict,
    get_field,
    options,
    overrides,
    renamed,
    to_dict,
    validate,
)
from crate_jax.models.variants import VARIANTS
from crate_jax.options import option_of, rule

# field: (values to accept, values to refuse)
AT_LEAST_ONE = ([1, 10**9], [0, -1])
AT_LEAST_ZERO = ([0, 10**9], [-1])
SHARE = ([0.0, 0.999], [1.0, 1.5, -0.001, math.nan])
CLOSED_SHARE = ([0.0, 0.5, 1.0], [-0.001, 1.001, math.nan])
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
    "model.num_classes": AT_LEAST_ZERO,
    "model.width": AT_LEAST_ONE,
    "model.depth": AT_LEAST_ONE,
    "model.num_heads": AT_LEAST_ONE,
    "model.head_dim": AT_LEAST_ONE,
    "model.in_channels": AT_LEAST_ONE,
    "model.eta": POSITIVE,
    "model.lmbda": AMOUNT,
    "model.ista_steps": AT_LEAST_ONE,
    "model.dropout": SHARE,
    "model.scan_unroll": AT_LEAST_ONE,
    "parallel.num_processes": AT_LEAST_ONE,
    "parallel.process_id": AT_LEAST_ZERO,
    "parallel.heartbeat_timeout_seconds": AT_LEAST_ONE,
    "data.repeats": ([1, 128], [0, -1]),
    "data.num_workers": AT_LEAST_ZERO,
    "data.num_threads": AT_LEAST_ONE,
    "data.prefetch_mib": AT_LEAST_ONE,
    "data.mixup_alpha": AMOUNT,
    "data.cutmix_alpha": AMOUNT,
    "data.mix_switch": ([0, 0.5, 1], [-0.001, 1.001, math.nan]),
    "data.max_bad_share": ([0, 0.5, 1], [-0.001, 1.001, math.nan]),
    "optim.lr": POSITIVE,
    "optim.weight_decay": AMOUNT,
    "optim.end_weight_decay": ([None, 0.0, 0.4], [-0.001, math.inf, math.nan]),
    "optim.clip_each": AMOUNT,
    "optim.layer_decay": ([0.001, 0.9, 1], [0.0, -0.1, 1.001, math.nan]),
    "optim.patch_lr_scale": AMOUNT,
    "optim.b1": SHARE,
    "optim.b2": SHARE,
    "optim.eps": POSITIVE,
    "optim.warmup_epochs": AMOUNT,
    "optim.warmup_lr": ([0.0], [-0.001, math.inf, math.nan]),
    "optim.cooldown_epochs": AMOUNT,
    "optim.end_lr": AMOUNT,
    "optim.label_smoothing": SHARE,
    "optim.clip_norm": AMOUNT,
    "optim.accumulate_steps": ([1, 2], [0, -1]),
    "optim.ema_decay": SHARE,
    "penalty.orthogonality": AMOUNT,
    "penalty.srr": AMOUNT,
    "penalty.srr_lmbda": AMOUNT,
    "penalty.srr_eps": POSITIVE,
    "masking.ratio": ([0.001, 0.999], [0.0, 1.0, -0.1, math.nan]),
    "mcr2.dimension": AT_LEAST_ONE,
    "mcr2.hidden": AT_LEAST_ZERO,
    "mcr2.eps": POSITIVE,
    "mcr2.gamma1": POSITIVE,
    "mcr2.gamma2": POSITIVE,
    "mcr2.regularizer": AMOUNT,
    "mcr2.views": AT_LEAST_ONE,
    "simdino.eps": POSITIVE,
    "simdino.coeff": AMOUNT,
    "simdino.gamma": AMOUNT,
    "simdino.group_size": AT_LEAST_ZERO,
    "simdino.head_hidden": AT_LEAST_ONE,
    "simdino.head_features": AT_LEAST_ONE,
    "simdino.momentum": CLOSED_SHARE,
    "simdino.end_momentum": CLOSED_SHARE,
    "simdino.local_crops": AT_LEAST_ZERO,
    "simdino.local_size": AT_LEAST_ONE,
    "simdino.patch_weight": AMOUNT,
    "simdino.min_masked": CLOSED_SHARE,
    "simdino.max_masked": CLOSED_SHARE,
    "simdino.bank_size": AT_LEAST_ONE,
    "simdino.neighbours": AT_LEAST_ONE,
}
# field: (every legal value, an illegal one, the legal one nearest to it)
CHOICES = {
    "model.pool": ([None, "cls", "mean"], "means", "mean"),
    "model.dtype": ([None, "float32", "bfloat16"], "float16", "bfloat16"),
    "model.backward": ([None, "derived", "autodiff"], "derivd", "derived"),
    "model.attention_kernel": ([None, "auto", "xla", "pallas", "cudnn"], "palas", "pallas"),
    "model.remat": ([None, "none", "dots", "full"], "dot", "dots"),
    "model.attention": ([None, "mssa", "mhsa", "tssa", "cbsa"], "msa", "mssa"),
    "model.nonlinearity": ([None, "ista", "mlp", "none"], "mpl", "mlp"),
    "model.stem": ([None, "patches", "convolutions"], "patch", "patches"),
    "model.attention_sign": ([None, "plus", "minus"], "pluss", "plus"),
    "model.threshold": ([None, "relu", "soft"], "sofft", "soft"),
    "model.step_sizes": ([None, "fixed", "shared", "per_layer"], "perlayer", "per_layer"),
    "simdino.expanded": (["student", "both"], "bth", "both"),
    "penalty.srr_layer": (["random", "all"], "al", "all"),
    "optim.optimizer": (["adamw", "lion"], "adam", "adamw"),
    "optim.schedule": (["cosine", "official_readme"], "cosin", "cosine"),
    "data.on_bad_example": (["raise", "skip"], "skipp", "skip"),
    "optim.mu_dtype": (["float32", "bfloat16"], "bfloat61", "bfloat16"),
    "mcr2.mode": (["supervised", "self_supervised"], "supervized", "supervised"),
    "init_method": (["right", "crate_alpha", "official_maps"], "crate_alfa", "crate_alpha"),
    "on_failed_save": (["stop", "continue"], "contnue", "continue"),
}
# Free text, paths, switches and layouts: read, and checked, where they are used.
UNRULED = {
    "name",
    "profile_steps",
    "loggers",
    "task",
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
    "data.image_key",
    "data.label_key",
    "data.train_transforms",
    "data.eval_transforms",
    "data.mean",
    "model.tied_output",
    "optim.orthonormal",
    "optim.no_decay",
    "optim.decay_only",
    "masking.normalize",
    "simdino.second_transforms",
    "simdino.local_transforms",
    "text.tokenizer",
    "text.end_token",
    "parallel.mesh",
    "parallel.coordinator",
}
SIZES = {"model.image_size", "model.patch_size", "model.representatives"}
SECTIONS = {
    "model": type(ModelConfig()),
    "data": DataConfig,
    "text": TextConfig,
    "optim": OptimConfig,
    "penalty": PenaltyConfig,
    "masking": MaskingConfig,
    "mcr2": Mcr2Config,
    "simdino": SimDinoConfig,
    "parallel": ParallelConfig,
}
# What a started run may not change, besides all of the model.
IDENTITY = {
    "name",
    "task",
    "seed",
    "batch_size",
    "data.dataset",
    "data.train_split",
    "data.image_key",
    "data.label_key",
    "data.train_transforms",
    "data.repeats",
    "data.mixup_alpha",
    "data.cutmix_alpha",
    "data.mix_switch",
    "optim.optimizer",
    "optim.schedule",
    "optim.ema_decay",
    "optim.clip_norm",
    "optim.clip_each",
    "optim.layer_decay",
    "optim.patch_lr_scale",
    "optim.end_weight_decay",
    "optim.no_decay",
    "optim.decay_only",
    "optim.mu_dtype",
    "optim.orthonormal",
    "masking.ratio",
    "masking.normalize",
    "mcr2.mode",
    "mcr2.dimension",
    "mcr2.hidden",
    "mcr2.eps",
    "mcr2.gamma1",
    "mcr2.gamma2",
    "mcr2.regularizer",
    "mcr2.views",
    *(f"simdino.{field}" for field in ("eps", "coeff", "gamma", "expanded", "group_size")),
    *(f"simdino.{field}" for field in ("head_hidden", "head_features", "local_crops")),
    *(f"simdino.{field}" for field in ("momentum", "end_momentum", "local_size", "patch_weight")),
    *(f"simdino.{field}" for field in ("min_masked", "max_masked", "bank_size")),
    *(f"simdino.{field}" for field in ("second_transforms", "local_transforms")),
    "text.end_token",
}


EXAMPLES = {variant.family: name for name, variant in VARIANTS.items()}.values()  # one a family


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
    told = {path: option_of(field) for path, _, field in options(TrainConfig())}
    assert {path for path in told if told[path].choices} == set(CHOICES)
    assert {path for path in told if told[path].bounds} == set(BOUNDS) | SIZES | {"data.std"}


def test_every_field_has_a_comment():
    lines = {path: (option_of(f).help, rule(f)) for path, _, f in options(TrainConfig())}
    assert set(lines) == all_fields() and all(len(help) > 3 for help, _ in lines.values())
    assert lines["optim.b1"] == ("AdamW's and Lion's first β", "a number >= 0 and < 1")
    assert lines["model.image_size"][1] == "1 or 2 whole numbers >= 1"
    assert lines["model.pool"][1] == "one of cls, mean"
    assert lines["data.download"][1] == "True or False" and lines["name"][1] == "text"
    assert lines["data.mean"][1] == "numbers" and lines["init_fit"][1] == "names"


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
        assert message.startswith(f"{path} must be >"), message
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
    for value in ((), (0,), (32, -1), (8, 8, 3), "32"):
        with pytest.raises(ValueError) as caught:
            validate(changed(path, value))
        wrong = value in ((0,), (32, -1))
        assert str(caught.value) == (
            f"{path} must be {'>= 1' if wrong else '1 or 2 whole numbers >= 1'}; got {value!r}. "
            f"Set --config.{path}."
        )


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("batch_size", "128", "a whole number >= 1; got '128'"),
        ("batch_size", 12.5, "a whole number >= 1; got 12.5"),
        ("batch_size", None, "a whole number >= 1; got None"),
        ("keep_best", True, "a whole number >= 0; got True"),
        ("optim.b1", "x", "a number >= 0 and < 1; got 'x'"),
        ("optim.optimizer", None, "one of adamw, lion; got None"),
        ("data.download", "no", "True or False; got 'no'"),
        ("data.data_dir", 3, "text; got 3"),
        ("data.mean", (0.5, "x"), "numbers; got (0.5, 'x')"),
        ("optim.no_decay", "bias", "names; got 'bias'"),
    ],
)
def test_a_value_of_another_type(path, value, rule):
    with pytest.raises(ValueError) as caught:
        validate(changed(path, value))
    assert str(caught.value).startswith(f"{path} must be {rule}. ")


def test_numbers_of_numpy_are_numbers_and_lists_are_tuples():
    config = TrainConfig(batch_size=np.int64(8))
    config.optim.lr = np.float32(0.5)
    config.model = ModelConfig(image_size=[32, 32])
    assert validate(config) is config


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


def test_an_example_is_repeated_within_a_batch():
    config = TrainConfig(batch_size=6)
    config.data.repeats = 6
    validate(config)
    config.data.repeats = 7
    with pytest.raises(ValueError) as caught:
        validate(config)
    assert str(caught.value) == (
        "data.repeats must be at most batch_size; got 7 and 6. Set --config.data.repeats."
    )


@pytest.mark.parametrize("field", ["end_lr", "warmup_lr", "cooldown_epochs"])
def test_the_official_schedule_takes_no_end(field):
    config = TrainConfig(optim=OptimConfig(warmup_epochs=1, **{field: 1e-6}))
    validate(config)
    config.optim.schedule = "official_readme"
    with pytest.raises(ValueError) as caught:
        validate(config)
    assert str(caught.value) == (
        f"optim.{field} must be 0 if optim.schedule is official_readme; got 1e-06. "
        f"Set --config.optim.{field}=0, or choose the schedule cosine."
    )
    setattr(config.optim, field, 0.0)
    validate(config)


@pytest.mark.parametrize(
    ("optim", "rule"),
    [
        (dict(warmup_epochs=5, warmup_lr=0.2, lr=0.1), "at most optim.lr; got 0.2 and 0.1. Set "),
        (dict(warmup_lr=1e-6), "0 if optim.warmup_epochs is 0; got 1e-06. Set "),
    ],
)
def test_a_warm_up_goes_up_from_its_start(optim, rule):
    with pytest.raises(ValueError) as caught:
        validate(TrainConfig(optim=OptimConfig(**optim)))
    assert str(caught.value).startswith(f"optim.warmup_lr must be {rule}--config.optim.warmup_lr")
    validate(TrainConfig(optim=OptimConfig(**optim | dict(warmup_epochs=5, lr=0.2))))


# --- there and back -------------------------------------------------------------------------------


def unusual():
    """No field has its default."""
    config = TrainConfig(
        name="x",
        task="y",
        seed=5,
        batch_size=64,
        eval_batch_size=8,
        total_epochs=2.5,
        total_steps=9,
        init_weights="weights.npz",
        init_fit=("head",),
        init_method="crate_alpha",
        log_every_steps=1,
        loggers=("trackio",),
        profile_steps="2:3",
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
        attention_kernel="xla",
        remat="dots",
        scan_unroll=2,
        attention="mhsa",
        nonlinearity="mlp",
        attention_sign="minus",
        tied_output=True,
        threshold="soft",
        ista_steps=2,
        step_sizes="shared",
        stem="convolutions",
        representatives=(3, 2),
    )
    config.data = DataConfig(
        dataset="folder",
        data_dir="images",
        train_split="a",
        eval_split="b",
        image_key="photo",
        label_key="kind",
        download=True,
        train_transforms="resize(8)",
        eval_transforms="resize(9)",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        repeats=3,
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
        end_weight_decay=0.3,
        decay_only=("kernel",),
        no_decay=("bias", "scale"),
        b1=0.3,
        b2=0.4,
        eps=0.5,
        mu_dtype="bfloat16",
        schedule="official_readme",
        warmup_epochs=0.6,
        warmup_lr=0.001,
        end_lr=0.01,
        cooldown_epochs=0.4,
        label_smoothing=0.7,
        clip_norm=0.8,
        clip_each=0.7,
        layer_decay=0.6,
        patch_lr_scale=0.2,
        orthonormal=("U",),
        accumulate_steps=2,
        ema_decay=0.9,
    )
    config.penalty = PenaltyConfig(
        orthogonality=0.1, srr=0.2, srr_layer="all", srr_lmbda=0.3, srr_eps=0.4
    )
    config.masking = MaskingConfig(ratio=0.5, normalize=False)
    config.mcr2 = Mcr2Config(
        mode="self_supervised",
        dimension=16,
        hidden=8,
        eps=0.5,
        gamma1=20.0,
        gamma2=0.05,
        regularizer=0.1,
        views=5,
    )
    config.simdino = SimDinoConfig(
        eps=0.1,
        coeff=2.0,
        gamma=0.3,
        expanded="student",
        group_size=32,
        head_hidden=16,
        head_features=8,
        momentum=0.9,
        end_momentum=0.99,
        local_crops=2,
        local_size=16,
        second_transforms="resize(9)",
        local_transforms="resize(8)",
        patch_weight=0.7,
        min_masked=0.2,
        max_masked=0.4,
        bank_size=10,
        neighbours=3,
    )
    config.text = TextConfig(tokenizer="a/tokenizer.json", end_token="</s>")
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
    assert type(back.model) is SECTIONS["model"] and type(back.optim) is OptimConfig
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


def test_what_a_started_run_may_not_change():
    model = {path for path in all_fields() if path.startswith("model.")}
    found = differences(TrainConfig(), unusual(), identity=True)
    assert set(found) == IDENTITY | model
    assert found["optim.clip_norm"] == (0.0, 0.8)


def test_a_config_of_an_older_run_is_the_same_run():
    """Before the families of models: no task, no operators, every field of the model a null."""
    values = to_dict(unusual()) | {"name": "digits", "seed": 0, "batch_size": 128}
    del values["task"]
    for section in ("data", "text", "optim", "masking", "mcr2", "simdino", "parallel"):
        values[section] = {}
    names = "num_classes image_size patch_size width depth num_heads head_dim pool in_channels eta"
    names += " lmbda dropout backward remat scan_unroll"
    values["model"] = {"name": "crate_tiny_patch16_224", "dtype": "float32"}
    values["model"] |= dict.fromkeys(names.split()) | {"image_size": [32, 32]}
    old = validate(from_dict(json.loads(json.dumps(values))))
    assert old.task == "classify" and overrides(old.model) == {
        "dtype": "float32",
        "image_size": (32, 32),
    }
    new = TrainConfig(model=ModelConfig(name="crate_tiny_patch16_224", image_size=(32, 32)))
    assert differences(old, new, identity=True) == {}
    stated = ModelConfig(name=new.model.name, image_size=(32, 32), depth=12, attention="mssa")
    assert differences(old, TrainConfig(model=stated), identity=True) == {}  # as unset
    stated.depth = 11
    changed = differences(old, TrainConfig(model=stated), identity=True)
    assert changed == {"model.depth": (12, 11)}


# --- the section of the model ---------------------------------------------------------------------


def test_a_section_has_the_fields_of_its_family(other_family):
    crate, other = ModelConfig(name="crate_tiny_patch16_224"), ModelConfig(name="other_tiny")
    assert isinstance(crate, ModelConfig) and isinstance(other, ModelConfig)
    assert hasattr(crate, "eta") and not hasattr(crate, "ratio")
    assert hasattr(other, "ratio") and not hasattr(other, "eta")
    assert dataclasses.replace(other, ratio=2) == ModelConfig(name="other_tiny", ratio=2)
    assert copy.deepcopy(other) == copy.copy(other) == other
    config = TrainConfig(model=ModelConfig(name="other_tiny", ratio=2))
    assert from_dict(to_dict(validate(config))) == config
    found = differences(TrainConfig(), config)
    assert next(iter(found)) == "model.name"
    assert found["model.ratio"] == (None, 2) and found["model.eta"] == (0.1, None)
    config.model.ratio = 0
    with pytest.raises(ValueError, match=r"^model\.ratio must be >= 1; got 0\. Set --config"):
        validate(config)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_config_can_be_pickled_and_copied(name):
    config = TrainConfig(model=ModelConfig(name=name, depth=2, num_heads=3))
    for back in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert back == config and type(back.model) is type(config.model)
        back.model.depth = 3
        assert config.model.depth == 2
    assert copy.copy(config.model) == config.model
    assert dataclasses.replace(config.model, depth=3).depth == 3


@pytest.mark.parametrize(
    ("field", "legal", "illegal"),
    [
        ("decoder_depth", [0, 24], [-1]),
        ("position_size", [(0, 0), (24,)], []),
        ("eta", *POSITIVE),
        ("lmbda", *AMOUNT),
    ],
)
def test_bounds_of_an_autoencoder(field, legal, illegal):
    for value in [None, *legal]:
        config = ModelConfig(name="crate_mae_tiny_patch16_224", **{field: value})
        validate(TrainConfig(model=config))
    for value in illegal:
        config = ModelConfig(name="crate_mae_tiny_patch16_224", **{field: value})
        with pytest.raises(ValueError, match=rf"^model\.{field} must be >.*Set --config\.model\."):
            validate(TrainConfig(model=config))


@pytest.mark.parametrize(
    ("field", "legal", "illegal"),
    [
        ("context_length", [1, 10**6], [0, -1]),
        ("vocab_size", [1, 10**6], [0, -1]),
        ("overcompleteness", [1, 9], [0]),
        ("eta", *POSITIVE),
        ("lmbda", *AMOUNT),
        ("pad_token", [0, 50_264], [-1]),
        ("tied", [True, False], [1, "yes"]),
    ],
)
def test_bounds_of_a_model_of_text(field, legal, illegal):
    name = "crate_lm_1l" if field == "overcompleteness" else "crate_bert_base"
    for value in [None, *legal]:
        validate(TrainConfig(model=ModelConfig(name=name, **{field: value})))
    for value in illegal:
        config = TrainConfig(model=ModelConfig(name=name, **{field: value}))
        with pytest.raises(ValueError, match=rf"^model\.{field} must be .*Set --config\.model\."):
            validate(config)


def test_a_section_keeps_to_its_family():
    model = ModelConfig(name="crate_tiny_patch16_224", depth=2)
    within = dataclasses.replace(model, name="crate_base_patch16_224")
    assert validate(TrainConfig(model=within)).model == renamed(model, within.name)
    replaced = dataclasses.replace(model, name="vit_tiny_patch16_224")
    model.name = replaced.name
    for wrong in (model, replaced):
        with pytest.raises(ValueError) as caught:
            validate(TrainConfig(model=wrong))
        assert str(caught.value) == (
            "model.name must be a model of the section's family, crate; got vit_tiny_patch16_224. "
            "Build ModelConfig(name='vit_tiny_patch16_224')."
        )
    model.name = "vit_tyni_patch16_224"
    with pytest.raises(KeyError, match="Did you mean vit_tiny_patch16_224"):
        validate(TrainConfig(model=model))


def test_a_renamed_section_keeps_what_is_legal_there():
    model = ModelConfig(name="crate_tiny_patch16_224", depth=0, pool="mean", nonlinearity="mlp")
    alpha = renamed(model, "crate_alpha_tiny_patch16_224")
    assert overrides(alpha) == {"depth": 0}
    with pytest.raises(ValueError, match=r"^model\.depth must be >= 1; got 0\."):
        validate(TrainConfig(model=alpha))  # a mistake of its own is not lost
    assert overrides(renamed(model, "crate_base_patch16_224")) == overrides(model)


def test_a_renamed_section_keeps_what_fits(other_family):
    model = ModelConfig(name="crate_tiny_patch16_224", depth=2, eta=0.5, pool="mean")
    assert renamed(model, "other_tiny") == ModelConfig(name="other_tiny", depth=2, pool="mean")
    small = renamed(model, "crate_small_patch16_224")
    assert overrides(small) == {"depth": 2, "eta": 0.5, "pool": "mean"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "crate_tyni_patch16_224"}, "got crate_tyni_patch16_224. Did you mean crate_tin"),
        ({"widht": 3}, "model.widht must name a field of crate_small_patch16_224. Did you mean w"),
        ({"ratio": 3}, "model.ratio must name a field of crate_small_patch16_224. "),
        ({"name": "other_tiny", "eta": 3}, "model.eta must name a field of other_tiny. Known: ba"),
    ],
)
def test_a_section_that_cannot_be(values, message, other_family):
    for make in (lambda: ModelConfig(**values), lambda: from_dict({"model": values})):
        with pytest.raises(KeyError) as caught:
            make()
        assert message in caught.value.args[0]


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
        (
            "model.widht",
            "model.widht must name a field of crate_small_patch16_224. Did you mean width?",
        ),
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
        assert caught.value.args == (f"the variant of a recipe must be known; got {arg}. {remedy}",)


def test_did_you_mean():
    known = ["zeta", "alpha", "alphabet"]
    assert did_you_mean("alpah", known) == "Did you mean alpha?"
    assert did_you_mean("qqq", known) == "Known: alpha, alphabet, zeta."
    assert did_you_mean("alpha", iter(known)) == "Did you mean alpha?"


def test_names_that_a_flag_gave_as_one_string_become_several():
    config = TrainConfig(init_fit=("head, image_size", "eta"))
    config.optim.no_decay = ("bias,scale",)
    validate(validate(config))
    assert config.init_fit == ("head", "image_size", "eta")
    assert config.optim.no_decay == ("bias", "scale")
