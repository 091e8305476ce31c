"""`export` and `crate_jax.export_model`: the same logits in a process without this package."""

import hashlib
import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.export
import numpy as np
import pytest

import crate_jax
from crate_jax import create_model, export_model, save_weights
from crate_jax.checkpoint.reading import read_trained
from crate_jax.cli import export as command
from crate_jax.config import DataConfig, ModelConfig, TrainConfig
from crate_jax.interop import export as module
from crate_jax.tasks.pixels import normalize
from crate_jax.training.loop import train

IMAGES = (
    *("crate_tiny_patch16_224", "crate_mhsa_mlp_small_384_patch8_224", "vit_base_patch16_reg4_224"),
    *("crate_alpha_base_patch16_224", "tost_tiny_patch16_224", "cbsa_tiny_patch16_224"),
    *("hyperset_patch16_224", "crate_mae_tiny_patch16_224"),
)
TEXTS = ("crate_causal_base", "crate_lm_2l", "tost_lm_base", "crate_bert_base")
SMALL = dict(width=16, depth=2, num_heads=2, head_dim=8)
MEAN, STD = (0.5, 0.25, 0.75), (0.5, 0.25, 1.0)


def small(name):
    """A model of the family, tiny, and its variables."""
    sizes = dict(context_length=12, vocab_size=20) if name in TEXTS else {}
    sizes |= {} if name in TEXTS else dict(image_size=(16, 32), patch_size=16, num_classes=5)
    if "mae" in name:
        sizes["num_classes"] = 0
    model = create_model(name, **SMALL | sizes)
    return model, jax.jit(lambda key: model.init(key, model.sample_input(), train=False))(
        jax.random.key(1)
    )


def pictures(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 32, 3)).astype(np.uint8)


def inputs_of(name, count=3):
    """What a program takes, and the same as the model takes it."""
    if name in TEXTS:
        tokens = np.random.default_rng(0).integers(2, 20, (count, 7)).astype(np.int32)
        return tokens, tokens
    pixels = pictures(count)
    return pixels, normalize(pixels, mean=MEAN, std=STD)


# A process that has JAX, and for which there is no crate_jax.
STRANGER = """
import sys
sys.modules["crate_jax"] = None
import jax.export, numpy as np
for name in sys.argv[1:]:
    with open(f"{name}.stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    np.save(f"{name}_out.npy", program.call(np.load(f"{name}_in.npy")))
assert not any(name.startswith("crate_jax.") for name in sys.modules)
"""


def stranger(folder, *names):
    subprocess.run([sys.executable, "-c", STRANGER, *names], cwd=folder, check=True)


@pytest.mark.slow
def test_every_family_gives_the_same_in_a_process_without_the_package(tmp_path):
    """Another number of examples, and of tokens, than any that the program was made with."""
    expected = {}
    for name in IMAGES + TEXTS:
        model, variables = small(name)
        scale = {} if name in TEXTS else dict(mean=MEAN, std=STD)
        (tmp_path / f"{name}.stablehlo").write_bytes(export_model(model, variables, **scale))
        given, taken = inputs_of(name)
        np.save(tmp_path / f"{name}_in.npy", given)
        expected[name] = np.asarray(
            jax.jit(lambda v, x, m=model: m.apply(v, x, train=False))(variables, taken)
        )
        assert expected[name].std() > 1e-3
    stranger(tmp_path, *expected)
    for name, values in expected.items():
        found = np.load(tmp_path / f"{name}_out.npy")
        assert found.dtype == np.float32
        np.testing.assert_allclose(
            found, values, rtol=0, atol=2e-6 * abs(values).max(), err_msg=name
        )


