"""`reconstruct` and `evaluate` of a run and of weights that reconstruct, and what they refuse."""

import json

import cv2
import numpy as np
import pytest
from command import TINY, run

from crate_jax import load_weights, save_weights
from crate_jax.checkpoint.reading import read_trained
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from crate_jax.models.zoo import build_model
from crate_jax.training.loop import train

FIELDS = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, width=16, depth=1, num_heads=2)
NAME, SPLIT = "crate_mae_tiny_patch16_224", "test[:10]"


def config(task, **fields):
    return TrainConfig(
        task=task,
        batch_size=48,
        eval_batch_size=16,
        total_steps=1,
        model=ModelConfig(name=NAME, **FIELDS, **fields),
        data=DataConfig(
            eval_split=SPLIT, train_transforms="resize(16)", eval_transforms="resize(16)"
        ),
        optim=OptimConfig(lr=1e-3),
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    train(config("masked_autoencoding", decoder_depth=1), folder)
    return folder


def test_a_run(workdir, call, tmp_path):
    status, found, _ = call("reconstruct", "--workdir", workdir)
    assert status == 0 and found["output"] == str(workdir / "reconstruction.png")
    assert (found["step"], found["images"], found["split"]) == (1, 8, SPLIT)
    shown = cv2.imread(found["output"], cv2.IMREAD_GRAYSCALE)
    assert shown.shape == (8 * 128, 3 * 128)  # enlarged eight times
    original, masked, told = np.split(shown[::8, ::8].astype(int), 3, axis=1)
    differs = (masked != original).reshape(16, 8, 2, 8).any(axis=(1, 3))  # of each patch
    hidden = differs.repeat(8, axis=0).repeat(8, axis=1)
    assert differs.mean() == 0.75 and set(masked[hidden]) == {128}
    assert (told[~hidden] == original[~hidden]).all() and (told != original)[hidden].any()
    output = tmp_path / "shown.jpg"
    assert call("reconstruct", "--workdir", workdir, "--output", output)[0] == 0
    assert cv2.imread(str(output)).shape == (8 * 128, 3 * 128, 3)


def test_evaluate_says_what_the_error_is(workdir, call):
    status, found, _ = call("evaluate", "--workdir", workdir)
    assert status == 0 and found["examples"] == 10 and found["fitted"] == []
    assert found["loss"] > 0.5 and 0.5 < found["loss_of_means"] < 1


def test_weights(workdir, call, tmp_path):
    model = build_model(config("masked_autoencoding", decoder_depth=1).model)
    save_weights(tmp_path / "mae.npz", load_weights(workdir, model), model)
    fields = [f"{name}={value}".replace(" ", "") for name, value in FIELDS.items()]
    given = ["--model", NAME, "--dataset", "digits", "--split", SPLIT, "--transforms", "resize(16)"]
    given += ["--model-kwargs", *fields, "decoder_depth=1"]
    output = tmp_path / "w.png"
    weights = ["--weights", tmp_path / "mae.npz"]
    status, found, err = call("reconstruct", *weights, "--output", output, *given)
    assert status == 0, err
    assert found["step"] is None and found["images"] == 8
    assert call("reconstruct", "--workdir", workdir, "--output", tmp_path / "r.png")[0] == 0
    assert output.read_bytes() == (tmp_path / "r.png").read_bytes()
    assert "decoder" in read_trained(workdir, "latest")[0]


def test_how_much_is_hidden_and_how_it_is_told(workdir, call, tmp_path):
    output = tmp_path / "half.png"
    assert call("reconstruct", "--workdir", workdir, "--ratio", 0.5, "--output", output)[0] == 0
    shown = cv2.imread(str(output), cv2.IMREAD_GRAYSCALE)
    original, masked, _ = np.split(shown[::8, ::8].astype(int), 3, axis=1)
    assert (masked != original).reshape(16, 8, 2, 8).any(axis=(1, 3)).mean() == 0.5
    model = build_model(config("masked_autoencoding", decoder_depth=1).model)
    save_weights(tmp_path / "mae.safetensors", load_weights(workdir, model), model)
    given = ["--weights", tmp_path / "mae.safetensors", "--model", NAME, "--dataset", "digits"]
    fields = [f"{name}={value}".replace(" ", "") for name, value in FIELDS.items()]
    given += ["--transforms", "resize(16)", "--model-kwargs", *fields, "decoder_depth=1"]
    pictures = []
    for flags in ([], ["--not-normalized"]):
        assert call("reconstruct", *given, *flags, "--output", output)[0] == 0
        pictures.append(cv2.imread(str(output), cv2.IMREAD_GRAYSCALE)[::8, ::8])
    differ = np.any(pictures[0] != pictures[1], axis=0)
    assert differ[32:].any() and not differ[:32].any()  # of the third picture alone
    for arguments, message in (
        (
            ["--ratio", "0.99"],
            "error: masking.ratio must leave a patch and hide one of the 4 of an",
        ),
        (["--ratio", "1.5"], "error: masking.ratio must be > 0 and < 1; got 1.5."),
        (["--not-normalized"], "error: --not-normalized must go with --weights; a run knows."),
    ):
        status, found, err = call("reconstruct", "--workdir", workdir, *arguments)
        assert (status, found) == (2, None) and err.startswith(message) and err.count("\n") == 1


@pytest.mark.slow
def test_the_encoder_of_a_run_is_fine_tuned_by_the_command_line(workdir, tmp_path):
    flags = [*TINY, "--config.model.name=" + NAME, "--config.model.decoder_depth=0"]
    flags += ["--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2"]
    flags += [
        f"--config.init_weights={workdir}",
        "--config.init_fit=head",
        "--config.total_steps=4",
    ]
    pool = "--config.model.pool=cls"
    status, out, err = run("train.py", f"--workdir={tmp_path / 'tuned'}", *flags, pool)
    assert status == 0, err
    assert 0 <= json.loads(out.splitlines()[-1])["test/top1"] <= 1
    for line in ("decoder, mask_token: left aside, for the model has none", "head: new, for 10 cl"):
        assert f"fitted: {line}" in err
    tuned, trained = (read_trained(folder, "latest")[0] for folder in (tmp_path / "tuned", workdir))
    moved = np.abs(tuned["blocks"]["ista"]["D"] - trained["blocks"]["ista"]["D"]).max()
    assert 0 < moved < 0.05, "it starts from the pre-trained encoder"
    assert tuned["head"]["kernel"].shape == (16, 10) and "decoder" not in tuned


@pytest.mark.slow
def test_pictures_without_labels(workdir, call, tmp_path):
    """They train it, and are reconstructed, in whatever folders they lie."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = tmp_path / ("photos" if i % 3 else f"photos/{i // 20}") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), rng.integers(0, 256, (20, 18), np.uint8))
    made = config("masked_autoencoding", decoder_depth=1)
    made.data.dataset, made.data.data_dir = "folder", str(tmp_path)
    made.data.train_split, made.data.eval_split = "photos", "photos/0"
    assert train(made, tmp_path / "run")["test/examples"] == 7
    given = ["--dataset", "folder", "--data_dir", tmp_path / "photos", "--split", "."]
    for trained in (workdir, tmp_path / "run"):
        status, found, err = call("reconstruct", "--workdir", trained, *given)
        assert status == 0 and found["images"] == 8, err
    assert cv2.imread(found["output"]).shape == (8 * 128, 3 * 128, 3)
    status, _, err = call("reconstruct", "--workdir", workdir, *given[:-1], "phots")
    assert status == 2 and "split must be a folder below" in err and err.count("\n") == 1


def test_what_it_refuses(workdir, call, tmp_path):
    train(config("classify", decoder_depth=0), tmp_path)
    for arguments, message in (
        (["--workdir", tmp_path], "a run of the task masked_autoencoding; "),
        ([], "reconstruct must get one of --workdir and --weights"),
        (["--weights", "w.npz"], "reconstruct --weights must get --dataset too"),
        (["--workdir", workdir, "--output", tmp_path / "x.txt"], "a known format; got "),
    ):
        status, found, err = call("reconstruct", *arguments)
        assert status == 2 and found is None
        assert message in err and err.startswith("error: ") and err.count("\n") == 1
    weights = ["--weights", workdir, "--model", "crate_tiny_patch16_224", "--dataset", "digits"]
    status, _, err = call("reconstruct", *weights)
    assert status == 2 and "model must be an autoencoder with a decoder" in err
