"""HLO parser, on hand-written programs in the styles of the compilers."""

from types import SimpleNamespace

import numpy as np
import pytest

from switch_jax.performance.hlo import Collective, HloProgram, _mesh_groups

AXES = ("slice", "data", "expert", "model")
MESH = SimpleNamespace(
    devices=np.zeros((1, 2, 4, 2)), axis_names=AXES, shape=dict(zip(AXES, (1, 2, 4, 2)))
)

LOOP = """
HloModule jit_step, is_scheduled=true

%condition (p.1: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %p.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%body (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.2 = (s32[], /*index=1*/f32[8,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %x.2 = f32[8,4]{1,0} get-tuple-element(%p.2), index=1
  %r = f32[8,4]{1,0} all-reduce(%x.2), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i.2, %r)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %while.1 = (s32[], f32[8,4]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%while.1), index=1
}
"""


@pytest.mark.parametrize(
    "groups, axes, devices",
    [
        ("{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", ("data",), 2),
        ("[8,2]<=[16]", ("model",), 2),
        ("[4,4]<=[2,4,2]T(0,2,1)", ("expert",), 4),
        ("[2,8]<=[8,2]T(1,0)", ("data", "expert"), 8),
        ("[1,16]<=[16]", ("data", "expert", "model"), 16),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", ("model",), 2),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", ("data", "expert"), 8),
        ("mesh['a'=2,'b'=4,'c'=2] {'a','c'}", ("data", "model"), 4),
        # A part of an axis: the two halves of `expert`, and neighbours on it.
        ("mesh['a'=2,'b'=4,'c'=2] {'b':(1)2}", ("expert",), 2),
        ("mesh['a'=2,'b'=4,'c'=2] {'b':(2)2}", ("expert",), 2),
        ("{}", ("data", "expert", "model"), 16),
    ],
)
def test_replica_groups_in_every_notation_become_mesh_axes(groups, axes, devices):
    (collective,) = HloProgram(LOOP.replace("GROUPS", groups)).collectives(MESH)
    assert (collective.kind, collective.axes, collective.devices) == ("all-reduce", axes, devices)
    assert (collective.size, collective.times) == (8 * 4 * 4, 12)
    assert collective.bytes_sent == 2 * (devices - 1) / devices * 128 * 12


def test_groups_along_a_part_of_an_axis_follow_hlo():
    groups = _mesh_groups("'a'=2,'b'=4,'c'=2", "'b':(1)2")
    assert [sorted(group) for group in groups][:2] == [[0, 4], [1, 5]]
    groups = _mesh_groups("'a'=2,'b'=4,'c'=2", "'b':(2)2")
    assert [sorted(group) for group in groups][:2] == [[0, 2], [1, 3]]


def test_a_group_of_one_device_is_no_collective():
    assert HloProgram(LOOP.replace("GROUPS", "[16,1]<=[16]")).collectives(MESH) == []


def test_a_known_trip_count_is_used():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
    text = LOOP.replace("body=%body", known).replace("GROUPS", "[8,2]<=[16]")
    assert HloProgram(text).collectives(MESH)[0].times == 5


KINDS = """
ENTRY %main (a: bf16[8,4]) -> bf16[4,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %g = bf16[16,4]{1,0} all-gather(%a), channel_id=1, replica_groups=[8,2]<=[16], dimensions={0}
  %p = bf16[8,4] collective-permute(%a), channel_id=2, source_target_pairs={{0,2},{2,4},{4,0}}
  %e = bf16[8,4]{1,0} all-to-all(%a), channel_id=3, replica_groups=[8,2]<=[16], dimensions={0}
  %s = (bf16[8,4], bf16[16,4]) all-gather-start(%a), channel_id=4, replica_groups=[8,2]<=[16]
  %d = bf16[16,4]{1,0} all-gather-done(%s)
  %m = (bf16[8,4]{1,0}, bf16[2]{0}) all-reduce-start(%a, %b), channel_id=6, GROUPS
  %n = ((bf16[8,4], bf16[2]), (bf16[16,4], bf16[4])) all-gather-start(%a, %b), channel_id=7, GROUPS
  %o = ((bf16[8,4], bf16[2]), (bf16[4,4], bf16[1])) reduce-scatter-start(%a), channel_id=8, GROUPS
  %t = (bf16[8,4], bf16[8,4], u32[], u32[]) collective-permute-start(%a), channel_id=9, PAIRS
  ROOT %r = bf16[4,4]{1,0} reduce-scatter(%a), channel_id=5, replica_groups=[8,2]<=[16]
}
"""
KINDS = KINDS.replace("GROUPS", "replica_groups=[8,2]<=[16]")
KINDS = KINDS.replace("PAIRS", "source_target_pairs={{0,2},{2,4},{4,0}}")