def test_pixels_may_be_floats_and_images_normalised_already():
    model, variables = small("crate_tiny_patch16_224")
    params = variables["params"]  # alone, as most models have no more
    pixels = pictures(2)
    called = {
        "pixels": (dict(mean=MEAN, std=STD), pixels),
        "floats": (dict(mean=MEAN, std=STD, pixels="float32"), pixels / np.float32(255)),
        "normalised": ({}, np.asarray(normalize(pixels, mean=MEAN, std=STD))),
    }
    found = {}
    for how, (options, inputs) in called.items():
        program = jax.export.deserialize(bytearray(export_model(model, params, **options)))
        assert program.platforms == ("cpu", "cuda", "tpu")
        assert str(program.in_avals[0].shape) == "(B, 16, 32, 3)"
        assert program.in_avals[0].dtype == inputs.dtype
        found[how] = np.asarray(program.call(inputs))
    np.testing.assert_allclose(found["floats"], found["pixels"], atol=1e-6)
    np.testing.assert_allclose(found["normalised"], found["pixels"], atol=1e-6)
    one = program.call(called["normalised"][1][:1])
    np.testing.assert_allclose(one, found["normalised"][:1], atol=1e-6)


def test_the_program_is_of_the_machines_that_were_asked_for_and_of_plain_operations():
    """Whatever kernel, dropout and loop the model has for training on this machine."""
    model, variables = small("crate_tiny_patch16_224")
    of_training = dict(attention_kernel="pallas", dropout=0.5, scan_unroll=2)
    same = export_model(model.clone(**of_training), variables, platforms=["cpu"])
    pixels = np.asarray(normalize(pictures(2), mean=MEAN, std=STD))
    np.testing.assert_allclose(
        jax.export.deserialize(bytearray(same)).call(pixels),
        model.apply(variables, pixels, train=False),
        atol=1e-5,
    )
    model = model.clone(attention_kernel="pallas")
    content = export_model(model, variables, platforms=["tpu"])
    program = jax.export.deserialize(bytearray(content))
    assert program.platforms == ("tpu",) and not program.disabled_safety_checks
    # No kernel of Pallas or cuDNN: what is called is a check of the sizes.
    called = set(re.findall(r"custom_call @(\w+)", program.mlir_module()))
    assert called == {"shape_assertion"}


def test_a_program_names_no_folder_and_no_caller():
    """It is published; and one model gives one file, wherever the package lies."""
    model, variables = small("crate_tiny_patch16_224")
    before = dict(jax.config.values)
    content = export_model(model, variables, mean=MEAN, std=STD)
    assert re.findall(rb"[\w.-]*/[\w./-]+\.py", content) == []
    assert b"test_export" not in content and b"names_no_folder" not in content
    assert (lambda: export_model(model, variables, mean=MEAN, std=STD))() == content
    assert dict(jax.config.values) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mean=(0.5,), std=(0.0,)), r"^std must be > 0; got \(0\.0,\)\. Give that of pixels"),
        (dict(mean=(), std=()), r"^std must be > 0; got \(\)\."),
        (dict(mean=MEAN), r"^mean must go with std; got one of them alone\. Give both"),
        (dict(mean=MEAN, std=STD, pixels="int8"), r"^pixels must be uint8 or float32; got int8\."),
        (dict(platforms=["gpu"]), r"^platforms must be out of cpu, cuda, rocm, tpu; got gpu\."),
        (dict(platforms=[]), r"^platforms must be out of cpu, cuda, rocm, tpu; got none\."),
        (dict(mean=(0.5, 0.5), std=(1.0,)), r"^data\.mean must have one value, or one for each of"),
    ],
)
def test_arguments_that_make_no_program(options, message):
    model, variables = small("crate_tiny_patch16_224")
    with pytest.raises(ValueError, match=message):
        export_model(model, variables, **options)


def test_models_that_make_no_program(monkeypatch):
    model, variables = small("crate_lm_2l")
    with pytest.raises(
        ValueError, match=r"^mean and std must go with a model of images; got a Cra"
    ):
        export_model(model, variables, mean=MEAN, std=STD)
    with pytest.raises(ValueError, match=r"^model must take images or text .* got a Dense\."):
        export_model(nn.Dense(3), {})
    monkeypatch.setattr(module, "LARGEST", 100)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    with pytest.raises(
        ValueError, match=rf"^the weights must take at most 100 bytes.* got {size}\."
    ):
        export_model(model, variables)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ValueError, match=r"^export must have flatbuffers.* 'crate-jax\[export\]'$"):
        export_model(model, variables)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of weights that states its model and classes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("weights")
    model, variables = small("crate_tiny_patch16_224")
    names = [f"kind {i}" for i in range(5)]
    save_weights(folder / "w.safetensors", variables["params"], model, class_names=names)
    return folder / "w.safetensors"


