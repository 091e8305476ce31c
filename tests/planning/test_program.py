"""The account of a program's text: what moves through the large memory, operation by operation."""

import pytest

from crate_jax.planning.hlo import arrays, read
from crate_jax.planning.program import account, copies

# A loop of three layers, as the TPU compiler writes it: weights and what is kept are stacked, small
# arrays lie in VMEM (S(1)) and counters in scalar memory (S(6)).
PROGRAM = """HloModule jit_step, is_scheduled=true

%layer (p.0: bf16[3,16,128], p.1: s32[], p.2: bf16[8,128]) -> (bf16[3,8,128], f32[8,128]) {
  %p.0 = bf16[3,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %p.2 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(2)
  %p.3 = bf16[3,8,128]{2,1,0:T(8,128)(2,1)} parameter(3)
  %zero = s32[] constant(0)
  %W = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,16,128}
  %flat = bf16[16,128]{1,0:T(8,128)(2,1)} bitcast(%W)
  %Y = f32[8,128]{1,0:T(8,128)} convolution(%p.2, %flat), dim_labels=bf_io->bf
  %kept = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} bitcast(%p.2)
  %all = bf16[3,8,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p.3, %kept, %p.1, %zero, %zero)
  ROOT %out = (bf16[3,8,128]{2,1,0:T(8,128)(2,1)}, f32[8,128]{1,0:T(8,128)}) tuple(%all, %Y)
}

%relayout (q: f32[8,128]) -> f32[128,8] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  %turned = f32[8,128]{0,1:T(8,128)} copy(%q)
  ROOT %b = f32[128,8]{1,0:T(8,128)} bitcast(%turned)
}

%body (t: (s32[], bf16[8,128], bf16[3,16,128], bf16[3,8,128])) -> (s32[], bf16[8,128], bf16[3,16,128], bf16[3,8,128]) {
  %t = (s32[]{:T(128)S(6)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[3,16,128]{2,1,0:T(8,128)(2,1)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %Z = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %Ws = bf16[3,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %saved = bf16[3,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%t), index=3
  %f = (bf16[3,8,128]{2,1,0:T(8,128)(2,1)}, f32[8,128]{1,0:T(8,128)}) fusion(%Ws, %i, %Z, %saved), kind=kOutput, calls=%layer, metadata={op_name="jit(step)/mssa"}, backend_config={"window_config":{"estimated_cycles":"700"}}
  %s = bf16[3,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%f), index=0
  %Y = f32[8,128]{1,0:T(8,128)} get-tuple-element(%f), index=1
  %moved = f32[128,8]{1,0:T(8,128)} fusion(%Y), kind=kLoop, calls=%relayout
  %start = (f32[128,8]{1,0:T(8,128)S(1)}, f32[128,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%moved)
  %done = f32[128,8]{1,0:T(8,128)S(1)} copy-done(%start)
  %begin = ((bf16[3,16,128]{2,1,0:T(8,128)(2,1)}), bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%Ws), slice={[0:1], [0:16], [0:128]}
  %end = bf16[1,16,128]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%begin)
  %kernel = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%done, %end, %Z), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/pallas_call"}
  ROOT %r = (s32[]{:T(128)S(6)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[3,16,128]{2,1,0:T(8,128)(2,1)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%i, %kernel, %Ws, %s)
}

%condition (c: (s32[], bf16[8,128], bf16[3,16,128], bf16[3,8,128])) -> pred[] {
  %c = (s32[]{:T(128)S(6)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[3,16,128]{2,1,0:T(8,128)(2,1)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %n = s32[]{:T(128)S(6)} get-tuple-element(%c), index=0
  ROOT %more = pred[]{:T(512)} compare(%n, %three), direction=LT
}

ENTRY %main (Z0: bf16[8,128], W0: bf16[3,16,128]) -> bf16[8,128] {
  %Z0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %W0 = bf16[3,16,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %zero.1 = s32[]{:T(128)S(6)} constant(0)
  %room = bf16[3,8,128]{2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %in = (s32[]{:T(128)S(6)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[3,16,128]{2,1,0:T(8,128)(2,1)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero.1, %Z0, %W0, %room)
  %loop = (s32[]{:T(128)S(6)}, bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[3,16,128]{2,1,0:T(8,128)(2,1)}, bf16[3,8,128]{2,1,0:T(8,128)(2,1)}) while(%in), condition=%condition, body=%body
  %last = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
  ROOT %copy = bf16[8,128]{0,1:T(8,128)(2,1)} copy(%last)
}
"""  # noqa: E501

