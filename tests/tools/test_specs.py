"""What the lanes are told of every kernel that ships."""

from __future__ import annotations

from collections import Counter

import pytest
import triton
import triton.language as tl

from csrc_triton.architectures import ARCHITECTURES
from csrc_triton.specs import kernel_spec
from tools.compile.aot import shipped_kernels


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_argument_is_named(arch: str, dtype: str) -> None:
    specs = {spec.name: spec for spec in shipped_kernels(arch, dtype)}
    assert len(specs) == len(shipped_kernels(arch, dtype))
    for spec in specs.values():
        assert not set(spec.signature) & set(spec.constants)
        assert set(spec.signature) | set(spec.constants) == set(spec.kernel.arg_names)
        assert spec.divisible_by_16 <= set(spec.signature)
        assert spec.dtype == dtype
        assert spec.plain_twin is None or spec.plain_twin in specs
        assert spec.proof is not None
        pointers = {name for name, type_ in spec.signature.items() if type_[0] == "*"}
        assert set(spec.proof.scalars) == set(spec.signature) - pointers
        assert set(spec.proof.arrays) <= pointers
    families = Counter(name.split("/")[0] for name in specs)
    assert families["shaw_attention_fwd"] == 4
    assert families["shaw_attention_bwd_keys"] == families["shaw_attention_bwd_queries"] == 4
    assert families["shaw_attention_bwd_prepare"] == 2
    assert sum(n for family, n in families.items() if family.startswith("conv_")) == 2 + 7
    assert sum(n for family, n in families.items() if family.endswith("layer_norm_fwd")) == 3
    assert sum(n for family, n in families.items() if family.endswith("layer_norm_bwd")) == 4
    assert sum(n for family, n in families.items() if family.startswith("ctc_")) == 3
    assert families["log_mel_fwd"] == (2 if dtype == "float32" else 0)
    assert families["sum_blocks"] == families["normalize_stack"] == (dtype == "float32")
    assert families["linear"] >= 2 and families["linear_glu"] >= 1
    assert families["linear_bwd"] == 2 and families["linear_glu_bwd"] == 1


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["cu_seqlens_ptr"])
def _kernel(x_ptr, cu_seqlens_ptr, bias_ptr, num_rows, width, stride_x_row, eps, N: tl.constexpr):
    pass


def test_a_signature_follows_from_names() -> None:
    spec = kernel_spec(
        "a",
        _kernel,
        {"N": 1},
        "bfloat16",
        absent=["bias_ptr"],
        num_warps=4,
        blocks=(2, 3),
        scalars={"num_rows": 5, "width": 32, "eps": 0.5, "not there": 1},
        stride=64,
        arrays={"cu_seqlens_ptr": (0, 5), "seqused_k_ptr": (3,)},
    )
    assert spec.signature == {
        "x_ptr": "*bf16",
        "cu_seqlens_ptr": "*i32",
        "num_rows": "i32",
        "width": "i32",
        "stride_x_row": "i32",
        "eps": "fp32",
    }
    assert spec.constants == {"N": 1, "bias_ptr": None}
    assert spec.divisible_by_16 == {"x_ptr", "width", "stride_x_row"}
    assert spec.proof is not None
    assert spec.proof.grid == (2, 3, 1)
    assert spec.proof.scalars == {"num_rows": 5, "width": 32, "stride_x_row": 64, "eps": 0.5}
    assert spec.proof.arrays == {"cu_seqlens_ptr": (0, 5)}
    other = kernel_spec(
        "a", _kernel, {"N": 1}, "float32", types={"x_ptr": "*fp64"},
        num_warps=4, blocks=1, scalars={}, stride=0,
    )  # fmt: skip
    assert (other.signature["x_ptr"], other.signature["bias_ptr"]) == ("*fp64", "*fp32")
