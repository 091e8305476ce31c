"""Sources of texts: files, folders of files, and the topics that come with Python."""

from collections.abc import Callable, Iterator, Mapping

from crate_jax.config import DataConfig
from crate_jax.data.stores import storage

# One group in so many of Python's topics is for evaluation, from this one on.
HELD_OUT, FIRST_HELD_OUT = 8, 4
COPIED = 80  # letters of a paragraph that no two topics have by chance


def file_texts(data: DataConfig, split: str) -> Iterator[str]:
    """The texts of ``data_dir/split``, a file or a folder with files anywhere below, by path.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: a file is not UTF-8, or data.data_dir is not set.
    """
    folder = storage.data_folder(data)
    root, have = storage.join(folder, split), storage.list_folder(folder)
    if split.partition("/")[0] not in have:
        raise storage.unknown_split(f"a file or a folder of text below {folder}", split, have)
    inside = storage.is_folder(root)
    paths = [storage.join(root, name) for name in storage.find_files(root)] if inside else [root]
    for path in paths:
        try:
            yield storage.read_bytes(path).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} must be text in UTF-8; got the byte {error.object[error.start]:#04x} at "
                f"{error.start}. Convert it, or take it out of the folder."
            ) from error


def topic_texts(data: DataConfig, split: str) -> Iterator[str]:
    """The topics of `help`, from Python's own documentation, in order of names.

    What ``test`` holds is no part of ``train``: topics that have a paragraph in common stay
    together, for many are copied from others.

    Raises:
        ValueError: there is no such split.
    """
    del data
    if split not in ("train", "test"):
        raise ValueError(
            f"split must be train or test for pydoc; got {split}. Set --config.data.train_split "
            "and --config.data.eval_split."
        )
    from pydoc_data.topics import topics

    groups = related(topics)
    held_out = {name for group in groups[FIRST_HELD_OUT::HELD_OUT] for name in group}
    return (topics[name] for name in sorted(topics) if (name in held_out) == (split == "test"))


def related(texts: Mapping[str, str]) -> list[list[str]]:
    """Names of texts in groups, sorted; those that share a paragraph are in one group."""
    group_of = {name: [name] for name in sorted(texts)}
    owners: dict[str, str] = {}
    for name in sorted(texts):
        for paragraph in texts[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) < COPIED:
                continue
            mine, other = group_of[name], group_of[owners.setdefault(words, name)]
            if mine is not other:
                other += mine
                group_of |= dict.fromkeys(mine, other)
    unique = {id(group): sorted(group) for group in group_of.values()}
    return sorted(unique.values())


# By ``data.dataset``; and "tokens", which are no texts any more.
SOURCES: dict[str, Callable[[DataConfig, str], Iterator[str]]] = {
    "text": file_texts,
    "pydoc": topic_texts,
}
