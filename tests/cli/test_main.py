"""The commands: what they print, and one line for each mistake.

Most mistakes are made in this process, which has imported everything.
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from command import LIMIT_S, ROOT, TINY, environment, run, start, wait_for

from crate_jax.checkpoint.reading import inspect
from crate_jax.cli.flags import parse_config
from crate_jax.cli.main import main
from crate_jax.cli.running import run_command
from crate_jax.training.loop import train

GOLDEN = ROOT / "tests" / "golden"


def refuse(*arguments):
    """A command that must fail: its one line."""
    return the_line(*run(*arguments))


def the_line(status, out, err):
    """The one line of a command that has failed by a user's mistake."""
    assert status == 2, (out, err)
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def intact_steps(workdir):
    """The steps of a run's checkpoints, of which none may be damaged."""
    found = inspect(workdir)
    assert all(checkpoint["intact"] for checkpoint in found)
    return [checkpoint["step"] for checkpoint in found]


@pytest.fixture
def refuse_here(capsys):
    """`refuse` for ``python -m crate_jax``, in this process."""

    def refuse(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's
            status = end.code
        return the_line(status, *capsys.readouterr())

    return refuse


@pytest.fixture
def refuse_training(capsys):
    """`refuse` for a recipe, its flags and the training with them, in this process."""

    def refuse(workdir, *flags, recipe="digits.py"):
        path = str(ROOT / "configs" / recipe)
        status = run_command(lambda: train(parse_config(path, list(flags)), workdir))
        return the_line(status, *capsys.readouterr())

    return refuse


def result(*arguments):
    """A command that must succeed: the JSON of its last line."""
    status, out, err = run(*arguments)
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run's workdir and summary; started elsewhere, without a workdir of its own."""
    folder = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *TINY, "--config.total_steps=8"],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "digits", json.loads(done.stdout.splitlines()[-1])


def test_train_ends_with_one_json_line(trained):
    workdir, summary = trained
    assert (workdir / "config.json").exists()  # named after the recipe
    assert summary["step"] == 8 and summary["workdir"] == "runs/digits"
    assert summary["test/examples"] == 297
    assert {"train/loss", "test/loss", "test/top1", "test/top5", "seconds"} <= set(summary)


def test_evaluate_gives_what_training_measured(trained):
    workdir, summary = trained
    found = result("-m", "crate_jax", "evaluate", f"--workdir={workdir}")
    assert found["examples"] == 297 and found["step"] == 8 and found["examples_per_s"] > 0
    assert found["top1"] == summary["test/top1"]
    assert found["loss"] == pytest.approx(summary["test/loss"], rel=1e-6)
    best = ["--step=best", "--split=train[:50]"]
    other = result("-m", "crate_jax", "evaluate", f"--workdir={workdir}", *best)
    (saved,) = (row["step"] for row in inspect(workdir) if row["best"])
    assert other["examples"] == 50 and other["step"] == saved


def test_evaluate_weights(tmp_path):
    """Official weights of a zoo model on a folder of images."""
    torch = pytest.importorskip("torch")
    import cv2
    import numpy as np

    from crate_jax.parity.torch_reference import TorchCrate

    torch.manual_seed(0)
    model = TorchCrate(224, 16, 1000, 384, 12, 6).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth.tar")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    x = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        logits = model(torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32))
    best = logits.argmax(1).tolist()
    # Two images lie in the class that the model finds, one in another.
    labels = [best[0], best[1], (best[2] + 1) % 1000]
    for i in range(1000):
        (tmp_path / "images" / "test" / f"{i:04d}").mkdir(parents=True)
    for i, label in enumerate(labels):
        path = tmp_path / "images" / "test" / f"{label:04d}" / f"{i}.png"
        cv2.imwrite(str(path), pixels[i][..., ::-1])
    found = result(
        "-m",
        "crate_jax",
        "evaluate",
        f"--weights={tmp_path / 'weights.pth.tar'}",
        "--model=crate_tiny_patch16_224",
        "--dataset=folder",
        f"--data_dir={tmp_path / 'images'}",
        "--transforms=resize(224)",
        "--batch_size=4",
    )
    assert found["examples"] == 3
    assert found["top1"] == pytest.approx(2 / 3)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-4)


