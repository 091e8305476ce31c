"""docs/one_block.md, run as it is written."""

import re

from command import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/one_block.md").read_text(), re.M | re.S)


def test_the_examples_run():
    assert len(BLOCKS) == 4
    found = {"__name__": "one_block"}
    for block in BLOCKS:
        exec(compile(block, "docs/one_block.md", "exec"), found)
    assert found["deeper"].shape == (2, 10)
    assert found["net"].layers.C_JxFxCxC.shape == (20, 3, 1, 12, 12)
