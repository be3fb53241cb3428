"""Launches Shaw attention over packed utterances: argument checks, tile map and scratch memory.

The kernel, its formula and its cost are in `attention_kernel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .attention_kernel import shaw_attention_fwd_kernel
from .configs.attention import (
    AttentionConfig,
    ScratchLayout,
    attention_config,
    scratch_layout,
    with_dropout,
)
from .dropout import check_dropout
from .packed import check_offsets
from .runtime import architecture, check_device, check_tensor
from .specs import TRITON_TYPES, KernelSpec, ProofLaunch

LOG2_E = 1.4426950408889634
"""Scores are scaled by it, so that the softmax needs powers of two only."""


def tile_bound(batch_size: int, num_tokens: int, max_seqlen: int, block_m: int) -> int:
    """Number of query tiles that utterances of these sizes have at most.

    Args:
        batch_size: number of utterances.
        num_tokens: frames of all utterances.
        max_seqlen: frames of the longest utterance, or more.
        block_m: query rows of a tile.
    """
    return min(num_tokens // block_m + batch_size, batch_size * -(-max_seqlen // block_m))


def build_tile_map(cu_seqlens: Tensor, block_m: int, *, num_tokens: int, max_seqlen: int) -> Tensor:
    """Which query tile of which utterance each program works on, longest utterance first.

    It is computed on the device without waiting for it, and serves every layer of an encoder.

    Args:
        cu_seqlens: int32 `[batch + 1]`, cumulative lengths in frames, starting at 0.
        block_m: query rows of a tile, from `attention_config`.
        num_tokens: frames of all utterances.
        max_seqlen: frames of the longest utterance.

    Returns:
        int32 `[tile_bound(...), 2]`: utterance and index of the tile within it. The rows that are
        left over hold -1.
    """
    check_tensor("cu_seqlens", cu_seqlens, (None,), (torch.int32,))
    batch_size = cu_seqlens.numel() - 1
    bound = tile_bound(batch_size, num_tokens, max_seqlen, block_m)
    if bound == 0:
        return cu_seqlens.new_empty(0, 2)
    lengths, order = cu_seqlens.diff().sort(descending=True, stable=True)
    tiles = (lengths + (block_m - 1)) // block_m
    ends = tiles.cumsum(0)
    slots = torch.arange(bound, device=cu_seqlens.device)
    rank = torch.searchsorted(ends, slots, right=True).clamp_(max=batch_size - 1)
    entries = torch.stack((order[rank], slots - (ends - tiles)[rank]), dim=1)
    return entries.masked_fill_((slots >= ends[-1])[:, None], -1).to(torch.int32)


def _next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _constants(
    config: AttentionConfig,
    layout: ScratchLayout,
    head_dim: int,
    has_positions: bool,
    left: int,
    right: int,
    same_row_stride: bool,
    precision: str,
    has_dropout: bool = False,
    has_seqused: bool = False,
) -> dict[str, bool | int | str]:
    return {
        "HAS_DROPOUT": has_dropout,
        "HAS_SEQUSED": has_seqused,
        "HAS_POSITIONS": has_positions,
        "LEFT": left,
        "RIGHT": right,
        "HEAD_DIM": head_dim,
        "SAME_ROW_STRIDE": same_row_stride,
        "BLOCK_D": max(_next_power_of_2(head_dim), 16),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_P": config.block_p,
        "SCRATCH_STRIDE": layout.row_stride,
        "SCRATCH_START": layout.start,
        "SCRATCH_SIZE": layout.size,
        "READ_LIMIT": layout.read_limit,
        "FAR_STAGES": config.num_stages,
        "BAND_STAGES": config.band_stages,
        "INPUT_PRECISION": precision,
    }


def _options(config: AttentionConfig) -> dict[str, int]:
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.max_registers is not None:
        options["maxnreg"] = config.max_registers
    return options


def check_attention(
    query: Tensor,
    tensors: Mapping[str, Tensor],
    log_sum_exp: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    dropout_p: float,
    dropout_seed: Tensor | None,
    tile_map: Tensor | None,
    seqused_k: Tensor | None,
    precision: str,
) -> str:
    """The checks that `shaw_attention` and its gradient share.

    Args:
        query: `[num_tokens, num_heads, D]`.
        tensors: by name, those of the shape and dtype of `query`.
        log_sum_exp: `None` where it is not an argument.
        cu_seqlens: as of `shaw_attention`, and so are the others.
        max_seqlen: frames of the longest utterance.
        distance_embedding: E, or `None`.
        left: L.
        right: R.
        dropout_p: probability with which a weight is dropped.
        dropout_seed: of its random numbers, or `None`.
        tile_map: checked by `checked_tile_map`; here only where it lies.
        seqused_k: number of keys of each utterance, or `None`.
        precision: of float32 products.

    Returns:
        The architecture, as of `runtime.architecture`.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what is needed.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    check_tensor("query", query, (None, None, None))
    for name, tensor in tensors.items():
        check_tensor(name, tensor, query.shape, (query.dtype,))
    if log_sum_exp is not None:
        shape = (query.shape[1], query.shape[0])
        check_tensor("log_sum_exp", log_sum_exp, shape, (torch.float32,))
    check_offsets(cu_seqlens, seqused_k)
    if left < 0 or right < 0:
        raise ValueError(
            f"left_max_position is {left} and right_max_position is {right}; both must be 0 or more"
        )
    if distance_embedding is not None:
        shape = (left + right + 1, query.shape[2])
        check_tensor("distance_embedding", distance_embedding, shape, (query.dtype,))
    check_dropout(dropout_p, dropout_seed)
    check_device(
        query=query,
        **tensors,
        log_sum_exp=log_sum_exp,
        cu_seqlens=cu_seqlens,
        distance_embedding=distance_embedding,
        dropout_seed=dropout_seed,
        tile_map=tile_map,
        seqused_k=seqused_k,
    )
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen}; it must be 0 or more")
    if precision not in ("ieee", "tf32x3"):
        raise ValueError(f"precision is {precision!r}; it must be 'ieee' or 'tf32x3'")
    arch = architecture(query.device)
    if precision == "tf32x3" and arch.startswith("gfx"):
        raise ValueError(f"precision is 'tf32x3'; on {arch} it must be 'ieee'")
    return arch


