"""wgmma: descriptors against the layouts of the PTX ISA, and what must be fenced and waited for."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch

from tests.tools.virtual_gpu.kernels import caught, changed, execute, with_fences, written
from tests.tools.virtual_gpu.scripts import fused_attention, matrix_product
from tests.tools.virtual_gpu.test_tensor_cores import A16, A32, DTYPES, fragment
from tools.virtual_gpu.executor import ExecutionError
from tools.virtual_gpu.faults import Fault
from tools.virtual_gpu.record import Launch
from tools.virtual_gpu.warpgroups import operand_chunks

MODES = {128: 1, 64: 2, 32: 3}


def operand_bytes(described: int, rows: int, depth: int, size: int, by_depth: bool) -> torch.Tensor:
    """Where each byte of each element lies, [rows, depth, size]."""
    chunks = torch.tensor(operand_chunks(described, rows, depth, size, by_depth))
    places = (chunks[..., None] * 16 + torch.arange(16)).reshape(chunks.shape[0], -1, size)
    return places if by_depth else places.transpose(0, 1)


def descriptor(start: int, leading: int, stride: int, mode: int) -> int:
    fields = (start >> 4, leading >> 4, stride >> 4)
    return fields[0] | fields[1] << 16 | fields[2] << 32 | mode << 62


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("span", MODES)
@pytest.mark.parametrize("step", [0, 1])
def test_rows_along_k_lie_in_lines_whose_chunks_are_exchanged(
    span: int, size: int, step: int
) -> None:
    """Rows of `span` bytes; chunk c of row r lies at c ^ (r's line of 128 bytes, modulo what the
    pattern repeats after)."""
    rows, depth, chunks, stride = 24, 32 // size, span // 16, 2048
    if 2 * step >= chunks:
        pytest.skip("no second slice in so short a row")
    got = operand_bytes(
        descriptor(1024 + 32 * step, 16, stride, MODES[span]), rows, depth, size, True
    )
    for r, k, byte in itertools.product(range(rows), range(depth), range(size)):
        chunk = 2 * step + k * size // 16
        moved = chunk ^ ((r % 8) // (8 // chunks)) % chunks
        inside = k * size % 16 + byte
        assert got[r, k, byte] == 1024 + r // 8 * stride + r % 8 * span + moved * 16 + inside


@pytest.mark.parametrize("span", MODES)
def test_rows_across_k_lie_in_lines_whose_chunks_are_exchanged(span: int) -> None:
    """Lines of `span` bytes of one k each: 8 lines, then the next 8 at the stride; what is further
    along the rows at the leading dimension's offset."""
    chunks, leading, stride = span // 16, 8192, 4096
    got = operand_bytes(descriptor(2048, leading, stride, MODES[span]), 128, 16, 2, False)
    for row, k in itertools.product(range(128), range(16)):
        block, inside = divmod(row * 2, span)
        moved = inside // 16 ^ ((k % 8) // (8 // chunks)) % chunks
        wanted = 2048 + block * leading + k // 8 * stride + k % 8 * span + moved * 16 + inside % 16
        assert got[row, k].tolist() == [wanted, wanted + 1]


def test_without_swizzling_there_are_core_matrices() -> None:
    """Of 8 rows of 16 bytes, one after another."""
    along = operand_bytes(descriptor(256, 640, 1280, 0), 16, 16, 2, True)
    across = operand_bytes(descriptor(256, 640, 1280, 0), 16, 16, 2, False)
    for row, k in itertools.product(range(16), range(16)):
        at = 256 + row // 8 * 1280 + k // 8 * 640
        assert along[row, k, 0] == at + row % 8 * 16 + k % 8 * 2
        assert across[row, k, 0] == at + k % 8 * 16 + row % 8 * 2
    with pytest.raises(Fault, match="base offset"):
        operand_bytes(1 << 49, 8, 16, 2, True)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("left", ["registers", "shared"])
