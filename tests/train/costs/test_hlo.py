"""Accounting of compiled programs, against programs whose work is known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from beit_jax.train.costs.hlo import Leaf, read
from beit_jax.train.costs.work import BETWEEN_SLICES, Collective, work

MODULE = """HloModule step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (whole: f32[64,16]) -> f32[8,16] {
  %whole = f32[64,16]{1,0} parameter(0)
  %all-reduce.9 = f32[64,16]{1,0} all-reduce(%whole), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %place = u32[] partition-id()
  ROOT %part = f32[8,16]{1,0} dynamic-slice(%all-reduce.9, %place, %place), dynamic_slice_sizes={8,16}
}

%piece (shard: bf16[1,16,32]) -> bf16[8,16,32] {
  %shard = bf16[1,16,32]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,16,32]{2,1,0} all-gather(%shard), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
}

%inner_body (state: (u32[], f32[4])) -> (u32[], f32[4]) {
  %state = (u32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%state), index=0
  %value = f32[4]{0:T(128)} get-tuple-element(%state), index=1
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%at, %two)
  %permute-start = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%value), channel_id=5, source_target_pairs={{0,1},{1,0}}
  %permute-done = f32[4]{0} collective-permute-done(%permute-start)
  ROOT %after = (u32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%next, %permute-done)
}

%inner_condition (tested: (u32[], f32[4])) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %tested = (u32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %index = u32[]{:T(128)} get-tuple-element(%tested), index=0
  ROOT %less = pred[]{:T(512)} compare(%index, %eight), direction=LT
}

%outer_body (given: (s32[], f32[4], bf16[1,16,32])) -> (s32[], f32[4], bf16[1,16,32]) {
  %given = (s32[], f32[4]{0}, bf16[1,16,32]{2,1,0}) parameter(0)
  %step = s32[] get-tuple-element(%given), index=0
  %carried = f32[4]{0} get-tuple-element(%given), index=1
  %weights = bf16[1,16,32]{2,1,0} get-tuple-element(%given), index=2
  %first = bf16[8,16,32]{2,1,0} fusion(%weights), kind=kCustom, calls=%piece
  %second = bf16[8,16,32]{2,1,0} fusion(%weights), kind=kCustom, calls=%piece
  %zero = u32[] constant(0)
  %begin = (u32[], f32[4]{0}) tuple(%zero, %carried)
  %loop = (u32[]{:T(128)}, f32[4]{0:T(128)}) while(%begin), condition=%inner_condition, body=%inner_body
  %value.2 = f32[4]{0} get-tuple-element(%loop), index=1
  %one = s32[] constant(1)
  %step.2 = s32[] add(%step, %one)
  ROOT %done = (s32[], f32[4]{0}, bf16[1,16,32]{2,1,0}) tuple(%step.2, %value.2, %weights)
}

%outer_condition (left: (s32[], f32[4], bf16[1,16,32])) -> pred[] {
  %left = (s32[], f32[4]{0}, bf16[1,16,32]{2,1,0}) parameter(0)
  %twelve = s32[] constant(12)
  %step.3 = s32[] get-tuple-element(%left), index=0
  ROOT %less.2 = pred[] compare(%step.3, %twelve), direction=LT
}

