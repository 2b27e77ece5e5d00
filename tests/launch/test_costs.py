"""What is read from HLO, against programs small enough to count by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import costs

MESH = {"data": 2, "fsdp": 4, "sequence": 1, "model": 2}


def costs_of(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return costs.of_program(jax.jit(function).lower(*arguments).compile().as_text(), {"data": 1})


def test_products_in_nested_loops_count_as_often_as_they_run():
    def layer(x, w):
        inner = jax.lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, length=3)[0]
        return inner, None

    def program(x, weights, last):
        return jax.lax.scan(layer, x, weights)[0] @ last

    found = costs_of(program, (64, 128), (5, 128, 128), (128, 32))
    assert found.flops == 5 * 3 * (2 * 64 * 128 * 128) + 2 * 64 * 128 * 32
    assert not found.unknown_loops and not found.collectives


def test_a_loop_that_nothing_bounds_is_named():
    found = costs_of(lambda x: jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y + 1, x), (4,))
    assert len(found.unknown_loops) == 1


def wrapped(body: str, parameters: str, computations: str = "") -> str:
    return f"HloModule m\n\n{computations}\nENTRY %main ({parameters}) -> f32[] {{\n{body}\n}}\n"


def test_precision_multiplies_passes_of_float32_alone():
    def line(name, type, precision):
        return (
            f"  %a{name} = {type}[8,16]{{1,0}} parameter(0)\n  %b{name} = {type}[16,4]{{1,0}} parameter(1)\n"
            f"  %{name} = f32[8,4]{{1,0}} dot(%a{name}, %b{name}), lhs_contracting_dims={{1}}, "
            f"rhs_contracting_dims={{0}}{precision}"
        )

    one = 2 * 8 * 4 * 16
    for type, precision, passes in [
        ("f32", "", 1),
        ("f32", ", operand_precision={high,high}", 3),
        ("f32", ", operand_precision={highest,highest}", 6),
        ("bf16", ", operand_precision={highest,highest}", 1),
    ]:
        found = costs.of_program(wrapped(line("d", type, precision), ""), {"data": 1})
        assert (found.flops, found.passes_flops) == (one, passes * one), (type, precision)


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "labels", "window", "pairs"),
    [
        # A plain product of [6, 4] and [4, 5].
        ("6,4", "4,5", "6,5", "bf_io->bf", "", 1),
        # 7 outer products: one input position meets each of 7 window positions once, the rest is padding.
        ("1,6,4", "7,4,5", "7,6,5", "0bf_0io->0bf", "size=7 pad=6_6 rhs_reversal=1", 7),
        # A causal filter of 3 lags over 10 positions: 10 + 9 + 8 real pairs.
        ("10,6,4", "3,4,5", "10,6,5", "0bf_0io->0bf", "size=3 pad=2_0", 27),
        # Every other position of 10 with a window of 2.
        ("10,6,4", "2,4,5", "5,6,5", "0bf_0io->0bf", "size=2 stride=2", 10),
        # The gradient of it: 5 positions with holes between them.
        ("5,6,4", "2,4,5", "10,6,5", "0bf_0io->0bf", "size=2 pad=1_1 lhs_dilate=2", 10),
    ],
)
def test_convolutions_count_real_elements(lhs, rhs, out, labels, window, pairs):
    body = (
        f"  %a = bf16[{lhs}] parameter(0)\n  %b = bf16[{rhs}] parameter(1)\n"
        f"  ROOT %c = bf16[{out}] convolution(%a, %b), window={{{window}}}, dim_labels={labels}"
    )
    assert costs.of_program(wrapped(body, ""), {"data": 1}).flops == 2 * 6 * 4 * 5 * pairs


def test_convolutions_of_jax_count_what_their_definition_sums():
    def program(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2,), [(3, 1)], rhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    x, kernel = np.ones((3, 11, 4), np.float32), np.ones((5, 4, 6), np.float32)
    # With ones everywhere each output is the number of its real products.
    found = costs_of(program, x.shape, kernel.shape)
    assert found.flops == 2 * float(jax.jit(program)(x, kernel).sum())


# Devices of MESH in order: model varies fastest, then fsdp (by 2), then data (by 8).
@pytest.mark.parametrize(
    ("attributes", "axes", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5}}", "model", 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "fsdp", 4),
        ("replica_groups=[8,2]<=[16]", "model", 2),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", "fsdp", 4),
        ("replica_groups=[2,8]<=[8,2]T(1,0)", "data+fsdp", 8),
        ("replica_groups=mesh['a'=8,'b'=2] {'a'}", "data+fsdp", 8),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','b','c'}", "data+fsdp+model", 16),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", "fsdp", 4),
        ("replica_groups={}", "data+fsdp+model", 16),
        ("source_target_pairs={{0,8},{8,0}}", "data", 2),
    ],
)
def test_groups_are_named_by_mesh_axes(attributes, axes, size):
    assert costs.replica_axes(attributes, MESH) == (axes, size)


def test_collectives_in_loops_and_the_larger_of_input_and_output():
    computations = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %g = f32[32]{0} all-gather(%x), replica_groups={{0,2,4,6}}, dimensions={0}
  %s = f32[8]{0} reduce-scatter(%g), replica_groups={{0,2,4,6}}, dimensions={0}
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %s)
}

%cond (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(11)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}
"""
    body = """  %start = (s32[], f32[8]{0}) parameter(0)
  %w = (s32[], f32[8]{0}) while(%start), condition=%cond, body=%body
  %y = f32[8]{0} get-tuple-element(%w), index=1
  %r = (f32[8]{0}, f32[4]{0}) all-reduce(%y, %z), replica_groups={{0,8},{1,9}}, to_apply=%add
  ROOT %alone = f32[] all-reduce(%q), replica_groups={{0},{1}}, to_apply=%add"""
    found = costs.of_program(wrapped(body, "", computations), MESH)
    assert [(c.kind, c.axes, c.count, c.bytes, c.group_size) for c in found.collectives] == [
        ("all-gather", "fsdp", 11, 11 * 32 * 4, 4),
        ("all-reduce", "data", 1, 12 * 4, 2),
        ("reduce-scatter", "fsdp", 11, 11 * 32 * 4, 4),
    ]


