"""docs/from_other_libraries.md by value: what its code leaves behind is what it says."""

import jax
import numpy as np
from command import ROOT
from test_pages import blocks

import crate_jax

PAGE = ROOT / "docs/from_other_libraries.md"


def test_the_page_computes_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {"__name__": "page"}
    for kind, _, code in blocks(PAGE.read_text()):
        assert kind == "python"
        exec(compile(code, PAGE.name, "exec"), found)
    assert found["losses"] == sorted(found["losses"], reverse=True) and len(found["losses"]) == 3
    assert found["nnx_losses"] == sorted(found["nnx_losses"], reverse=True)

    # timm: grids of patches, lists of them, logits of the tokens, and a new head.
    assert [x.shape for x in found["maps"]] == [(8, 4, 4, 32)] * 2
    assert [x.shape for x in found["last_two"]] == [(8, 16, 32)] * 2
    model, params, images = found["model"], found["params"], found["images"]
    assert model.num_classes == 5 and params["head"]["kernel"].shape == (32, 5)
    out = crate_jax.analysis.taps(model, params, images, "out")[1]["out"]
    np.testing.assert_allclose(found["tokens"], out[-1], atol=1e-5)
    np.testing.assert_allclose(found["maps"][0], out[0][:, 1:].reshape(8, 4, 4, 32), atol=1e-5)
    assert found["logits"].shape == (8, 10)

    # NNX: the module computes what the model does with the parameters that were put into it.
    linen, loaded = found["linen"], found["loaded"]
    expected = linen.apply({"params": loaded}, images, train=False)
    np.testing.assert_allclose(found["module"](images, train=False), expected, atol=1e-5)
    assert np.abs(np.asarray(found["outputs"]) - expected).max() > 1e-2  # of what was there before
    saved = crate_jax.load_weights(tmp_path / "learnt.safetensors", linen)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
