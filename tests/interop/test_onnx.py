"""`crate_jax.export_onnx`: onnxruntime gives the model's logits, where the extra is installed."""

import sys
import types

import jax
import jax.export
import numpy as np
import pytest
from command import run

from crate_jax import create_model, export_onnx
from crate_jax.tasks.pixels import normalize

SMALL = dict(image_size=(16, 32), patch_size=16, num_classes=5, width=16, depth=2, num_heads=2)
MEAN, STD = (0.5, 0.25, 0.75), (0.5, 0.25, 1.0)
CONVERTED = {
    "crate": "crate_tiny_patch16_224",
    "crate_alpha": "crate_alpha_base_patch16_224",
    "vit": "vit_base_patch16_reg4_224",
    "tost": "tost_tiny_patch16_224",
    "crate_mae": "crate_mae_tiny_patch16_224",
}


def small(name):
    model = create_model(name, **SMALL | (dict(num_classes=0) if "mae" in name else {}))
    start = jax.jit(lambda key: model.init(key, model.sample_input(), train=False))
    return model, start(jax.random.key(1))


# In a process of its own: jax2onnx leaves out what it cannot import, where warnings are errors.
REALLY = """
import sys, numpy as np, onnxruntime
sys.path += ["tests", "tests/interop"]
from test_onnx import CONVERTED, MEAN, STD, small
from crate_jax import export_onnx
from crate_jax.tasks.pixels import normalize
for name in CONVERTED.values():
    model, variables = small(name)
    content = export_onnx(model, variables, mean=MEAN, std=STD)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert taken.type == "tensor(uint8)" and taken.shape == ["B", 16, 32, 3], name
    for count in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 32, 3)).astype(np.uint8)
        (found,) = session.run(None, {taken.name: pixels})
        images = normalize(pixels, mean=MEAN, std=STD)
        expected = np.asarray(model.apply(variables, images, train=False))
        limit = 1e-5 * abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit, err_msg=name)
    print(name)
"""


@pytest.mark.slow
def test_onnxruntime_gives_the_same_logits():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("jax2onnx")
    status, out, err = run("-c", REALLY)
    assert status == 0, err
    assert out.split() == [*CONVERTED.values()]


@pytest.mark.parametrize("scaled", [True, False])
def test_what_the_converter_gets(monkeypatch, scaled):
    """A function of pixels, or of images, and any number of them; by a stand-in that calls it."""
    monkeypatch.setattr(jax.export, "symbolic_shape", lambda text: (3,))  # which it can run
    model, variables = small(CONVERTED["crate"])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 32, 3)).astype(np.uint8)
    images = np.asarray(normalize(pixels, mean=MEAN, std=STD))
    asked = []

    def to_onnx(function, inputs, *, model_name):
        asked.extend(inputs)
        found = np.asarray(function(pixels if scaled else images))
        return types.SimpleNamespace(SerializeToString=found.tobytes)

    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=to_onnx))
    content = export_onnx(model, variables, **dict(mean=MEAN, std=STD) if scaled else {})
    found = np.frombuffer(content, np.float32).reshape(3, 5)
    np.testing.assert_allclose(found, model.apply(variables, images, train=False), atol=1e-5)
    (taken,) = asked
    assert taken.shape == ("B", 16, 32, 3) and taken.dtype == ("uint8" if scaled else "float32")


def test_what_the_converter_does_not_know_is_told_in_one_line(monkeypatch):
    def to_onnx(function, inputs, *, model_name):
        raise NotImplementedError("No plugins for 'stack'\nand more")

    stand_in = types.ModuleType("jax2onnx")
    stand_in.to_onnx = to_onnx  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jax2onnx", stand_in)
    model, variables = small(CONVERTED["crate"])
    message = (
        r"^model must be one that jax2onnx converts; Crate is not \(No plugins for 'stack'\)\. "
    )
    with pytest.raises(ValueError, match=message):
        export_onnx(model, variables)


def test_what_it_refuses(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    model, variables = small(CONVERTED["crate"])
    with pytest.raises(ValueError, match=r"^export_onnx must have jax2onnx.* 'crate-jax\[onnx\]'$"):
        export_onnx(model, variables)