%data_condition (any: (f32[4])) -> pred[] {
  %any = (f32[4]{0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

%data_body (some: (f32[4])) -> (f32[4]) {
  %some = (f32[4]{0}) parameter(0)
  %some.1 = f32[4]{0} get-tuple-element(%some), index=0
  ROOT %again = (f32[4]{0}) tuple(%some.1)
}

ENTRY %main (vector: f32[4], weight: bf16[1,16,32], gradient: f32[64,16]) -> f32[8,16] {
  %vector = f32[4]{0} parameter(0)
  %weight = bf16[1,16,32]{2,1,0} parameter(1)
  %gradient = f32[64,16]{1,0} parameter(2)
  %start = s32[] constant(0)
  %copied = s32[] copy(%start)
  %state.0 = (s32[], f32[4]{0}, bf16[1,16,32]{2,1,0}) tuple(%copied, %vector, /*index=2*/%weight)
  %blocks = (s32[], f32[4]{0}, bf16[1,16,32]{2,1,0}) while(%state.0), condition=%outer_condition, body=%outer_body
  %last = bf16[8,16,32]{2,1,0} fusion(%weight), kind=kCustom, calls=%piece
  %draws = (f32[4]{0}) tuple(%vector)
  %drawn = (f32[4]{0}) while(%draws), condition=%data_condition, body=%data_body
  %token = token[] after-all()
  %receive = (f32[2,16]{1,0}, u32[], token[]) recv(%token), channel_id=4, is_host_transfer=true
  %received = (f32[2,16]{1,0}, token[]) recv-done(%receive), channel_id=4, is_host_transfer=true
  ROOT %scattered = f32[8,16]{1,0} fusion(%gradient), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_collectives_count_as_often_as_their_loops_run() -> None:
    found = {one.kind: one for one in work(MODULE, 8).collectives}
    # One channel is one transfer, however many pieces of it overlap with what is around them: 12 times in the loop.
    assert found["all-gather"] == Collective("all-gather", 12, 12 * 7 * 16 * 32 * 2)
    # 12 x 4: the inner loop goes from 0 to 8 by 2.
    assert found["collective-permute"] == Collective("collective-permute", 48, 48 * 4 * 4)
    assert found["reduce-scatter"] == Collective("reduce-scatter", 1, 64 * 16 * 4 * 7 / 8)
    # Channels of transfers between slices are numbered anew: 4 is no gather here.
    assert found[BETWEEN_SLICES] == Collective(BETWEEN_SLICES, 1, 2 * 16 * 4)
    assert found.keys() == {"all-gather", "collective-permute", "reduce-scatter", BETWEEN_SLICES}


def test_a_loop_over_data_counts_once_and_is_reported() -> None:
    assert work(MODULE, 8).unknown_loops == 1


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 4),
        ("{}", 8),
    ],
)
def test_groups_of_devices_are_read_in_every_notation(groups: str, size: int) -> None:
    text = f"""HloModule step

ENTRY %main (vector: f32[100]) -> f32[100] {{
  %vector = f32[100]{{0}} parameter(0)
  ROOT %total = f32[100]{{0}} all-reduce(%vector), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    assert work(text, 8).collectives == (Collective("all-reduce", 1, 2 * 400 * (size - 1) / size),)


@pytest.mark.parametrize(
    ("leaf", "held"),
    [
        (Leaf("f32", (64, 197, 768), "2,1,0:T(8,128)"), 64 * 200 * 768 * 4),
        (Leaf("bf16", (12, 197, 197), "2,1,0:T(8,128)(2,1)"), 12 * 200 * 256 * 2),
        (Leaf("f32", (500_000, 2), "1,0:T(8,128)"), 500_000 * 128 * 4),  # two columns take the room of 128
        (Leaf("f32", (500_000, 2), "0,1:T(2,128)"), 500_096 * 2 * 4),
        (Leaf("f32", (10,), "0:T(128)"), 128 * 4),
        (Leaf("f32", (64, 197, 768), "2,1,0:T(8,128)S(1)"), 0),  # on the chip
        (Leaf("pred", (5, 3), "1,0"), 15),
        (Leaf("s32", (), ":T(128)"), 4),
    ],
)
def test_arrays_take_the_room_of_their_tiles(leaf: Leaf, held: int) -> None:
    assert leaf.held == held


@pytest.mark.parametrize("fusion", ["read_block", "read_within"])
def test_slices_of_stacked_parameters_count_as_slices(fusion: str) -> None:
    """Also where a fusion within the fusion takes them."""
    text = """HloModule step

%one_block (stack: f32[12,64,64], at: s32[], change: f32[64,64]) -> f32[12,64,64] {
  %stack = f32[12,64,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %change = f32[64,64]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %update = f32[1,64,64]{2,1,0} bitcast(%change)
  ROOT %changed = f32[12,64,64]{2,1,0} dynamic-update-slice(%stack, %update, %at, %zero, %zero)
}

%read_block (stack.1: f32[12,64,64], at.1: s32[]) -> f32[64,64] {
  %stack.1 = f32[12,64,64]{2,1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %block = f32[1,64,64]{2,1,0} dynamic-slice(%stack.1, %at.1, %zero.1, %zero.1), dynamic_slice_sizes={1,64,64}
  ROOT %flat = f32[64,64]{1,0} bitcast(%block)
}

%read_within (stack.2: f32[12,64,64], at.2: s32[]) -> f32[64,64] {
  %stack.2 = f32[12,64,64]{2,1,0} parameter(0)
  %at.2 = s32[] parameter(1)
  ROOT %inner = f32[64,64]{1,0} fusion(%stack.2, %at.2), kind=kLoop, calls=%read_block
}

ENTRY %main (blocks: f32[12,64,64], place: s32[]) -> f32[12,64,64] {
  %blocks = f32[12,64,64]{2,1,0} parameter(0)
  %place = s32[] parameter(1)
  %taken = f32[64,64]{1,0} fusion(%blocks, %place), kind=kLoop, calls=%READ
  %near = f32[64,64]{1,0:T(8,128)S(1)} copy(%taken)
  ROOT %put = f32[12,64,64]{2,1,0} fusion(%blocks, %place, %near), kind=kLoop, calls=%one_block
}
"""
    text = text.replace("%READ", f"%{fusion}")
    block, place = 64 * 64 * 4, 4
    read_, copied, put = 2 * block + place, block, block + place  # what lies on the chip costs nothing to read
    assert work(text, 1).traffic == read_ + copied + put


def compiled(function: Callable[..., Any], *shapes: tuple[int, ...]) -> str:
    text = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()
    assert text is not None
    return text


def test_products_in_loops_are_all_counted() -> None:
    def model(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def step(x: jax.Array, weights: jax.Array) -> jax.Array:
        return jax.grad(lambda weights: model(x, weights).sum())(weights)

    # Forward, and the gradients of both factors of each of 7 products.
    assert work(compiled(step, (32, 48), (7, 48, 48)), 1).flops == 3 * 7 * 2 * 32 * 48 * 48


@pytest.mark.parametrize(
    ("stride", "padding", "base", "kernel"),
    [((1, 1), "SAME", (1, 1), (1, 1)), ((2, 2), "VALID", (1, 1), (1, 1)), ((1, 1), ((2, 1), (0, 3)), (2, 3), (2, 1))],
)
def test_products_of_a_convolution_are_those_with_values(
    stride: tuple[int, int], padding: Any, base: tuple[int, int], kernel: tuple[int, int]
) -> None:
    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, stride, padding, base, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, w = (2, 9, 11, 3), (3, 3, 3, 5)
    # Of ones with ones, every product adds one to the result.
    assert work(compiled(convolve, x, w), 1).flops == 2 * float(convolve(jnp.ones(x), jnp.ones(w)).sum())


def test_every_computation_of_a_program_is_read() -> None:
    computations, entry = read(MODULE)
    assert entry == "main"
    assert list(computations) == [
        "add", "all-reduce-scatter.1", "piece", "inner_body", "inner_condition", "outer_body", "outer_condition",
        "data_condition", "data_body", "main",
    ]  # fmt: skip
    assert [len(one.instructions) for one in computations.values()] == [3, 4, 2, 8, 4, 13, 4, 2, 3, 14]


SPARSE_CORE = """HloModule step

%fused (table: f32[512,196,768], places: s32[38400]) -> f32[38400,768] {
  %table = f32[512,196,768]{2,0,1:T(8,128)} parameter(0)
  %places = s32[38400]{0:T(1024)} parameter(1)
  ROOT %rows = f32[38400,768]{1,0:T(8,128)} custom-call(%table, %places), custom_call_target="GatherScatterIndicesBitpacked"
}, execution_thread="sparsecore"

%called_computation.12 (param_0: f32[512,196,768], param_1: s32[38400]) -> f32[38400,768] {
  %param_0 = f32[512,196,768]{2,0,1:T(8,128)} parameter(0)
  %param_1 = s32[38400]{0:T(1024)} parameter(1)
  ROOT %gather_offload_custom_fusion.16 = f32[38400,768]{1,0:T(8,128)} fusion(%param_0, %param_1), kind=kCustom, calls=%fused, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
}, execution_thread="sparsecore"

%called_computation.4 (param_2: f32[512,196,768], param_3: s32[38400]) -> f32[38400,768] {
  %param_2 = f32[512,196,768]{2,0,1:T(8,128)} parameter(0)
  %param_3 = s32[38400]{0:T(1024)} parameter(1)
  %cloned.call-start = ((f32[512,196,768]{2,0,1:T(8,128)}, s32[38400]{0:T(1024)}), f32[38400,768]{1,0:T(8,128)}, u32[]{:S(8)}) call-start(%param_2, %param_3), async_execution_thread="sparsecore", to_apply=%called_computation.12
  ROOT %cloned.call-done = f32[38400,768]{1,0:T(8,128)} call-done(%cloned.call-start)
}, execution_thread="sparsecore"

ENTRY %main (images: f32[512,196,768], chosen: s32[38400]) -> f32[38400,768] {
  %images = f32[512,196,768]{2,0,1:T(8,128)} parameter(0)
  %chosen = s32[38400]{0:T(1024)} parameter(1)
  %gather_offload_async_start.2 = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%called_computation.4, backend_config={"sparse_core_config":{"offload":"OFFLOAD_GATHER"}}
  %gather_offload_async_start.2.update = ((f32[512,196,768]{2,0,1:T(8,128)}, s32[38400]{0:T(1024)}), f32[38400,768]{1,0:T(8,128)}) call-update(%gather_offload_async_start.2, %images, %chosen)
  ROOT %gather_offload_async_done.2 = f32[38400,768]{1,0:T(8,128)} call-done(%gather_offload_async_start.2.update)
}
"""  # noqa: E501


def test_a_gather_on_sparse_cores_counts_once() -> None:
    """As libtpu 0.0.50.1 writes it for v5p and v6e: the first start has no operands, and the cycles no number."""
    found = work(SPARSE_CORE, 4)
    images, chosen, rows = 512 * 196 * 768, 38_912, 38_400 * 768  # indices fill tiles of 1024
    assert found.traffic == 4 * (images + chosen + rows)
    assert found.cycles == 0 and found.unknown == () and found.flops == 0


# Each line is one that this counter did not know, in this form or at all; and the bytes of its shapes.
STRANGE = {
    "warp-gather": ("f32[8]{0} warp-gather(%a, %b)", 4 * (8 + 64 + 64)),
    "scaled-dot": ("f32[8,8]{1,0} scaled-dot(%a, %b), lhs_contracting_dims={1}", 4 * 3 * 64),
    "quantum-start": ("(f32[8]{0}) quantum-start(%a)", 4 * (8 + 64)),
    "slice-start": ("(s32[1]{0}) slice-start()", 4),
    "call-start": ("((), s32[4]{0}) call-start(), to_apply=%nowhere", 16),
    "dot": ("f32[8,8]{1,0} dot(), lhs_contracting_dims={1}", 256),
    "convolution": ("f32[8,8]{1,0} convolution(%a, %b), window={size=1}", 4 * 3 * 64),
    "while": ("(f32[8]{0}) while(%a), body=%nowhere", 4 * (8 + 64)),
    "conditional": ("f32[8]{0} conditional(%a), branch_computations={%nowhere}", 4 * (8 + 64)),
    "dynamic-update-slice": ("f32[8,8]{1,0} dynamic-update-slice(%a)", 4 * 2 * 64),
    "all-reduce": ("f32[8,8]{1,0} all-reduce(%elsewhere)", 4 * 64),
    "gather": ("f32[8]{0} gather()", 32),
    "negate": ("f32[8,8]{4,3:T(8,128)} negate(%a)", 4 * 2 * 64),
    "unreadable line": ("something=else", 0),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_known_counts_by_its_shapes_and_is_named(name: str) -> None:
    line, size = STRANGE[name]
    text = f"""HloModule step

ENTRY %main (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8]{{1,0}} parameter(0)
  %b = f32[8,8]{{1,0}} parameter(1)
  %strange = {line}
  ROOT %known = f32[8,8]{{1,0}} add(%a, %b)
}}
"""
    found = work(text, 1)
    assert found.unknown == (name,)
    assert found.traffic == size + 4 * 3 * 64
    assert found.flops == 0 and found.collectives == ()


# As XLA writes them for an H100: products that it leaves to a library, and their FLOPs.
LIBRARIES = {
    "__cudnn$convBiasActivationForward": (
        "(f32[2,9,11,5]{3,2,1,0}, u8[0]{0}) custom-call(%images, %kernel), window={size=3x3 pad=1_1x1_1}, "
        "dim_labels=b01f_o01i->b01f",
        2 * 2 * (3 * 9 - 2) * (3 * 11 - 2) * 3 * 5,
    ),
    "__cudnn$convBackwardInput": (
        "(f32[2,9,11,3]{3,2,1,0}, u8[64]{0}) custom-call(%outputs, %kernel), window={size=3x3 pad=1_1x1_1}, "
        "dim_labels=b01f_o01i->b01f",
        2 * 2 * (3 * 9 - 2) * (3 * 11 - 2) * 3 * 5,
    ),
    "__cudnn$convBackwardFilter": (
        "(f32[5,3,3,3]{3,2,1,0}, u8[64]{0}) custom-call(%images, %outputs), window={size=3x3 pad=1_1x1_1}, "
        "dim_labels=b01f_o01i->b01f",
        2 * 2 * (3 * 9 - 2) * (3 * 11 - 2) * 3 * 5,
    ),
    "__cublas$lt$matmul": (
        "(bf16[4,16,64]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), "
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}',
        2 * 4 * 16 * 64 * 32,
    ),
}


@pytest.mark.parametrize("target", LIBRARIES)
def test_products_of_a_gpus_libraries_count(target: str) -> None:
    line, flops = LIBRARIES[target]
    text = f"""HloModule step

ENTRY %main (images: f32[2,9,11,3]) -> f32[2,9,11,3] {{
  %images = f32[2,9,11,3]{{3,2,1,0}} parameter(0)
  %kernel = f32[5,3,3,3]{{3,2,1,0}} parameter(1)
  %outputs = f32[2,9,11,5]{{3,2,1,0}} parameter(2)
  %a = bf16[4,16,32]{{2,1,0}} parameter(3)
  %b = bf16[4,32,64]{{2,1,0}} parameter(4)
  %product = {line}, custom_call_target="{target}"
  ROOT %same = f32[2,9,11,3]{{3,2,1,0}} copy(%images)
}}
"""
    found = work(text, 1)
    assert (found.flops, found.unknown) == (flops, ())


def test_a_call_of_a_library_that_is_no_known_product_is_named() -> None:
    text = """HloModule step

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %b = f32[8,8]{1,0} custom-call(%a, %a), custom_call_target="__cudnn$fmhaSoftmax"
}
"""
    assert work(text, 1).unknown == ("custom-call",)


def test_a_kernel_counts_what_it_says_and_every_array_once() -> None:
    """It reads queries, keys and values of one array. The line is libtpu's, with the kernel's own text left out."""
    text = """HloModule step

