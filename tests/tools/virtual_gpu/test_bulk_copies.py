"""Bulk copies of tensors: boxes against a formula of the PTX ISA, and what they must wait for."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.tools.virtual_gpu.kernels import caught, changed, execute, written
from tests.tools.virtual_gpu.scripts import described_product
from tools.virtual_gpu.executor import ExecutionError
from tools.virtual_gpu.faults import Fault, UnsupportedError
from tools.virtual_gpu.footprint import footprint
from tools.virtual_gpu.record import Launch
from tools.virtual_gpu.tensor_maps import box, encoded
from tools.virtual_gpu.trace import traced

SPANS = {0: None, 1: 32, 2: 64, 3: 128}
ELEMENTS = {1: 0, 2: 6, 4: 7, 8: 9}


@pytest.mark.parametrize("size", ELEMENTS)
@pytest.mark.parametrize("mode", SPANS)
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_a_box_lies_where_the_manual_says(rank: int, mode: int, size: int) -> None:
    """Rows one after another, the innermost dimension fastest; of rows of 32, 64 and 128 bytes the
    16-byte chunk c of row r at c ^ (r's line of 128 bytes), within lines of 4, 2 and 1 rows."""
    row = SPANS[mode] or 48
    sides = [*[2, 2, 3, 5][: rank - 1], row // size]
    shape = [*[7, 5, 6, 9][: rank - 1], 100]
    strides = [48 * 1024, 9600, 1600, 800 + 16 * size][-rank + 1 :] if rank > 1 else []
    at = [*[-1, 3, 5, 6][: rank - 1], 100 - sides[-1] // 2]
    made = box(encoded(4096, ELEMENTS[size], shape, strides, sides, mode), at[::-1], 2048)
    assert made.bytes == np.prod(sides) * size
    addresses = made.address[:, None] + np.arange(made.width)
    seen = addresses.reshape(-1, size), made.inside.repeat(made.width).reshape(-1, size)
    places = (made.chunks[:, None] * 16 + np.arange(16)).reshape(-1, size)
    chunks = row // 16 if mode else 1
    for number, index in enumerate(itertools.product(*map(range, sides))):
        where = [a + i for a, i in zip(at, index, strict=True)]
        byte = 4096 + sum(w * s for w, s in zip(where, [*strides, size], strict=True))
        assert (seen[0][number] == byte + np.arange(size)).all()
        inside = all(0 <= w < limit for w, limit in zip(where, shape, strict=True))
        assert (seen[1][number] == inside).all()
        line, chunk = divmod(number * size, row)
        moved = chunk // 16 ^ (line // (8 // chunks) % chunks if mode else 0)
        place = 2048 + line * row + moved * 16 + chunk % 16
        assert (places[number] == place + np.arange(size)).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"address": 4104}, "global_address must not be 4104"),
        ({"strides": [72]}, r"global_stride must not be \[72 "),
        ({"shape": [0, 64]}, "global_dim must not be"),
        ({"box": [512, 32]}, "box_dim must not be"),
        ({"box": [8, 3]}, "box_dim must not be"),
        ({"box": [8, 128], "swizzle_mode": 3}, "swizzle_mode must not be 3"),
        ({"shape": [2, 4, 64], "strides": [128, 128], "box": [1, 8, 32]}, "3 dimensions, and a"),
    ],
)
def test_a_map_that_cannot_be_is_a_fault(change: dict, said: str) -> None:
    given = {"address": 4096, "elemtype": 6, "shape": [64, 64], "strides": [128], "box": [8, 32]}
    box(encoded(**given), [0, 0], 128)
    with pytest.raises(Fault, match=said):
        box(encoded(**given | change), [0, 0], 128)
    with pytest.raises(Fault, match="no multiple of 128"):
        box(encoded(**given), [0, 0], 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"elemtype": 11}, "elemtype is 11"),
        ({"fill_mode": 1}, "fill_mode is 1"),
        ({"swizzle_mode": 4}, "swizzle_mode is 4"),
        ({"swizzle_mode": 3}, "swizzle_mode is 3"),  # its rows have 64 bytes
    ],
)
def test_what_a_map_may_say_and_has_no_rule_is_named(change: dict, said: str) -> None:
    given = {"address": 4096, "elemtype": 6, "shape": [64, 64], "strides": [128], "box": [8, 32]}
    with pytest.raises(UnsupportedError, match=said):
        box(encoded(**given | change), [0, 0], 128)