def checked_tile_map(
    tile_map: Tensor | None, cu_seqlens: Tensor, block_m: int, num_tokens: int, max_seqlen: int
) -> Tensor:
    """The map that was given, or that of `build_tile_map` where none was.

    A map for another `block_m` has another number of rows, unless every utterance is one tile.

    Raises:
        ValueError: it is not a contiguous int32 `[tile_bound(...), 2]`.
    """
    if tile_map is None:
        return build_tile_map(cu_seqlens, block_m, num_tokens=num_tokens, max_seqlen=max_seqlen)
    num_tiles = tile_bound(cu_seqlens.numel() - 1, num_tokens, max_seqlen, block_m)
    check_tensor("tile_map", tile_map, (num_tiles, 2), (torch.int32,))
    if num_tiles > 0 and tile_map.stride(0) != 2:
        raise ValueError(f"tile_map has strides {tile_map.stride()}; it must be contiguous")
    return tile_map


def shaw_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
    out: Tensor | None = None,
    precision: str = "ieee",
    config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within each utterance, with Shaw relative keys or without positions.

    Args:
        query: `[num_tokens, num_heads, D]`, D from 1 to 128; any strides but the last, which is 1.
        key: like `query`.
        value: like `query`.
        cu_seqlens: int32 `[batch + 1]`, cumulative lengths in frames, starting at 0.
        max_seqlen: frames of the longest utterance.
        distance_embedding: E, `[L + R + 1, D]` in the dtype of `query`; `None` for no positions.
        left_max_position: L, frames to the left beyond which distances are equal.
        right_max_position: R.
        dropout_p: probability with which an attention weight is dropped.
        dropout_seed: int64 `[2]`, seed and offset of its random numbers; needed where `dropout_p`
            is not 0.
        tile_map: of `build_tile_map` with the configuration's `block_m`; computed when `None`.
        seqused_k: int32 `[batch]`, the first so many tokens of each utterance are its keys, at
            least one where there are tokens; `None`: all are.
        out: where the output goes; allocated when `None`.
        precision: of float32 products, "ieee" or "tf32x3" (tensor cores, three passes).
        config: launch configuration; that of `attention_config` when `None`.

    Returns:
        The output `[num_tokens, num_heads, D]` in the dtype of `query`, and the log-sum-exp of each
        query's scores, float32 `[num_heads, num_tokens]`.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what is needed.
        RuntimeError: CPU tensors outside Triton's interpreter.
    """
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    arch = check_attention(
        query,
        {"key": key, "value": value, "out": out},
        None,
        cu_seqlens,
        max_seqlen,
        distance_embedding,
        left_max_position,
        right_max_position,
        dropout_p,
        dropout_seed,
        tile_map,
        seqused_k,
        precision,
    )
    num_tokens, num_heads, head_dim = query.shape
    if config is None:
        config = attention_config(head_dim, query.dtype, arch)
        if dropout_p > 0.0:
            config = with_dropout(config)
    tile_map = checked_tile_map(tile_map, cu_seqlens, config.block_m, num_tokens, max_seqlen)
    num_tiles = tile_map.shape[0]
    log_sum_exp = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)

    has_positions = distance_embedding is not None
    left, right = (left_max_position, right_max_position) if has_positions else (0, 0)
    layout = scratch_layout(config.block_m, config.block_n, left, right)
    num_work = num_tiles * num_heads
    per_launch = num_work
    scratch = log_sum_exp  # not touched without positions
    if has_positions and num_work > 0:
        per_launch = max(min(num_work, config.scratch_limit // (4 * layout.size)), 1)
        scratch = torch.empty(per_launch * layout.size, dtype=torch.float32, device=query.device)
    vectors = distance_embedding if distance_embedding is not None else query
    constants = _constants(
        config,
        layout,
        head_dim,
        has_positions,
        left,
        right,
        key.stride(0) == value.stride(0),
        precision,
        dropout_p > 0.0,
        seqused_k is not None,
    )
    dropout = (dropout_seed, dropout_p) if dropout_p > 0.0 else (None, None)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(query):
        for first_work in range(0, num_work, max(per_launch, 1)):
            shaw_attention_fwd_kernel[(min(per_launch, num_work - first_work),)](
                query,
                key,
                value,
                vectors,
                scratch,
                out,
                log_sum_exp,
                cu_seqlens,
                seqused_k,
                tile_map,
                first_work,
                num_heads,
                head_dim**-0.5 * LOG2_E,
                query.stride(0),
                query.stride(1),
                key.stride(0),
                key.stride(1),
                value.stride(0),
                value.stride(1),
                vectors.stride(0),
                out.stride(0),
                out.stride(1),
                num_tokens,
                *dropout,
                **constants,
                **_options(config),
            )
    return out, log_sum_exp


def kernel_specs(arch: str, dtype: str) -> list[KernelSpec]:
    """The attention kernels of an encoder of width 1024 (16 heads of 64, L = 64, R = 8).

    Args:
        arch: such as `"sm_90"`.
        dtype: name of the activations' dtype: "float32", "float16" or "bfloat16".
    """
    element = "*" + TRITON_TYPES[dtype]
    pointers = dict.fromkeys(
        ("q_ptr", "k_ptr", "v_ptr", "distance_ptr", "scratch_ptr", "out_ptr", "lse_ptr"), element
    )
    pointers |= {"scratch_ptr": "*fp32", "lse_ptr": "*fp32"}
    pointers |= {"cu_seqlens_ptr": "*i32", "seqused_k_ptr": "*i32"}
    pointers |= {"tile_map_ptr": "*i32", "seed_ptr": "*i64"}
    aligned = {"q_ptr", "k_ptr", "v_ptr", "distance_ptr", "scratch_ptr", "out_ptr"}
    specs = []
    # AMD's tensor cores multiply float32 as it is; NVIDIA's need three passes.
    nvidia = not arch.startswith("gfx")
    for precision in ("ieee", "tf32x3") if dtype == "float32" and nvidia else ("ieee",):
        suffix = f"/{precision}" if dtype == "float32" else ""
        variants = ("relative_key", "no_positions", "relative_key_dropout", "relative_key_seqused")
        for variant in variants:
            has_positions, has_dropout = variant != "no_positions", variant.endswith("dropout")
            has_seqused = variant.endswith("seqused")
            config = attention_config(64, getattr(torch, dtype), arch)
            config = with_dropout(config) if has_dropout else config
            left, right = (64, 8) if has_positions else (0, 0)
            layout = scratch_layout(config.block_m, config.block_n, left, right)
            constants: dict[str, Any] = dict(
                _constants(
                    config,
                    layout,
                    64,
                    has_positions,
                    left,
                    right,
                    True,
                    precision,
                    has_dropout,
                    has_seqused,
                )
            )
            if not has_dropout:
                constants |= {"seed_ptr": None, "dropout_p": None}
            if not has_seqused:
                constants |= {"seqused_k_ptr": None}
            signature = {}
            for name in shaw_attention_fwd_kernel.arg_names:
                if name not in constants:
                    signature[name] = pointers.get(name, "i32")
            signature["scale_log2"] = "fp32"
            if has_dropout:
                signature["dropout_p"] = "fp32"
            strides = {name for name in signature if name.startswith("stride_")}
            specs.append(
                KernelSpec(
                    name=f"shaw_attention_fwd/{variant}{suffix}",
                    kernel=shaw_attention_fwd_kernel,
                    signature=signature,
                    constants=constants,
                    # NVIDIA's tensor cores have no product of float32 in full precision.
                    kind="pointwise" if suffix == "/ieee" and nvidia else "attention",
                    dtype=dtype,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                    divisible_by_16=frozenset(
                        aligned | (strides - {"stride_lse_head"}) | {"num_heads"}
                    ),
                    plain_twin=(
                        f"shaw_attention_fwd/no_positions{suffix}"
                        if variant in ("relative_key", "relative_key_seqused")
                        else None
                    ),
                    max_registers=config.max_registers,
                    proof=_proof_launch(signature, config.block_m),
                )
            )
    return specs


def _proof_launch(signature: dict[str, str], block_m: int) -> ProofLaunch:
    """The last head of an utterance's first tile and the first head of its second, a ragged one.

    Where `seqused_k` is read, the utterance's last token is no key.
    """
    length = block_m + 22
    scalars = {
        **{name: 64 if name.endswith("_head") else 1024 for name in signature},
        "stride_e_row": 64,
        "stride_lse_head": length,
        "first_work": 15,
        "num_heads": 16,
        "scale_log2": 0.125,
        "dropout_p": 0.1,
    }
    return ProofLaunch(
        2,
        {n: v for n, v in scalars.items() if n in signature and signature[n][0] != "*"},
        {
            "cu_seqlens_ptr": (0, length),
            "tile_map_ptr": (0, 0, 0, 1),
            **({"seqused_k_ptr": (length - 1,)} if "seqused_k_ptr" in signature else {}),
        },
    )