ENTRY %main (qkv: bf16[8,197,2304], bias: f32[1,12,197,197]) -> bf16[8,197,768] {
  %qkv = bf16[8,197,2304]{2,1,0:T(8,128)(2,1)} parameter(0)
  %bias = f32[1,12,197,197]{3,2,1,0:T(8,128)} parameter(1)
  ROOT %call = bf16[8,197,768]{2,1,0:T(8,128)(2,1)} custom-call(%qkv, %qkv, %qkv, %bias), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8,197,2304]{2,1,0}, bf16[8,197,2304]{2,1,0}, \
bf16[8,197,2304]{2,1,0}, f32[1,12,197,197]{3,2,1,0}}, frontend_attributes={kernel_metadata={}}, \
backend_config={"flag_configs":[],"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"953769984",\
"transcendentals":"3725664","bytes_accessed":"11545392","remote_bytes_transferred":"0"}}}
}
"""
    found = work(text, 1)
    assert found.flops == found.opaque == 953_769_984
    assert found.traffic == 2 * 8 * 200 * (2304 + 768) + 4 * 12 * 200 * 256
    assert found.unknown == ()


def test_a_fusion_that_overlaps_counts_as_a_fusion() -> None:
    """As XLA writes it for GPUs: a slice of stacked parameters, read while something else is computed."""
    text = """HloModule step

