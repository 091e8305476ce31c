"""Masks as COCO's files hold them."""

import numpy as np

from crate_jax.files import Json


def encode(mask_HxW: np.ndarray) -> Json:
    """A mask as COCO's compressed run lengths.

    Pixels go column by column; the runs of zeros and ones take turns, zeros first. From the third
    run on a number is the difference to the one two before. A number is written in digits of five
    bits, the lowest first, each a character from "0" on; a sixth bit says that more follow, and the
    highest bit of the last digit is the sign.

    Args:
        mask_HxW: bool.

    Returns:
        {"size": [H, W], "counts": text}.

    >>> encode(np.array([[False, True], [True, True]]))
    {'size': [2, 2], 'counts': '13'}
    """
    flat = np.concatenate([[False], mask_HxW.ravel(order="F"), [not mask_HxW[-1, -1]]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    runs = np.diff(changes, prepend=0).tolist()
    text = ""
    for place, run in enumerate(runs):
        number = run - runs[place - 2] if place > 2 else run
        more = True
        while more:
            digit = number & 31
            number >>= 5
            more = number != (-1 if digit & 16 else 0)
            text += chr(digit + 32 * more + 48)
    return {"size": [int(side) for side in mask_HxW.shape], "counts": text}


def runs(counts: str) -> list[int]:
    """The run lengths in the text of `encode`, zeros first; it may be any file's.

    Args:
        counts: the text.

    Returns:
        Numbers of pixels; of a text that no mask has, some may be negative.

    Raises:
        ValueError: the text has another character, or ends within a number.

    >>> runs("13")
    [1, 3]
    """
    found: list[int] = []
    number = shift = 0
    for character in counts:
        digit = ord(character) - 48
        if not 0 <= digit < 64:
            raise ValueError(
                f"run lengths must be of the characters 0 … o; got {character!r}. Encode the mask "
                "anew."
            )
        number |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        number -= (digit & 16) << (shift - 4)
        found.append(number + found[-2] if len(found) > 2 else number)
        number = shift = 0
    if shift:
        raise ValueError(
            f"run lengths must end with a number; {counts[-20:]!r} breaks off. Encode the mask "
            "anew."
        )
    return found


def box(mask_HxW: np.ndarray) -> list[float]:
    """The box around a mask as COCO's, [left, top, width, height] in pixels; zeros for none."""
    rows, columns = (np.flatnonzero(mask_HxW.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return [0.0] * 4
    left, top = columns[0], rows[0]
    return [float(v) for v in (left, top, columns[-1] + 1 - left, rows[-1] + 1 - top)]
