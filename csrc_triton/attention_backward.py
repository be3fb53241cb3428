"""Launches the gradients of Shaw attention: argument checks, tile maps and scratch memory.

The kernels, their formulas and their cost are in `attention_backward_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from .attention import LOG2_E, check_attention, checked_tile_map
from .attention_backward_kernel import (
    shaw_attention_bwd_keys_kernel,
    shaw_attention_bwd_prepare_kernel,
)
from .attention_backward_queries_kernel import shaw_attention_bwd_queries_kernel
from .configs.attention_backward import (
    AttentionBackwardConfig,
    ScoresLayout,
    attention_backward_config,
    scores_layout,
)
from .specs import TRITON_TYPES, KernelSpec, ProofLaunch


def shaw_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    distance_embedding: Tensor | None = None,
    left_max_position: int = 0,
    right_max_position: int = 0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    tile_map: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
    precision: str = "ieee",
    config: AttentionBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `shaw_attention` with respect to query, key, value and distance embedding.

    Two runs give the same bits.

    Args:
        grad_output: gradient of the output, `[num_tokens, num_heads, D]` in the dtype of `query`;
            like all tensors of this shape at any strides but the last, which is 1.
        query: `[num_tokens, num_heads, D]`, D from 1 to 128.
        key: like `query`.
        value: like `query`.
        output: what `shaw_attention` returned.
        log_sum_exp: float32 `[num_heads, num_tokens]`, of the same call.
        cu_seqlens: int32 `[batch + 1]`, cumulative lengths in frames, starting at 0.
        max_seqlen: frames of the longest utterance.
        distance_embedding: E, `[L + R + 1, D]` in the dtype of `query`; `None` for no positions.
        left_max_position: L.
        right_max_position: R.
        dropout_p: probability with which the forward pass dropped an attention weight.
        dropout_seed: int64 `[2]`, seed and offset of its random numbers (`dropout`).
        tile_map: of `build_tile_map` with the configuration's `tile`, which may be that of the
            forward pass; computed when `None`.
        seqused_k: int32 `[batch]` or `None`, of the forward pass.
        out: where the gradients of query, key and value go, such as views of one buffer; allocated
            when `None`.
        precision: of float32 products, "ieee" or "tf32x3" (tensor cores, three passes).
        config: launch configuration; that of `attention_backward_config` when `None`.

    Returns:
        The gradients of query, key and value, `[num_tokens, num_heads, D]` in the dtype of `query`,
        and that of the distance embedding, float32 `[L + R + 1, D]`, or `None`.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what is needed.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    same = {"grad_output": grad_output, "key": key, "value": value, "output": output}
    if out is None:
        grads = torch.empty(3, *query.shape, dtype=query.dtype, device=query.device)
        out = (grads[0], grads[1], grads[2])
    same |= {f"out[{index}]": tensor for index, tensor in enumerate(out)}
    left, right = left_max_position, right_max_position
    arch = check_attention(
        query,
        same,
        log_sum_exp,
        cu_seqlens,
        max_seqlen,
        distance_embedding,
        left,
        right,
        dropout_p,
        dropout_seed,
        tile_map,
        seqused_k,
        precision,
    )
    num_tokens, num_heads, head_dim = query.shape
    if config is None:
        config = attention_backward_config(
            head_dim, query.dtype, arch, precision=precision, has_dropout=dropout_p > 0.0
        )
    batch_size = cu_seqlens.numel() - 1
    if num_tokens == 0 or num_heads == 0 or batch_size == 0:
        empty = None
        if distance_embedding is not None:
            empty = torch.zeros_like(distance_embedding, dtype=torch.float32)
        return *out, empty

    tile_map = checked_tile_map(tile_map, cu_seqlens, config.tile, num_tokens, max_seqlen)
    num_tiles = tile_map.shape[0]

    has_positions = distance_embedding is not None
    vectors = query[0] if distance_embedding is None else distance_embedding
    left, right = (left, right) if has_positions else (0, 0)
    layout = scores_layout(config, batch_size, num_tokens, left, right)
    heads = num_heads
    grad_distance = None
    if has_positions:
        heads = min(max(config.scratch_limit // (4 * layout.head_size), 1), num_heads)
        elements = layout.front + heads * layout.head_size + layout.back
        scratch = torch.empty(elements, dtype=torch.float32, device=query.device)
        scores = scratch[layout.front :]
        grad_distance = scratch.new_zeros(left + right + 1, head_dim)
    else:
        scores = log_sum_exp  # not touched
    # Of P's first and last column; of o . g.
    shifts = log_sum_exp.new_empty(2 if has_positions else 1, heads, num_tokens)
    delta = log_sum_exp.new_empty(heads, num_tokens)
    shares = log_sum_exp.new_empty(num_tiles * heads if has_positions else 0, *vectors.shape)
    scales = (head_dim**-0.5, head_dim**-0.5 * LOG2_E)
    has_dropout, has_seqused = dropout_p > 0.0, seqused_k is not None
    dropout = (dropout_seed, dropout_p) if has_dropout else (None, None)
    special = (has_positions, has_dropout, has_seqused)
    kernels = _kernels(config, layout, head_dim, *special, left, right, precision)
    prepare, keys, queries = kernels
    grad_query, grad_key, grad_value = out
    with torch.cuda.device_of(query):
        for first_head in range(0, num_heads, heads):
            count = min(heads, num_heads - first_head)
            grid = (num_tiles * count,)
            prepare.kernel[grid](
                query,
                vectors,
                output,
                grad_output,
                log_sum_exp,
                scores,
                shifts,
                delta,
                cu_seqlens,
                tile_map,
                first_head,
                count,
                scales[1],
                *_strides(query),
                vectors.stride(0),
                *_strides(output),
                *_strides(grad_output),
                num_tokens,
                num_tokens,
                layout.head_blocks,
                **prepare.constants,
                **prepare.options,
            )
            # The kernel over queries overwrites the scores that the one over keys reads.
            keys.kernel[grid](
                query,
                key,
                value,
                grad_output,
                scores,
                shifts,
                delta,
                grad_key,
                grad_value,
                cu_seqlens,
                seqused_k,
                tile_map,
                *dropout,
                first_head,
                count,
                *scales,
                *_strides(query),
                *_strides(key),
                *_strides(value),
                *_strides(grad_output),
                *_strides(grad_key),
                *_strides(grad_value),
                num_tokens,
                layout.head_blocks,
                **keys.constants,
                **keys.options,
            )
            queries.kernel[grid](
                query,
                key,
                value,
                vectors,
                grad_output,
                scores,
                shifts,
                delta,
                grad_query,
                shares,
                cu_seqlens,
                seqused_k,
                tile_map,
                *dropout,
                first_head,
                count,
                *scales,
                *_strides(query),
                *_strides(key),
                *_strides(value),
                vectors.stride(0),
                *_strides(grad_output),
                *_strides(grad_query),
                num_tokens,
                layout.head_blocks,
                **queries.constants,
                **queries.options,
            )
            if grad_distance is not None:
                grad_distance += shares[: grid[0]].sum(0)
    return grad_query, grad_key, grad_value, grad_distance


def _strides(tensor: Tensor) -> tuple[int, int]:
    return tensor.stride(0), tensor.stride(1)


@dataclass(frozen=True)
class _Launch:
    """A kernel with its constants and its compiler options."""

    kernel: Any
    constants: dict[str, bool | int | str]
    options: dict[str, int]


def _kernels(
    config: AttentionBackwardConfig,
    layout: ScoresLayout,
    head_dim: int,
    has_positions: bool,
    has_dropout: bool,
    has_seqused: bool,
    left: int,
    right: int,
    precision: str,
) -> tuple[_Launch, _Launch, _Launch]:
    common: dict[str, bool | int | str] = {
        "HAS_POSITIONS": has_positions,
        "LEFT": left,
        "RIGHT": right,
        "ROW_STRIDE": layout.row_stride,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(triton.next_power_of_2(head_dim), 16),
        "INPUT_PRECISION": precision,
    }
    queries = {"num_warps": config.query_warps, "num_stages": config.query_stages}
    keys = {"num_warps": config.key_warps, "num_stages": config.key_stages}
    tile = {"BLOCK_M": config.tile, "BLOCK_P": config.block_p}
    return (
        _Launch(shaw_attention_bwd_prepare_kernel, {**common, **tile}, queries | {"num_stages": 1}),
        _Launch(
            shaw_attention_bwd_keys_kernel,
            {
                **common,
                "HAS_DROPOUT": has_dropout,
                "HAS_SEQUSED": has_seqused,
                "BLOCK_M": config.query_step,
                "BLOCK_N": config.tile,
                "FAR_STAGES": config.key_stages,
            },
            keys,
        ),
        _Launch(
            shaw_attention_bwd_queries_kernel,
            {
                **common,
                **tile,
                "HAS_DROPOUT": has_dropout,
                "HAS_SEQUSED": has_seqused,
                "BLOCK_N": config.key_step,
                "FAR_STAGES": config.query_stages,
            },
            queries,
        ),
    )


def kernel_specs(arch: str, dtype: str) -> list[KernelSpec]:
    """The kernels of the attention gradients, for 16 heads of 64, L = 64, R = 8.

    Args:
        arch: such as `"sm_90"`.
        dtype: name of the activations' dtype: "float32", "float16" or "bfloat16".
    """
    nvidia = not arch.startswith("gfx")
    specs = []
    for precision in ("ieee", "tf32x3") if dtype == "float32" and nvidia else ("ieee",):
        suffix = f"/{precision}" if dtype == "float32" else ""
        variants = ("relative_key", "relative_key_dropout", "no_positions", "relative_key_seqused")
        for variant in variants:
            positions = variant != "no_positions"
            left, right = (64, 8) if positions else (0, 0)
            dropout, seqused = variant.endswith("dropout"), variant.endswith("seqused")
            config = attention_backward_config(
                64, getattr(torch, dtype), arch, precision=precision, has_dropout=dropout
            )
            layout = scores_layout(config, 1, 16, left, right)
            special = (positions, dropout, seqused)
            launches = _kernels(config, layout, 64, *special, left, right, precision)
            for step, launch in zip(("prepare", "keys", "queries"), launches, strict=True):
                if step == "prepare" and (dropout or seqused):
                    continue  # has neither
                # The preparation without positions has no product; NVIDIA's tensor cores have none
                # of float32 in full precision.
                product = (step != "prepare" or positions) and not (suffix == "/ieee" and nvidia)
                specs.append(
                    _kernel_spec(
                        f"shaw_attention_bwd_{step}/{variant}{suffix}",
                        launch,
                        dtype,
                        "gemm" if product else "pointwise",
                        config,
                    )
                )
    return specs


def _kernel_spec(
    name: str,
    launch: _Launch,
    dtype: str,
    kind: Literal["gemm", "pointwise"],
    config: AttentionBackwardConfig,
) -> KernelSpec:
    constants: dict[str, Any] = dict(launch.constants)
    names = launch.kernel.arg_names
    if not constants.get("HAS_DROPOUT") and "seed_ptr" in names:
        constants |= {"seed_ptr": None, "dropout_p": None}
    if not constants.get("HAS_SEQUSED") and "seqused_k_ptr" in names:
        constants |= {"seqused_k_ptr": None}
    signature = {}
    for argument in names:
        if argument in constants:
            continue
        if argument in ("scratch_ptr", "shift_ptr", "delta_ptr", "lse_ptr", "share_ptr"):
            signature[argument] = "*fp32"
        elif argument in ("cu_seqlens_ptr", "seqused_k_ptr", "tile_map_ptr"):
            signature[argument] = "*i32"
        elif argument == "seed_ptr":
            signature[argument] = "*i64"
        elif argument.endswith("_ptr"):
            signature[argument] = "*" + TRITON_TYPES[dtype]
        else:
            signature[argument] = (
                "fp32" if argument in ("scale", "scale_log2", "dropout_p") else "i32"
            )
    unaligned = {
        "cu_seqlens_ptr",
        "seqused_k_ptr",
        "tile_map_ptr",
        "lse_ptr",
        "seed_ptr",
        "first_head",
        "num_heads",
    }
    unaligned |= {"stride_lse_head", "stride_row_head", "head_blocks"}
    aligned = {name for name in signature if signature[name] != "fp32"} - unaligned
    return KernelSpec(
        name=name,
        kernel=launch.kernel,
        signature=signature,
        constants=constants,
        kind=kind,
        dtype=dtype,
        num_warps=launch.options["num_warps"],
        num_stages=launch.options["num_stages"],
        divisible_by_16=frozenset(aligned),
        proof=_proof_launch(signature, constants, config),
    )


def _proof_launch(
    signature: dict[str, str], constants: dict[str, Any], config: AttentionBackwardConfig
) -> ProofLaunch:
    """One head of an utterance of two tiles, the second a ragged one.

    Where `seqused_k` is read, the utterance's last token is no key.
    """
    length = config.tile + 22
    layout = scores_layout(config, 1, length, constants["LEFT"], constants["RIGHT"])
    scalars = {
        **{name: 64 if name.endswith("_head") else 1024 for name in signature},
        "stride_e_row": 64,
        "stride_lse_head": length,
        "stride_row_head": length,
        "head_blocks": layout.head_blocks,
        "first_head": 3,
        "num_heads": 1,
        "scale": 0.125,
        "scale_log2": 0.125,
        "dropout_p": 0.125,
    }
    return ProofLaunch(
        2,
        {name: value for name, value in scalars.items() if signature.get(name, "*")[0] != "*"},
        {
            "cu_seqlens_ptr": (0, length),
            "tile_map_ptr": (0, 0, 0, 1),
            **({"seqused_k_ptr": (length - 1,)} if "seqused_k_ptr" in signature else {}),
        },
    )
