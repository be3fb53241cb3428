"""Fragments against the formulas of the PTX ISA, element by element."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.tools.virtual_gpu.kernels import execute, written


def fragment(matrix: np.ndarray, count: int, row_of, column_of) -> np.ndarray:
    """[32 lanes, count elements] of a matrix, by the manual's row and column of element i."""
    out = np.empty((32, count), matrix.dtype)
    for lane in range(32):
        for i in range(count):
            group, inside = lane >> 2, lane % 4
            out[lane, i] = matrix[row_of(i, group, inside), column_of(i, group, inside)]
    return out


# PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "for mma.m16n8k8".
A16 = (
    lambda i, g, t: g if 0 <= i < 2 or 4 <= i < 6 else g + 8,
    lambda i, g, t: t * 2 + (i & 1) + (8 if i >= 4 else 0),
)
B16 = (lambda i, g, t: t * 2 + (i & 1) + (8 if i >= 2 else 0), lambda i, g, t: g)
A32 = (lambda i, g, t: g if i in (0, 2) else g + 8, lambda i, g, t: t if i < 2 else t + 4)
B32 = (lambda i, g, t: t if i == 0 else t + 4, lambda i, g, t: g)
C = (lambda i, g, t: g if i < 2 else g + 8, lambda i, g, t: t * 2 + (i & 1))

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def registers(values: np.ndarray) -> torch.Tensor:
    """Rows of 32 lanes as 32-bit registers, [32, n] int32."""
    return torch.from_numpy(np.ascontiguousarray(values).view(np.int32).reshape(32, -1).copy())


@pytest.mark.parametrize("kind", DTYPES)
def test_a_product_of_fragments_is_the_product_of_the_matrices(kind: str) -> None:
    torch.manual_seed(0)
    k = 8 if kind == "tf32" else 16
    a, b = torch.randint(-8, 9, (16, k)).float() / 4, torch.randint(-8, 9, (k, 8)).float() / 4
    c = torch.randn(16, 8)
    a_of, b_of = (A32, B32) if kind == "tf32" else (A16, B16)
    raw = torch.int32 if kind == "tf32" else torch.int16
    x, y = (m.to(DTYPES[kind]).view(raw).numpy() for m in (a, b))
    per = 1 if kind == "tf32" else 2
    tensors = {
        "a": registers(fragment(x, 4 * per, *a_of)),
        "b": registers(fragment(y, 2 * per, *b_of)),
        "c": registers(fragment(c.numpy(), 4, *C)),
        "out": torch.zeros(32, 4, dtype=torch.int32),
    }
    body = f"""
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    mad.wide.u32 %rd22, %r0, 16, %rd2;
    mad.wide.u32 %rd23, %r0, 16, %rd3;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd20];
    ld.global.v2.b32 {{%r5, %r6}}, [%rd11];
    ld.global.v4.b32 {{%r7, %r8, %r9, %r10}}, [%rd22];
    mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%r7, %r8, %r9, %r10}},
        {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r8, %r9, %r10}};
    st.global.v4.b32 [%rd23], {{%r7, %r8, %r9, %r10}};
    """
    execute(written(body, tensors))
    right = (a.double() @ b.double() + c.double()).float()
    got = tensors["out"].numpy().view(np.float32)
    np.testing.assert_array_equal(got, fragment(right.numpy(), 4, *C))


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_of_shared_memory_come_and_go_in_the_manual_s_order(trans: str) -> None:
    """Four matrices are stored by rows, loaded with ldmatrix, and stored again with stmatrix."""
    matrices = torch.arange(256, dtype=torch.int16).reshape(4, 8, 8)
    rows = matrices.reshape(32, 8)
    tensors = {
        "rows": rows,
        "out": torch.zeros(32, 4, dtype=torch.int32),
        "back": torch.zeros(32, 8, dtype=torch.int16),
    }
    body = f"""
    mad.wide.u32 %rd20, %r0, 16, %rd0;
    mad.wide.u32 %rd21, %r0, 16, %rd1;
    mad.wide.u32 %rd22, %r0, 16, %rd2;
    ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd20];
    shl.b32 %r10, %r0, 4;
    st.shared.v4.b32 [%r10], {{%r1, %r2, %r3, %r4}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r10];
    st.global.v4.b32 [%rd21], {{%r5, %r6, %r7, %r8}};
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r10+512], {{%r5, %r6, %r7, %r8}};
    bar.sync 0;
    ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r10+512];
    st.global.v4.b32 [%rd22], {{%r1, %r2, %r3, %r4}};
    """
    execute(written(body, tensors, shared=1024))
    got = tensors["out"].view(torch.int16).reshape(32, 4, 2)
    for lane in range(32):
        for number in range(4):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                if trans:
                    row, column = column, row
                assert got[lane, number, half] == matrices[number, row, column]
    assert torch.equal(tensors["back"], rows)


@pytest.mark.parametrize(("rows", "depth"), [(8, 4), (16, 4), (16, 8), (16, 16)])
def test_a_product_in_float64_is_that_of_the_matrices(rows: int, depth: int) -> None:
    """PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f64" and those of m16n8k4, k8 and k16."""
    torch.manual_seed(0)
    shapes = ((rows, depth), (depth, 8), (rows, 8))
    a, b, c = (torch.randint(-9, 9, shape, dtype=torch.float64) for shape in shapes)
    halves = rows // 8
    a_of = [
        lambda g, t, i=i: a[g + 8 * (i % halves), i // halves * 4 + t]
        for i in range(halves * depth // 4)
    ]
    b_of = [lambda g, t, i=i: b[t + 4 * i, g] for i in range(depth // 4)]
    c_of = [lambda g, t, i=i: c[g + 8 * (i // 2), 2 * t + (i & 1)] for i in range(2 * halves)]
    parts = [*a_of, *b_of, *c_of]
    sources = torch.stack(
        [torch.stack([part(lane >> 2, lane % 4) for part in parts]) for lane in range(32)]
    )
    out = torch.zeros(32, 2 * halves, dtype=torch.float64)
    names = [f"%rd{30 + i}" for i in range(len(parts) + 2 * halves)]
    taken = iter(names)
    groups = [[next(taken) for _ in part] for part in (a_of, b_of, c_of, range(2 * halves))]
    loads = "".join(
        f"ld.global.b64 {name}, [%rd20+{8 * i}];\n" for i, name in enumerate(names[: len(parts)])
    )
    stores = "".join(f"st.global.b64 [%rd21+{8 * i}], {n};\n" for i, n in enumerate(groups[3]))
    x, y, z, to = (f"{{{', '.join(group)}}}" for group in groups)
    body = f"""
    mad.wide.u32 %rd20, %r0, {8 * len(parts)}, %rd0;
    mad.wide.u32 %rd21, %r0, {8 * 2 * halves}, %rd1;
    {loads}
    mma.sync.aligned.m{rows}n8k{depth}.row.col.f64.f64.f64.f64 {to}, {x}, {y}, {z};
    {stores}
    """
    launch = written(body, {"sources": sources, "out": out})
    execute(dataclasses.replace(launch, ptx=launch.ptx.replace("%rd<32>", "%rd<64>")))
    exact = a @ b + c
    for lane in range(32):
        for i in range(2 * halves):
            row, column = (lane >> 2) + 8 * (i // 2), lane % 4 * 2 + (i & 1)
            assert out[lane, i] == exact[row, column]
