"""`benchmarks/bundles.py` on schedules and programs written by hand."""

import sys

import pytest
from command import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import bundles

from crate_jax.planning.hlo import read

# Two bundles, a loop of 5 rounds of three with one of 7 rounds of two inside, a loop that does not
# say how often, and the end: 2 + 5 (3 + 7 · 2) + 2 + 1.
TEXT = """= control target key start
     0   :  { %s1_s0 = smov 0 }
   0x1   :  { %s2_s1 = smov 0 }
   0x2 LB: > { %s3_s2 = sadd.s32 1, %s3_s2 } /* Start region 4 */
   0x3 LB: >> { %s4_s3 = sadd.s32 1, %s4_s3 } /* Start region 6 */
   0x4   : >> { %p1 = scmp.ge.s32.totalorder %s4_s3, 7 /* loop exit test */ ;; sbr.rel (!%p1) target = $region6 }
   0x5   : > { %p2 = scmp.ge.s32.totalorder %s3_s2, 5 /* loop exit test */ }
   0x6   : > { %9 = sbr.rel (!%p2) target = $region4 }
   0x7 LB: > { %s5_s4 = sadd.s32 1, %s5_s4 } /* Start region 8 */
   0x8   : > { %p3 = scmp.ge.s32.totalorder %s5_s4, %s6_s5 /* loop exit test */ ;; sbr.rel (!%p3) target = $region8 }
   0x9   :  { %10 = vsyncpa }
"""  # noqa: E501
# Of two units; the inner loop's second bundle has all of the first unit, the last half of it.
USE = "\n".join(
    ["== CAPACITY:", "MXU, VALU", "4 2", "== USE:", *["0 0"] * 4, "4 1", *["0 0"] * 4, "2 0"]
)


def test_bundles_are_counted_as_often_as_they_run():
    found = bundles.schedule(TEXT, USE)
    assert found.bundles == 2 + 5 * (3 + 7 * 2) + 2 + 1
    assert found.units == {"MXU": 5 * 7 + 0.5, "VALU": 5 * 7 * 0.5}
    assert found.unknown == 1


def test_a_file_about_units_of_other_bundles_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        bundles.schedule(TEXT, USE + "\n0 0")


def test_a_missing_file_about_units_is_named(tmp_path):
    (tmp_path / "17-fusion.1-02-final_bundles.txt").write_text(TEXT)
    with pytest.raises(FileNotFoundError, match=r"must hold fusion\.1-\*-final_hlo.* beside 17-"):
        bundles.schedules(tmp_path)
    (tmp_path / "17-fusion.1-00-final_hlo-static-per-bundle-utilization.txt").write_text(USE)
    assert bundles.schedules(tmp_path) == {"fusion.1": bundles.schedule(TEXT, USE)}


PROGRAM = read("""HloModule made_up

%first (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8] parameter(0)
  %b = f32[8,8] parameter(1)
  ROOT %c = f32[8,8] dot(%a, %b), metadata={op_name="one"}
}

%second (d: f32[8,8], e: f32[8,8]) -> f32[8,8] {
  %d = f32[8,8] parameter(0)
  %e = f32[8,8] parameter(1)
  ROOT %f = f32[8,8] dot(%d, %e), metadata={op_name="other"}
}

%third (g: f32[8,8], h: f32[8,8]) -> f32[8,8] {
  %g = f32[8,8] parameter(0)
  %h = f32[8,8] parameter(1)
  ROOT %i = f32[8,8] dot(%h, %g)
}

ENTRY %main (x: f32[8,8], y: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8] parameter(0)
  %y = f32[8,8] parameter(1)
  %fusion.1 = f32[8,8] fusion(%x, %y), kind=kOutput, calls=%first
  %fusion.2 = f32[8,8] fusion(%y, %fusion.1), kind=kOutput, calls=%second
  %fusion.3 = f32[8,8] fusion(%y, %fusion.2), kind=kOutput, calls=%third
  ROOT %add.4 = f32[8,8] add(%fusion.2, %fusion.3)
}
""")


def test_the_same_operation_has_the_same_schedule():
    """The compiler writes it once; of the third the factors are the other way round."""
    found = {"fusion.1": bundles.Schedule(7, {}, 0)}
    known = bundles.shared(found, PROGRAM)
    assert known == found | {"fusion.2": found["fusion.1"]}
    names = ["fusion.1", "fusion.2", "fusion.3", "add.4"]
    assert bundles.without_schedule(names, known, PROGRAM) == ["fusion.3"]
