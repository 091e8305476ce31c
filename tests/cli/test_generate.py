"""The command `generate`, and the other commands on a run of text."""

import json
import shutil

import numpy as np
import pytest
from weights import random_params

from crate_jax import CrateBert, CrateCausal, generate, load_weights, save_weights
from crate_jax.cli.main import main
from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig
from crate_jax.tasks import NextToken
from crate_jax.training.loop import train

SIZES = dict(context_length=8, vocab_size=257, width=16, depth=2, num_heads=2)
MODEL = CrateCausal(**SIZES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text that repeats itself, as a text and as a token file, and runs over both."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text("abcd" * 300)
    np.frombuffer(b"abcd" * 300, np.uint8).astype(np.uint16).tofile(folder / "all.bin")
    for dataset, split, steps in (("text", "all.txt", 150), ("tokens", "all", 1)):
        config = TrainConfig(
            name=dataset,
            task="next_token",
            batch_size=32,
            eval_batch_size=32,
            total_steps=steps,
            log_every_steps=50,
            model=ModelConfig(name="crate_causal_base", **SIZES),
            data=DataConfig(
                dataset=dataset,
                data_dir=str(folder),
                train_split=split,
                eval_split=split,
                num_threads=2,
            ),
            text=TextConfig(tokenizer="bytes" if dataset == "text" else None),
            optim=OptimConfig(lr=1e-2),
        )
        train(config, folder / dataset)
    return folder


@pytest.fixture
def said(capsys):
    """What a command writes: its lines before the result, and the result."""

    def said(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        return "\n".join(lines), json.loads(last)

    return said


@pytest.fixture
def refused(capsys):
    """The one line that a command ends with."""

    def refused(*arguments):
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == "" and line.startswith("error: ")
        return line.removeprefix("error: ")

    return refused


def test_a_run_continues_what_it_has_learnt(folder, said):
    flags = ["--workdir", folder / "text", "--prompt=bcda", "--tokens=6", "--temperature=0"]
    text, found = said("generate", *flags)
    assert text == found["text"] == "bcdabcdabc"
    assert found == {
        "prompt": "bcda",
        "text": text,
        "tokens": 6,
        "ended": False,
        "step": 150,
        "seed": None,
    }


def test_draws_hang_on_the_seed(folder, said):
    flags = ["generate", "--workdir", folder / "tokens", "--tokenizer=bytes", "--tokens=40"]
    texts = [said(*flags, f"--seed={seed}")[1]["text"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    cold = ["--temperature=1e-6", "--prompt=a"]
    assert (
        said(*flags, *cold)[1]["text"] == said(*flags, "--temperature=0", "--prompt=a")[1]["text"]
    )
    narrow = said(*flags, "--top-k=1", "--prompt=a")[1]
    assert narrow["text"] == said(*flags, *cold)[1]["text"] and narrow["seed"] == 0


def test_a_text_ends_where_the_model_ends_it(tmp_path, said, monkeypatch):
    """An empty prompt begins behind the end of a text, which is not written."""
    save_weights(tmp_path / "w.safetensors", random_params(MODEL), MODEL)
    seen = []

    def ends(model, params, tokens, steps, **_):
        seen.append(tokens.tolist())
        return np.array([[*tokens[0].tolist(), 104, 105, 256, 106]])

    monkeypatch.setattr("crate_jax.models.generation.generate", ends)
    flags = ["generate", f"--weights={tmp_path / 'w.safetensors'}", "--tokenizer=bytes"]
    text, found = said(*flags)
    assert seen == [[[256]]] and text == "hi"
    assert (found["tokens"], found["ended"], found["step"]) == (2, True, None)


def test_weights_take_a_tokenizer_of_their_own(tmp_path, said):
    params = random_params(MODEL)
    save_weights(tmp_path / "w.npz", params, MODEL)
    fields = [f"{name}={value}" for name, value in SIZES.items()]
    flags = ["--model=crate_causal_base", "--tokenizer=bytes", "--prompt=é", "--temperature=0"]
    weights = [f"--weights={tmp_path / 'w.npz'}", "--tokens=12"]
    _, found = said("generate", *weights, *flags, "--model-kwargs", *fields)
    tokens = generate(MODEL, load_weights(tmp_path / "w.npz", MODEL), np.array([[0xC3, 0xA9]]), 12)
    wanted = bytes(t for t in np.asarray(tokens)[0].tolist() if t < 256)
    assert found["text"] == wanted.decode(errors="replace")


def test_other_commands_take_a_run_of_text(folder, said, refused, tmp_path):
    shutil.copytree(folder / "text", tmp_path / "run")
    _, found = said("evaluate", "--workdir", tmp_path / "run")
    assert found["fitted"] == [] and found["step"] == 150 and found["examples"] == 150
    # The letters are told, but the first, and the end of the text.
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * 1200 / 1199 / np.log(2))
    assert found["loss"] < 1  # of each context the first letter cannot be told
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    _, found = said("report", "--workdir", tmp_path / "run")
    assert len(found["subspace_rate"]) == 2 and (tmp_path / "run/report/index.html").is_file()
    _, found = said("convert", "--from", tmp_path / "run", "--to", tmp_path / "w.safetensors")
    flags = ["--tokenizer=bytes", "--prompt=bcda", "--tokens=4", "--temperature=0"]
    text, _ = said("generate", "--weights", tmp_path / "w.safetensors", *flags)
    assert text == "bcdabcda"
    assert "next_token" in refused("reconstruct", "--workdir", tmp_path / "run")


def test_weights_are_evaluated_on_text(folder, said, refused, tmp_path):
    _, whole = said("evaluate", "--workdir", folder / "text")
    said("convert", "--from", folder / "text", "--to", tmp_path / "w.safetensors")
    fields = [f"{name}={value}" for name, value in SIZES.items()]
    flags = ["evaluate", "--weights", tmp_path / "w.safetensors", "--model=crate_causal_base"]
    flags += ["--data_dir", folder, "--model-kwargs", *fields]
    text = ["--dataset=text", "--split=all.txt"]
    _, found = said(*flags, *text, "--tokenizer=bytes", "--batch_size=32")
    for name in ("loss", "bits_per_byte", "examples"):
        assert found[name] == pytest.approx(whole[name], rel=1e-6), name
    _, tokens = said(*flags, "--dataset=tokens", "--split=all")  # without the end of the text
    assert tokens["loss"] == pytest.approx(whole["loss"], rel=0.1)
    assert tokens["examples"] == 150 and "bits_per_byte" not in tokens
    line = refused(*flags, *text)
    assert line.endswith("Set --config.text.tokenizer=bytes, say, or --tokenizer where weights are "
                         "evaluated.")  # fmt: skip
    assert "one of tokens, text, pydoc" in refused(*flags, "--dataset=digits")


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "generate must get one of --workdir and --weights. See --help."),
        (["--workdir=a", "--weights=b"], "generate must get one of --workdir and --weights. See -"),
        (
            ["--workdir=a", "--model=b"],
            "--model must go with --weights; a run knows its own mo",
        ),
        (["--weights=a"], "generate --weights must get --tokenizer, and no --step. See --help."),
        (
            ["--weights=a", "--tokenizer=bytes", "--step=1"],
            "generate --weights must get --tokenizer, and no --step. See --help.",
        ),
        (
            ["--workdir=a", "--tokens=0"],
            "--tokens must be >= 1 and --temperature >= 0; got 0 and 1.0. See --help.",
        ),
        (
            ["--workdir=a", "--temperature=nan"],
            "--tokens must be >= 1 and --temperature >= 0; got 200 and nan. See --help.",
        ),
        (
            ["--workdir=a", "--temperature=0", "--top-k=3"],
            "--top-k must be left out with --temperature=0; got 3. The most likely token is taken.",
        ),
    ],
)
def test_flags_that_do_not_go_together(flags, message, refused):
    assert refused("generate", *flags).startswith(message)


