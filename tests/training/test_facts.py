"""A run says what its outputs mean and what it was trained on, and is held to that."""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from stored import write_folder, write_tfds

from crate_jax.checkpoint.folder import FOLDER
from crate_jax.checkpoint.manager import Checkpointer
from crate_jax.checkpoint.reading import read_facts
from crate_jax.cli.compare import _stored_images
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, from_dict
from crate_jax.data.images.labelled import LabelledImages
from crate_jax.data.images.pipeline import make_pipeline
from crate_jax.data.rows import BadExampleError
from crate_jax.data.stores.sources import Source, open_source
from crate_jax.interop import load_fitted, read_class_names
from crate_jax.training.loop import open_checkpoints, restore_or_init, train
from crate_jax.training.run import set_up
from crate_jax.training.workdir import check_facts

LEVEL = {"ant": 30, "bee": 130, "cat": 220}


def pictures(name, count=8):
    """Encoded grey images, of another brightness for every class."""
    rng = np.random.default_rng(LEVEL[name])
    pixels = np.clip(LEVEL[name] + rng.integers(-20, 20, (count, 8, 8, 1)), 0, 255)
    return [cv2.imencode(".png", image.astype(np.uint8))[1].tobytes() for image in pixels]


def write_split(root, split, folders):
    """Folders {"0_bee": "bee"} of the images of a class."""
    files = {f"{f}/{i}.png": x for f, n in folders.items() for i, x in enumerate(pictures(n))}
    write_folder(root, split, files)


