"""Flags about data that a command would not heed are refused in one line."""

import pytest
from weights import random_params

from crate_jax import Crate, CrateCausal, save_weights

FLAGS = ["--image_key=image", "--label_key=label", "--transforms=resize(16)"]


def refusal(call, *arguments):
    """The one line of a command that must refuse its arguments."""
    status, result, err = call(*arguments)
    assert (status, result) == (2, None) and len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("command", ["evaluate", "layerwise"])
def test_a_model_of_text_reads_no_images(call, tmp_path, command, flag):
    model = CrateCausal(context_length=8, vocab_size=257, width=8, depth=1, num_heads=2)
    save_weights(tmp_path / "text.safetensors", random_params(model), model)
    (tmp_path / "a.txt").write_text("The white box. " * 20)
    flags = ["--dataset=text", f"--data_dir={tmp_path}", "--split=a.txt"]
    line = refusal(call, command, f"--weights={tmp_path}/text.safetensors", *flags, flag)
    assert line == (
        f"error: {flag.partition('=')[0]} must go with a model of images; got one of the task "
        "next_token. Leave it out.\n"
    )


@pytest.mark.parametrize("flag", FLAGS[:2])
@pytest.mark.parametrize("dataset", ["digits", "synthetic", "folder"])
def test_keys_name_features_of_tfds_alone(tiny_run, call, tmp_path, dataset, flag):
    """Also where they are those that a data set has anyway."""
    flags = [] if dataset == "digits" else [f"--dataset={dataset}", f"--data_dir={tmp_path}"]
    line = refusal(call, "evaluate", f"--workdir={tiny_run}", *flags, flag)
    assert line == (
        f"error: {flag.partition('=')[0]} must go with a data set of TFDS; {dataset} names no "
        "features. Leave it out.\n"
    )


def test_keys_of_tfds_are_read(tiny_run, call, tmp_path):
    flags = ["--dataset=no_such_data_set", f"--data_dir={tmp_path}", "--image_key=x"]
    assert "data.dataset must be " in refusal(call, "evaluate", f"--workdir={tiny_run}", *flags)


@pytest.mark.parametrize("flag", [*FLAGS, "--split=test", "--data_dir=."])
def test_noise_and_a_folder_have_no_data_set(tmp_path, call, flag):
    pytest.importorskip("torch")
    model = Crate(8, 4, 5, width=6, depth=1, num_heads=2)
    save_weights(tmp_path / "w.safetensors", random_params(model), model)
    compare = ["compare", f"--weights={tmp_path}/w.safetensors"]
    name = flag.partition("=")[0]
    assert refusal(call, *compare, flag) == (
        f"error: {name} must go with --dataset; compare draws noise without one. Leave it out.\n"
    )
    line = refusal(call, *compare, f"--images={tmp_path}", flag)
    if name == "--transforms":  # a folder's images are prepared by them
        assert line.startswith("error: --images must be a folder with images")
    else:
        assert line == f"error: {name} must go with --dataset; --images has none. Leave it out.\n"