def test_a_product_of_fragments_is_the_product_of_the_matrices(left: str, kind: str) -> None:
    """PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16" and "m64nNk8": of each warp 16
    rows, as mma.sync has them; accumulators of 8 columns after one another."""
    torch.manual_seed(0)
    size = 4 if kind == "tf32" else 2
    k, columns = 32 // size, 16
    a, b = torch.randint(-8, 9, (64, k)).float() / 4, torch.randint(-8, 9, (k, columns)).float() / 4
    c = torch.randn(64, columns)
    x, y = (m.to(DTYPES[kind]).view(torch.int32 if size == 4 else torch.int16) for m in (a, b.T))
    image = torch.zeros(4096 // size, dtype=x.dtype)
    for matrix, start, leading, stride in ((y, 256, 256, 512), (x, 2048, 128, 256)):
        for row, column in itertools.product(range(len(matrix)), range(k)):
            at = start + row // 8 * stride + column * size // 16 * leading
            at += row % 8 * 16 + column * size % 16
            image[at // size] = matrix[row, column]

    def of_warps(matrix: np.ndarray, count: int, row_of, column_of) -> np.ndarray:
        parts = matrix.reshape(4, 16, -1)
        return np.concatenate([fragment(part, count, row_of, column_of) for part in parts])

    accumulator = (
        lambda i, g, t: g if i % 4 < 2 else g + 8,
        lambda i, g, t: i // 4 * 8 + t * 2 + (i & 1),
    )
    of_a = of_warps(x.numpy(), 16 // size, *(A32 if size == 4 else A16))
    tensors = {
        "image": image.view(torch.int32),
        "a": torch.from_numpy(np.ascontiguousarray(of_a).view(np.int32)),
        "c": torch.from_numpy(of_warps(c.numpy(), 8, *accumulator)),
        "out": torch.zeros(128, 8),
    }
    descriptors = [descriptor(256, 256, 512, 0), descriptor(2048, 128, 256, 0)]
    operand = "{%r1, %r2, %r3, %r4}" if left == "registers" else "%rd21"
    turned = "" if size == 4 else ", 0" if left == "registers" else ", 0, 0"
    sums = [f"%r{8 + i}" for i in range(8)]
    halves = [f"{{{', '.join(half)}}}" for half in (sums[:4], sums[4:])]
    body = f"""
    mad.wide.u32 %rd22, %r0, 32, %rd0;
    mad.wide.u32 %rd23, %r0, 16, %rd1;
    mad.wide.u32 %rd24, %r0, 32, %rd2;
    mad.wide.u32 %rd25, %r0, 32, %rd3;
    shl.b32 %r20, %r0, 5;
    ld.global.v4.b32 {halves[0]}, [%rd22];
    ld.global.v4.b32 {halves[1]}, [%rd22+16];
    st.shared.v4.b32 [%r20], {halves[0]};
    st.shared.v4.b32 [%r20+16], {halves[1]};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd23];
    ld.global.v4.b32 {halves[0]}, [%rd24];
    ld.global.v4.b32 {halves[1]}, [%rd24+16];
    mov.b64 %rd20, {descriptors[0]};
    mov.b64 %rd21, {descriptors[1]};
    mov.pred %p0, -1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n16k{k}.f32.{kind}.{kind} {{{", ".join(sums)}}},
        {operand}, %rd20, %p0, 1, 1{turned};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.b32 [%rd25], {halves[0]};
    st.global.v4.b32 [%rd25+16], {halves[1]};
    """
    execute(written(body, tensors, threads=128, shared=4096))
    right = (a.double() @ b.double() + c.double()).float().numpy()
    np.testing.assert_array_equal(tensors["out"].numpy(), of_warps(right, 8, *accumulator))


def product(dtype: torch.dtype = torch.bfloat16) -> tuple[Launch, torch.Tensor]:
    torch.manual_seed(0)
    a, b = torch.randn(70, 104).to(dtype), torch.randn(104, 48).to(dtype)
    (launch,) = caught("sm_90", lambda: matrix_product.matmul(a, b))
    assert "wgmma.mma_async" in launch.ptx
    return launch, a.double() @ b.double()


def described_address(launch: Launch) -> tuple[str, str]:
    """Where an address in shared memory becomes that of a descriptor, in 16 bytes; its register."""
    found = re.search(r"^[ \t]*bfe\.u32\s+(%r\d+), %r\d+, 4, 1[45];.*$", launch.ptx, re.MULTILINE)
    assert found is not None
    return found[0], found[1]


def attention() -> Launch:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 70, 64).to(torch.bfloat16).unbind()
    (launch,) = caught("sm_90", lambda: fused_attention.attention(q, k, v))
    return with_fences(launch)


NEEDED = {
    "fence.proxy.async.shared::cta;": "with no fence.proxy.async and barrier between",
    "wgmma.fence.sync.aligned;": "which was used after the last wgmma.fence",
    "wgmma.wait_group.sync.aligned": "was waited for",
}


@pytest.mark.parametrize("statement", NEEDED)
def test_every_fence_and_wait_is_needed(statement: str) -> None:
    launch, exact = product()
    execute(launch)
    out = launch.tensors["c_ptr"]
    torch.testing.assert_close(out.double(), exact, rtol=2**-7, atol=2**-7)
    count = launch.ptx.count(statement)
    noticed = 0
    for which in range(count):
        dropped = "//" if statement.endswith(";") else "// "
        try:
            execute(changed(launch, statement, dropped, which), garbage=False)
        except ExecutionError as fault:
            assert NEEDED[statement] in str(fault) or "still reads" in str(fault)
            noticed += 1
    # In a loop, whose first round has nothing under way, what the last one waits for is enough.
    assert count and noticed >= count - (statement.startswith("wgmma.wait") and count > 1)


def test_the_barrier_between_writing_and_the_product_is_needed() -> None:
    launch, _ = product()
    bars = launch.ptx.count("bar.sync")
    said = []
    for which in range(bars):
        try:
            execute(changed(launch, "bar.sync", "//", which), garbage=False)
        except ExecutionError as fault:
            said.append(str(fault))
    assert any("no fence.proxy.async and barrier between" in text for text in said)


def test_a_product_is_read_from_where_the_descriptor_says() -> None:
    launch, exact = product()
    constants = [word for word in launch.ptx.split() if word.startswith("46116862933")]
    assert constants
    other = changed(launch, constants[0].rstrip(";"), str(int(constants[0].rstrip(";")) ^ 2 << 32))
    execute(other)
    assert (launch.tensors["c_ptr"].double() - exact).abs().max() > 0.5


def test_registers_as_the_left_operand_are_the_fragments_of_the_manual() -> None:
    launch = attention()
    execute(launch)
    right = launch.tensors["out_ptr"].clone()
    line = next(
        line for line in launch.ptx.splitlines() if "wgmma.mma_async" in line and "}, {" in line
    )
    first, second = line[line.index("}, {") + 4 : line.rindex("}")].split(",")[:2]
    execute(changed(launch, line, line.replace(f"{{{first},{second}", f"{{{second},{first}")))
    assert not torch.equal(right, launch.tensors["out_ptr"])


def test_what_a_product_reads_and_adds_to_is_nobody_elses_until_it_is_waited_for() -> None:
    launch = attention()
    lines = launch.ptx.splitlines()
    line = next(line for line in lines if "wgmma.mma_async" in line and "}, {" in line)
    accumulator = line[line.index("{") + 1 : line.index(",")]
    source = line[line.index("}, {") + 4 :].partition(",")[0]
    commit = "wgmma.commit_group.sync.aligned;"
    which = launch.ptx[: launch.ptx.index(line)].count(commit)
    for statement, said in (
        (f"mov.b32 {accumulator}, 0;", "is used before the wgmma that adds to it was waited for"),
        (f"mov.b32 {source}, 0;", "is written before the wgmma that reads it was waited for"),
    ):
        with pytest.raises(ExecutionError, match=said):
            execute(changed(launch, commit, f"{commit}\n{statement}\n", which), garbage=False)


def test_registers_of_a_product_are_neither_read_nor_written_between_fence_and_product() -> None:
    """PTX ISA, `wgmma.fence`: between a register access and a wgmma that accesses the register."""
    launch = attention()
    line = next(line for line in launch.ptx.splitlines() if "wgmma.mma_async" in line)
    accumulator = line[line.index("{") + 1 : line.index(",")].strip()
    fence, which = "wgmma.fence.sync.aligned;", launch.ptx.index(line)
    which = launch.ptx[:which].count(fence) - 1
    for statement in (f"setp.eq.b32 %p0, {accumulator}, 0;", f"mov.b32 {accumulator}, 0;"):
        execute(changed(launch, fence, f"{statement}\n{fence}", which), garbage=False)
        late = changed(launch, fence, f"{fence}\n{statement}", which)
        with pytest.raises(ExecutionError, match=r"which was used after the last wgmma\.fence"):
            execute(late, garbage=False)
        execute(late, garbage=False, register_fences=False)


def test_what_a_product_reads_may_not_be_written_until_it_is_waited_for() -> None:
    launch, _ = product()
    commit, said = "wgmma.commit_group.sync.aligned;", []
    for at in range(0, launch.shared_bytes, 4096):
        try:
            execute(changed(launch, commit, f"{commit}\nst.shared.b32 [{at}], 7;"), garbage=False)
        except ExecutionError as fault:
            said.append(str(fault))
    assert any("race in shared memory: write of what a wgmma still reads" in text for text in said)


def test_an_operand_outside_of_shared_memory_is_a_fault() -> None:
    launch, _ = product()
    line, register = described_address(launch)
    with pytest.raises(ExecutionError, match=r"wgmma at byte \d+ of the \d+ of shared memory"):
        execute(changed(launch, line, f"mov.u32 {register}, 16383;"))


def test_threads_that_disagree_and_parts_of_a_block_are_faults() -> None:
    launch, _ = product()
    fence = "wgmma.fence.sync.aligned;"
    with pytest.raises(ExecutionError, match=r"wgmma\.fence by a part of the block"):
        execute(changed(launch, fence, f"setp.lt.u32 %p0, %tid.x, 64;\n@%p0 {fence}"))
    line, register = described_address(launch)
    with pytest.raises(ExecutionError, match="wgmma whose threads disagree on an operand"):
        execute(changed(launch, line, f"{line}\nadd.u32 {register}, {register}, %tid.x;"))
