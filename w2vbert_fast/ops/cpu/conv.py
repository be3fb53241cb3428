"""Causal depthwise convolution with its LayerNorm and activation, forward and backward.

Packed `[num_tokens, channels]` is what a convolution over a picture one row high calls
channels-last, so nothing is transposed. Pieces of utterances are copied once, before each the K - 1
rows that it follows on, zeros before an utterance's first, and one convolution runs over all pieces
of a share. So few elements that its call takes longer than its work are multiplied tap by tap
instead.

The gradient of the input is the same convolution run backwards in time. The gradient of the weight
is K sums of products of shifted rows, over blocks of rows that stay in cache: 20 times as fast as
oneDNN's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.ops.activations import get_activation
from w2vbert_fast.ops.cpu import threads
from w2vbert_fast.ops.cpu.gemm import IN_PLACE, activation_gradient
from w2vbert_fast.ops.cpu.norm import norm_gradient, norm_rows

_LOW_PRECISION_CHANNELS = 256
"""Fewer channels than this are convolved in float32: for 32 or fewer oneDNN 3.12 does not come to
an end at some lengths, when it makes its bfloat16 kernel."""
_FEW_ELEMENTS = 8192
"""Up to so many elements the products of all taps, summed up, take less time than a convolution."""
_SHARE_ELEMENTS = 3 << 18
"""Elements that are worth a share; see `gemm`."""
_BLOCK_ELEMENTS_BACKWARD = 1 << 17
"""Products of one block, in float32 half a megabyte."""


def conv_norm_act(
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """As `ops.conv_norm_act`, contiguous."""
    get_activation(activation)  # a name that there is not is refused, whatever the shapes
    out = torch.empty_like(x, memory_format=torch.contiguous_format)

    def pieces_of(pieces: list[Piece]) -> None:
        _convolve_norm_act(out, x, conv_weight, norm_weight, norm_bias, eps, activation, pieces)

    threads.run(pieces_of, _shares(x, utterances_of(cu_seqlens, seqused_k)))
    return out


def _convolve_norm_act(
    out: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    pieces: list[Piece],
) -> None:
    """Fill the rows of pieces that follow each other."""
    y = convolve(x, conv_weight, pieces)
    pad = conv_weight.shape[1] - 1
    rows = slice(pieces[0].start, pieces[-1].end)
    if len(pieces) > 1:
        torch.cat([y[start:end] for start, end in _places(pieces, pad)], out=out[rows])
        y = out[rows]
    in_place = IN_PLACE.get(activation)
    norm_rows(out[rows], y, norm_weight, norm_bias, eps)
    if in_place is not None:
        in_place(out[rows], inplace=True)
    else:
        out[rows] = get_activation(activation)(out[rows])


class Piece(NamedTuple):
    """Rows of one utterance."""

    begin: int  # the utterance's first row
    start: int  # the piece's own
    used_end: int  # end of the utterance's rows that are read
    end: int  # of the piece


def _shares(x: Tensor, utterances: list[tuple[int, int, int]]) -> list[list[Piece]]:
    """Pieces of utterances, in turn, about as many rows in each share."""
    number = threads.number(x, x.numel() / _SHARE_ELEMENTS)
    shares: list[list[Piece]] = []
    for rows in threads.slices(x.shape[0], number):
        pieces = [
            Piece(begin, max(begin, rows.start), used_end, min(end, rows.stop))
            for begin, used_end, end in utterances
            if begin < rows.stop and end > rows.start
        ]
        shares += [pieces] if pieces else []
    return shares


def utterances_of(cu_seqlens: Tensor, seqused_k: Tensor | None) -> list[tuple[int, int, int]]:
    """First row, end of the rows that are read, and end of each utterance that has rows."""
    starts = cu_seqlens.tolist()
    ends = starts[1:]
    if seqused_k is not None:
        used = seqused_k.tolist()
        ends = [start + count for start, count in zip(starts[:-1], used, strict=True)]
    bounds = zip(starts[:-1], ends, starts[1:], strict=True)
    return [(start, used_end, end) for start, used_end, end in bounds if end > start]


def convolve(x: Tensor, weight: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """The convolution of pieces, each K - 1 rows after the end of the one before it.

    Returns `[sum of the pieces' rows + (len(pieces) - 1) * (K - 1), channels]`; the rows in between
    are of no use.
    """
    channels, taps = weight.shape
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    pad = taps - 1
    num_rows = sum(piece.end - piece.start + pad for piece in pieces)
    if channels < _LOW_PRECISION_CHANNELS:
        weight = weight.to(wide)
    spaced = x.new_empty(num_rows, channels, dtype=weight.dtype)
    at = pad
    for begin, start, used_end, end in pieces:
        first = max(begin, start - pad)
        last = max(first, min(used_end, end))
        spaced[at - pad : at - start + first].zero_()
        spaced[at - start + first : at - start + last] = x[first:last]
        spaced[at - start + last : at - start + end].zero_()
        at += end - start + pad
    if num_rows * channels <= _FEW_ELEMENTS + pad * channels:
        windows = spaced.as_strided((num_rows - pad, taps, channels), (channels, channels, 1))
        return (windows * weight.t()).sum(1).to(dtype)
    strides = (num_rows * channels, 1, num_rows * channels, channels)
    picture = spaced.as_strided((1, channels, 1, num_rows), strides)
    y = F.conv2d(picture, weight.reshape(channels, 1, 1, taps), groups=channels)
    return y[0, :, 0].t().to(dtype)  # [rows, channels]


def _places(pieces: Sequence[Piece], pad: int) -> Iterator[tuple[int, int]]:
    """First row and end of each piece in `convolve`'s result."""
    at = 0
    for piece in pieces:
        yield at, at + piece.end - piece.start
        at += piece.end - piece.start + pad


