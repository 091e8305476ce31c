"""Recipes of ImageNet's and CIFAR's size, five steps each, on small sets in the real formats."""

import json

import jax
import numpy as np
import pytest
from command import ROOT, run
from stored import encode_crops, tar_bytes, write_tfds

import crate_jax
from crate_jax.data.stores.tars import imagenet_classes

# Everything else is the recipe's: model, input, optimizer.
FEW = ["--config.total_steps=5", "--config.batch_size=4", "--config.eval_batch_size=4"]
FEW += ["--config.log_every_steps=1", "--config.data.num_workers=1", "--config.eval_every_steps=0"]
FEW += ["--config.log_objective_every_steps=0", "--config.checkpoint_every_steps=5"]


def result_of(*arguments):
    status, out, err = run(*arguments, optimised=True)  # big enough to be worth it
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


def metrics_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_imagenet_from_its_tar_files(tmp_path, photographs):
    crops, synsets = encode_crops(photographs, 16, size=(230, 250)), imagenet_classes()
    train = {
        f"{synsets[label]}.tar": tar_bytes(
            {f"{synsets[label]}_{i}.JPEG": crops[4 * k + i] for i in range(4)}
        )
        for k, label in enumerate((3, 777, 999))
    }
    source = tmp_path / "tars"
    source.mkdir()
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(train))
    val = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": crops[i] for i in range(6)}
    (source / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(val))

    prepared = result_of("-m", "crate_jax", "prepare", "--from", source, "--to", tmp_path / "tfds")
    assert prepared["splits"] == {"train": 12, "validation": 6}
    workdir = tmp_path / "run"
    recipe = f"--config={ROOT}/configs/imagenet1k.py:tiny"
    data = f"--config.data.data_dir={tmp_path / 'tfds'}"
    warmup = "--config.optim.warmup_epochs=1"  # of three steps
    found = result_of("train.py", recipe, data, warmup, f"--workdir={workdir}", *FEW)
    assert (found["step"], found["test/examples"]) == (5, 6)
    steps = metrics_of(workdir)
    assert abs(steps[0]["train/loss"] - np.log(1000)) < 1
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert all(0 <= line["data_wait_share"] <= 1 for line in steps)


@pytest.mark.slow
def test_finetuning_on_cifar10(tmp_path):
    import tensorflow_datasets as tfds

    photographs = [np.random.default_rng(i).integers(0, 256, (99, 99, 3), np.uint8) for i in (0, 1)]
    pngs = encode_crops(photographs, 18, size=(32, 32), suffix=".png")
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
    )
    examples = [
        {"id": b"train_%d" % i, "image": png, "label": np.int64(i % 10)}
        for i, png in enumerate(pngs)
    ]
    version = str(tfds.builder_cls("cifar10").VERSION)
    write_tfds(
        tmp_path / "tfds", "cifar10", version, features, dict(train=examples[:12], test=examples)
    )
    model = crate_jax.create_model("crate_tiny_patch16_224")
    abstract = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32), train=False)
    )["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(np.float32), abstract)
    crate_jax.save_weights(tmp_path / "tiny.safetensors", params, model)

    recipe = f"--config={ROOT}/configs/finetune.py:cifar10-tiny"
    data = f"--config.data.data_dir={tmp_path / 'tfds'}"
    weights = f"--config.init_weights={tmp_path / 'tiny.safetensors'}"
    workdir = tmp_path / "run"
    found = result_of("train.py", recipe, data, weights, f"--workdir={workdir}", *FEW)
    assert (found["step"], found["test/examples"]) == (5, 18)
    assert np.isfinite(found["train/loss"])
    assert len(metrics_of(workdir)) == 5