def code(page):
    """The code of a page."""
    (block,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    return block


def test_the_command_writes_a_program_its_facts_and_five_lines_that_run(call, weights, tmp_path):
    status, found, err = call("export", "--weights", weights, "--output", tmp_path / "out")
    assert (status, err) == (0, "")
    file, facts = (
        tmp_path / "out/model.stablehlo",
        json.loads((tmp_path / "out/model.json").read_text()),
    )
    assert found["output"] == str(file) and found["within_tolerance"] and found["compared"]
    assert found["difference"] < 1e-5 and found["step"] is None
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts["file"] == "model.stablehlo" and facts["bytes"] == file.stat().st_size
    assert facts["input"] == {"shape": ["B", 16, 32, 3], "dtype": "uint8"}
    assert facts["output"] == {"shape": ["B", 5], "dtype": "float32"}
    assert facts["classes"] == [f"kind {i}" for i in range(5)]
    assert facts["model"]["family"] == "crate" and facts["model"]["width"] == 16
    assert facts["source"] == {"weights": str(weights), "model": None}
    assert facts["platforms"] == ["cpu", "cuda", "tpu"]
    assert facts["preprocessing"] == {
        "image_size": [16, 32],
        "before": [
            {"name": "resize", "size": [16, 32], "interpolation": "bilinear", "antialias": True}
        ],
        "inside": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    }
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["versions"]["crate_jax"] == crate_jax.__version__

    model, variables = small("crate_tiny_patch16_224")
    five = code(tmp_path / "out/README.md")
    assert len(five.splitlines()) == 5
    program = "import sys\nsys.modules['crate_jax'] = None\n" + five + "np.save('o.npy', outputs)\n"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "out", check=True)
    mean_std = facts["preprocessing"]["inside"]
    black = normalize(
        np.zeros((2, 16, 32, 3), np.uint8), **{k: tuple(v) for k, v in mean_std.items()}
    )
    expected = model.apply(variables, black, train=False)
    np.testing.assert_allclose(np.load(tmp_path / "out/o.npy"), expected, atol=1e-5)


def test_a_run(call, tmp_path):
    """The mean, deviation and classes of its own data, at the step that is named.

    A CRATE normalises each patch, and would not show another mean.
    """
    name = "vit_tiny_patch16_224"
    fields = dict(image_size=(16, 16), patch_size=(8, 8), in_channels=1, **SMALL)
    transforms = dict(train_transforms="resize(16)", eval_transforms="resize(16)")
    config = TrainConfig(
        batch_size=48,
        eval_batch_size=16,
        total_steps=2,
        checkpoint_every_steps=1,
        model=ModelConfig(name=name, **fields),
        data=DataConfig(eval_split="test[:16]", mean=(0.25,), std=(0.5,), **transforms),
    )
    train(config, tmp_path / "run")
    status, found, _ = call(
        "export", "--workdir", tmp_path / "run", "--step=1", "--platforms", "cpu"
    )
    assert status == 0 and found["step"] == 1 and found["difference"] < 1e-5
    folder = tmp_path / "run/export"
    facts = json.loads((folder / "model.json").read_text())
    assert facts["source"] == {"workdir": str(tmp_path / "run"), "step": 1}
    assert facts["classes"] == [str(digit) for digit in range(10)]
    assert facts["preprocessing"]["inside"] == {"mean": [0.25], "std": [0.5]}
    params = read_trained(tmp_path / "run", 1)[0]
    pixels = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 1)).astype(np.uint8)
    model = create_model(name, num_classes=10, **fields)
    expected = model.apply({"params": params}, (pixels / np.float32(255) - 0.25) / 0.5, train=False)
    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(pixels), expected, atol=1e-5)