def test_bytes_sent_by_each_kind_of_collective():
    collectives = HloProgram(KINDS).collectives(MESH)
    assert [c.kind for c in collectives] == [
        "all-gather",
        "collective-permute",
        "all-to-all",
        "all-gather",
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "collective-permute",
        "reduce-scatter",
    ]
    # Half of 128 gathered bytes, all of 64 bytes, half of 64, again 64; of two arrays together: all
    # of 64 + 4, half of 128 + 8, half of 64 + 4; all of 64, half of 2 × 32.
    assert [c.bytes_sent for c in collectives] == [64, 64, 32, 64, 68, 68, 34, 64, 32]


def test_sends_by_hosts_between_tpu_slices_are_collectives():
    text = """
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %t = token[] after-all()
  %s = (f32[8]{0}, u32[], token[]) send(%a, %t), channel_id=5, is_host_transfer=true, MORE
  %d = token[] send-done(%s), channel_id=5, is_host_transfer=true, MORE
}
""".replace("MORE", 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}')
    slices = SimpleNamespace(**vars(MESH) | {"shape": MESH.shape | {"slice": 4}})
    (collective,) = HloProgram(text).collectives(slices)
    assert collective == Collective("all-reduce", ("slice",), 4, size=32, times=1)
    assert collective.bytes_sent == 2 * 3 / 4 * 32


def test_parts_of_one_overlapped_collective_count_once():
    part = "{i} = f32[8]{{0}} all-gather(%a), channel_id=7, replica_groups=[8,2]<=[16], "
    part += 'frontend_attributes={{chain_id="0"}}'
    lines = "\n".join("  %g." + part.format(i=i) for i in range(3))
    text = f"ENTRY %main (a: f32[4]) -> f32[8] {{\n  %a = f32[4]{{0}} parameter(0)\n{lines}\n}}\n"
    assert len(HloProgram(text).collectives(MESH)) == 1
    assert len(HloProgram(text.replace("chain_id", "other")).collectives(MESH)) == 3


TRAFFIC = """
%fused (p0: f32[10,64], p1: s32[], p2: f32[10,8]) -> f32[10,64] {
  %p0 = f32[10,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[10,8]{1,0} parameter(2)
  %row = f32[1,8]{1,0} dynamic-slice(%p2, %p1, %p1), dynamic_slice_sizes={1,8}
  %wide = f32[1,64]{1,0} broadcast(%row), dimensions={0,1}
  ROOT %new = f32[10,64]{1,0} dynamic-update-slice(%p0, %wide, %p1, %p1)
}

%outer (q0: f32[10,64], q1: s32[]) -> f32[1,64] {
  %q0 = f32[10,64]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  ROOT %inner = f32[1,64]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%slicing
}

%slicing (s0: f32[10,64], s1: s32[]) -> f32[1,64] {
  %s0 = f32[10,64]{1,0} parameter(0)
  %s1 = s32[] parameter(1)
  ROOT %cut = f32[1,64]{1,0} dynamic-slice(%s0, %s1, %s1), dynamic_slice_sizes={1,64}
}

%retiling (t0: f32[10,64]) -> f32[10,64] {
  ROOT %t0 = f32[10,64]{1,0} parameter(0)
}

%retiled (r0: f32[10,64], r1: s32[]) -> f32[1,64] {
  %r0 = f32[10,64]{1,0} parameter(0)
  %r1 = s32[] parameter(1)
  %r2 = f32[10,64]{1,0} fusion(%r0), output_to_operand_aliasing={{}: (0, {})}, calls=%retiling
  ROOT %cut = f32[1,64]{1,0} dynamic-slice(%r2, %r1, %r1), dynamic_slice_sizes={1,64}
}

ENTRY %main (a: f32[10,64], b: f32[10,8]) -> f32[10,64] {
  %a = f32[10,64]{1,0} parameter(0)
  %b = f32[10,8]{1,0} parameter(1)
  %i = s32[] constant(0)
  LINE
}
"""
ROW = 64 * 4