def test_a_run_that_knows_no_tokenizer(folder, refused):
    line = refused("generate", "--workdir", folder / "tokens")
    assert line.startswith(
        f"--tokenizer must be given for {folder / 'tokens'}, which knows of none"
    )


def test_a_run_with_another_tokenizer(folder, refused, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    flags = ["--workdir", folder / "text", "--tokenizer", tmp_path, "--end-token=</s>"]
    line = refused("generate", *flags)
    assert line.startswith("text.tokenizer must be that of the training, of digest bytes; got ")


def test_a_run_of_another_task(folder, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("crate_jax.cli.generate.TASK", "another")
    line = refused("generate", "--workdir", folder / "text")
    assert line == (
        f"generate must get a run of the task another; {folder / 'text'} is one of next_token. "
        "Choose another --workdir."
    )


def test_a_model_that_sees_the_whole_text(tmp_path, refused):
    model = CrateBert(**SIZES)
    save_weights(tmp_path / "w.safetensors", random_params(model), model)
    line = refused("generate", f"--weights={tmp_path / 'w.safetensors'}", "--tokenizer=bytes")
    assert "a model must be causal" in line


def test_the_command_names_the_task_as_it_is_called():
    from crate_jax.cli.generate import TASK
    from crate_jax.tasks import TASKS

    assert TASKS[TASK] is NextToken