def config(root, **changes):
    data = {
        "dataset": "folder", "data_dir": str(root), "num_threads": 1,
        "train_transforms": "resize(8)", "eval_transforms": "resize(8)",
    }  # fmt: skip
    sizes = dict(image_size=(8,), patch_size=(4,), in_channels=1, width=16, depth=1, num_heads=2)
    values = dict(
        name="facts",
        batch_size=8,
        eval_batch_size=8,
        total_steps=2,
        model=ModelConfig(name="crate_tiny_patch16_224", **sizes),
        data=DataConfig(**data),
        optim=OptimConfig(lr=1e-2),
    )
    return TrainConfig(**values | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of three classes; splits of some of them, and of other names."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        write_split(root, split, {name: name for name in LEVEL})
    write_split(root, "bees", {"bee": "bee"})
    write_split(root, "others", {"ant": "ant", "cat": "cat"})
    write_split(root, "numbered", {"0_cat": "cat", "1_bee": "bee", "ant": "ant"})
    import tensorflow_datasets as tfds

    names = ["cat", "bee", "ant"]
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=names),
        }
    )
    examples = [{"image": x, "label": names.index(n)} for n in LEVEL for x in pictures(n)]
    write_tfds(root, "backwards", "1.0.0", features, {"test": examples})
    return root


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """A complete run's workdir, and its summary."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(config(root), workdir)


def evaluated(capsys, *arguments):
    """What `evaluate` says, its clock aside."""
    status = main(["evaluate", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert status == 0, err
    found = json.loads(out.splitlines()[-1])
    return {k: v for k, v in found.items() if k in ("top1", "loss", "examples", "fitted")}


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- what is recorded -----------------------------------------------------------------------------


def test_every_checkpoint_records_classes_examples_and_listing(run, root):
    workdir, _ = run
    reader = Checkpointer(workdir, read_only=True)
    recorded = [reader.restore_record(step)["facts"] for step in reader.steps]
    reader.close()
    listing = open_source(config(root).data, "train", image_shape=(8, 8, 1), num_classes=3).listing
    assert listing.endswith(" of names and labels")
    expected = {"classes": ["ant", "bee", "cat"], "examples": 24, "listing": listing}
    assert recorded == [expected]
    assert read_facts(workdir) == expected and read_class_names(workdir) == ("ant", "bee", "cat")


def test_what_one_record_says_holds_for_the_run(run, tmp_path):
    """An older version may have written the newest record; it may be damaged; nothing may be."""
    checkpointer = Checkpointer(tmp_path)
    for step, facts in ((1, {"facts": {"examples": 5}}), (2, {})):
        checkpointer.save(step, {"step": jax.numpy.int32(step)}, {"step": step} | facts)
    checkpointer.close()
    assert read_facts(tmp_path) == {"examples": 5}
    path = tmp_path / FOLDER / "1/record/metadata"
    path.write_text(path.read_text().replace('"examples": 5', '"examples": 6'))
    assert read_facts(tmp_path) == {} == read_facts(tmp_path / "none")


# --- evaluation -----------------------------------------------------------------------------------


def test_a_split_is_evaluated_by_the_names_of_its_classes(run, root, capsys):
    workdir, summary = run
    whole = {k.removeprefix("test/"): v for k, v in summary.items() if k.startswith("test/")}
    backwards = evaluated(capsys, f"--workdir={workdir}", "--dataset=backwards", "--split=test")
    assert backwards.pop("fitted") == []
    assert backwards == pytest.approx({k: whole[k] for k in ("top1", "loss", "examples")})
    bees, others = (
        evaluated(capsys, f"--workdir={workdir}", f"--split={split}")
        for split in ("bees", "others")
    )
    assert (bees["examples"], others["examples"]) == (8, 16)
    for name in ("loss", "top1"):
        assert (bees[name] + 2 * others[name]) / 3 == pytest.approx(whole[name])
    assert abs(bees["loss"] - others["loss"]) > 0.01  # swapped labels would show


def test_classes_that_the_run_does_not_know_are_named(run, capsys):
    line = refused(capsys, "evaluate", f"--workdir={run[0]}", "--split=numbered")
    assert (
        "numbered must have classes that the model knows; 0_cat, 1_bee are not among ant, bee, cat."
        in line
    )


def test_weights_that_name_their_classes_are_evaluated_by_name(run, capsys, tmp_path):
    workdir, summary = run
    file = tmp_path / "w.safetensors"
    assert main(["convert", f"--from={workdir}", f"--to={file}"]) == 0
    assert load_fitted(file, None).class_names == ("ant", "bee", "cat")
    model = ["--model=crate_tiny_patch16_224", "--model-kwargs"]
    model += ["image_size=8", "patch_size=4", "in_channels=1", "width=16", "depth=1", "num_heads=2"]
    root = from_dict(json.loads((workdir / "config.json").read_text())).data.data_dir
    data = ["--batch_size=8", f"--data_dir={root}", "--split=test", *model]
    found = evaluated(capsys, f"--weights={file}", "--dataset=backwards", *data)
    assert found["loss"] == pytest.approx(summary["test/loss"])
    folder = [f"--weights={file}", "--dataset=folder", *data, "--split=numbered"]
    assert "0_cat, 1_bee are not among ant, bee, cat" in refused(capsys, "evaluate", *folder)


def test_a_run_that_does_not_say_its_classes_is_no_damaged_one(run, root, capsys, tmp_path):
    workdir = without_facts(run[0], tmp_path)
    found = evaluated(capsys, f"--workdir={workdir}", "--split=test")
    assert found["loss"] == pytest.approx(run[1]["test/loss"])
    assert found["fitted"] == ["classes by number: the weights name none"]
    line = refused(capsys, "evaluate", f"--workdir={workdir}", "--split=bees")
    assert "checkpoint must have the arrays of this config; step 2 in" in line
    assert "has params/head/bias float32(3,), expected float32(1,). Use the config and" in line


def without_facts(workdir, tmp_path):
    """A copy as an older version would have written it."""
    copy = tmp_path / "older"
    shutil.copytree(workdir, copy)
    for path in (copy / FOLDER).glob("*/record/metadata"):
        record = json.loads(path.read_text())
        del record["facts"], record["checksum"]
        path.write_text(json.dumps(record))
    return copy


def test_compare_takes_the_labels_that_the_weights_have(run, root):
    """`compare` on the images of a split whose names are in another order."""
    data = dataclasses.replace(config(root).data, dataset="backwards")
    loaded = load_fitted(run[0], None)
    args = argparse.Namespace(images=None, batch_size=24)
    _, labels, name = _stored_images(args, loaded.model, data, loaded.class_names)
    assert name == "backwards/test"
    assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_a_bad_label_is_told_as_it_is_stored(root):
    source = Source("x", [{"image": pictures("ant")[0], "label": 2}], 2, ("bee", "ant"))
    pipeline = make_pipeline(config(root).data, (8, 8, 1), train=False)
    rows = LabelledImages(source, pipeline, ("ant", "bee", "cat"))
    with pytest.raises(BadExampleError, match=r"x\[0\] must have a label of 0 … 1; got 2\."):
        rows.row(0, np.random.default_rng(0))
    assert (rows.num_classes, rows.class_names) == (3, ("ant", "bee", "cat"))


# --- going on -------------------------------------------------------------------------------------


CHANGES = {
    "renamed": (
        lambda train: (train / "bee").rename(train / "wasp"),
        "classes of the data must stay ant, bee, cat in {}, which is trained on that; got ant, "
        "cat, wasp (without bee, with wasp). Restore the data set, or choose another --workdir.",
    ),
    "numbered": (
        lambda train: [(train / n).rename(train / f"{i}_{n}") for i, n in enumerate(LEVEL)],
        "classes of the data must stay ant, bee, cat in {}, which is trained on that; got 0_ant, "
        "1_bee, 2_cat (without ant, bee, cat, with 0_ant, 1_bee, 2_cat). ",
    ),
    "added": (
        lambda train: (train / "dog").mkdir(),
        "got ant, bee, cat, dog (with dog). Restore",
    ),
    "removed": (
        lambda train: shutil.rmtree(train / "bee"),
        "got ant, cat (without bee). Restore",
    ),
    "one more image": (
        lambda train: shutil.copy(train / "bee/0.png", train / "bee/00.png"),
        "examples of the data must stay 24 in {}, which is trained on that; got 25. Restore",
    ),
    "an image in another class": (
        lambda train: (train / "bee/0.png").rename(train / "cat/00.png"),
        "listing of the data must stay ",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_other_data(run, root, tmp_path, change):
    workdir = run[0]
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    for split in ("train", "test"):
        shutil.copytree(root / "train", tmp_path / split)
        CHANGES[change][0](tmp_path / split)
    with pytest.raises(ValueError) as caught:
        train(config(tmp_path, total_steps=4), workdir)
    assert CHANGES[change][1].format(workdir) in str(caught.value)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_the_same_data_elsewhere_is_the_same(run, root, tmp_path):
    shutil.copytree(root, tmp_path / "moved")
    assert train(config(tmp_path / "moved"), run[0])["step"] == 2


def test_the_order_of_classes_is_told():
    """No store of ours can swap the folders of a class; a TFDS set can swap its names."""
    message = (
        r"classes of the data must stay a, b, c in run, .* got b, a, c \(in the order b, a, where"
    )
    with pytest.raises(ValueError, match=message):
        check_facts({"classes": ["a", "b", "c"]}, {"classes": ["b", "a", "c"]}, Path("run"))
    check_facts({"classes": ["a"]}, {"classes": ["a"], "examples": 3}, Path("run"))


def test_a_run_of_a_larger_model_is_not_set_aside(run, root, tmp_path):
    """A run without facts whose data has another class."""
    workdir = without_facts(run[0], tmp_path)
    for split in ("train", "test"):
        shutil.copytree(root / "train", tmp_path / split)
        write_split(tmp_path, split, {"dog": "cat"})
    message = (
        r"has \w+/.*head/bias float32\(3,\), expected float32\(4,\)\. Use the config and the d"
    )
    with pytest.raises(ValueError, match=message):
        train(config(tmp_path, total_steps=4), workdir)
    assert [p.name for p in (workdir / FOLDER).iterdir()] == ["2"]


# --- fine-tuning ----------------------------------------------------------------------------------


def test_a_head_goes_on_with_its_own_classes_alone(run, tmp_path):
    weights = tmp_path / "w.npz"
    assert main(["convert", f"--from={run[0]}", f"--to={weights}", "--layout=official"]) == 0
    assert read_class_names(weights) == ("ant", "bee", "cat")
    for split in ("train", "test"):
        write_split(tmp_path, split, {"ant": "ant", "bee": "bee", "wasp": "cat"})
    other = set_up(config(tmp_path, init_weights=str(weights)), "train", "eval")
    message = (
        r"w\.npz must be weights for the classes ant, bee, wasp; its head is for ant, bee, cat: "
        r"the data is without cat, with wasp\. Ask for a new head \(fit: head\), or rename"
    )
    with pytest.raises(ValueError, match=message):
        restore_or_init(other, open_checkpoints(other, tmp_path / "run"))
    model, swapped = other.task.model, {"classes": ["bee", "ant", "cat"]}
    with pytest.raises(ValueError, match=r"ant, bee, cat: the data is in the order bee, ant, wh"):
        load_fitted(weights, model, facts=swapped)
    new = load_fitted(weights, model, fit=("head",), facts=swapped)
    assert new.report == ["head: new, for 3 classes"] and new.class_names == ()
    own = load_fitted(weights, model, facts={"classes": ["ant", "bee", "cat"], "examples": 9})
    assert own.class_names == ("ant", "bee", "cat")


def test_a_fact_that_the_data_have_no_more_is_a_change(tmp_path):
    recorded = {"classes": ["ant", "bee"], "examples": 24}
    with pytest.raises(ValueError, match=r"^classes of the data must stay .*ant.* got None"):
        check_facts(recorded, {"examples": 24}, tmp_path)


def test_labels_without_names_are_said_to_go_by_number(run, capsys, tmp_path):
    """Integers name nothing: whether 0 is an ant, nobody can check."""
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(8, 8, 1)), "label": tfds.features.Scalar(np.int64)}
    )
    examples = [{"image": pictures(name, 1)[0], "label": i} for i, name in enumerate(LEVEL)]
    write_tfds(tmp_path, "numbers", "1.0.0", features, {"test": examples})
    found = evaluated(
        capsys, f"--workdir={run[0]}", "--dataset=numbers", f"--data_dir={tmp_path}", "--split=test"
    )
    assert found["fitted"] == ["classes by number: the data name none"]


def test_a_folder_with_our_weights_names_its_classes(run, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    assert main(["convert", f"--from={run[0]}", f"--to={folder / 'model.safetensors'}"]) == 0
    assert read_class_names(folder) == ("ant", "bee", "cat")
    assert load_fitted(folder, None).class_names == ("ant", "bee", "cat")


def test_features_have_no_classes_to_name(run, tmp_path):
    source = tmp_path / "named.safetensors"
    assert main(["convert", f"--from={run[0]}", f"--to={source}"]) == 0
    headless = load_fitted(source, None).model.clone(num_classes=0)
    assert load_fitted(source, headless, facts={"classes": ["x", "y"]}).class_names == ()
