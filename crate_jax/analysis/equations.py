r"""The equations of a model's blocks, as its fields make them.

They are text for `crate_jax.pages.mathml`. Tokens are columns here, as in the papers: Z is d x N,
and V_k = U_kᵀ Y has a column for each token.
"""

from typing import Any, NamedTuple

from crate_jax.models.stacked import BlockModel

OBJECTIVE = (
    r"R(Z) = \frac{1}{2} logdet(I + \frac{d}{N ε^{2}} Z Z^⊤)",
    r"R^{c}(Z; U) = \frac{1}{2} \sum_{k} logdet(I + \frac{p}{N ε^{2}} (U_{k}^⊤ Z)^⊤ (U_{k}^⊤ Z))",
)
_COLUMNS = " The softmax acts on columns."
_HALF, _NEXT = "Z^{ℓ+1/2}", "Z^{ℓ+1}"


class Equations(NamedTuple):
    """The equations of one part of a layer.

    Attributes:
        title: the title of the part.
        lines: an equation each.
        note: what the letters are, in words; "" where nothing is to be said.
    """

    title: str
    lines: tuple[str, ...]
    note: str = ""


def equations(model: BlockModel) -> list[Equations]:
    """The layer of a model, and its operators.

    Raises:
        KeyError: an operator has no equations here.
    """
    parts = [model.attention_part, model.nonlinearity_part]
    operators = [_OPERATORS[part.name](model) for part in parts if part is not None]
    found = [_layer(model), *operators]
    if getattr(model, "decoder_depth", 0):
        found.append(_decoder(model))
    return found


def _layer(model: BlockModel) -> Equations:
    """The two halves: signs, residuals, factors."""
    fields: dict[str, Any] = model.block_fields()
    scaled = fields.get("layer_scale") is not None
    computed = "modulation" in fields
    g = ("g_{1} ∘ ", "g_{2} ∘ ") if scaled else ("α ∘ ", "β ∘ ") if computed else ("", "")
    norm = "{}" if fields.get("norm") == "none" else "LN({})"
    sign = "−" if fields.get("sign", 1) < 0 else "+"
    second = model.nonlinearity_part
    middle = _HALF if second else _NEXT
    name = _name(model.attention_part.name)
    lines = [f"{middle} = Z^{{ℓ}} {sign} {g[0]}{name}({norm.format('Z^{ℓ}')})"]
    if second:
        added = f"{_HALF} + " if fields.get("residual") else ""
        lines.append(f"{_NEXT} = {added}{g[1]}{_name(second.name)}({norm.format(_HALF)})")
    note = f"ℓ = 1, …, {model.depth}."
    if norm != "{}":
        note += " LN is a LayerNorm of each token."
    if scaled:
        note += " g are learned factors, one a channel."
    if computed:
        note += " α and β are computed from depth and tokens, one a token and channel."
    return Equations("A layer", tuple(lines), note)


def _mssa(model: Any) -> Equations:
    lines = [
        r"V_{k} = U_{k}^⊤ Y",
        r"SSA_{k} = V_{k} softmax(\frac{V_{k}^⊤ V_{k}}{\sqrt{p}})",
    ]
    note = _sizes(model) + _COLUMNS + _order(model)
    if getattr(model, "tied_output", False):
        lines.append(r"MSSA(Y) = s \sum_{k} U_{k} SSA_{k}")
        note += " s is learned."
    elif (model.num_heads, model.subspace_dim) == (1, model.width):
        lines.append(r"MSSA(Y) = SSA_{1}")
    else:
        bias = "" if model.attention_part.make.keywords.get("bias") is False else " + b"
        lines.append(rf"MSSA(Y) = W [SSA_{{1}}; …; SSA_{{K}}]{bias}")
    return Equations("MSSA, which compresses", tuple(lines), note)


def _mhsa(model: Any) -> Equations:
    lines = (
        r"Q_{k} = W_{k}^{q} Y, K_{k} = W_{k}^{k} Y, V_{k} = W_{k}^{v} Y",
        r"A_{k} = softmax(\frac{K_{k}^⊤ Q_{k}}{\sqrt{p}})",
        r"MHSA(Y) = W [V_{1} A_{1}; …; V_{K} A_{K}] + b",
    )
    return Equations(
        "MHSA, the attention of a ViT", lines, _sizes(model) + _COLUMNS + _order(model)
    )


def _tssa(model: Any) -> Equations:
    lines = (
        r"V_{k} = U_{k}^⊤ Y",
        r"Π_{n k} = softmax_{k}(τ_{k} \sum_{i} \frac{V_{k i n}^{2}}{\sum_{m} V_{k i m}^{2}})",
        r"s_{k i} = \frac{\sum_{n} Π_{n k} V_{k i n}^{2}}{\sum_{n} Π_{n k}}",
        r"O_{k i n} = − Π_{n k} \frac{V_{k i n}}{1 + s_{k i}}",
        r"TSSA(Y) = W [O_{1}; …; O_{K}] + b",
    )
    note = _sizes(model) + " Π is how far a token belongs to a subspace, s its second moments."
    return Equations("TSSA, whose cost is linear in the tokens", lines, note + _order(model))