WAIT = """
{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [4096], 0;
    @!complete bra.uni waitLoop;
}
"""
# Thread 0 makes a map of `x` in shared memory, its warp brings it to `scratch`, and a copy brings a
# box of it, which every thread doubles and another copy stores in `out`.
COPY = f"""
setp.lt.u32 %p1, %r0, 32;
shl.b32 %r1, %r0, 2;
cvt.u64.u32 %rd20, %r1;
@%p1 st.shared.b32 [%r1+8192], 0;
bar.warp.sync -1;
setp.eq.u32 %p2, %r0, 0;
mov.b64 %rd21, 8192;
{{fields}}
@%p1 tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned
    [%rd1], [%rd21], 128;
@%p1 fence.proxy.tensormap::generic.acquire.gpu [%rd1], 128;
cvta.global.u64 %rd22, %rd1;
elect.sync %r2|%p3, -1;
and.pred %p3, %p3, %p1;
@%p2 mbarrier.init.shared::cta.b64 [4096], 1;
@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [4096], 512;
bar.sync 0;
mov.b32 %r3, 2;
mov.b32 %r4, -1;
@%p3 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
    [1024], [%rd22, {{{{%r3, %r4}}}}], [4096];
{WAIT.replace("{", "{{").replace("}", "}}")}
ld.shared.b64 %rd23, [%r6+1024];
add.s64 %rd23, %rd23, %rd23;
bar.sync 0;
st.shared.b64 [%r6+1024], %rd23;
fence.proxy.async.shared::cta;
bar.sync 0;
@%p3 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd2, {{{{%r8, %r8}}}}], [1024];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group.read 0;
"""
FIELDS = {
    "global_address": "%rd0",
    "rank": 1,
    "box_dim": (16, 8),
    "global_dim": (20, 6),
    "global_stride": (80,),
    "element_stride": (1, 1),
    "elemtype": 3,
    "interleave_layout": 0,
    "swizzle_mode": 2,
    "fill_mode": 0,
}


def copy(**fields: object) -> tuple[Launch, torch.Tensor]:
    """The launch, and what its output must be: rows -1 to 6 and columns 2 to 17 of 6 x 20, twice,
    with zeros outside."""
    x = torch.arange(1, 121, dtype=torch.int32).reshape(6, 20)
    tensors = {"x": x, "scratch": torch.zeros(16, dtype=torch.int64)}
    out = torch.zeros(8, 16, dtype=torch.int32)
    described = torch.from_numpy(encoded(out.data_ptr(), 3, [8, 16], [64], [8, 16], 2))
    lines = ["mul.lo.s32 %r6, %r0, 8;", "mov.b32 %r8, 0;"]
    for name, value in (FIELDS | fields).items():
        bits = 64 if name in ("global_address", "global_stride") else 32
        parts = enumerate(value) if isinstance(value, tuple) else [("", value)]
        for number, part in parts:
            place = f"0x{number}, " if number != "" else ""
            if place or bits == 64:
                register = "%rd24" if bits == 64 else "%r7"
                lines.append(f"mov.b{bits} {register}, {part};")
                part = register
            lines.append(
                f"@%p2 tensormap.replace.tile.{name}.shared::cta.b1024.b{bits} [%rd21], "
                f"{place}{part};"
            )
    body = COPY.format(fields="\n".join(lines))
    launch = written(body, {**tensors, "map": described, "out": out}, threads=64, shared=16384)
    padded = torch.zeros(8, 16, dtype=torch.int32)
    padded[1:7] = 2 * x[:, 2:18]
    return launch, padded


def test_a_box_comes_and_goes_with_zeros_outside() -> None:
    launch, right = copy()
    execute(launch)
    assert torch.equal(launch.tensors["out"], right)


NEEDED = {
    "mbarrier.init": "there is no mbarrier at byte 4096",
    "mbarrier.arrive": "does not end: .* waits for 1 arrivals and -512 bytes",
    "cp.async.bulk.tensor.2d.shared": "does not end: .* waits for 0 arrivals and 512 bytes",
    "fence.proxy.tensormap": r"no fence\.proxy\.tensormap acquired",
    "fence.proxy.async": r"cp\.async\.bulk of what thread 0 wrote, with no fence\.proxy\.async and",
    "cp.async.bulk.commit_group": r"ends before a cp\.async\.bulk was waited for",
    "cp.async.bulk.wait_group": r"ends before a cp\.async\.bulk was waited for",
    "tensormap.replace.tile.rank": "a tensor map of 1 dimensions, and a copy of 2",
    "tensormap.replace.tile.global_address": "global load outside of every tensor",
    "tensormap.replace.tile.box_dim": "box_dim must not be",
}