def conv_norm_act_backward(
    grad: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    activation: str,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype and, in float32 at least, of the three parameters.

    Raises:
        ValueError: no derivative is known for the activation.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    channels, taps = conv_weight.shape
    pad = taps - 1
    grad_y, grad_x = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    shares = _shares(x, utterances_of(cu_seqlens, seqused_k))

    def of_parameters(pieces: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """Fills `grad_y`, the gradient of the convolution's result."""
        rows = slice(pieces[0].start, pieces[-1].end)
        y = convolve(x, conv_weight, pieces)
        y = torch.cat([y[start:end] for start, end in _places(pieces, pad)]).to(dtype)
        weight, bias = norm_weight.to(dtype), norm_bias.to(dtype)
        normed = F.layer_norm(y, (channels,), weight, bias, eps)
        inner = activation_gradient(grad[rows].to(dtype), normed, activation)
        grad_y[rows], grad_weight, grad_bias = norm_gradient(inner, y, weight, eps)
        grad_conv = torch.zeros(taps, channels, dtype=dtype, device=x.device)
        _add_weight_gradient(grad_conv, grad_y, x, pieces)
        return grad_conv, grad_weight, grad_bias

    def of_x(pieces: list[Piece]) -> None:
        for begin, start, used_end, end in pieces:
            after = grad_y[start : min(end + pad, ends[begin])].flip(0)
            backwards = Piece(0, len(after) - (end - start), len(after), len(after))
            grad_x[start:end] = convolve(after, conv_weight, [backwards]).flip(0)
            grad_x[max(start, min(used_end, end)) : end].zero_()

    ends = {piece.begin: piece.end for pieces in shares for piece in pieces}
    zeros = [x.new_zeros(size, dtype=dtype) for size in ((taps, channels), channels, channels)]
    of_shares = threads.run(of_parameters, shares)
    threads.run(of_x, shares)
    sums = [sum(grads, zero) for zero, *grads in zip(zeros, *of_shares, strict=True)]
    return grad_x, sums[0].t().contiguous(), sums[1], sums[2]


def _add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor, pieces: Sequence[Piece]) -> None:
    """`total[k, c] += sum_t grad[t, c] * x[t - (K - 1) + k, c]`, within each utterance."""
    taps, channels = total.shape
    pad = taps - 1
    step = max(1, _BLOCK_ELEMENTS_BACKWARD // channels)
    products = total.new_empty(step, channels)
    for begin, start, used_end, end in pieces:
        for first in range(start, end, step):
            last = min(first + step, end)
            rows = grad[first:last].to(total.dtype)
            before = min(pad, first - begin)
            window = x[first - before : min(last, used_end)].to(total.dtype)
            for tap in range(taps):
                # Rows that this tap finds before the utterance are zero, and so are those that the
                # convolution does not read.
                skip = max(pad - tap - before, 0)
                offset = before - pad + tap + skip
                count = min(last - first - skip, len(window) - offset)
                if count <= 0:
                    continue
                out = products[:count]
                torch.mul(rows[skip : skip + count], window[offset : offset + count], out=out)
                total[tap] += out.sum(0)
