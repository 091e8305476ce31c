"""A bad row is an error, or the next good one takes its place."""

import numpy as np
import pytest

from crate_jax.data.rows import BadExampleError, good_row


class Numbers:
    """Rows of a number and a random draw; some are bad, which is seen after something is drawn."""

    name, shapes = "numbers/all", {}

    def __init__(self, *bad):
        self.bad = bad

    def __len__(self):
        return 5

    def row(self, index, rng):
        drawn = rng.random()
        if index in self.bad:
            raise BadExampleError(f"{self.name}[{index}] must be good; got bad.")
        return {"index": index, "drawn": drawn}


def draw():
    return np.random.default_rng(3).random()


@pytest.mark.parametrize(
    "bad, index, found", [((), 4, 4), ((1, 3), 1, 2), ((3, 4), 3, 0), ((4, 0, 1), 4, 2)]
)
def test_the_next_good_row_draws_what_the_bad_one_did(bad, index, found):
    row, is_own = good_row(Numbers(*bad), index, np.random.default_rng(3), skip=True)
    assert (row, is_own) == ({"index": found, "drawn": draw()}, found == index)


def test_a_bad_row_that_may_not_be_skipped():
    with pytest.raises(BadExampleError, match=r"numbers/all\[2\] must be good; got bad\."):
        good_row(Numbers(2), 2, np.random.default_rng(3), skip=False)


def test_no_good_row():
    with pytest.raises(
        ValueError,
        match=r"numbers/all must hold good .* none can be read\. The first: numbers/all\[2\]",
    ):
        good_row(Numbers(0, 1, 2, 3, 4), 2, np.random.default_rng(3), skip=True)