TOKENS = 8 * 128 * 2  # bytes in bfloat16
WEIGHTS = 16 * 128 * 2  # of a layer
TURNED = 128 * 128 * 4  # 8 of 128 lanes are used


def test_every_operation_counts_what_it_reads_and_writes():
    found = {x.name: x for x in account(PROGRAM)}
    assert set(found) == {"f", "moved", "start", "begin", "kernel", "copy"}
    assert all(x.trips == 3 for name, x in found.items() if name != "copy")
    # The weights of one layer, and the tokens; what is kept of one layer, and the sums in float32.
    f = found["f"]
    assert (f.reads, f.writes) == (WEIGHTS + TOKENS, TOKENS + 2 * TOKENS)
    assert f.bytes == 3 * (f.reads + f.writes)
    assert (f.opcode, f.source, f.cycles) == ("fusion", "jit(step)/mssa", 700)
    assert (found["moved"].reads, found["moved"].writes) == (2 * TOKENS, TURNED)
    # Into VMEM and out of it nothing is counted but what leaves the large memory.
    assert (found["start"].reads, found["start"].writes) == (TURNED, 0)
    assert (found["begin"].reads, found["begin"].writes) == (WEIGHTS, 0)
    assert (found["kernel"].reads, found["kernel"].writes) == (TOKENS, TOKENS)
    assert (found["kernel"].opcode, found["kernel"].cycles) == ("tpu_custom_call", 0)
    copy = found["copy"]
    assert (copy.reads, copy.writes, copy.trips) == (TOKENS, TURNED // 2, 1)  # bfloat16


def test_another_memory_counts_where_it_is_asked_for():
    both = {x.name: x for x in account(PROGRAM, spaces=(0, 1))}
    assert (both["start"].reads, both["start"].writes) == (TURNED, TURNED)
    assert both["kernel"].reads == TURNED + WEIGHTS + TOKENS


def test_copies_are_what_only_lays_out_anew():
    found = account(PROGRAM)
    assert {x.name for x in found if x.is_copy} == {"moved", "copy"}
    assert copies(found, 8 * 128) == 3 + 1
    assert copies(found, 8 * 128 + 1) == 0


@pytest.mark.parametrize(
    ("text", "content", "padded", "space"),
    [
        ("f32[64,12,197,197]{2,3,1,0:T(8,128)}", 64 * 12 * 197**2 * 4, 64 * 12 * 200 * 256 * 4, 0),
        ("bf16[2,197,768]{2,1,0:T(8,128)(2,1)S(1)}", 2 * 197 * 768 * 2, 2 * 200 * 768 * 2, 1),
        ("f32[768]{0:T(1024)}", 768 * 4, 1024 * 4, 0),
        ("s32[]{:T(128)S(6)}", 4, 512, 6),
        ("bf16[8,197,64]{2,1,0}", 8 * 197 * 64 * 2, 8 * 197 * 64 * 2, 0),  # of a GPU
        ("f8e4m3fn[3,5]{1,0}", 15, 15, 0),
        ("pred[7]", 7, 7, 0),
        ("s4[7]{0}", 4, 4, 0),
    ],
)
def test_arrays_have_the_padding_of_their_tiles(text, content, padded, space):
    (array,) = arrays(text)
    assert (array.content, array.bytes, array.space) == (content, padded, space)


def test_a_loop_runs_as_often_as_the_program_says():
    program = read(PROGRAM)
    (loop,) = (x for x in program.computations["main"].values() if x.opcode == "while")
    assert program.trips(loop) == 3
    known = PROGRAM.replace(
        "body=%body\n", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}\n'
    )
    (loop,) = (x for x in read(known).computations["main"].values() if x.opcode == "while")
    assert read(known).trips(loop) == 5
    assert [name for name, _ in program.runs()] == ["main", "body"]