def test_memory_traffic_takes_slices_for_what_they_take_and_skips_the_chips_own_memory():
    computations = """
%sliced (a: f32[10,100], i: s32[]) -> f32[1,100] {
  %a = f32[10,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %d = f32[1,100]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,100}
}

%updated (b: f32[10,100], u: f32[1,100], j: s32[]) -> f32[10,100] {
  %b = f32[10,100]{1,0} parameter(0)
  %u = f32[1,100]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %v = f32[10,100]{1,0} dynamic-update-slice(%b, %u, %j, %j)
}
"""
    body = """  %whole = f32[10,100]{1,0} parameter(0)
  %k = s32[]{:S(1)} parameter(1)
  %one = f32[1,100]{1,0} fusion(%whole, %k), kind=kLoop, calls=%sliced
  %near = f32[1,100]{1,0:T(8,128)S(1)} add(%one, %one)
  %new = f32[10,100]{1,0} fusion(%whole, %near, %k), kind=kLoop, calls=%updated
  ROOT %sum = f32[] negate(%new)"""
    row = 100 * 4
    slice_, add, update, negate = 2 * row, 2 * row, row, 10 * row + 4
    assert costs.of_program(wrapped(body, "", computations), {"data": 1}).hbm_bytes == slice_ + add + update + negate


