"""`probe` and `knn`: a run, a weights file, what is kept, the baselines, and what they refuse."""

import json

import cv2
import jax
import numpy as np
import pytest
from objectives import small
from toy import Regress

from crate_jax import load_weights, save_weights
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.data.images.labelled import open_labelled_images
from crate_jax.evaluation.features import Features
from crate_jax.evaluation.knn import knn
from crate_jax.models.zoo import build_model
from crate_jax.tasks import TASKS
from crate_jax.training.loop import train

FIELDS = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=16, depth=1, num_heads=2)
NAME, TRAIN, TEST = "crate_mae_tiny_patch16_224", "train[:300]", "test[:90]"
DATA = ["--dataset", "digits", "--train_split", TRAIN, "--split", TEST, "--batch_size", "40"]


def config(task="masked_autoencoding", **fields):
    return TrainConfig(
        task=task,
        batch_size=48,
        eval_batch_size=40,
        total_steps=1,
        model=ModelConfig(name=NAME, **FIELDS, **fields),
        data=DataConfig(
            train_split=TRAIN,
            eval_split=TEST,
            train_transforms="resize(16)",
            eval_transforms="resize(16)",
        ),
        optim=OptimConfig(lr=1e-3),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    train(config(decoder_depth=1), folder)
    return folder


@pytest.fixture
def call(capsys):
    """The JSON of a command that must succeed, or its one line."""

    def call(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        if status == 0:
            return json.loads(out.splitlines()[-1])
        assert (status, out) == (2, "") and len(err.splitlines()) == 1
        return err

    return call


def test_a_run_and_its_baselines(workdir, call):
    found = call("probe", "--workdir", workdir, "--baselines", "pixels", "random", "--seeds", 0, 1)
    assert (found["train_split"], found["split"], found["seeds"]) == (TRAIN, TEST, [0, 1])
    assert (found["step"], found["fitted"]) == (1, [])
    assert found["pixels/linear/top1"] > 0.8  # of images that keep all there is to see
    assert 0.1 < found["random/linear/top1"] < found["pixels/linear/top1"]
    by_seed = found["random/linear/top1_by_seed"]
    assert by_seed[0] != by_seed[1]
    assert found["random/linear/top1"] == pytest.approx(np.mean(by_seed))
    assert len(found["linear/C_by_seed"]) == 2
    assert "linear/C" not in found


def test_nearest_pixels_are_those_of_the_images_themselves(workdir, call):
    found = call("knn", "--workdir", workdir, "--baselines", "pixels", "--k", 5, 400)
    data, splits = config().data, []
    for split in (TRAIN, TEST):
        rows = open_labelled_images(
            data, split, train=False, image_shape=(16, 16, 1), num_classes=None
        )
        read = [rows.row(i, np.random.default_rng(0)) for i in range(len(rows))]
        values = np.stack([row["image"] for row in read]).reshape(len(read), -1) / 255
        splits.append(Features(values.astype(np.float32), np.stack([row["label"] for row in read])))
    for name, value in knn(*splits, ks=(5, 400)).items():
        assert found[f"pixels/{name}"] == value
    assert "k5/top1_by_seed" not in found
    assert found["k400/top5"] >= found["k400/top1"] > 0.1


def test_flags_reach_the_votes(workdir, call, tmp_path):
    kept = ["--features", tmp_path / "kept.npz", "--k", 40]
    asked = [
        call("knn", "--workdir", workdir, *kept, *flags)
        for flags in ((), ("--temperature", "1e3"), ("--form", "dinov2"))
    ]
    assert asked[0]["k40/top1"] != asked[1]["k40/top1"]
    assert asked[0] == asked[2]  # at the largest k alone they are proportional


def test_weights_are_probed_as_the_run_is(workdir, call, tmp_path):
    model = build_model(config(decoder_depth=1).model)
    path = tmp_path / "mae.safetensors"
    save_weights(path, load_weights(workdir, model), model)
    fields = [f"{k}={v}".replace(" ", "") for k, v in (FIELDS | dict(decoder_depth=1)).items()]
    flags = ["--model", NAME, "--model-kwargs", *fields, "--transforms", "resize(16)", *DATA]
    flags += ["--task", "masked_autoencoding"]
    fewshot = ["--classifiers", "fewshot", "--shots", 1, 5, "--l2", 1, 64]
    found = call("probe", "--weights", path, *flags, *fewshot)
    of_run = call("probe", "--workdir", workdir, *fewshot)
    names = {f"fewshot/shots_{shots}/l2_{l2}/top1" for shots in (1, 5) for l2 in (1, 64)}
    assert {name for name in found if name.startswith("fewshot/")} == names
    assert {name: found[name] for name in names} == {name: of_run[name] for name in names}
    assert found["step"] is None


def test_sgd_and_two_classifiers_at_once(workdir, call):
    flags = ["--classifiers", "linear", "fewshot", "subspace", "svm", "--shots", 2]
    flags += ["--components", 3, "--C", 0.5]
    found = call("probe", "--workdir", workdir, *flags, "--solver", "sgd", "--epochs", 5)
    assert found["linear/top1"] > 0.2
    assert found["fewshot/shots_2/l2_1024/top1"] > 0.15
    assert found["subspace/top1"] > 0.3 and found["subspace/components_by_seed"] == [3]
    assert found["svm/top1"] > 0.3
    assert len(found["linear/rate_by_seed"]) == 1


def test_features_are_kept_and_those_of_another_model_refused(workdir, call, tmp_path):
    path = tmp_path / "features.npz"
    flags = ["knn", "--workdir", workdir, "--features", path, "--k", 3]
    first, written = call(*flags), path.read_bytes()
    assert call(*flags) == first
    assert path.read_bytes() == written
    assert "holds features of other data" in call(*flags, "--train_split", "train[:200]")
    other = tmp_path / "other"
    train(config(decoder_depth=2), other)
    line = call("knn", "--workdir", other, "--features", path)
    assert line.startswith("error: --features must hold features of this model and data")
    assert "holds features of another model" in line


def test_labels_are_read_though_the_task_reads_none(workdir, call, tmp_path):
    # By split and class: which half of each image is light.
    halves = {"train": {"a": "LL", "b": "RR"}, "test": {"a": "L", "b": "LL"}}
    for split, classes in halves.items():
        for name, sides in classes.items():
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number, side in enumerate(sides):
                image = np.zeros((16, 16), np.uint8)
                image[:, :8] = 200 + number
                cv2.imwrite(str(folder / f"{number}.png"), image if side == "L" else image[:, ::-1])
    flags = ["--dataset", "folder", "--data_dir", tmp_path, "--train_split", "train"]
    flags += ["--split", "test", "--baselines", "pixels", "--k", 4]
    found = call("knn", "--workdir", workdir, *flags)
    assert found["pixels/k4/top1"] == pytest.approx(1 / 3)  # of b the images are like those of a


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "simdino", "mcr2"])
def test_every_objective_of_images(task, call, tmp_path):
    made = small(task, total_steps=1)
    train(made, tmp_path)
    flags = ["--train_split", TRAIN, "--split", TEST, "--batch_size", 40, "--k", 5]
    flags += ["--features", tmp_path / "kept.npz", "--baselines", "random"]
    found = call("knn", "--workdir", tmp_path, *flags)
    assert 0.1 < found["k5/top1"] <= found["k5/top5"] <= 1
    with np.load(tmp_path / "kept.npz") as kept:
        assert (len(kept["train/values"]), len(kept["test/values"])) == (300, 90)
        assert (kept["test/values"].std(axis=0) > 0).any()


