"""Rows of a context of tokens and the tokens that follow each."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from crate_jax.config import DataConfig, TextConfig
from crate_jax.data.rows import BadExampleError, Row, patiently
from crate_jax.data.stores import storage
from crate_jax.data.text.documents import SOURCES
from crate_jax.data.text.tokenizers import Tokenizer, open_tokenizer

NOT_COUNTED = -1  # the target of a place that no loss counts
DATASETS = ("tokens", *SOURCES)
LOOKED_AT = 256  # pieces of a token file that are checked before anything is trained


class Tokens(Protocol):
    """Many tokens in a row."""

    def __len__(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray:
        """Read so many tokens from a place on, or all that are left."""
        ...


@dataclasses.dataclass(frozen=True)
class TokensInMemory:
    """Tokens (n,), int32."""

    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:  # noqa: D102
        return self.tokens[start : start + length]


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of tokens and nothing else, uint16, as nanoGPT writes it; it is read in pieces.

    Attributes:
        path: here or in a bucket.
        size: bytes.
    """

    path: str
    size: int

    def __len__(self) -> int:
        return self.size // 2

    def read(self, start: int, length: int) -> np.ndarray:  # noqa: D102
        data = patiently(lambda: storage.read_bytes(self.path, 2 * start, 2 * length), self.path)
        return np.frombuffer(data, "<u2").astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Tokens cut into contexts of one length; a `crate_jax.data.rows.Rows`.

    Row i begins at token i T, in training up to T − 1 tokens behind it, as its random numbers say.
    Each token is told from those before it in its row. In evaluation every token but the first is
    told once, and the last row is filled up. A context may hold the end of a text and the start of
    the next.
    Differs from nanoGPT: there a row begins anywhere, and an epoch has no end.

    Attributes:
        name: the name of the rows in errors and logs.
        tokens: all of them, texts one after the other.
        context: T, tokens of a row.
        vocab_size: V; tokens are below it.
        train: whether rows begin at random, and none is filled up.
        lengths: bytes of text of each token, (V,); None: not known.
        listing: another one where other tokens lie.
    """

    name: str
    tokens: Tokens
    context: int
    vocab_size: int
    train: bool
    lengths: np.ndarray | None
    listing: str

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """One row's shapes: "tokens", "targets" (T,), and "bytes" () of the targets' text, int32.

        A target of `NOT_COUNTED` is none. Bytes that are not known are 0.
        """
        return {
            "tokens": jax.ShapeDtypeStruct((self.context,), np.int32),
            "targets": jax.ShapeDtypeStruct((self.context,), np.int32),
            "bytes": jax.ShapeDtypeStruct((), np.int32),
        }

    def __len__(self) -> int:
        told = len(self.tokens) - 1
        return told // self.context if self.train else -(-told // self.context)

    def row(self, index: int, rng: np.random.Generator) -> Row:
        """The context at an index, and what follows each of its tokens.

        Raises:
            BadExampleError: one of them is not in the vocabulary.
            FailingSystemError: a file cannot be read.
        """
        T, start = self.context, index * self.context
        if self.train:
            last = len(self.tokens) - T - 1
            start = min(start + int(rng.integers(T)), last)
        piece = self.tokens.read(start, T + 1)
        if piece.max() >= self.vocab_size:
            raise BadExampleError(
                f"{self.name} must hold tokens below {self.vocab_size}, as its tokenizer or the "
                f"model has them; got {piece.max()} near token {start}. Set text.tokenizer and "
                "model.vocab_size to those that it was written with."
            )
        told = piece[1:]
        tokens, targets = np.zeros(T, np.int32), np.full(T, NOT_COUNTED, np.int32)
        tokens[: len(told)], targets[: len(told)] = piece[:-1], told
        known = 0 if self.lengths is None else self.lengths[told].sum()
        return {"tokens": tokens, "targets": targets, "bytes": np.array(known, np.int32)}


def open_text(
    data: DataConfig, text: TextConfig, split: str, *, train: bool, context: int, vocab_size: int
) -> TextRows:
    """The rows of a split.

    Args:
        data: reads dataset and data_dir.
        text: reads tokenizer and end_token.
        split: a file or folder below data_dir; of token files without the ending ``.bin``.
        train: see `TextRows`.
        context: T.
        vocab_size: the vocabulary size of the model.

    Raises:
        KeyError, ValueError, FileNotFoundError: there is no such data set, split or tokenizer; it
            is shorter than a context; or its tokens are not in the vocabulary.
    """
    if data.dataset not in DATASETS:
        raise KeyError(
            f"data.dataset must be one of {', '.join(DATASETS)} for a model of text; got "
            f"{data.dataset}. Set --config.data.dataset."
        )
    tokenizer = tokenizer_of(text)
    if tokenizer is not None and tokenizer.size > vocab_size:
        raise ValueError(
            f"model.vocab_size must be at least the {tokenizer.size} tokens of {text.tokenizer}; "
            f"got {vocab_size}. Set --config.model.vocab_size."
        )
    name = f"{data.dataset}/{split}"
    if data.dataset == "tokens":
        tokens = _token_file(data, split)
        listing, lengths = f"{len(tokens)} tokens", None if tokenizer is None else tokenizer.lengths
    else:
        tokens, listing, lengths = _tokenized(data, text, split, tokenizer)
    known = vocab_size if tokenizer is None else tokenizer.size
    rows = TextRows(name, tokens, context, known, train, lengths, listing)
    least = context + 1 if train else 2
    if len(tokens) < least:
        raise ValueError(
            f"{name} must hold at least {least} tokens, a context and the one behind it; got "
            f"{len(tokens)}. Take more text, or set a shorter --config.model.context_length."
        )
    if data.dataset == "tokens":
        digest = hashlib.sha256()
        for index in np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(int)):
            digest.update(rows.row(int(index), np.random.default_rng(0))["targets"].tobytes())
        listing = f"{listing}, some of digest {digest.hexdigest()[:16]}"
    return dataclasses.replace(rows, listing=listing)


def tokenizer_of(text: TextConfig) -> Tokenizer | None:
    """The tokenizer of a config; None if it is not known.

    Raises:
        ValueError: see `open_tokenizer`.
    """
    return open_tokenizer(text.tokenizer, text.end_token) if text.tokenizer else None


def _token_file(data: DataConfig, split: str) -> TokenFile:
    """``data_dir/split.bin``."""
    folder = storage.data_folder(data)
    path = storage.join(folder, f"{split}.bin")
    have = [name.removesuffix(".bin") for name in storage.list_folder(folder) if ".bin" in name]
    if split not in have:
        raise storage.unknown_split(f"a file of tokens, SPLIT.bin, in {folder}", split, have)
    if (size := storage.file_size(path)) % 2:
        raise ValueError(
            f"{path} must hold tokens of two bytes each; got {size} bytes. Write it again."
        )
    return TokenFile(path, size)


def _tokenized(
    data: DataConfig, text: TextConfig, split: str, tokenizer: Tokenizer | None
) -> tuple[TokensInMemory, str, np.ndarray | None]:
    """All texts of a split, each with the token that ends it; their digest; bytes of each token."""
    if tokenizer is None:
        raise ValueError(
            f"text.tokenizer must be set for {data.dataset}; it is unset. Set "
            "--config.text.tokenizer=bytes, say, or --tokenizer where weights are evaluated."
        )
    found: list[np.ndarray] = []
    size, end = 0, np.array([tokenizer.end], np.int32)
    for document in SOURCES[data.dataset](data, split):
        size += len(document.encode())
        found += [tokenizer.encode(document), end]
    tokens = np.concatenate(found or [np.zeros(0, np.int32)])
    lengths = tokenizer.lengths
    if lengths is not None and int(lengths[tokens].sum()) != size:
        lengths = None  # it adds spaces, say, or takes letters for others
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
    return TokensInMemory(tokens), f"{digest} of tokens", lengths