def test_what_is_handed_to_the_network_counts_once_and_as_often_as_it_is_sent():
    # Of the pair of send and receive that the TPU's compiler makes of a sum over slices; the other sends to a neighbour chip.
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_target="{1,2,3:4}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    body = f"""
  %p = bf16[8,128]{{1,0}} parameter(0)
  %t = token[] after-all()
  %s = (bf16[8,128]{{1,0}}, u32[], token[]) send(%p, %t), channel_id=1, {attributes}
  %r = (bf16[8,128]{{1,0}}, u32[], token[]) recv(%t), channel_id=2, {attributes}
  %n = (bf16[8,128]{{1,0}}, u32[], token[]) send(%p, %t), channel_id=3
  ROOT %zero = f32[] constant(0)"""
    (found,) = costs.of_program(wrapped(body, "p: bf16[8,128]"), MESH).collectives
    assert found == costs.Collective(
        "all-reduce", "slices", count=1, bytes=2 * 8 * 128, largest=2 * 8 * 128, group_size=4
    )


def test_kernels_count_what_their_scope_says():
    line = (
        '  %k.{i} = (f32[2,4,1,256,8]{{4,3,2,1,0}}) custom-call(%mask, %q, %k), custom_call_target="tpu_custom_call", '
        'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":"{{\\"block\\": 128,\n}}}}, '
        'metadata={{op_name="jit(f)/{scope}/splash_mqa_{i}_no_residuals/pallas_call"}}, backend_config={{}}\n'
    )
    body = "".join(line.format(i=kind, scope="attention_pairs_49152") for kind in ("fwd", "dq", "dkv"))
    text = (
        "ENTRY %main (q: f32[2,4,3,256,8]) -> f32[2,4,1,256,8] {\n"
        "  %mask = s8[1,2,2]{2,1,0} parameter(0)\n"
        "  %q = f32[2,4,3,256,8]{4,3,2,1,0} parameter(1)\n"
        "  %k = f32[2,4,256,8]{3,2,1,0} parameter(2)\n"
        f"{body}{line.format(i='fwd', scope='another')}}}\n"
    )
    # Three of four blocks of 128 x 128; 2 x 4 x 3 heads of width 8; 2, 3 and 4 products of 2 FLOPs a pair.
    assert costs.of_program(text, MESH).flops == 2 * (2 + 3 + 4) * (3 * 128**2) * (2 * 4 * 3) * 8


def test_a_collective_that_goes_on_behind_several_fusions_is_one():
    def part(number):
        return (
            f"%part.{number} (shard.{number}: bf16[1,8], whole.{number}: bf16[8,8], x.{number}: f32[16]) -> "
            "(f32[16], bf16[8,8], bf16[8,8], bf16[1,8]) {\n"
            f"  %shard.{number} = bf16[1,8]{{1,0}} parameter(0)\n"
            f"  %whole.{number} = bf16[8,8]{{1,0}} parameter(1)\n"
            f"  %x.{number} = f32[16]{{0}} parameter(2)\n"
            f"  %sine.{number} = f32[16]{{0}} sine(%x.{number})\n"
            f"  %gathered.{number} = bf16[8,8]{{1,0}} all-gather(%shard.{number}), channel_id=7, "
            "replica_groups=[2,8]<=[16], dimensions={0}\n"
            f"  ROOT %all.{number} = (f32[16]{{0}}, bf16[8,8]{{1,0}}, bf16[8,8]{{1,0}}, bf16[1,8]{{1,0}}) "
            f"tuple(%sine.{number}, %whole.{number}, %gathered.{number}, %shard.{number})\n}}\n\n"
        )

    text = (
        part(1)
        + part(2)
        + (
            "ENTRY %main (a: bf16[1,8], b: bf16[8,8], c: f32[16]) -> (f32[16], bf16[8,8], bf16[8,8], bf16[1,8]) {\n"
            "  %a = bf16[1,8]{1,0} parameter(0)\n  %b = bf16[8,8]{1,0} parameter(1)\n  %c = f32[16]{0} parameter(2)\n"
            "  %first = (f32[16]{0}, bf16[8,8]{1,0}, bf16[8,8]{1,0}, bf16[1,8]{1,0}) fusion(%a, %b, %c), kind=kLoop, calls=%part.1\n"
            "  %d = f32[16]{0} get-tuple-element(%first), index=0\n"
            "  %e = bf16[8,8]{1,0} get-tuple-element(%first), index=2\n"
            "  ROOT %second = (f32[16]{0}, bf16[8,8]{1,0}, bf16[8,8]{1,0}, bf16[1,8]{1,0}) fusion(%a, %e, %d), kind=kLoop, calls=%part.2\n"
            "}\n"
        )
    )
    found = costs.of_program(text, MESH)
    (gather,) = found.collectives
    assert (gather.kind, gather.axes, gather.count, gather.bytes) == ("all-gather", "fsdp+model", 1, 8 * 8 * 2)
    # Twice 16 numbers are read and written, and what was gathered is written once.
    assert found.hbm_bytes == 2 * 2 * 16 * 4 + 8 * 8 * 2
