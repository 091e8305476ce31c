"""Weights that state their model need no --model, and one that contradicts them is refused."""

import json
import os

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

from crate_jax import (
    Crate,
    CrateCausal,
    CrateMae,
    load_pretrained,
    load_weights,
    preprocessing,
    save_weights,
)
from crate_jax.config import DataConfig
from crate_jax.data.stores.sources import open_source
from crate_jax.interop.pictures import Preprocessing
from crate_jax.interop.pretrained import stated_by
from crate_jax.models.zoo import architecture

SIZES = dict(patch_size=8, num_classes=10, width=16, depth=1, num_heads=2, in_channels=1)
MODEL = Crate(16, **SIZES)
PREPARED = Preprocessing((16, 16), (0.25,), (0.75,), 0.5)
DATA = ["--dataset=digits", "--split=test[:40]", "--batch_size=40"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stated") / "mine"
    names = [str(digit) for digit in range(10)]
    params = random_params(MODEL)
    save_weights(f"{path}/", params, MODEL, class_names=names, preprocessing=PREPARED)
    return path


def expected_loss(path):
    """Loss in nats and top-1 of the first 40 test digits, as one computes them in Python."""
    model, params = load_pretrained(str(path))
    prepare = preprocessing(str(path))
    data = DataConfig(dataset="digits")
    source = open_source(data, "test[:40]", image_shape=(16, 16, 1), num_classes=None)
    examples = [source.examples[i] for i in range(40)]
    stored = [np.frombuffer(example["image"], np.uint8) for example in examples]
    images = jnp.stack([prepare(cv2.imdecode(png, cv2.IMREAD_GRAYSCALE)) for png in stored])
    logits = model.apply({"params": params}, images, train=False)
    labels = np.array([example["label"] for example in examples])
    chosen = jax.nn.log_softmax(logits)[np.arange(40), labels]
    return -float(chosen.mean()), float((logits.argmax(-1) == labels).mean())


def test_evaluate_takes_model_and_preprocessing_from_the_folder(folder, call):
    status, found, err = call("evaluate", f"--weights={folder}", *DATA)
    assert status == 0, err
    loss, top1 = expected_loss(folder)
    assert found["loss"] == pytest.approx(loss, rel=1e-5) and found["top1"] == pytest.approx(top1)
    assert found["examples"] == 40 and found["fitted"] == []
    _, other, _ = call("evaluate", f"--weights={folder}/", *DATA, "--transforms=resize(16)")
    assert abs(other["loss"] - loss) > 1e-4  # so the folder's own preparation was seen above


def test_a_new_head_and_other_sizes(folder, call):
    status, found, err = call("knn", f"--weights={folder}", *DATA, "--k=3", "--fit", "head")
    assert status == 0, err
    assert found["fitted"][0] == "head: new, for 10 classes" and 0 < found["k3/top1"] <= 1
    size = ["--model-kwargs", "image_size=32"]
    status, found, err = call("evaluate", f"--weights={folder}", *DATA, *size, "--fit=image_size")
    assert status == 0, err
    assert found["fitted"] == ["embedding/pos_embedding: 2x2 to 4x4 patches, bicubic"]
    status, _, line = call("evaluate", f"--weights={folder}", *DATA, *size)
    assert (status, line) == (
        2,
        "error: --model-kwargs must be the model that the weights state; got image_size [32, 32] "
        "in the place of [16, 16]. Leave --model-kwargs out, or add --fit image_size.\n",
    )
    size += ["num_classes=3", "eta=0.2", "--fit", "eta"]
    _, _, line = call("evaluate", f"--weights={folder}", *DATA, *size)
    assert line.endswith("Leave --model-kwargs out, or add --fit eta image_size head.\n")


def test_layerwise_export_and_convert_read_the_folder(folder, call, tmp_path):
    status, found, err = call("layerwise", f"--weights={folder}", *DATA, "--images=8")
    assert status == 0 and len(found["layers"]["zeros"]) == 1, err
    pytest.importorskip("flatbuffers")
    status, found, err = call("export", f"--weights={folder}", f"--output={tmp_path}/out")
    assert status == 0 and found["within_tolerance"], err
    facts = json.loads((tmp_path / "out/model.json").read_text())
    assert facts["model"] == architecture(MODEL)
    assert facts["preprocessing"]["inside"] == {"mean": [0.25], "std": [0.75]}
    assert facts["preprocessing"]["crop_share"] == 0.5
    status, _, err = call("convert", f"--from={folder}", f"--to={tmp_path}/w.npz")
    assert status == 0, err
    found = load_weights(tmp_path / "w.npz", MODEL)
    jax.tree.map(np.testing.assert_array_equal, found, load_weights(folder, MODEL))


def test_config_json_speaks_for_weights_that_state_nothing(folder, call, tmp_path):
    """As where another program has written the weights beside it."""
    torch = pytest.importorskip("torch")
    other = tmp_path / "other"
    other.mkdir()
    save_weights(tmp_path / "w.npz", load_weights(folder, MODEL), MODEL)
    save_weights(other / "w.pth", load_weights(folder, MODEL), MODEL)
    os.rename(other / "w.pth", other / "pytorch_model.bin")
    assert torch.load(other / "pytorch_model.bin")
    status, _, line = call("evaluate", f"--weights={other}", *DATA)
    assert (status, line) == (
        2,
        f"error: evaluate --weights must get --model too, for {other} states no model. Name it; a "
        "run is given as --workdir.\n",
    )
    (other / "config.json").write_text((folder / "config.json").read_text())
    for command in (["evaluate", *DATA], ["export", f"--output={tmp_path}/out"]):
        status, _, err = call(command[0], f"--weights={other}", *command[1:])
        assert status == 0, err
    assert architecture(stated_by(other)) == architecture(MODEL)
    status, _, line = call(
        "convert", f"--from={tmp_path}/w.npz", f"--to={tmp_path}/x.npz", "--model-kwargs", "width=3"
    )
    assert (status, line) == (2, "error: --model-kwargs must go with --model. See --help.\n")
    # A name in the place of our fields, as timm writes it.
    (other / "config.json").write_text('{"architecture": "vit_small_patch16_224"}')
    assert stated_by(other) is None


def test_a_file_and_a_run_that_state_their_model(folder, tiny_run, call, tmp_path):
    save_weights(tmp_path / "w.safetensors", load_weights(folder, MODEL), MODEL)
    assert architecture(stated_by(tmp_path / "w.safetensors")) == architecture(MODEL)
    status, found, err = call("evaluate", f"--weights={tmp_path}/w.safetensors", *DATA)
    assert status == 0 and found["examples"] == 40, err
    assert stated_by(tiny_run) is None
    status, _, line = call("evaluate", f"--weights={tiny_run}", *DATA)
    assert status == 2 and "states no model. Name it; a run is given as --workdir." in line
    status, _, line = call("evaluate", f"--weights={tmp_path}/none", *DATA)
    assert status == 2 and line.startswith("error: ") and f"{tmp_path}/none" in line
    status, _, line = call("evaluate", f"--workdir={tiny_run}", "--model-kwargs", "width=3")
    assert status == 2 and "must go with --weights; a run knows its own model" in line


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (["vit_tiny_patch16_224"], "family vit in the place of crate. Leave --model out.\n"),
        (["crate_tiny_patch16_224"], "image_size [224, 224] in the place of [16, 16], "),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "export", "segment", "convert", "compare"])
