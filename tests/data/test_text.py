"""Text: tokenizers, where texts come from, rows of contexts, the loader over them, mistakes."""

import dataclasses
import pickle
from pydoc_data.topics import topics

import numpy as np
import pytest

from crate_jax.cli.flags import parse_config
from crate_jax.config import DataConfig, TextConfig
from crate_jax.data.loader import eval_batches, train_batches
from crate_jax.data.rows import BadExampleError
from crate_jax.data.text.documents import SOURCES, related
from crate_jax.data.text.rows import TextRows, TokensInMemory, open_text, tokenizer_of
from crate_jax.data.text.tokenizers import Bytes, Learned, open_tokenizer

END = "<|endoftext|>"
WORDS = "Ein Pfad durch den Wald, täglich 3 km – „schön“. \n\t"


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A byte-level BPE of 300 tokens, trained on the spot."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.ByteLevelBPETokenizer()
    texts = [topics[name] for name in sorted(topics)[:5]]
    made.train_from_iterator(texts, vocab_size=300, special_tokens=[END], show_progress=False)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def files(tmp_path):
    """A folder of two texts, a text, and a token file of nanoGPT's kind."""
    (tmp_path / "train" / "b").mkdir(parents=True)
    (tmp_path / "train" / "b" / "1.txt").write_text("zweiter Text", "utf-8")
    (tmp_path / "train" / "a.txt").write_text("erster, mit ü", "utf-8")
    (tmp_path / "train" / ".hidden").write_bytes(b"\xff")
    (tmp_path / "test.txt").write_text("gehalten", "utf-8")
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "val.bin")
    return tmp_path


def opened(folder, split, *, dataset="text", train=True, context=4, vocab_size=257, **text):
    data = DataConfig(dataset=dataset, data_dir=None if folder is None else str(folder))
    made = TextConfig(**text)
    return open_text(data, made, split, train=train, context=context, vocab_size=vocab_size)


def rows_of(tokens, *, train=False, context=4, vocab_size=257, lengths=Bytes.lengths):
    stored = TokensInMemory(np.asarray(tokens, np.int32))
    return TextRows("rows", stored, context, vocab_size, train, lengths, "")


# --- tokenizers -----------------------------------------------------------------------------------


def test_bytes_are_those_of_utf_8():
    tokenizer = open_tokenizer("bytes", END)
    assert (tokenizer.size, tokenizer.end, tokenizer.digest) == (257, 256, "bytes")
    assert tokenizer.encode("aü").tolist() == [97, 0xC3, 0xBC]
    assert tokenizer.decode([*tokenizer.encode(WORDS).tolist(), 256]) == WORDS
    assert tokenizer.decode([97, 0xC3]) == "a�"
    assert tokenizer.lengths.tolist() == [1] * 256 + [0]


def test_a_learned_tokenizer_keeps_every_byte(learned):
    for name in (str(learned), str(learned.parent)):
        tokenizer = open_tokenizer(name, END)
        assert isinstance(tokenizer, Learned) and tokenizer.size == 300 and tokenizer.end == 0
        tokens = tokenizer.encode(WORDS)
        assert tokens.dtype == np.int32 and len(tokens) < len(WORDS.encode())
        assert tokenizer.decode([*tokens.tolist(), tokenizer.end]) == WORDS
        assert tokenizer.lengths[tokens].sum() == len(WORDS.encode())
        assert tokenizer.lengths[tokenizer.end] == 0
    assert pickle.loads(pickle.dumps(tokenizer)).digest == tokenizer.digest != "bytes"


def test_the_bytes_of_other_tokenizers_are_not_known(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2, END: 3}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path), END)
    assert tokenizer.lengths is None and tokenizer.encode("a  b").tolist() == [0, 1]