def test_a_classifier_of_other_classes_is_read_without_its_head(call, tmp_path):
    model = build_model(ModelConfig(name="crate_tiny_patch16_224", **FIELDS, num_classes=3))
    params = model.init(jax.random.key(0), model.sample_input(), train=False)["params"]
    path = tmp_path / "three.safetensors"
    save_weights(path, params, model)
    fields = [f"{name}={value}".replace(" ", "") for name, value in FIELDS.items()]
    flags = ["--model", "crate_tiny_patch16_224", "--model-kwargs", *fields]
    flags += ["--transforms", "resize(16)", *DATA, "--k", 5]
    assert "num_classes" in call("knn", "--weights", path, *flags)
    assert call("knn", "--weights", path, *flags, "--fit", "head")["k5/top1"] > 0.3


def test_a_model_of_no_images_has_no_features(call, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "regress", Regress)
    train(TrainConfig(task="regress", batch_size=48, eval_batch_size=32, total_steps=1), tmp_path)
    assert "features must be those of images; got a model" in call("knn", "--workdir", tmp_path)


def test_mistakes(workdir, call):
    line = call("probe", "--workdir", workdir, "--task", "classify")
    assert "--task must go with --weights" in line
    line = call("knn", "--workdir", workdir, "--k", 0)
    assert "k must be at least 1" in line
    line = call("probe", "--workdir", workdir, "--classifiers", "fewshot", "--shots", 31)
    assert "shots must be at most the rows of each class" in line
    line = call("probe", "--workdir", workdir, "--classifiers", "svm", "linear", "--shots", 3)
    assert line == (
        "error: --shots must go with --classifiers fewshot; got svm linear. Leave it out, or add "
        "fewshot.\n"
    )
    assert "--solver must go with --classifiers linear; got svm." in call(
        "probe", "--workdir", workdir, "--classifiers", "svm", "--solver", "sgd"
    )
    for flags in ([], ["--solver", "lbfgs"]):
        line = call("probe", "--workdir", workdir, "--epochs", 3, *flags)
        assert line.startswith("error: --epochs must go with --solver sgd; got ")
    line = call("knn", "--workdir", workdir, "--seeds", 2, -1)
    assert line == "error: --seeds must be >= 0; got -1. Choose another.\n"
    assert "invalid choice: 'tree'" in call("probe", "--workdir", workdir, "--classifiers", "tree")