def test_summary_by_value(capsys):
    found = result("-m", "crate_jax", "summary", "crate_base_patch16_224")
    assert found["parameters"] == 22_796_008
    assert found["tokens"] == 197
    assert found["gmacs"] == pytest.approx(6.41, abs=0.005)
    rectangle = ["--image_size", "64", "32", "--num_classes", "10"]
    assert main(["summary", "crate_tiny_patch16_224", *rectangle]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 9
    assert main(["summary", "crate_base_patch16_224", "--num_classes", "0"]) == 0
    without_a_head = json.loads(capsys.readouterr().out.splitlines()[-1])["parameters"]
    assert without_a_head == 22_796_008 - 769 * 1000


def test_checkpoints_lists_the_run(trained):
    workdir, _ = trained
    status, out, err = run("-m", "crate_jax", "checkpoints", workdir)
    assert status == 0, err
    *rows, last = out.splitlines()
    found = json.loads(last)
    assert [c["step"] for c in found["checkpoints"]] == [4, 8] and found["set_aside"] == []
    assert all(c["intact"] for c in found["checkpoints"])
    assert len(rows) == 4 and "intact" in rows[0] and "test/top1 0." in rows[1]


def test_checkpoints_ends_with_1_where_one_is_damaged(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run/checkpoints/8/state/_METADATA").unlink()
    status, out, err = run("-m", "crate_jax", "checkpoints", tmp_path / "run")
    *rows, last = out.splitlines()
    assert status == 1 and not json.loads(last)["intact"], err
    assert "DAMAGED" in rows[2] and "checkpoint must be readable; step 8 in" in " ".join(rows[3:])


@pytest.mark.slow
def test_report_writes_the_page_of_the_run(trained):
    workdir, _ = trained
    found = result("-m", "crate_jax", "report", f"--workdir={workdir}")
    assert len(found["zeros"]) == 2 and 0 < found["zeros"][0] < 1 and found["step"] == 8
    assert found["output"] == str(workdir / "report" / "index.html")
    assert (workdir / "report" / "index.html").read_text().startswith("<!doctype html>")


def test_train_without_flags_starts():
    """The bare command gets to its help; CI runs it to the end."""
    status, out, err = run("train.py", "--help")
    assert status == 0, err
    assert "--workdir" in out and "--config" in out and "config digits" in out


def test_the_package_trains_from_anywhere(trained, tmp_path):
    """With the recipe's name alone, and what train.py began: the two are the same program."""
    shutil.copytree(trained[0], tmp_path / "runs" / "digits")
    (tmp_path / "flags").write_text("--config.total_steps=8\n")
    done = subprocess.run(
        [sys.executable, "-m", "crate_jax", "train", *TINY, "--flagfile=flags"],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "runs/digits is complete at step 8. Nothing to do." in done.stderr
    clock = ("seconds",)
    found = json.loads(done.stdout)
    assert {k: v for k, v in found.items() if k not in clock} == {
        k: v for k, v in trained[1].items() if k not in clock
    }
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "flags"}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--config=configs/digit.py",
            "--config must be a file that exists; got configs/digit.py. Did",
        ),
        ("--config.optim.lrr=1", "optim.lrr must name a field. Did you mean lr?"),
        ("--wrkdir=x", "train must get flags that it has; got --wrkdir. Did you mean --workdir?"),
        ("x", "the command line must hold flags alone; got x"),
        ("--config.optim=1", "config.optim must be a field, not a section"),
        ("--config.data.dataset=cifarr10", "got cifarr10. Did you mean cifar10?"),
    ],
)
def test_a_mistaken_flag_is_one_line(flag, message, tmp_path):
    assert message in refuse("train.py", f"--workdir={tmp_path / 'run'}", flag)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.seed=x", "seed must be a whole number"),
        ("--config.optim.optimizer=adam", "got adam. Did you mean adamw?"),
        ("--config.optim.lr=-1", "optim.lr must be > 0; got -1.0"),
        ("--config.model.name=crate_tyni_patch16_224", "Did you mean crate_tiny_patch16_224?"),
        (
            "--config.model.image_size=30,30",
            "model.image_size must be a multiple of model.patch_size; got 30x30 and 8x8",
        ),
        ("--config.model.num_heads=5", "model.width must be a multiple of model.num_heads"),
        ("--config.model.num_classes=11", "model.num_classes must equal the 10 classes of digits"),
        ("--config.data.dataset=cifar10", "cifar10 is not in"),
        ("--config.data.train_split=trian", "got trian. Did you mean train?"),
        (
            "--config.data.data_dir=/no/such/folder",
            "data.data_dir must be an existing directory; got /no/such/folder. Set "
            "--config.data.data_dir, or --data_dir beside --dataset.",
        ),
        ("--config.data.eval_transforms=resise(32)", "got resise. Did you mean resize?"),
        ("--config.data.eval_transforms=resize(16)", "must give the 32x32x1 images"),
        ("--config.parallel.mesh=data:3", "parallel.mesh must multiply to the 8 devices"),
        ("--config.init_weights=nothing.pth", "weights must be a file or a run's folder"),
    ],
)
def test_a_mistake_in_a_config_is_one_line(flag, message, refuse_training, tmp_path):
    batches = ["--config.batch_size=48", "--config.eval_batch_size=48"]  # of eight devices
    assert message in refuse_training(tmp_path / "run", *batches, flag)
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_mistake_about_a_recipe_is_one_line(refuse_training, tmp_path):
    line = refuse_training(tmp_path / "run", recipe="imagenet1k.py:larg")
    assert "got larg. Did you mean large?" in line
    line = refuse_training(tmp_path / "run", recipe="finetune.py:pets")
    assert "init_weights must be set if init_fit is" in line