@pytest.mark.parametrize("name", ["no/such/tokenizer.json", "bites"])
def test_an_unknown_tokenizer(name, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")

    class Offline:
        from_file = tokenizers.Tokenizer.from_file

        @staticmethod
        def from_pretrained(name):
            raise OSError(f"{name} is not there")

    monkeypatch.setattr(tokenizers, "Tokenizer", Offline)
    with pytest.raises(ValueError) as caught:
        open_tokenizer(name, END)
    start = "text.tokenizer must be bytes, a tokenizer.json, or a name on huggingface.co; got "
    assert str(caught.value).startswith(f"{start}{name} (")
    assert str(caught.value).endswith("). Set --config.text.tokenizer.")


def test_a_tokenizer_without_the_token_that_ends_a_text(learned):
    with pytest.raises(ValueError) as caught:
        open_tokenizer(str(learned), "</s>")
    assert str(caught.value) == (
        f"text.end_token must be a token of {learned}; got </s>. Set --config.text.end_token to "
        "what ends a text there, such as </s>."
    )


def test_bytes_end_a_text_by_a_token_without_a_name():
    message = r"^text\.end_token must be left as it is if text\.tokenizer is bytes.*; got </s>\. "
    with pytest.raises(ValueError, match=message):
        open_tokenizer("bytes", "</s>")
    unknown = parse_config("openwebtext", ["--config.text.tokenizer="])
    assert tokenizer_of(unknown.text) is None


def test_a_missing_library_is_told(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    message = r"^text\.tokenizer must be bytes if the package tokenizers is missing; got gpt2\. I"
    with pytest.raises(ValueError, match=message):
        open_tokenizer("gpt2", END)


# --- texts ----------------------------------------------------------------------------------------


def test_texts_of_a_folder_come_in_order_each_with_its_end(files):
    rows = opened(files, "train")
    stream = [*"erster, mit ü".encode(), 256, *b"zweiter Text", 256]
    assert rows.tokens.tokens.tolist() == stream and rows.name == "text/train"
    assert opened(files, "test.txt", train=False).tokens.tokens.tolist() == [*b"gehalten", 256]
    assert rows.listing != opened(files, "test.txt").listing


def test_topics_are_held_out_whole_and_nothing_of_them_is_trained():
    data = DataConfig(dataset="pydoc")
    train, test = (list(SOURCES["pydoc"](data, split)) for split in ("train", "test"))
    assert sorted(train + test) == sorted(topics.values())
    share = sum(map(len, test)) / sum(map(len, topics.values()))
    assert 0.05 < share < 0.2
    paragraphs = [
        {" ".join(p.split()) for text in texts for p in text.split("\n\n")}
        for texts in (train, test)
    ]
    assert max(map(len, paragraphs[0] & paragraphs[1])) < 80


def test_texts_with_a_paragraph_in_common_are_related():
    one, two, three = ("a" * 100, "b" * 100, "c" * 100)
    texts = {
        "x": f"{one}\n\nshort",
        "y": f"{two}\n\n{three}",
        "z": f"  {one}\n\n{two}",
        "w": "short",
    }
    assert related(texts) == [["w"], ["x", "y", "z"]]
    assert related({"x": "short", "y": "short"}) == [["x"], ["y"]]


# --- rows -----------------------------------------------------------------------------------------


def test_evaluation_tells_every_token_but_the_first_once():
    for n in range(2, 14):
        stream = np.random.default_rng(n).integers(0, 257, n)
        rows, told, seen = rows_of(stream), [], []
        for i in range(len(rows)):
            row = rows.row(i, np.random.default_rng(0))
            assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
                k: (s.shape, s.dtype) for k, s in rows.shapes.items()
            }
            real = row["targets"] >= 0
            assert (np.diff(real.astype(int)) <= 0).all() and not row["tokens"][~real].any()
            assert row["bytes"] == (row["targets"][real] < 256).sum()
            seen += row["tokens"][real].tolist()
            told += row["targets"][real].tolist()
        assert (seen, told) == (stream[:-1].tolist(), stream[1:].tolist())


def test_training_rows_are_full_and_begin_within_their_stretch():
    stream = np.arange(23)
    rows = rows_of(stream, train=True)
    assert len(rows) == 5  # 22 are told
    begins = set()
    for seed in range(50):
        for i in range(5):
            row = rows.row(i, np.random.default_rng(seed))
            begin = row["tokens"][0]
            begins.add(int(begin))
            assert 4 * i <= begin < 4 * (i + 1)
            np.testing.assert_array_equal(row["tokens"], stream[begin : begin + 4])
            np.testing.assert_array_equal(row["targets"], stream[begin + 1 : begin + 5])
            again = rows.row(i, np.random.default_rng(seed))
            np.testing.assert_array_equal(row["tokens"], again["tokens"])
    assert begins == set(range(19))


def test_a_token_file_is_read_as_it_is(files):
    rows = opened(files, "val", dataset="tokens", train=False, context=9, tokenizer=None)
    assert len(rows) == 11 and rows.row(0, np.random.default_rng(0))["bytes"] == 0
    np.testing.assert_array_equal(rows.row(10, np.random.default_rng(0))["targets"], range(91, 100))
    assert "100 tokens" in rows.listing
    known = opened(files, "val", dataset="tokens", train=False, context=9)
    assert known.row(0, np.random.default_rng(0))["bytes"] == 9
    np.arange(1, 101, dtype=np.uint16).tofile(files / "val.bin")
    other = opened(files, "val", dataset="tokens", train=False, context=9)
    assert other.listing != known.listing


def test_bytes_that_a_tokenizer_adds_are_not_known(files, learned):
    """It puts a space before a text, so that tokens have more bytes than the text."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(learned))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.save(str(files / "tokenizer.json"))
    for path, known in ((files, False), (learned, True)):
        rows = opened(files, "test.txt", train=False, tokenizer=str(path), vocab_size=310)
        assert (rows.row(0, np.random.default_rng(0))["bytes"] > 0) == known


# --- the loader -----------------------------------------------------------------------------------


def taken(rows, count, **kwargs):
    """So many batches of a loader, as lists of lists."""
    batches = train_batches(rows, DataConfig(num_threads=2), batch_size=3, seed=5, **kwargs)
    try:
        return [next(batches)["tokens"].tolist() for _ in range(count)]
    finally:
        batches.close()


def test_the_position_is_exact_on_resume():
    rows = rows_of(np.random.default_rng(0).integers(0, 257, 50), train=True)
    whole = taken(rows, 9)
    for seen in (1, 4, 8):
        assert taken(rows, 9 - seen, examples_seen=3 * seen) == whole[seen:]
    one, two = (taken(rows_two(rows), 9, process_index=i, process_count=1) for i in (0, 0))
    assert one == two == whole
    assert len({str(row) for batch in whole for row in batch}) > 20  # each epoch begins elsewhere


def rows_two(rows):
    return pickle.loads(pickle.dumps(rows))


def test_evaluation_batches_fill_up_without_a_target_more():
    rows = rows_of(np.arange(30))
    found = list(eval_batches(rows, DataConfig(num_threads=1), batch_size=3))
    told = sum(int((b["targets"][b["mask"] > 0] >= 0).sum()) for b in found)
    assert told == 29 and sum(b["mask"].sum() for b in found) == len(rows) == 8


# --- mistakes -------------------------------------------------------------------------------------


def test_text_shorter_than_a_context(files):
    with pytest.raises(ValueError) as caught:
        opened(files, "test.txt", context=9)
    assert str(caught.value) == (
        "text/test.txt must hold at least 10 tokens, a context and the one behind it; got 9. Take "
        "more text, or set a shorter --config.model.context_length."
    )
    assert len(opened(files, "test.txt", context=8)) == 1
    assert len(opened(files, "test.txt", context=9, train=False)) == 1
    (files / "empty").mkdir()
    with pytest.raises(ValueError, match=r"at least 2 tokens, .*; got 0\. "):
        opened(files, "empty", train=False)


def test_a_token_file_of_another_vocabulary(files):
    tokens = np.zeros(5000, np.uint16)
    tokens[3000] = 300
    tokens.tofile(files / "train.bin")
    message = r"^tokens/train must hold tokens below 257, as its .*; got 300 near token \d+\. Set t"
    short = dict(dataset="tokens", train=False, context=16)
    with pytest.raises(BadExampleError, match=message):
        opened(files, "train", **short, tokenizer=None)
    with pytest.raises(BadExampleError, match=message):  # of which bytes would not be counted
        opened(files, "train", **short, vocab_size=301)
    assert opened(files, "train", **short, vocab_size=301, tokenizer=None)


def test_a_vocabulary_that_is_smaller_than_the_tokenizer(files, learned):
    with pytest.raises(
        ValueError, match=r"^model\.vocab_size must be at least the 257 tokens of b"
    ):
        opened(files, "train", vocab_size=256)
    with pytest.raises(ValueError, match=r"must be at least the 300 tokens of /.*; got 299\. Set"):
        opened(files, "train", vocab_size=299, tokenizer=str(learned))


@pytest.mark.parametrize(
    ("dataset", "split", "tokenizer", "error", "message"),
    [
        (
            "digits",
            "train",
            "bytes",
            KeyError,
            "data.dataset must be one of tokens, text, pydoc fo",
        ),
        ("text", "trian", "bytes", FileNotFoundError, "split must be a file or a folder of text b"),
        ("text", "train", None, ValueError, "text.tokenizer must be set for text; it is unset. S"),
        ("tokens", "train", None, FileNotFoundError, "split must be a file of tokens, SPLIT.bin, "),
        ("tokens", "odd", None, ValueError, "must hold tokens of two bytes each; got 3 bytes."),
        ("text", "odd.bin", "bytes", ValueError, "must be text in UTF-8; got the byte 0xff at 1."),
        ("pydoc", "val", "bytes", ValueError, "split must be train or test for pydoc; got val. S"),
    ],
)
def test_what_is_not_there(files, dataset, split, tokenizer, error, message):
    (files / "odd.bin").write_bytes(b"a\xffb")
    with pytest.raises(error) as caught:
        opened(files, split, dataset=dataset, tokenizer=tokenizer)
    assert message in str(caught.value)


def test_no_folder_is_given():
    with pytest.raises(
        ValueError, match=r"^data\.data_dir must be set for a text\. Set --config\.d"
    ):
        opened(None, "train")


def test_the_listing_of_a_split_is_that_of_its_tokens(files):
    assert opened(files, "train").listing == opened(files, "train", context=2).listing
    rows = opened(files, "train")
    assert dataclasses.replace(rows, context=2).listing == rows.listing
