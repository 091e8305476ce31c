"""The equations of a page: those of the blocks as the model's fields make them, and as MathML."""

import xml.etree.ElementTree as ET

import pytest

from crate_jax import create_model, list_models
from crate_jax.analysis.equations import OBJECTIVE, equations
from crate_jax.pages import mathml


def lines(model):
    return [line for part in equations(model) for line in part.lines]


@pytest.mark.parametrize("name", list_models())
def test_every_model_has_equations_that_are_well_formed(name):
    found = equations(create_model(name))
    assert found[0].title == "A layer"
    for line in (*lines(create_model(name)), *OBJECTIVE):
        root = ET.fromstring(mathml(line))
        assert root.tag == "math" and "".join(root.itertext()).strip()


@pytest.mark.parametrize(
    ("name", "fields", "there", "not_there"),
    [
        ("crate_tiny_patch16_224", {}, "Z^{ℓ+1} = ISTA(LN(Z^{ℓ+1/2}))", "Z^{ℓ+1/2} +"),
        ("crate_tiny_patch16_224", dict(attention_sign="minus"), "Z^{ℓ} − MSSA(", "Z^{ℓ} + MSSA"),
        ("crate_tiny_patch16_224", dict(tied_output=True), r"s \sum_{k} U_{k} SSA_{k}", "W ["),
        ("crate_tiny_patch16_224", dict(num_heads=1), "MSSA(Y) = SSA_{1}", "W ["),
        ("crate_tiny_patch16_224", dict(nonlinearity="none"), "Z^{ℓ+1} = Z^{ℓ} + MSSA", "ISTA"),
        ("crate_tiny_patch16_224", dict(ista_steps=2), "ISTA(Y) = A^{2}", "ReLU(Y"),
        ("crate_tiny_patch16_224", dict(attention="mhsa"), "MHSA(Y) = W", "MSSA"),
        ("crate_tiny_patch16_224", dict(nonlinearity="mlp"), "Z^{ℓ+1/2} + MLP(", "ISTA"),
        ("crate_alpha_tiny_patch16_224", {}, "ODL(Y) = D_{1} A^{2}", "+ b"),
        ("crate_alpha_tiny_patch16_224", dict(decoupled=False), "ODL(Y) = D A^{2}", "D_{1}"),
        ("crate_alpha_tiny_patch16_224", dict(residual=False), "= ODL(", "Z^{ℓ+1/2} + ODL"),
        ("crate_alpha_tiny_patch16_224", dict(layer_scale=0.1), "g_{2} ∘ ODL(", "∘ ISTA"),
        ("tost_tiny_patch16_224", {}, "g_{1} ∘ TSSA(LN(", "MSSA"),
        ("cbsa_tiny_patch16_224", {}, "CBSA(Y) = W", "MSSA"),
        ("hyperset_patch16_224", {}, "Z^{ℓ} − α ∘ attention(Z^{ℓ})", "LN("),
        ("crate_mae_tiny_patch16_224", {}, "Z^{ℓ+1/2} − MSSA(LN(Z^{ℓ+1/2}))", "TSSA"),
        ("crate_mae_tiny_patch16_224", dict(decoder_depth=0), "ISTA(", "D LN("),
    ],
)
def test_the_equations_are_those_of_the_fields(name, fields, there, not_there):
    text = "\n".join(lines(create_model(name, **fields)))
    assert there in text and not_there not in text


def test_notes_have_the_numbers():
    notes = " ".join(part.note for part in equations(create_model("crate_tiny_patch16_224")))
    assert "ℓ = 1, …, 12." in notes and "p = 64, d = 384" in notes and "η = 0.1, λ = 0.1." in notes
    model = create_model("crate_tiny_patch16_224", step_sizes="shared", threshold="soft")
    notes = " ".join(part.note for part in equations(model))
    assert "both are learned" in notes and "sign(x) max(|x| − ηλ, 0)" in notes
    tied = equations(create_model("crate_tiny_patch16_224", tied_output=True))
    assert any(part.note.endswith(" s is learned.") for part in tied)
    causal = " ".join(part.note for part in equations(create_model("crate_causal_base")))
    assert "itself and those before it" in causal
    both = " ".join(part.note for part in equations(create_model("crate_bert_base")))
    assert "before it" not in both


def test_mathml_by_hand():
    assert mathml(r"\frac{1}{2} x_{k}^{2}") == (
        '<math displaystyle="true"><mrow><mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow>'
        "</mfrac><msubsup><mi>x</mi><mrow><mi>k</mi></mrow><mrow><mn>2</mn></mrow></msubsup>"
        "</mrow></math>"
    )
    assert "<msqrt><mrow><mi>p</mi></mrow></msqrt>" in mathml(r"\sqrt{p}")
    assert "<mo>&lt;</mo>" in mathml("a < b")


@pytest.mark.parametrize("text", ["x^", "{x", "x}", r"\frac{1}"])
def test_equations_that_are_none(text):
    with pytest.raises(ValueError, match=r"^an equation must .*; got .*\. Correct it\.$"):
        mathml(text)
