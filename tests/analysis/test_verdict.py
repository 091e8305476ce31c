"""What is said of layers whose measures are known."""

import numpy as np
import pytest

from crate_jax.analysis.measured import Measured
from crate_jax.analysis.verdict import Judged, judge, verdict


def of(mean, std, count=100):
    return Measured(np.array(mean, float), np.array(std, float), count)


def test_a_change_counts_beyond_two_standard_errors():
    changes = of([-1.0, 1.0, 0.5, -0.5], [4.9, 4.9, 2.6, 2.6])  # two errors: 0.98, 0.52
    assert judge(changes) == [Judged(-1, -1), Judged(1, 1), Judged(0.5, 0), Judged(-0.5, 0)]
    assert [half.sign for half in judge(of([-1.0, 2.0, 0.0], [np.nan] * 3, 1))] == [-1, 1, 0]


def test_a_sentence_a_layer():
    measured = {
        "compression": of([-10.0, 4.26, 0.0], [1, 1, 1]),
        "descent": of([-0.5, 0.25, 0.001], [0.1, 0.1, 1]),
        "zeros": of([0.5, 0.61, 0.7], [0, 0, 0]),
        "subspace_rate": of([30.0, 40.0, 35.0], [1, 1, 1]),
    }
    assert verdict(measured) == [
        "Layer 1: the attention lowers R^c by 10.0 nats; the second half lowers its LASSO by 0.50 "
        "per token; 50% of the code is zero.",
        "Layer 2: the attention raises R^c by 4.3 nats; the second half raises its LASSO by 0.25 "
        "per token; 61% of the code is zero.",
        "Layer 3: the attention leaves R^c as it is; the second half leaves its LASSO as it is; "
        "70% of the code is zero.",
        "Together: the attention compresses in 1 of 3 layers; the second half descends its LASSO "
        "in 1 of 3 layers; R^c after the attention rises from layer 1 to 2 with depth.",
    ]


def test_a_change_that_is_not_finite_is_called_so():
    measured = dict.fromkeys(("compression", "descent"), of([np.nan, -2.0], [np.nan, 1]))
    assert judge(measured["descent"])[0].sign is None
    assert verdict(measured) == [
        "Layer 1: the change of R^c is not finite; the change of the LASSO is not finite.",
        "Layer 2: the attention lowers R^c by 2.0 nats; the second half lowers its LASSO by 2.00 "
        "per token.",
        "Together: the attention compresses in 1 of 2 layers; the second half descends its LASSO "
        "in 1 of 2 layers.",
    ]


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        ((), []),
        (
            ("compression",),
            [
                "Layer 1: the attention lowers R^c by 2.0 nats.",
                "Together: the attention compresses in 1 of 1 layers.",
            ],
        ),
        (
            ("descent",),
            [
                "Layer 1: the second half lowers its LASSO by 2.00 per token.",
                "Together: the second half descends its LASSO in 1 of 1 layers.",
            ],
        ),
        (("subspace_rate",), ["Together: R^c after the attention never rises with depth."]),
    ],
)
def test_what_is_missing_is_not_spoken_of(names, lines):
    assert verdict({name: of([-2.0], [0.1]) for name in names}) == lines
