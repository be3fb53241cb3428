"""Fragments against the formulas of the PTX ISA, element by element."""

from __future__ import annotations

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


def test_a_product_in_float64_is_that_of_the_matrices() -> None:
    """PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f64 floating point type"."""
    torch.manual_seed(0)
    a, b, c = (
        torch.randint(-9, 9, shape, dtype=torch.float64) for shape in ((8, 4), (4, 8), (8, 8))
    )
    lanes = range(32)
    tensors = {
        "a": torch.stack([a[lane >> 2, lane % 4] for lane in lanes]),
        "b": torch.stack([b[lane % 4, lane >> 2] for lane in lanes]),
        "c0": torch.stack([c[lane >> 2, lane % 4 * 2] for lane in lanes]),
        "c1": torch.stack([c[lane >> 2, lane % 4 * 2 + 1] for lane in lanes]),
        "out0": torch.zeros(32, dtype=torch.float64),
        "out1": torch.zeros(32, dtype=torch.float64),
    }
    loads = "".join(f"ld.global.b64 %rd{20 + i}, [%rd{10 + i}];\n" for i in range(4))
    body = f"""
    {loads}
    mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64
        {{%rd24, %rd25}}, {{%rd20}}, {{%rd21}}, {{%rd22, %rd23}};
    st.global.b64 [%rd14], %rd24;
    st.global.b64 [%rd15], %rd25;
    """
    execute(written(body, tensors))
    exact = a @ b + c
    for lane in lanes:
        row, column = lane >> 2, lane % 4 * 2
        assert tensors["out0"][lane] == exact[row, column]
        assert tensors["out1"][lane] == exact[row, column + 1]
