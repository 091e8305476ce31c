"""A model and its released weights in one call, and the preprocessing that belongs to them."""

import argparse
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from command import ROOT
from command import TINY as FLAGS
from weights import assert_equal_trees, random_params

import crate_jax
from crate_jax import Crate, CrateCausal, ModelCard, Preprocessing, load_weights, save_weights
from crate_jax.cli.arguments import default_data
from crate_jax.config import IMAGENET_EVAL, IMAGENET_MEAN, IMAGENET_STD, DataConfig
from crate_jax.interop import pictures, pretrained
from crate_jax.interop.pictures import of_data, standard
from crate_jax.models import released, variants
from crate_jax.models.released import Released
from crate_jax.models.zoo import architecture

TINY = dict(image_size=16, patch_size=8, width=8, depth=1, num_heads=2)
PAGE = "https://drive.google.com/file/d/x/view"


@pytest.fixture
def table(monkeypatch, tmp_path):
    """A table of small files, which lie in the cache as if they had been put there by hand."""
    monkeypatch.setenv("CRATE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for name, family in (("toy", "crate"), ("toy_other", "crate"), ("toy_lm", "crate_lm")):
        fields = dict(width=8, depth=1, num_heads=2)
        fields |= {"context_length": 8, "vocab_size": 11} if family == "crate_lm" else TINY
        monkeypatch.setitem(variants.VARIANTS, name, variants.Variant(family, fields))
    rows = (
        Released("toy", "in1k", "hf://o/r/a.npz", "MIT", 5),
        Released("toy", "in21k", "hf://o/r/b.npz", "MIT", 9, crop_share=1.0),
        Released("toy_other", "in1k", PAGE, "MIT", 5),
        Released("toy_other", "dead", "https://github.com/o/r", "none", 0, note="by", dead=True),
        Released("toy_lm", "text", "hf://o/r/lm.npz", "MIT", 0),
    )
    monkeypatch.setattr(released, "RELEASED", rows)
    folder = tmp_path / "cache/weights/hf/o/r"
    folder.mkdir(parents=True)
    found = {}
    for row in (rows[0], rows[1], rows[4]):
        text = row.model == "toy_lm"
        model = crate_jax.create_model(row.model, **{} if text else {"num_classes": row.classes})
        found[row.name] = (model, random_params(model))
        save_weights(folder / row.file.rpartition("/")[2], found[row.name][1], model)
    return found


def refuse(name, line, **overrides):
    with pytest.raises((ValueError, KeyError, OSError), match=line) as caught:
        crate_jax.load_pretrained(name, **overrides)
    assert "\n" not in str(caught.value)


def test_by_name_and_tag(table):
    for name, whose in (("toy", "toy.in1k"), *((name, name) for name in table)):
        model, params = crate_jax.load_pretrained(name)
        expected, numbers = table[whose]
        assert model == expected
        assert_equal_trees(params, numbers)
    assert crate_jax.list_pretrained() == ["toy.in1k", "toy.in21k", "toy_lm.text"]
    assert crate_jax.list_pretrained("toy") == ["toy.in1k", "toy.in21k"]
    assert crate_jax.list_pretrained("*.in21k") == ["toy.in21k"]


def test_overrides_are_fitted(table):
    trained = table["toy.in1k"][1]
    model, params = crate_jax.load_pretrained("toy", num_classes=3, dropout=0.5)
    assert model.num_classes == 3 and model.dropout == 0.5
    assert params["head"]["kernel"].shape == (8, 3)
    assert_equal_trees(params["blocks"], trained["blocks"])
    model, params = crate_jax.load_pretrained("toy", num_classes=5)
    assert_equal_trees(params, trained)  # the head is kept where nothing differs
    model, params = crate_jax.load_pretrained("toy", num_classes=0)
    assert "head" not in params
    model, params = crate_jax.load_pretrained("toy", image_size=32, in_channels=1, eta=0.2)
    assert model.image_size == 32 and model.eta == 0.2
    assert params["embedding"]["pos_embedding"].shape == (17, 8)
    assert params["embedding"]["projection"]["kernel"].shape == (64, 8)
    assert_equal_trees(params["head"], trained["head"])
    model, params = crate_jax.load_pretrained("toy", image_size=(16, 16))
    assert_equal_trees(params, trained)
    refuse(
        "toy", r"model\.num_clases must name a field of Crate\. Did you mean num_cl", num_clases=3
    )
    refuse("toy", r"model\.depth must be|must hold the parameters of the model", depth=2)


def test_what_has_no_weights(table):
    refuse("toyy", r"model\.name must be a known model; got toyy. Did you mean toy\?")
    refuse(
        "crate_tiny_patch16_224",
        r"with released weights; got crate_tiny_patch16_224, of which none are released\. .*toy_lm",
    )
    refuse("toy.in22k", "the tag of toy must be one of in1k, in21k; got in22k. Choose one")
    refuse(
        "toy_other",
        rf"toy_other\.in1k must be downloaded by hand, for its page asks for a browser: {PAGE} "
        r"\(licence: MIT\)\. Once you have the file, call load_weights\(FILE, "
        r"create_model\('toy_other', num_classes=5\)\)",
    )
    refuse(
        "toy_other.dead",
        r"come from somebody who kept it, for .* is dead: by, https://github\.com/o/r",
    )
    assert "load_variables(FILE, create_model('cbsa_tiny_patch16_224'))" in pretrained._by_hand(
        Released("cbsa_tiny_patch16_224", "in1k", PAGE, "MIT", 1000)
    )


def test_every_row_names_a_model_that_can_be_built():
    for row in released.RELEASED:
        assert row.by_program or row.name in pretrained._by_hand(row)
        model = pretrained._released_model(row)
        assert getattr(model, "num_classes", row.classes) == row.classes
    names = crate_jax.list_pretrained("crate_alpha_base_patch16_224*")
    assert [name.partition(".")[2] for name in names] == ["in1k", "torch_in1k", "in21k"]


def test_a_folder(tmp_path, tiny_model, tiny_params, tiny_images):
    prepared = Preprocessing((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.8, "bicubic")
    card = ModelCard("Seven", "mit", "seven things", {"top1": 0.625}, ["white-box"])
    names = tuple("abcdefg")
    save_weights(
        f"{tmp_path}/new/folder/",
        tiny_params,
        tiny_model,
        class_names=names,
        preprocessing=prepared,
        card=card,
    )
    folder = tmp_path / "new/folder"
    assert {each.name for each in folder.iterdir()} == {
        "model.safetensors",
        "config.json",
        "README.md",
    }
    model, params = crate_jax.load_pretrained(str(folder))
    apply = jax.jit(
        lambda model, p: model.apply({"params": p}, tiny_images, train=False), static_argnums=0
    )
    np.testing.assert_array_equal(apply(model, params), apply(tiny_model, tiny_params))
    assert_equal_trees(load_weights(folder, tiny_model), jax.device_get(tiny_params))
    assert crate_jax.preprocessing(f"{folder}/") == prepared
    model, params = crate_jax.load_pretrained(f"{folder}/", num_classes=2, pool="mean")
    assert params["head"]["kernel"].shape == (24, 2) and model.pool == "mean"
    config = json.loads((folder / "config.json").read_text())
    assert config["class_names"] == list(names) and config["library_name"] == "crate_jax"
    assert config["architecture"] == architecture(tiny_model)
    text = (folder / "README.md").read_text()
    assert f"`{prepared.transforms}`, mean [0.1, 0.2, 0.3] and deviation [0.4, 0.5, 0.6]" in text
    save_weights(folder, tiny_params, tiny_model)  # an existing folder needs no slash
    assert "preprocessing" not in json.loads((folder / "config.json").read_text())
    assert crate_jax.preprocessing(str(folder)) == standard(tiny_model)


def test_the_model_card_is_what_the_hub_reads(tmp_path, tiny_model, tiny_params):
    from huggingface_hub import ModelCard as HubCard

    card = ModelCard("Seven", "mit", "seven things", {"top1": 0.625}, ["white-box"])
    save_weights(f"{tmp_path}/a/", tiny_params, tiny_model, card=card)
    found = HubCard.load(tmp_path / "a/README.md")
    assert found.data.license == "mit" and found.data.library_name == "crate_jax"
    assert found.data.tags == ["jax", "flax", "white-box"]
    (result,) = found.data.eval_results
    assert (result.metric_type, result.metric_value) == ("top1", 0.625)
    assert (result.dataset_name, result.task_type) == ("seven things", "image-classification")
    assert found.data.metrics == ["top1"] and found.data.model_name == "Seven"
    count = sum(leaf.size for leaf in jax.tree.leaves(tiny_params))
    assert f"A `Crate` of {count:,} parameters." in found.text
    assert "prepared" not in found.text  # nothing is known of it
    assert "# Seven" in found.text and "| top1 | 0.625 |" in found.text
    assert 'crate_jax.load_pretrained("hf://OWNER/REPOSITORY")' in found.text
    save_weights(f"{tmp_path}/b/", tiny_params, tiny_model)
    found = HubCard.load(tmp_path / "b/README.md")
    assert found.data.license is None and found.data.eval_results is None
    assert "# Crate" in found.text


def test_folders_of_other_kinds(tmp_path):
    """A model of text, and one with running statistics."""
    model = CrateCausal(context_length=8, vocab_size=11, width=8, depth=1, num_heads=2)
    params = random_params(model)
    save_weights(f"{tmp_path}/text/", params, model)
    assert "pipeline_tag: text-generation" in (tmp_path / "text/README.md").read_text()
    found, again = crate_jax.load_pretrained(f"{tmp_path}/text/")
    assert isinstance(found, CrateCausal)
    assert_equal_trees(again, params)
    with pytest.raises(ValueError, match="model must classify images here; got a CrateCausal"):
        crate_jax.preprocessing(f"{tmp_path}/text/")
    model = Crate(32, 8, 3, width=8, depth=1, num_heads=2, stem="convolutions")
    images = np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.device_get(model.init(jax.random.key(0), images, train=False))
    save_weights(f"{tmp_path}/stem/", variables, model)
    _, again = crate_jax.load_pretrained(f"{tmp_path}/stem/")
    assert set(again) == {"params", "batch_stats"}
    assert_equal_trees(again, variables)


def test_folders_that_are_none(tmp_path, tiny_model, tiny_params):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"must be written to a folder of their own; .*run is a run"
    ):
        save_weights(tmp_path / "run", tiny_params, tiny_model)
    with pytest.raises(ValueError, match=r"to a folder for a preprocessing or a model card; got"):
        save_weights(tmp_path / "w.npz", tiny_params, tiny_model, card=ModelCard())
    assert not (tmp_path / "w.npz").exists()
    for address in ("hf://me/mine", "https://host/w.npz"):
        with pytest.raises(ValueError, match=f"^weights must be written .* got {address}. For the"):
            save_weights(address, tiny_params, tiny_model)
    refuse("me/mine", r"^me/mine must be a folder; there is none\. .* write hf://me/mine\.")
    (tmp_path / "w.npz").touch()
    (tmp_path / "empty").mkdir()
    for name, line in {
        f"{tmp_path}/run": r"it is a run\. Make one of it: .* convert --from=\S+/run --to=FOLDER/$",
        f"{tmp_path}/empty": r"must state its model in config\.json, as save_weights writes it",
        f"{tmp_path}/w.npz": r"^name must be that of a model, .*/w\.npz, a file\. Build the model",
        "https://host/w.npz": "got https://host/w.npz, a file. Build the model, and call load_w",
        "hf://a/b/w.npz": "got hf://a/b/w.npz, a file. Build the model, and call load_weights",
        "": r"model\.name must be a known model; got \.",
    }.items():
        refuse(name, line)
        with pytest.raises((ValueError, KeyError), match=line):
            crate_jax.preprocessing(name)
    save_weights(f"{tmp_path}/a/", tiny_params, tiny_model)
    (tmp_path / "a/config.json").write_text("[1]")
    refuse(f"{tmp_path}/a", r"config\.json must hold a JSON object; it does not\. Write the folder")
    for wrong in ({"mean": [1]}, 3, {**standard(tiny_model).to_json(), "mean": ["a"]}):
        (tmp_path / "a/config.json").write_text(json.dumps({"preprocessing": wrong}))
        with pytest.raises(ValueError, match="must state image_size, mean, std, crop_share, inter"):
            crate_jax.preprocessing(f"{tmp_path}/a")


def test_preprocessing_by_value():
    """Against a picture whose crop and numbers are known: columns of 0 … 255, twice as wide."""
    row = np.repeat(np.arange(0, 64, dtype=np.uint8), 1)
    picture = np.broadcast_to(row[None, :, None], (32, 64, 3)).copy()
    prepare = Preprocessing((16, 16), (0.5, 0.25, 0.0), (0.5, 0.25, 1.0), 0.5)
    found = prepare(picture)  # the shorter side is 32 already, and the centre 16 of 64 columns
    assert found.dtype == np.float32 and found.shape == (16, 16, 3)
    levels = np.arange(24, 40, dtype=np.float32) / 255
    expected = np.stack([(levels - 0.5) / 0.5, (levels - 0.25) / 0.25, levels], axis=-1)
    np.testing.assert_allclose(found, np.broadcast_to(expected, (16, 16, 3)), atol=1e-6)
    whole = Preprocessing((32, 64), (0.0,), (1.0,), None)(picture[..., 0])
    np.testing.assert_allclose(whole[..., 0] * 255, np.broadcast_to(row, (32, 64)), atol=1e-4)
    with pytest.raises(ValueError, match=r"must be a uint8 array \(H, W, c\); got float32"):
        prepare(picture.astype(np.float32))
    with pytest.raises(ValueError, match=r"crop_share must be in .*, and None for an image_size"):
        Preprocessing((16, 32), (0.5,), (0.5,), 0.5)
    for wrong in (dict(mean=(1.0, 1.0)), dict(std=(0.0,)), dict(interpolation="area")):
        with pytest.raises(ValueError, match="must have two sides, a mean and a deviation above 0"):
            Preprocessing(**(dict(image_size=(16, 16), mean=(0.5,), std=(0.5,)) | wrong))


def test_preprocessing_is_that_of_the_evaluation(photographs):
    """The same pixels as the rows of `evaluate`, normalised as on the device."""
    from crate_jax.data.images.pipeline import make_pipeline
    from crate_jax.tasks.pixels import normalize

    prepare = crate_jax.preprocessing("tost_tiny_patch16_224")
    assert prepare.transforms == "resize_shorter(256, interpolation='bicubic')|center_crop(224)"
    data = DataConfig(eval_transforms=prepare.transforms, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    pixels = make_pipeline(data, (224, 224, 3), train=False)(
        photographs[0], np.random.default_rng(0)
    )
    expected = normalize(pixels[None], mean=data.mean, std=data.std)[0]
    np.testing.assert_allclose(prepare(photographs[0]), expected, atol=1e-6)


def test_preprocessing_by_name(table):
    assert crate_jax.preprocessing("crate_tiny_patch16_224").transforms == IMAGENET_EVAL
    assert crate_jax.preprocessing("toy") == crate_jax.preprocessing("toy.in1k")
    assert crate_jax.preprocessing("toy").transforms == "resize((16, 16))"
    grey = crate_jax.create_model("crate_tiny_patch16_224", in_channels=1)
    assert standard(grey).mean == (0.5,)
    with pytest.raises(KeyError, match="must be a known model; got nothing"):
        crate_jax.preprocessing("nothing")
    with pytest.raises(KeyError, match="the tag of toy must be"):
        crate_jax.preprocessing("toy.x")
    with pytest.raises(ValueError, match="model must classify images"):
        crate_jax.preprocessing("toy_lm")
    row = next(row for row in ORIGINAL if row.tag == "clipa")
    model = crate_jax.create_model("crate_alpha_large_patch14_224")
    assert standard(model, "", row.crop_share).transforms == "resize_shorter(224)|center_crop(224)"


ORIGINAL = released.RELEASED


def test_a_model_near_to_one_with_weights_suggests_it():
    refuse(
        "crate_alpha_base_patch14_224",
        r"none are released\. Did you mean crate_alpha_base_patch16_224\? Models with some: crate",
    )


def test_preprocessing_of_a_released_file_is_that_of_its_row():
    """Of its authors' two kinds of training, by name; and by a command's two flags."""
    for tag, share in (("clipa", 1.0), ("in21k", 0.875)):
        found = crate_jax.preprocessing(f"crate_alpha_large_patch14_224.{tag}")
        assert (found.crop_share, found.mean, found.std) == (share, IMAGENET_MEAN, IMAGENET_STD)
    model = crate_jax.create_model("tost_tiny_patch16_224", in_channels=1)
    flags = argparse.Namespace(weights=None, model="tost_tiny_patch16_224")
    data = default_data(model, flags)
    assert data.eval_transforms == "resize_shorter(256, interpolation='bicubic')|center_crop(224)"
    assert (data.mean, data.std) == ((0.5,), (0.5,))


def test_what_a_run_evaluates_by(tiny_model):
    model = tiny_model
    found = of_data(DataConfig(eval_transforms="resize(16, interpolation='bicubic')"), model)
    assert found == Preprocessing((16, 16), (0.5,) * 3, (0.5,) * 3, None, "bicubic")
    found = of_data(DataConfig(eval_transforms="resize_shorter(20)|center_crop(16)"), model)
    assert found.transforms == "resize_shorter(20)|center_crop(16)"
    for spec in (
        "resize_shorter(20)|center_crop(8)",
        "center_crop(16)",
        "resize(16,antialias=False)",
    ):
        with pytest.raises(ValueError, match=r"data\.eval_transforms must be resize\(S\) or"):
            of_data(DataConfig(eval_transforms=spec), model)


def test_weights_state_how_a_command_prepares_pictures(tmp_path, tiny_model, tiny_params):
    stated = Preprocessing((16, 16), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.8, "bicubic")
    save_weights(f"{tmp_path}/a/", tiny_params, tiny_model, preprocessing=stated)
    found = pretrained.prepared_for(tiny_model, f"{tmp_path}/a/")
    assert found == stated
    larger = pretrained.prepared_for(tiny_model.clone(image_size=(32, 48)), f"{tmp_path}/a/")
    assert (larger.image_size, larger.crop_share) == ((32, 48), None)
    assert larger.mean == stated.mean
    grey = tiny_model.clone(in_channels=1)
    assert pretrained.prepared_for(grey, f"{tmp_path}/a/") == standard(grey)
    save_weights(tmp_path / "w.npz", tiny_params, tiny_model)
    assert pretrained.prepared_for(tiny_model, tmp_path / "w.npz") == standard(tiny_model)
    clipa = "hf://UCSC-VLAA/CRATE-alpha/torch/crate_alpha_CLIPA_L14.pth"
    large = crate_jax.create_model("crate_alpha_large_patch14_224")
    assert pretrained.prepared_for(large, clipa).crop_share == 1.0
    tost = crate_jax.create_model("tost_tiny_patch16_224")
    assert pretrained.prepared_for(tost, "", "tost_tiny_patch16_224").interpolation == "bicubic"
    assert pictures.standard(tost).interpolation == "bilinear"


# Runs a command in a process that ends where it asks for an address or connects to one.
CLOSED = """
import sys
def heard(event, arguments):
    beyond = event == "socket.connect" and isinstance(arguments[1], tuple)
    if beyond or event == "socket.getaddrinfo":
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(heard)
import crate_jax
from crate_jax.cli.main import main
crate_jax.list_pretrained()
crate_jax.preprocessing("crate_alpha_base_patch16_224")
if sys.argv[1:]:
    sys.exit(main(sys.argv[1:]))
"""


def closed(*arguments):
    """A command of this package, or none, where there is no network and nobody may ask for it."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:1"}
    command = [sys.executable, "-c", CLOSED, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_no_import_touches_the_network(tmp_path):
    done = closed()
    assert done.returncode == 0, done.stderr[-2000:]
    done = closed("convert", "--from=hf://a/b/c.npz", f"--to={tmp_path}/x.npz")
    assert done.returncode == 1 and "socket." in done.stderr  # a download would have been heard


@pytest.mark.slow
def test_no_default_run_touches_the_network(tmp_path):
    run = ["train", "--config=digits", *FLAGS, "--config.total_steps=1", f"--workdir={tmp_path}/r"]
    done = closed(*run)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 1