@pytest.mark.parametrize("statement", NEEDED)
def test_without_a_statement_there_is_a_fault(statement: str) -> None:
    launch, _ = copy()
    lines = launch.ptx.splitlines()
    at = next(n for n, line in enumerate(lines) if statement in line)
    dropped = [at] if lines[at].endswith(";") else [at, at + 1]
    with pytest.raises(ExecutionError, match=NEEDED[statement]):
        execute(changed(launch, "\n".join(lines[at : at + len(dropped)]), ""))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_barriers_are_needed(which: int) -> None:
    """Between who makes the mbarrier or the map and the copy, between reading and writing (here of
    one thread and one byte: not needed), between writing and the copy."""
    launch, right = copy()
    dropped = changed(launch, "bar.sync 0;", "", which)
    if which == 1:
        execute(dropped)
        assert torch.equal(launch.tensors["out"], right)
        return
    with pytest.raises(ExecutionError, match="race in shared memory"):
        execute(dropped)


def test_what_a_copy_brings_is_nobody_s_until_it_was_waited_for() -> None:
    launch, _ = copy()
    with pytest.raises(ExecutionError, match=r"shared load of what a cp\.async still copies to"):
        execute(changed(launch, WAIT, ""))
    with pytest.raises(ExecutionError, match=r"shared store of what a cp\.async still copies to"):
        execute(changed(launch, WAIT, f"@%p2 st.shared.b32 [1024], 0;{WAIT}"))
    ends = changed(launch, WAIT, "ret;")
    with pytest.raises(ExecutionError, match=r"ends before a cp\.async\.bulk was waited for"):
        execute(ends)


def test_a_copy_is_over_when_its_bytes_have_come() -> None:
    launch, right = copy()
    for expected, missing in ((528, 16), (256, -256)):
        with pytest.raises(ExecutionError, match=f"0 arrivals and {missing} bytes that do"):
            execute(changed(launch, "_, [4096], 512", f"_, [4096], {expected}"))
    with pytest.raises(ExecutionError, match="waits for 1 arrivals and 0 bytes"):
        execute(changed(launch, "b64 [4096], 1;", "b64 [4096], 2;"))
    # The phase before the first one counts as over: nothing is waited for.
    with pytest.raises(ExecutionError, match=r"still copies to"):
        execute(changed(launch, "complete, [4096], 0", "complete, [4096], 1"))
    again = "@%p2 mbarrier.arrive.shared::cta.b64 _, [4096];"
    with pytest.raises(ExecutionError, match="an arrival more than its 1"):
        execute(changed(launch, WAIT, f"{again}{WAIT}"))
    # Not of this phase but of the next one, which would not end.
    over = changed(launch, "complete, [4096], 0", "complete, [4096], 1")
    with pytest.raises(ExecutionError, match="waits for 1 arrivals and 0 bytes"):
        execute(changed(over, WAIT.replace(", 0;", ", 1;"), WAIT + WAIT.replace(", 0;", ", 1;")))
    # After the wait an arrival is the next phase's.
    execute(changed(launch, WAIT, f"{WAIT}{again}"))
    assert torch.equal(launch.tensors["out"], right)


def test_a_stored_box_is_overwritten_when_it_was_waited_for() -> None:
    launch, right = copy()
    commit, store = "cp.async.bulk.commit_group;", "st.shared.b64 [%r6+1024], 7;"
    with pytest.raises(ExecutionError, match=r"write of what a cp\.async\.bulk still reads"):
        execute(changed(launch, commit, f"{commit}\n{store}"))
    wait = "cp.async.bulk.wait_group.read 0;"
    # Thread 0 waited; the others know of it behind a barrier.
    with pytest.raises(ExecutionError, match="write of what another thread read"):
        execute(changed(launch, wait, f"{wait}\n{store}"))
    execute(changed(launch, wait, f"{wait}\nbar.sync 0;\n{store}"))
    assert torch.equal(launch.tensors["out"], right)
    more = changed(launch, wait, f"{wait.replace('0', '1')}\nbar.sync 0;\n{store}")
    with pytest.raises(ExecutionError, match=r"write of what a cp\.async\.bulk still reads"):
        execute(more)
    # A group more, an empty one, is behind it then.
    execute(changed(more, commit, f"{commit}\n{commit}"))