def _cbsa(model: Any) -> Equations:
    lines = (
        r"V_{k} = U_{k}^⊤ Y, R_{k} = pool(V_{k})",
        r"A_{k} = softmax(\frac{R_{k}^⊤ V_{k}}{\sqrt{p}})",
        r"Q_{k} = R_{k} + r_{k} V_{k} A_{k}^⊤",
        r"O_{k} = x_{k} Q_{k} softmax(\frac{Q_{k}^⊤ Q_{k}}{\sqrt{p}}) A_{k}",
        r"CBSA(Y) = W [O_{1}; …; O_{K}] + b",
    )
    note = (
        " R are the representatives, means of cells of the grid; r and x are learned steps. The "
        "softmax of A is over the tokens, that of Q acts on columns."
    )
    return Equations("CBSA, which moves tokens by a few", lines, _sizes(model) + note)


def _ista(model: Any) -> Equations:
    learned = getattr(model, "step_sizes", "fixed") != "fixed"
    soft = getattr(model, "threshold", "relu") == "soft"
    steps = getattr(model, "ista_steps", 1)
    sizes = f"η starts at {model.eta:g} and λ at {model.lmbda:g}, and both are learned."
    note = sizes if learned else f"η = {model.eta:g}, λ = {model.lmbda:g}."
    if steps == 1 and not soft:
        lines = [r"ISTA(Y) = ReLU(Y + η D^⊤ (Y − D Y) − η λ)"]
    else:
        lines = [
            r"A^{0} = Y",
            r"A^{i+1} = S(A^{i} + η D^⊤ (Y − D A^{i}))",
            rf"ISTA(Y) = A^{{{steps}}}",
        ]
        kind = "sign(x) max(|x| − ηλ, 0)" if soft else "ReLU(x − ηλ)"
        note += f" S is the threshold {kind}."
    return Equations("ISTA, which sparsifies", tuple(lines), note + " D is the dictionary.")


def _odl(model: Any) -> Equations:
    reads = "D_{1}" if getattr(model, "decoupled", True) else "D"
    lines = (
        r"A^{1} = ReLU(η D^⊤ Y − η λ)",
        r"A^{2} = ReLU(A^{1} − η D^⊤ (D A^{1} − Y) − η λ)",
        rf"ODL(Y) = {reads} A^{{2}}",
    )
    atoms = model.overcompleteness * model.width
    note = f"η = {model.eta:g}, λ = {model.lmbda:g}. D has {atoms} atoms of {model.width} entries."
    return Equations("ODL, a sparse code in a wide dictionary", lines, note)


def _mlp(model: Any) -> Equations:
    bias = ("", "") if getattr(model, "bias", True) is False else (" + b_{1}", " + b_{2}")
    line = rf"MLP(Y) = W_{{2}} GELU(W_{{1}} Y{bias[0]}){bias[1]}"
    note = f"{model.mlp_ratio * model.width} hidden units."
    return Equations("An MLP in the place of ISTA", (line,), note)


def _bisoftmax(model: Any) -> Equations:
    lines = (
        r"Q_{k}, K_{k}, V_{k} = RMSNorm(U_{k}^⊤ X)",
        r"S_{k} = \frac{K_{k}^⊤ Q_{k}}{\sqrt{p}}",
        r"attention(X) = \sum_{k} U_{k} V_{k} (softmax_{keys}(S_{k}) + softmax_{queries}(S_{k}))",
    )
    note = " The three norms have scales of their own."
    return Equations("A descent on the energy of attention", lines, _sizes(model) + note)


def _tied_mlp(model: Any) -> Equations:
    line = r"MLP(X) = V GELU(RMSNorm(V^⊤ X))"
    note = f"{model.mlp_ratio * model.width} hidden units."
    return Equations("An MLP with tied weights", (line,), note)


def _decoder(model: Any) -> Equations:
    lines = (f"{_HALF} = D LN(Z^{{ℓ}})", f"{_NEXT} = {_HALF} − MSSA(LN({_HALF}))")
    note = f"ℓ = 1, …, {model.decoder_depth}. It undoes what the encoder does."
    return Equations("A layer of the decoder", lines, note)


def _name(part: str) -> str:
    """The name of a part in the equations."""
    return {"bisoftmax": "attention", "tied_mlp": "MLP"}.get(part, part.upper())


def _sizes(model: Any) -> str:
    return f"k = 1, …, {model.num_heads}; p = {model.subspace_dim}, d = {model.width}."


def _order(model: Any) -> str:
    """A sentence on the mask, if not all tokens attend to all."""
    return " A token sees itself and those before it." if getattr(model, "causal", False) else ""


_OPERATORS = {
    "mssa": _mssa,
    "mhsa": _mhsa,
    "tssa": _tssa,
    "cbsa": _cbsa,
    "ista": _ista,
    "odl": _odl,
    "mlp": _mlp,
    "bisoftmax": _bisoftmax,
    "tied_mlp": _tied_mlp,
}