%slice (stack: f32[12,768], at: s32[]) -> f32[1,768] {
  %stack = f32[12,768]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,768]{1,0} dynamic-slice(%stack, %at, %zero), dynamic_slice_sizes={1,768}
}

ENTRY %main (stack: f32[12,768], at: s32[]) -> f32[1,768] {
  %stack.1 = f32[12,768]{1,0} parameter(0)
  %at.1 = s32[] parameter(1)
  %start = ((f32[12,768]{1,0}, s32[]), f32[1,768]{1,0}, u32[]) fusion-start(%stack.1, %at.1), kind=kLoop, calls=%slice
  ROOT %done = f32[1,768]{1,0} fusion-done(%start)
}
"""
    assert work(text, 1).traffic == 768 * 4 + 4 + 768 * 4


def test_a_dimension_with_a_bound_counts_as_its_bound() -> None:
    text = """HloModule step

ENTRY %main (a: f32[<=8,4]) -> f32[<=8,4] {
  %a = f32[<=8,4]{1,0} parameter(0)
  ROOT %negated = f32[<=8,4]{1,0} negate(%a)
}
"""
    assert work(text, 1).traffic == 2 * 8 * 4 * 4


def test_a_product_of_an_unknown_kind_within_a_kernel_is_named() -> None:
    text = """HloModule step

%kernel (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} scaled-dot(%x, %x)
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %b = f32[8,8]{1,0} fusion(%a), kind=kOutput, calls=%kernel
}
"""
    found = work(text, 1)
    assert found.unknown == ("scaled-dot",) and found.traffic == 2 * 256


def test_a_text_of_another_form_is_no_traceback() -> None:
    for text in ("", "module @step { func.func public @main() }"):
        assert work(text, 1).unknown == ("program without an entry",)