@pytest.mark.parametrize("register, widened", [("%rd20", ""), ("%r1", "cvt.u64.u32 %rd20, %r1;")])
def test_the_address_of_a_parameter_is_one_of_its_space(register: str, widened: str) -> None:
    """Of 32 or 64 bits, and nothing that lies in the tensor until it is made generic."""
    body = f"""
    mov.b{64 if widened == "" else 32} {register}, k_param_0;
    {widened}
    cvta.param.u64 %rd21, %rd20;
    ld.global.b64 %rd22, [%rd21+8];
    st.global.b64 [%rd11], %rd22;
    """
    tensors = {"map": torch.arange(16), "out": torch.zeros(32, dtype=torch.int64)}
    launch = written(body, tensors)
    launch = changed(launch, ".param .u64 k_param_0", ".param .align 64 .b8 k_param_0[128]")
    launch = changed(
        launch, "ld.param.b64 %rd0, [k_param_0];\nmad.wide.u32 %rd10, %r0, 8, %rd0;", ""
    )
    execute(launch)
    assert tensors["out"].tolist() == [1] * 32
    with pytest.raises(ExecutionError, match="global load outside of every tensor"):
        execute(changed(launch, "[%rd21+8]", "[%rd20+8]"))
    with pytest.raises(ExecutionError, match=r"cvta\.param of what is no parameter's address"):
        execute(changed(launch, "cvta.param.u64", "add.s64 %rd20, %rd20, 8;\ncvta.param.u64"))


def test_a_map_reaches_no_further_than_the_tensor() -> None:
    launch, _ = copy(global_dim=(20, 7))
    with pytest.raises(ExecutionError, match=r"global load outside of every tensor: .* of x"):
        execute(launch)


def test_an_mbarrier_orders_what_lies_before_its_arrivals() -> None:
    """Each thread writes its word and reads its neighbour's, with an mbarrier between."""
    body = """
    setp.eq.u32 %p0, %r0, 0;
    @%p0 mbarrier.init.shared::cta.b64 [512], 64;
    bar.sync 0;
    shl.b32 %r1, %r0, 2;
    xor.b32 %r2, %r1, 128;
    st.shared.b32 [%r1], %r0;
    mbarrier.arrive.shared::cta.b64 _, [512];
    WAIT
    ld.shared.b32 %r4, [%r2];
    cvt.u64.u32 %rd20, %r4;
    st.global.b64 [%rd10], %rd20;
    mbarrier.inval.shared::cta.b64 [512];
    """.replace("WAIT", WAIT.replace("4096", "512"))
    body = body.replace("mbarrier.inval", "bar.sync 0;\n@%p0 mbarrier.inval")
    out = torch.zeros(64, dtype=torch.int64)
    launch = written(body, {"out": out}, threads=64, shared=1024)
    execute(launch)
    assert out.tolist() == [thread ^ 32 for thread in range(64)]
    late = changed(launch, "st.shared.b32 [%r1], %r0;", "")
    arrive = "mbarrier.arrive.shared::cta.b64 _, [512];"
    late = changed(late, arrive, f"{arrive}\nst.shared.b32 [%r1], %r0;")
    with pytest.raises(ExecutionError, match="race in shared memory: read of what thread"):
        execute(late)
    with pytest.raises(ExecutionError, match=r"write of what thread \d+ wrote|write of what"):
        execute(changed(launch, "bar.sync 0;", "", 1))
    with pytest.raises(UnsupportedError, match="a wait by a part of the block"):
        execute(changed(launch, "mbarrier.try_wait", "@%p0 mbarrier.try_wait"))


def test_one_lane_of_a_warp_is_elected() -> None:
    """The same each time, and only where the whole warp is there."""
    out = torch.zeros(64, 4, dtype=torch.int32)
    body = """
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    elect.sync %r1|%p0, -1;
    selp.b32 %r2, 1, 0, %p0;
    elect.sync %r3|%p1, -1;
    selp.b32 %r4, 1, 0, %p1;
    st.global.v4.b32 [%rd20], {%r1, %r2, %r3, %r4};
    """
    launch = written(body, {"out": out}, threads=64)
    execute(launch)
    for warp in out.reshape(2, 32, 4):
        assert (warp[:, 0] == warp[0, 0]).all() and torch.equal(warp[:, :2], warp[:, 2:])
        assert warp[:, 1].tolist() == [int(lane == warp[0, 0]) for lane in range(32)]
    part = changed(launch, "elect.sync", "setp.lt.u32 %p2, %r0, 9;\n@%p2 elect.sync")
    with pytest.raises(ExecutionError, match=r"elect\.sync by a part of a warp"):
        execute(part)


def test_what_knows_nothing_of_boxes_says_so() -> None:
    launch, _ = copy()
    with pytest.raises(
        UnsupportedError, match=r"no sectors are known of .*cp\.async\.bulk\.tensor"
    ):
        footprint(launch)
    with (
        traced() as trace,
        pytest.raises(UnsupportedError, match=r"has no rule for .*cp\.async\.bu"),
    ):
        trace.launch(launch)


