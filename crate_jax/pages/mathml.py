"""Equations as MathML, which browsers draw without a script."""

import html
import re

_TOKEN = re.compile(r"\s*(\\[a-z]+|\{|\}|\^|_|[0-9.]+(?:×10)?|[A-Za-z]{2,}|[A-Za-zα-ωΑ-Ωℓ∞]|[^\s])")
_OPERATORS = set("=+−-±·∘←∈≥≤<>|,;:()[]∥‖⊤√∑Σ…→~×/!")


def mathml(text: str) -> str:
    r"""An equation in a small part of LaTeX's language, as MathML that is drawn at full size.

    A letter is a variable, two and more are the name of a function, all other characters stand for
    themselves. ``x^{…}`` and ``x_{…}`` are raised and lowered, ``{…}`` is a group.
    ``\frac{a}{b}`` is a fraction, ``\sqrt{…}`` a root, ``\sum_{…}`` a sum.

    >>> mathml("Z^{ℓ}")
    '<math displaystyle="true"><mrow><msup><mi>Z</mi><mrow><mi>ℓ</mi></mrow></msup></mrow></math>'

    Args:
        text: the equation.

    Raises:
        ValueError: a brace is not closed, or nothing stands where something must.
    """
    reader = _Reader(_TOKEN.findall(text), text)
    inner = reader.row()
    if reader.tokens:
        raise reader.fault("have an opening brace for each closing one")
    return f'<math displaystyle="true">{inner}</math>'


class _Reader:
    """Reads tokens from the front of a list."""

    def __init__(self, tokens: list[str], text: str):
        self.tokens, self.text = tokens, text

    def fault(self, rule: str) -> ValueError:
        return ValueError(f"an equation must {rule}; got {self.text}. Correct it.")

    def row(self) -> str:
        """Parse the text up to a closing brace."""
        parts = []
        while self.tokens and self.tokens[0] != "}":
            parts.append(self.scripted())
        return f"<mrow>{''.join(parts)}</mrow>"

    def scripted(self) -> str:
        """One item with its subscript and superscript."""
        base, scripts = self.atom(), {}
        while self.tokens and self.tokens[0] in ("^", "_"):
            where = self.tokens.pop(0)
            scripts[where] = self.atom()
        if len(scripts) == 2:
            return f"<msubsup>{base}{scripts['_']}{scripts['^']}</msubsup>"
        for where, name in (("^", "msup"), ("_", "msub")):
            if where in scripts:
                return f"<{name}>{base}{scripts[where]}</{name}>"
        return base

    def atom(self) -> str:
        """One item."""
        if not self.tokens or self.tokens[0] == "}":
            raise self.fault("have something after ^, _ and a command")
        token = self.tokens.pop(0)
        if token == "{":
            inner = self.row()
            if not self.tokens:
                raise self.fault("close every brace")
            self.tokens.pop(0)
            return inner
        if token == "\\frac":
            return f"<mfrac>{self.atom()}{self.atom()}</mfrac>"
        if token == "\\sqrt":
            return f"<msqrt>{self.atom()}</msqrt>"
        if token == "\\sum":
            return '<mo movablelimits="false">∑</mo>'
        escaped = html.escape(token)
        if token[0].isdigit():
            return f"<mn>{escaped}</mn>"
        if token in _OPERATORS:
            return f"<mo>{escaped}</mo>"
        upright = ' mathvariant="normal"' if len(token) == 1 and not token.isalpha() else ""
        return f"<mi{upright}>{escaped}</mi>"