def test_unprepared_data_says_how_to_prepare_and_downloads_nothing(refuse_training, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    batches = ["--config.batch_size=48", "--config.eval_batch_size=48"]
    dataset = ["--config.data.dataset=cifar10", f"--config.data.data_dir={data}"]
    line = refuse_training(tmp_path / "run", *batches, *dataset)
    assert "Set --config.data.data_dir, or --data_dir beside --dataset, to where it is" in line
    assert "--config.data.download=True" in line
    assert list(data.iterdir()) == []


def test_batch_must_fit_the_devices(refuse_training, tmp_path):
    line = refuse_training(tmp_path, "--config.batch_size=100")
    assert "batch_size must be a multiple of 8" in line and "got 100. Nearest: 96." in line


@pytest.mark.parametrize("damage", ["file", "config", "checkpoint"])
def test_unreadable_workdir(trained, refuse_training, tmp_path, damage):
    workdir = tmp_path / "run"
    if damage == "file":
        workdir.write_text("not a folder")
        expected = "is a file. Choose another"
    else:
        shutil.copytree(trained[0], workdir)
    if damage == "config":
        (workdir / "config.json").write_text("{")
        expected = "workdir must hold a readable config.json"
    if damage == "checkpoint":
        for step in "48":  # with one whole step left, the run would go back to it
            (workdir / "checkpoints" / step / "state" / "_METADATA").unlink()
        expected = "checkpoint must be readable; step 8 in"
    flags = [*TINY, "--config.total_steps=8"]
    if damage == "checkpoint":  # whatever the libraries write themselves would be a second line
        line = refuse("train.py", f"--workdir={workdir}", *flags)
    else:
        line = refuse_training(workdir, *flags)
    assert expected in line


def test_a_workdir_of_another_config_is_refused(trained, refuse_training):
    workdir, _ = trained
    line = refuse_training(workdir, *TINY, "--config.total_steps=8", "--config.model.depth=3")
    assert "model.depth must stay 2 in" in line
    assert intact_steps(workdir) == [4, 8]


def test_a_non_finite_loss_names_step_and_checkpoint(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained[0], workdir)
    flags = [*TINY, "--config.total_steps=20", "--config.optim.lr=1e30"]
    status, out, err = run("train.py", f"--workdir={workdir}", *flags)
    assert status == 2 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: train/") and "must be finite; got" in last
    assert "at step" in last and "Checkpoint 8 is intact" in last
    assert intact_steps(workdir) == [4, 8]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(tmp_path):
    """A terminal sends it to all processes, the loader's workers too."""
    arguments = ["train.py", f"--workdir={tmp_path}", *TINY, "--config.total_steps=400"]
    arguments += ["--config.eval_every_steps=400", "--config.data.num_workers=1"]
    process = start(*arguments, group=True)
    wait_for(5, "\n", tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: SIGINT at step ") and "which is saved. Run the same" in last
    step = int(last.split("at step ")[1].split()[0])
    assert intact_steps(tmp_path)[-1] == step < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["evalute"], "must be one that there is; got evalute. Did you mean evaluate?"),
        (["evaluate"], "evaluate must get one of --workdir and --weights"),
        (
            ["evaluate", "--workdir=/no/such/run"],
            "workdir must hold a checkpoint; /no/such/run has",
        ),
        (["evaluate", "--weights=a.pth"], "must get --dataset too"),
        (
            ["evaluate", "--workdir=a", "--model=b"],
            "--model-kwargs and --fit must go with --weights",
        ),
        (
            ["evaluate", "--weights=a", "--model=b", "--dataset=c", "--step=1"],
            "--step must go with",
        ),
        (["checkpoints", "/no/such/run"], "workdir must hold a checkpoint; /no/such/run has none"),
        (["summary", "crate_bse_patch16_224"], "Did you mean crate_base_patch16_224?"),
        (["summary", "crate_tiny_patch16_224", "--image_size", "225"], "must be a multiple of"),
    ],
)
def test_a_mistaken_command_is_one_line(arguments, message, refuse_here):
    assert message in refuse_here(*arguments)


def test_an_unknown_step_is_refused(trained, refuse_here):
    line = refuse_here("evaluate", f"--workdir={trained[0]}", "--step=5")
    assert "step must be latest, best or one of 4, 8; got 5" in line


def test_weights_that_do_not_fit_are_refused(refuse_here):
    pytest.importorskip("torch")
    line = refuse_here(
        "evaluate",
        f"--weights={GOLDEN / 'crate_cls.pth.tar'}",
        "--model=crate_tiny_patch16_224",
        "--dataset=synthetic",
        "--batch_size=8",
    )
    assert "width 48 where the model has 384" in line and "missing: transformer.layers" in line