def test_a_model_that_contradicts_is_refused(folder, call, tmp_path, command, model, said):
    if command == "compare":
        pytest.importorskip("torch")
    flags = {
        "evaluate": DATA,
        "export": [f"--output={tmp_path}/out"],
        "segment": [f"--images={tmp_path}"],
        "convert": [f"--to={tmp_path}/w.npz"],
        "compare": [],
    }[command]
    if command == "segment":
        cv2.imwrite(f"{tmp_path}/a.png", np.zeros((16, 16), np.uint8))
    weights = "--from" if command == "convert" else "--weights"
    status, _, line = call(command, f"{weights}={folder}", "--model", *model, *flags)
    assert status == 2 and len(line.splitlines()) == 1
    assert line.startswith("error: --model must be the model that the weights state; got ")
    assert said in line and "Leave --model out" in line


def test_a_model_that_agrees_is_taken(folder, call):
    named = [f"{name}={value}" for name, value in (SIZES | dict(image_size=16)).items()]
    flags = ["--model=crate_tiny_patch16_224", "--model-kwargs", *named]
    _, found, err = call("evaluate", f"--weights={folder}", *DATA, *flags)
    _, without, _ = call("evaluate", f"--weights={folder}", *DATA)
    assert found["loss"] == without["loss"], err
    del named[named.index("num_classes=10")]  # the data says how many
    _, found, err = call("evaluate", f"--weights={folder}", *DATA, *flags)
    assert found["loss"] == without["loss"], err
    status, _, line = call("evaluate", f"--weights={folder}", *DATA, *flags, "num_classes=9")
    assert status == 2 and "got num_classes 9 in the place of 10." in line


def test_a_model_of_text_and_an_autoencoder(call, tmp_path):
    model = CrateCausal(context_length=8, vocab_size=257, width=8, depth=1, num_heads=2)
    save_weights(f"{tmp_path}/text/", random_params(model), model)
    (tmp_path / "a.txt").write_text("The white box. " * 20)
    flags = ["--dataset=text", f"--data_dir={tmp_path}", "--split=a.txt", "--tokenizer=bytes"]
    status, found, err = call("evaluate", f"--weights={tmp_path}/text", *flags)
    assert status == 0 and found["bits_per_byte"] > 0, err
    named = ["context_length=8", "vocab_size=257", "width=8", "depth=1", "num_heads=2"]
    flags += ["--model=crate_causal_base", "--model-kwargs", *named]
    _, same, err = call("evaluate", f"--weights={tmp_path}/text", *flags)
    assert found["loss"] == same["loss"], err
    sizes = {k: v for k, v in SIZES.items() if k != "num_classes"}
    mae = CrateMae(16, **sizes, num_classes=0, decoder_depth=1)
    save_weights(f"{tmp_path}/mae/", random_params(mae), mae)
    flags = ["--task=masked_autoencoding", "--k=3"]
    status, found, err = call("knn", f"--weights={tmp_path}/mae", *DATA, *flags)
    assert status == 0 and 0 <= found["k3/top1"] <= 1, err
