"""From text to tokens and back: bytes, or a tokenizer of the library `tokenizers`."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from crate_jax.config import TextConfig
from crate_jax.errors import first_line

BYTES = "bytes"


class Bytes:
    """The bytes of UTF-8, and a token that ends a text: 257 tokens.

    Attributes:
        digest: another one where text becomes other numbers.
        size: the number of tokens, the numbers from 0 on.
        end: the token that ends a text.
        lengths: bytes of text that each token stands for (size,), int32; None: not known.
    """

    digest, size, end = BYTES, 257, 256
    lengths: np.ndarray | None = np.repeat(np.array([1, 0], np.int32), [256, 1])

    def encode(self, text: str) -> np.ndarray:
        """Tokens (N,), int32, without one that ends the text."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without those that end texts; what is no UTF-8 becomes �."""
        return bytes(t for t in tokens if t < self.end).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class Learned:
    """A tokenizer that was learned from text, as `Bytes` is one.

    Attributes:
        inner: of the library `tokenizers`.
        end: the token that ends a text.
    """

    inner: Any
    end: int

    @functools.cached_property
    def _stated(self) -> str:
        return self.inner.to_str()

    @property
    def digest(self) -> str:
        """See `Bytes`."""
        return hashlib.sha256(self._stated.encode()).hexdigest()[:16]

    @property
    def size(self) -> int:
        """See `Bytes`."""
        return max(self.inner.get_vocab().values()) + 1

    @functools.cached_property
    def lengths(self) -> np.ndarray | None:
        """Known where each letter of a token's name is a byte, as in GPT-2's tokenizer."""
        stated = json.loads(self._stated)
        if (stated["decoder"] or {}).get("type") != "ByteLevel":
            return None
        lengths = np.zeros(self.size, np.int32)
        for name, token in self.inner.get_vocab().items():
            lengths[token] = len(name)
        for added in stated["added_tokens"]:  # these are written as they are
            bytes_of = 0 if added["special"] else len(added["content"].encode())
            lengths[added["id"]] = bytes_of
        return lengths

    def encode(self, text: str) -> np.ndarray:
        """See `Bytes`."""
        return np.array(self.inner.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Bytes`."""
        return self.inner.decode(list(tokens), skip_special_tokens=True)


Tokenizer = Bytes | Learned


def open_tokenizer(name: str, end_token: str) -> Tokenizer:
    """The tokenizer that ``text.tokenizer`` names.

    Args:
        name: ``bytes``; a tokenizer.json, or a folder with one; or a name on huggingface.co, which
            is downloaded once.
        end_token: what a tokenizer that was learned calls the end of a text.

    Raises:
        ValueError: there is none of this name, it is damaged, it has no such token, the library is
            missing, or bytes are to end by a token of another name.
    """
    if name == BYTES:
        if end_token != TextConfig.end_token:
            raise ValueError(
                "text.end_token must be left as it is if text.tokenizer is bytes, which end a "
                f"text by a token without a name; got {end_token}. Leave it out."
            )
        return Bytes()
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ValueError(
            f"text.tokenizer must be bytes if the package tokenizers is missing; got {name}. "
            "Install it: pip install 'crate-jax[text]'."
        ) from error
    path = os.path.join(name, "tokenizer.json") if os.path.isdir(name) else name
    local = path.endswith(".json") or os.path.exists(path)
    read = tokenizers.Tokenizer.from_file if local else tokenizers.Tokenizer.from_pretrained
    try:
        inner = read(path)
    except Exception as error:  # the library raises the class itself
        raise ValueError(
            "text.tokenizer must be bytes, a tokenizer.json, or a name on huggingface.co; got "
            f"{name} ({first_line(error)}). Set --config.text.tokenizer."
        ) from error
    end = inner.token_to_id(end_token)
    if end is None:
        raise ValueError(
            f"text.end_token must be a token of {name}; got {end_token}. Set "
            "--config.text.end_token to what ends a text there, such as </s>."
        )
    return Learned(inner, end)
