"""The reader of compiled programs against programs whose work and traffic are known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from efftrain.measure.compiled.hlo import ProgramText
from efftrain.measure.compiled.replica_groups import first_group, group_axes

ROWS, WIDTH, ROUNDS = 16, 32, 7


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def compiled_text(function, mesh, *arrays: tuple[tuple[int, ...], P], out=None) -> ProgramText:
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in arrays]
    with jax.set_mesh(mesh):
        shardings = None if out is None else NamedSharding(mesh, out)
        return ProgramText(jax.jit(function, out_shardings=shardings).lower(*given).compile().as_text())


def test_a_scan_over_fsdp_layers_gathers_each_layer_once(mesh):
    def forward(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None

        return jax.lax.scan(layer, x, weights)[0]

    batch = P(("replica", "fsdp"))
    text = compiled_text(forward, mesh, ((ROWS, WIDTH), batch), ((ROUNDS, WIDTH, WIDTH), P(None, "fsdp")), out=batch)
    (gather,) = [c for c in text.collectives if c.kind == "all-gather"]
    assert gather.count * gather.size == ROUNDS * WIDTH * WIDTH * 4
    assert group_axes(gather.group, mesh) == ("fsdp",)
    assert text.flops == ROUNDS * 2 * (ROWS / 8) * WIDTH * WIDTH
    assert not text.unknown_loops


def test_loops_within_loops_multiply(mesh):
    def nested(x, w):
        def inner(x, _):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(lambda x, _: jax.lax.scan(inner, x, None, length=3), x, None, length=5)[0]

    text = compiled_text(nested, mesh, ((ROWS, WIDTH), P()), ((WIDTH, WIDTH), P()))
    assert text.flops == 3 * 5 * 2 * ROWS * WIDTH * WIDTH
    assert text.collectives == []


@pytest.mark.parametrize(("spec", "axes"), [(P("fsdp"), ("fsdp",)), (P(("replica", "fsdp")), ("replica", "fsdp"))])
def test_a_sum_over_shards_is_an_all_reduce_along_their_axes(mesh, spec, axes):
    text = compiled_text(lambda x: x.sum(0), mesh, ((ROWS, WIDTH), spec), out=P())
    (found,) = text.collectives
    assert (found.kind, found.size, found.count, found.in_loop) == ("all-reduce", WIDTH * 4, 1, False)
    assert group_axes(found.group, mesh) == axes


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['axis_0'=4] {'axis_0'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}, x", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}, x", (0, 3)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}, x", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(2)4}, x", (0, 1, 2, 3)),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}, x", (0, 1)),
        ("channel_id=1", ()),
    ],
)
def test_the_group_of_the_first_device_in_every_notation(text, group):
    assert first_group(text) == group


TPU = """HloModule step, is_scheduled=true

%async_fusion (p: bf16[64,256]) -> bf16[256,256] {
  %p = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[256,256]{1,0} all-gather(%p), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="2"}
}

%all-reduce-scatter.1 (q: f32[256,256]) -> f32[64,256] {
  %q = f32[256,256]{1,0} parameter(0)
  %sum = f32[256,256]{1,0} all-reduce(%q), channel_id=4, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[64,256]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={64,256}
}

%body (state: (s32[], bf16[64,256])) -> (s32[], bf16[64,256]) {
  %state = (s32[], bf16[64,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = bf16[64,256]{1,0} get-tuple-element(%state), index=1
  %again = bf16[256,256]{1,0} fusion(%w), kind=kOutput, calls=%async_fusion
  %left = bf16[8,4,2,256,32]{4,3,2,1,0} constant({...})
  %right = bf16[8,4,256,32,1]{4,3,2,1,0} constant({...})
  %scores = f32[8,4,2,256,256]{3,4,2,1,0:T(8,128)} convolution(%left, %right), window={size=8x4x1 stride=7x3x1 \
lhs_dilate=8x4x1}, dim_labels=012bf_01oi2->012bf
  %moved = (bf16[4,32]{1,0:S(1)}, bf16[4,32]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%w), \
channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %get = (bf16[64,32]{1,0}, bf16[256,32]{1,0}) all-gather-start(%w), channel_id=3, replica_groups={{0,1,2,3}}
  %one = s32[]{:T(128)} constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], bf16[64,256]{1,0}) tuple(%next, %w)
}

%condition (state.1: (s32[], bf16[64,256])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %state.1 = (s32[], bf16[64,256]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: bf16[64,256], g: f32[256,256]) -> bf16[256,256] {
  %a = bf16[64,256]{1,0} parameter(0)
  %g = f32[256,256]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,256]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[64,256]{1,0}) while(%start), condition=%condition, body=%body
  %scattered = f32[64,256]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %last = bf16[256,256]{1,0} fusion(%a), kind=kOutput, calls=%async_fusion.2
}

%async_fusion.2 (p2: bf16[64,256]) -> bf16[256,256] {
  %p2 = bf16[64,256]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[256,256]{1,0} all-gather(%p2), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}, \
frontend_attributes={chain_id="2"}
}
"""


def test_what_tpus_write_is_read_as_what_it_does():
    """A gather in pieces beside a loop is one; a reduce and slice is a scatter; starts hold two arrays."""
    text = ProgramText(TPU)
    found = {(c.kind, c.size, c.count, c.in_loop) for c in text.collectives}
    assert found == {
        ("all-gather", 256 * 256 * 2, 1, False),
        ("reduce-scatter", 256 * 256 * 4, 1, False),
        ("collective-permute", 4 * 32 * 2, 5, True),
        ("all-gather", 256 * 32 * 2, 5, True),
    }


def test_a_batched_product_that_a_tpu_writes_as_a_convolution_counts_as_the_product():
    assert ProgramText(TPU).flops == 5 * 2 * (8 * 4 * 2) * 256 * 256 * 32


def test_metadata_of_a_kernel_that_spans_lines_hides_nothing_behind_it():
    kernel = """  %kernel = f32[8]{0} custom-call(%w), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="splash"}
"""
    broken = TPU.replace("  %left = ", kernel + "  %left = ")
    text = ProgramText(broken)
    assert text.flops == ProgramText(TPU).flops
    assert text.kernels == (5, 0.0)
    assert len(text.collectives) == 4


def test_a_text_that_ends_too_early_is_refused():
    with pytest.raises(ValueError, match="body has no result"):
        ProgramText(TPU.replace("  ROOT %out =", "}\n  ROOT %out ="))


def test_a_loop_that_counts_in_twos_runs_half_as_often():
    """XLA unrolls the loop of a product with its gather, and the counter is added to twice."""
    unrolled = (
        TPU.replace("constant(5)", "constant(8)")
        .replace("tuple(%next,", "tuple(%after,")
        .replace("  ROOT %out", "  %after = s32[] add(%one, %next)\n  ROOT %out")
    )
    assert ProgramText(unrolled).flops == 4 * 2 * (8 * 4 * 2) * 256 * 256 * 32


def test_a_loop_of_unknown_length_is_named_and_counts_once():
    text = ProgramText(TPU.replace("constant(5)", "parameter(1)"))
    assert text.unknown_loops == ["loop"]
    assert text.flops == 2 * (8 * 4 * 2) * 256 * 256 * 32


def test_memory_traffic_of_a_product_in_a_loop_is_its_operands_and_results(mesh):
    text = compiled_text(lambda x, w: x @ w, mesh, ((ROWS, WIDTH), P()), ((WIDTH, WIDTH), P()))
    assert text.memory_bytes == 4 * (ROWS * WIDTH + WIDTH * WIDTH + ROWS * WIDTH)
