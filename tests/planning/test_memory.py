"""The formula of a step's memory on TPUs, against what their compiler set aside; none is needed."""

import dataclasses
import json

import jax
import pytest
from command import ROOT

from crate_jax import placement
from crate_jax.cli.recipes import load_recipe
from crate_jax.config import ParallelConfig
from crate_jax.parallel import batch_sharding
from crate_jax.planning.chips import CHIPS
from crate_jax.planning.memory import memory_bytes
from crate_jax.training.run import set_up
from crate_jax.training.state import abstract_state

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
SLICES = json.loads((ROOT / "benchmarks" / "results" / "slices.json").read_text())


def compiled():
    """Chip, recipe, mesh, images on a chip, and the bytes that libtpu set aside there.

    None of these programs was run. Those of the large slice, and two recipes on all chips.
    """
    for row in SLICES["rows"]:
        everywhere = row["recipe"] in ("imagenet1k:base", "finetune:cifar10-small")
        fits = "memory" in row["compiled"]
        if fits and (everywhere or row["topology"] == "v5e:16x16"):
            family, recipe = row["topology"].partition(":")[0], row["recipe"]
            devices = row["mesh"]["data"] * row["mesh"]["fsdp"]
            spec = row["spec"].replace("data:64", "data:-1")  # so much is on a chip of any number
            images, found = row["batch_size"] // devices, row["compiled"]["memory"]
            yield pytest.param(family, recipe, spec, images, found, id=f"{family}-{recipe}-{spec}")


@pytest.fixture
def on(monkeypatch):
    """A function: the formula's kinds for a recipe, as if the devices here were chips."""

    def ask(family, recipe, spec, images, **changes):
        monkeypatch.setattr(placement, "device_kind", lambda: KINDS[family])
        monkeypatch.setattr(placement, "platform", lambda: "tpu")
        config = load_recipe(recipe)
        devices = jax.devices()[: 8 if "fsdp" in spec else 1]
        config.batch_size = images * len(devices)
        for path, value in changes.items():
            section, _, field = path.partition("__")
            setattr(getattr(config, section), field, value)
        run = set_up(
            dataclasses.replace(config, parallel=ParallelConfig(mesh=spec)), devices=devices
        )
        state, _ = abstract_state(run.task, run.tx, run.key, run.mesh, ema=run.ema)
        batch = {
            name: jax.ShapeDtypeStruct(
                (config.batch_size, *row.shape[1:]), row.dtype, sharding=batch_sharding(run.mesh)
            )
            for name, row in run.task.blank().items()
        }
        return memory_bytes(run, run.task.model, state, batch, platform="tpu", chip=CHIPS[family])  # type: ignore[arg-type]

    return ask


@pytest.mark.parametrize(("family", "recipe", "spec", "images", "bytes_there"), list(compiled()))
def test_the_formula_is_near_what_the_compiler_sets_aside(
    on, family, recipe, spec, images, bytes_there
):
    found = on(family, recipe, spec, images)
    assert sum(found.values()) == pytest.approx(bytes_there, rel=0.1)


def test_what_lies_inside_the_chip_is_no_more_than_there_is(on):
    """Of a large step as much as the chip gives to it; of a small one all that is computed."""
    large, small = on("v5e", "imagenet1k:base", "data:-1", 8), on("v5e", "digits", "data:-1", 100)
    assert large["inside"] == -72 * 2**20
    assert on("v5p", "imagenet1k:base", "data:-1", 8)["inside"] == -36 * 2**20
    state = sum(small[name] for name in ("parameters", "optimizer", "batch"))
    assert sum(small.values()) - state == 3 * 2**20  # the program's tables


def test_scores_lie_in_memory_where_no_kernel_computes_them(on):
    """Three arrays of a layer in float32, 197 tokens by 256: a row is of multiples of 128."""
    with_kernel, without = (
        on("v5e", "imagenet1k:tiny", "data:-1", 8, model__attention_kernel=kernel)["working"]
        for kernel in ("auto", "xla")
    )
    assert without - with_kernel == 8 * 3 * 6 * 197 * 256 * 4
    # Automatic differentiation has no kernel either.
    old = on("v5e", "imagenet1k:tiny", "data:-1", 8, model__backward="autodiff")
    assert old["working"] == without


def test_weights_are_cast_and_rows_filled_up(on):
    """CRATE-S is 576 wide, a row of 640 in memory, unless the examples fill the rows better."""
    few, many = (on("v5e", "imagenet1k:small", "data:-1", n) for n in (8, 128))
    assert few["copies"] == many["copies"]
    assert few["copies"] == pytest.approx(12 * 3 * 576 * 640 * 2, rel=0.01)  # and biases
    assert few["activations"] / 8 == pytest.approx(many["activations"] / 128 * 640 / 576)
    exact = on("v5e", "imagenet1k:small", "data:-1", 8, model__dtype="float32")
    assert exact["copies"] == 0


def test_what_is_computed_again_is_held_for_a_layer(on):
    kept, again = (
        on("v5e", "imagenet1k:base", "data:-1", 8, model__remat=remat) for remat in ("none", "full")
    )
    layer = kept["activations"] / 12
    assert again["working"] - kept["working"] == pytest.approx(layer, rel=1e-6)
    assert again["activations"] == 8 * 12 * 197 * 768 * 2


def test_text_has_scores_where_images_have_a_kernel_and_logits_where_they_are_more(on):
    sizes = dict(model__depth=1, model__vocab_size=8, model__context_length=256)
    scores = 4 * 3 * 12 * 256**2  # A, dA and dS of a text, 12 heads
    found = on("v4", "openwebtext:base", "data:1", 2, **sizes)["working"]
    assert 2 * scores < found < 3 * scores
    logits = 2 * 4 * 256 * 10**6  # of a text, and their gradient
    large = on("v4", "openwebtext:base", "data:1", 2, **sizes | {"model__vocab_size": 10**6})
    assert large["working"] == pytest.approx(2 * logits, rel=0.01)