def test_blocks_that_part_have_mbarriers_and_copies_of_their_own() -> None:
    """Four blocks go round a loop as often as their number says, a copy under way, then wait."""
    x = torch.arange(1, 257, dtype=torch.int32).reshape(32, 8)
    out = torch.zeros(4, 64, dtype=torch.int32)
    of_x = torch.from_numpy(encoded(x.data_ptr(), 3, [32, 8], [32], [8, 8]))
    of_out = torch.from_numpy(encoded(out.data_ptr(), 3, [4, 64], [256], [1, 64]))
    body = f"""
    mov.u32 %r1, %ctaid.x;
    shl.b32 %r2, %r1, 3;
    mov.b32 %r3, 0;
    setp.eq.u32 %p0, %r0, 0;
    @%p0 mbarrier.init.shared::cta.b64 [4096], 1;
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [4096], 256;
    bar.sync 0;
    @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [0], [%rd2, {{%r3, %r2}}], [4096];
    mov.b32 %r5, 0;
    $again:
    add.s32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, %r1;
    @%p1 bra $again;
    {WAIT}
    shl.b32 %r6, %r0, 3;
    ld.shared.v2.b32 {{%r7, %r8}}, [%r6];
    add.s32 %r7, %r7, %r5;
    add.s32 %r8, %r8, %r5;
    st.shared.v2.b32 [%r6+512], {{%r7, %r8}};
    fence.proxy.async;
    bar.sync 0;
    @%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd3, {{%r3, %r1}}], [512];
    cp.async.bulk.commit_group;
    setp.lt.u32 %p1, %r1, 1;
    @%p1 bra $early;
    add.s32 %r5, %r5, 1;
    $early:
    cp.async.bulk.wait_group 0;
    """
    tensors = {"x": x, "out": out, "of_x": of_x, "of_out": of_out}
    launch = dataclasses.replace(written(body, tensors, shared=8192), grid=(4, 1, 1))
    execute(launch)
    for block in range(4):
        right = x[8 * block : 8 * block + 8].flatten() + max(block, 1)
        assert torch.equal(out[block], right)
    early = changed(launch, "bra $early;\n", "bra $early;\ncp.async.bulk.wait_group 0;\n")
    early = changed(early, "$early:\n    cp.async.bulk.wait_group 0;", "$early:")
    with pytest.raises(ExecutionError, match=r"block \(0, 0, 0\): the block ends before a cp"):
        execute(early, garbage=False)


@triton.jit
def next_kernel(x_ptr, out_ptr, L, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [L, M, N], [M * N, N, 1], [1, BLOCK_M, BLOCK_N])
    out = tl.make_tensor_descriptor(out_ptr, [L, M, N], [M * N, N, 1], [1, BLOCK_M, BLOCK_N])
    row = tl.program_id(0) * BLOCK_M
    out.store([tl.program_id(1), row, 0], x.load([tl.program_id(1), row, 0]) + 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
def test_what_triton_reads_of_a_box_is_what_lies_there(dtype: torch.dtype) -> None:
    """Ragged in rows and columns, in boxes of one row of up to 128 bytes beside another."""
    x = torch.arange(3 * 20 * 48).reshape(3, 20, 48).remainder(100).to(dtype)
    out = torch.zeros_like(x)
    kernel = next_kernel[(2, 3)]
    (launch,) = caught("sm_90", lambda: kernel(x, out, *x.shape, BLOCK_M=16, BLOCK_N=64))
    execute(launch)
    assert torch.equal(out, x + 1)


def product(from_host: bool) -> tuple[Launch, torch.Tensor]:
    torch.manual_seed(0)
    a, b = torch.randn(40, 72).to(torch.bfloat16), torch.randn(72, 48).to(torch.bfloat16)
    (launch,) = caught("sm_90", lambda: described_product.product(a, b, from_host))
    assert "cp.async.bulk.tensor.2d" in launch.ptx
    return launch, a.double() @ b.double()


def test_every_wait_of_a_product_that_triton_compiled_is_needed() -> None:
    launch, exact = product(from_host=True)
    execute(launch)
    out = launch.tensors["c"]
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)
    waits = launch.ptx.count("mbarrier.try_wait")
    assert waits
    for which in range(waits):
        parts = launch.ptx.split("mbarrier.try_wait")
        before = "mbarrier.try_wait".join(parts[: which + 1])
        after = "mbarrier.try_wait".join(parts[which + 1 :]).partition(";")[2]
        never = dataclasses.replace(launch, ptx=f"{before}//\nmov.pred complete, -1;{after}")
        with pytest.raises(ExecutionError, match=r"wgmma of what a cp\.async still copies to"):
            execute(never, garbage=False)