@pytest.mark.parametrize(
    "line, expected",
    [
        ("ROOT %x = f32[10,64]{1,0} add(%a, %a)", 3 * 10 * ROW),
        # The result stays in the vector memory of the chip.
        ("ROOT %x = f32[10,64]{1,0:T(8,128)S(1)} add(%a, %a)", 2 * 10 * ROW),
        ("ROOT %x = f32[1,64]{1,0} dynamic-slice(%a, %i, %i)", 2 * ROW),
        # In place: a row of 8 is read, one of 64 written, and the index.
        ("ROOT %x = f32[10,64]{1,0} fusion(%a, %i, %b), kind=kLoop, calls=%fused", ROW + 32 + 4),
        ("ROOT %x = f32[1,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%outer", 2 * ROW + 4),
        ("ROOT %x = (f32[10,64]{1,0}, s32[]) tuple(%a, %i)", 0),
        # A slice of an array whose tiles are in another layout.
        ("ROOT %x = f32[1,64]{1,0} fusion(%a, %i), kind=kLoop, calls=%retiled", 2 * ROW + 4),
        # Memory that is allocated and not written.
        ('ROOT %x = f32[10,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"', 0),
        # A matmul of cuBLAS, with its workspace.
        (
            "ROOT %x = (f32[1,64]{1,0}, s8[4194304]{0}) custom-call(%a, %b),"
            ' custom_call_target="__cublas$lt$matmul"',
            11 * ROW + 10 * 8 * 4,
        ),
        # Results of an all-reduce only, and operands and results of an all-gather.
        ("ROOT %x = f32[10,64]{1,0} all-reduce-start(%a), to_apply=%add", 20 * ROW),
        ("ROOT %x = (f32[10,64]{1,0}, f32[20,64]{1,0}) all-gather-start(%a)", 30 * ROW),
        # Two rows prefetched into vector memory: only they are read.
        (
            "ROOT %x = ((f32[10,64]{1,0}), f32[2,64]{1,0:S(1)}, s32[]) slice-start(%a),"
            " slice={[0:2], [0:64]}",
            2 * ROW,
        ),
    ],
)
def test_memory_traffic_counts_slices_instead_of_whole_arrays(line, expected):
    assert HloProgram(TRAFFIC.replace("LINE", line)).memory_bytes() == pytest.approx(
        expected, abs=4
    )


def test_loops_of_unknown_length_are_counted_and_not_taken_for_one():
    known = LOOP.replace("GROUPS", "[8,2]<=[16]")
    assert HloProgram(known).unknown_loops() == 0
    varying = known.replace("constant(12)", "get-tuple-element(%p.1), index=0")
    assert HloProgram(varying).unknown_loops() == 1


def test_estimated_cycles_are_multiplied_by_the_iterations_of_loops():
    text = LOOP.replace("GROUPS", "[8,2]<=[16]")
    assert HloProgram(text).estimated_cycles() is None
    text = text.replace("to_apply=%add", 'to_apply=%add, backend_config={"estimated_cycles":"70"}')
    assert HloProgram(text).estimated_cycles() == 12 * 70