def test_a_crop_is_told_by_its_share(weights, tmp_path, call):
    """As the images of ImageNet are cut."""
    model = create_model("crate_tiny_patch16_224", **SMALL | dict(depth=1, patch_size=112))
    params = jax.jit(lambda key: model.init(key, model.sample_input(), train=False))(
        jax.random.key(0)
    )
    save_weights(tmp_path / "w.npz", params["params"], model)
    kwargs = [f"{k}={v}" for k, v in (SMALL | dict(depth=1, patch_size=112)).items()]
    named = ["--model", "crate_tiny_patch16_224", "--model-kwargs", *kwargs]
    output = tmp_path / "one.stablehlo"
    more = ["--pixels", "float32", "--platforms", "cpu"]
    status, found, _ = call(
        "export", "--weights", tmp_path / "w.npz", *named, "--output", output, *more
    )
    assert status == 0 and found["output"] == str(output) and output.is_file()
    facts = json.loads((tmp_path / "one.json").read_text())
    assert facts["preprocessing"]["crop_share"] == 0.875
    assert [step["name"] for step in facts["preprocessing"]["before"]] == [
        "resize_shorter",
        "center_crop",
    ]
    assert facts["source"]["model"] == "crate_tiny_patch16_224" and "classes" not in facts
    assert facts["platforms"] == ["cpu"] and facts["input"]["dtype"] == "float32"
    assert "one.stablehlo" in code(tmp_path / "one.md") and "pixels in [0, 1]" in code(
        tmp_path / "one.md"
    )


def test_text(call, tmp_path):
    model, variables = small("crate_lm_2l")
    save_weights(tmp_path / "w.safetensors", variables["params"], model)
    status, found, _ = call(
        "export",
        "--weights",
        tmp_path / "w.safetensors",
        "--output",
        tmp_path,
        "--platforms",
        "cpu",
    )
    assert status == 0 and found["difference"] < 1e-5
    facts = json.loads((tmp_path / "model.json").read_text())
    assert facts["input"] == {"shape": ["B", "N"], "dtype": "int32"}
    assert facts["output"]["shape"] == ["B", "N", 20] and "preprocessing" not in facts
    names = {"np": None}
    exec(
        code(tmp_path / "README.md").replace("model.stablehlo", f"{tmp_path}/model.stablehlo"),
        names,
    )
    assert names["outputs"].shape == (2, 1, 20)


def test_where_it_cannot_run_nothing_is_compared(call, weights, tmp_path):
    status, found, _ = call(
        "export", "--weights", weights, "--output", tmp_path, "--platforms", "tpu"
    )
    assert status == 0 and found["compared"] is False and "within_tolerance" not in found


def test_a_program_that_differs_is_told_by_the_status(call, weights, tmp_path, monkeypatch):
    def other(model, variables, make=module.make_program, **how):
        return make(model, jax.tree.map(lambda leaf: 1.001 * leaf, variables), **how)

    monkeypatch.setattr(module, "make_program", other)
    status, found, _ = call(
        "export", "--weights", weights, "--output", tmp_path, "--platforms", "cpu"
    )
    assert status == 1 and found["within_tolerance"] is False
    assert command.TOLERANCE["float32"] < 1e-4 < found["difference"] < 1e-2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "export must get one of --workdir and --weights. See --help."),
        (
            ["--weights={weights}", "--output=model.onnx"],
            "--output must be a file that ends in .stab",
        ),
        (
            ["--weights={weights}", "--output={weights}"],
            "--output must be a file that ends in .stab",
        ),
        (
            ["--weights={weights}", "--output=/dev/null/x"],
            "--output must be a folder; /dev/null is a",
        ),
        (
            ["--weights={weights}", "--output=no/x.stablehlo"],
            "no/x.stablehlo must lie in an existing",
        ),
        (["--weights=nothing.npz"], "nothing.npz"),
        (["--workdir={folder}"], "workdir must hold a checkpoint"),
    ],
)
def test_what_it_refuses(call, weights, tmp_path, monkeypatch, arguments, line):
    monkeypatch.chdir(tmp_path)
    places = dict(weights=weights, folder=tmp_path)
    status, found, err = call("export", *(each.format(**places) for each in arguments))
    assert status == 2 and found is None and line in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_for_models_of_images(call, tmp_path):
    model, variables = small("crate_lm_2l")
    save_weights(tmp_path / "w.safetensors", variables["params"], model)
    status, _, err = call("export", "--weights", tmp_path / "w.safetensors", "--pixels", "uint8")
    assert status == 2 and "--pixels must go with a model of images; got a CrateLM." in err
