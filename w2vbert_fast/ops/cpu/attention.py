"""Shaw attention over packed utterances, block by block of queries, in memory O(T x block).

    score(i, j) = (q_i . k_j + q_i . E[clip(j - i, -L, R) + L]) / sqrt(D)

Heads are divided among threads, and queries too where there are more threads than heads. One block
of queries of one or several heads at a time is scored, small enough to stay in cache between the
two products. The factor 1 / sqrt(D) is in the queries; in fp32 log2(e) is too, because
the powers of two are the faster ones. bf16 queries would be rounded once more by it, and bf16
scores in base 2, with log2(e) as the product's factor, come out less exact.

Positions. Left of the band every key of a row adds the same P[i, 0], right of it P[i, L + R], with
P = q E^T. Softmax does not see what a whole row shares, so the side that has more keys counts as
zero, the other side gets the difference, and only the columns of the band get a number each. In a
block of b queries the band is a parallelogram of b + L + R columns: a buffer whose rows lie one
element short of a diagonal step apart receives P as it stands.

Softmax. With |q| max|k| + 2 |q| max|E| below a limit no power can overflow or vanish, so the powers
are taken of the scores as they are. Heads beyond it subtract each row's maximum first.
The row sums divide the output, not the probabilities. Those of long bf16 rows are sums of stretches
of keys, each rounded once, added up in fp32: PyTorch would copy all powers to fp32 first.

Short utterances. To prepare the above takes longer than the work on a short utterance, which is
scored at once, all heads and keys, each position score picked by its index; in fp32, also for bf16.

Products. bf16 goes through oneDNN's batched product, several heads a call. fp32 goes to MKL, which
on AMD processors is less than half as fast as oneDNN's linear layer, so long utterances go through
that, head by head. oneDNN keeps what it prepares for each shape, so without log-sum-exp and dropout
its products have few numbers of queries and keys (`sizes`): scores of what is behind an utterance
are computed too, and get no weight.

Gradients, block by block of queries too, in as little memory. With the numerators w_ij of a row's
softmax, their sum z_i, the kept weights m_ij and g' = g / (z (1 - p)), which puts both divisions on
rows of D numbers instead of T:

    ds_ij = w_ij (m_ij g'_i . v_j - delta_i / z_i)      delta_i = g_i . o_i
    dv_j  = sum_i w_ij m_ij g'_i
    dk_j  = sum_i ds_ij q_i / sqrt(D)
    dq_i  = (sum_j ds_ij k_j + dP[i] E) / sqrt(D)
    dE    = sum_i dP[i]^T q_i / sqrt(D)

dP[i, r] is the sum of ds_ij over the keys at clipped distance r: within the band one key a
distance, so a diagonal of the band's buffer; its first and last column also get the keys beyond the
band. Numerators are computed again as in the forward pass.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from w2vbert_fast.ops.cpu import threads
from w2vbert_fast.ops.cpu.capability import onednn_linear
from w2vbert_fast.ops.cpu.conv import utterances_of
from w2vbert_fast.ops.cpu.gemm import matmul_transposed
from w2vbert_fast.ops.cpu.sizes import rounded_up

_BLOCK_BYTES = 2 << 20
"""Scores in flight where a head is scored by itself."""
_GROUP_BYTES = 3 << 20
"""Scores in flight where several heads are scored at once."""
_SHARE_SCORES = 1 << 21
"""Scores that are worth a share of several threads."""
_GROUP_HEADS = 8
"""So many heads are scored at once even if they take up to twice those bytes: the blocks of a long
utterance are large, and fewer calls make up for what leaves the second-level cache."""
_MIN_QUERIES = 256
"""Fewer queries than this in a block make the products slow, whatever the cache holds; more than
this at once, where several heads share a block, only make the band wider."""
_MOST_QUERIES = 512
"""In several threads' shares: every call waits for Python's lock. Fewer where a head's scores would
leave the cache."""
_STRETCHES_FROM = 512
"""Keys from which row sums are added up from stretches; the rounding of fewer would not average."""
_LINEAR_FROM = 160
"""Frames from which fp32 calls the linear layer a head: below, its call takes longer than MKL."""
_FEW_SCORES = 1 << 18
"""So many scores, of all heads of the longest utterance, are computed at once."""
_GROUP_FRAMES = 1024
"""Frames of utterances that are prepared together."""
_WHOLE_KEYS = 32
"""In 16 bits so many keys are multiplied at once. Of a rest (seen with 304 keys) oneDNN 3.12 on AMX
multiplies the next row's weights by zeros too, and NaN in that row reaches this one."""
_SAFE_EXPONENT = 64.0
"""Scores within +-64 need no maximum in either base: exp(64) = 2**92 summed over 2**20 keys is
finite in fp32 and bf16, and what underflows beside exp(-64) is less than 2**-30 of its row."""


class Positions(NamedTuple):
    """`q . E` of all queries and the clipping it stands for."""

    products: Tensor  # [H, N, L + R + 1]
    longest: Tensor  # the length of the longest embedding
    left: int
    right: int


class Utterance(NamedTuple):
    """Where an utterance lies in the batch: its first row, its queries and its keys."""

    offset: int
    num_queries: int
    num_keys: int  # the first so many rows


class Block(NamedTuple):
    """Queries `start` to `end` of an utterance of `length` keys at row `offset` of the batch.

    Where sizes are few only the first `own` queries need be the utterance's.
    """

    offset: int
    length: int
    start: int
    end: int
    own: int

    def rows(self) -> slice:
        """The utterance's queries, in the batch."""
        return slice(self.offset + self.start, self.offset + self.start + self.own)

    def columns(self) -> slice:
        """All of the utterance's keys, in the batch."""
        return slice(self.offset, self.offset + self.length)


def shaw_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    tile_map: Tensor | None = None,
    return_log_sum_exp: bool = True,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ops.shaw_attention`, of tensors at any strides; `max_seqlen` and `tile_map` are not read.

    Returns:
        The output `[N, H, D]`, contiguous, and the log-sum-exp of every row of scores, fp32
        `[H, N]`; without `return_log_sum_exp` that is empty.
    """
    if distance_embedding is not None:
        distance_embedding = distance_embedding.to(query.dtype)
    num_tokens, num_heads, head_size = query.shape
    output = query.new_empty(num_tokens, num_heads, head_size)
    shape = (num_heads, num_tokens) if return_log_sum_exp else (0,)
    log_sum_exp = query.new_empty(shape, dtype=torch.float32)
    if output.numel() == 0:
        return output, log_sum_exp
    found = utterances_of(cu_seqlens, seqused_k)
    scores = num_heads * max((end - start) * (used_end - start) for start, used_end, end in found)
    if scores <= _FEW_SCORES and dropout_p == 0.0 and not return_log_sum_exp:
        for start, used_end, end in found:
            rows, used = slice(start, end), slice(start, used_end)
            tensors = (query[rows], key[used], value[used])
            output[rows] = _attend_short(*tensors, distance_embedding, left, right)
        return output, log_sum_exp
    # Without positions that matter to the softmax the embedding counts for the log-sum-exp only.
    embedding = distance_embedding if return_log_sum_exp or left + right > 0 else None

    few_sizes = dropout_p == 0.0 and not return_log_sum_exp

    def attend_share(share: Share) -> None:
        rows, heads, utterances = share.rows, share.heads, share.utterances
        tensors = (query[rows, heads], key[rows, heads], value[rows, heads])
        longest = longest_of(utterances)
        attend = Attend(*tensors, longest, embedding, left, right, few_sizes=few_sizes)
        dropout = Dropout(dropout_p, dropout_seed, share.number)
        statistics = log_sum_exp[heads, rows] if return_log_sum_exp else None
        for block, of_heads, by_head in attend.blocks(share):
            attend.forward(block, of_heads, by_head, dropout, output[rows, heads], statistics)

    shares = shares_of(query, cu_seqlens, seqused_k, dropout_p > 0.0)
    threads.run(attend_share, shares, divided=threads.divides(query))
    return output, log_sum_exp


class Share(NamedTuple):
    """Heads of a group of utterances, and a part of the queries of each."""

    rows: slice  # of the group, in the batch
    utterances: list[Utterance]  # of the group
    heads: slice
    part: int  # this one of so many parts of each utterance's queries
    parts: int
    number: int  # of the share
    most_queries: int  # of a block for several heads


def shares_of(
    query: Tensor,
    cu_seqlens: Tensor,
    seqused_k: Tensor | None,
    one_by_one: bool,
    divides_queries: bool = True,
) -> list[Share]:
    """What is divided among threads.

    Args:
        query: `[N, H, D]`.
        cu_seqlens: of the batch.
        seqused_k: of the batch.
        one_by_one: every head by itself, whatever the number of threads, so that both passes draw
            the same dropout.
        divides_queries: whether a head's queries may be divided.
    """
    groups = list(groups_of_utterances(cu_seqlens, seqused_k))
    num_heads = query.shape[1]
    scores = num_heads * sum(u.num_queries * u.num_keys for _, group in groups for u in group)
    wanted = threads.number(query, scores / _SHARE_SCORES)
    # As many of each group as make up the number.
    of_group = max(1, -(-wanted // max(1, len(groups))))
    heads_at_once = 1 if one_by_one else max(1, num_heads // of_group)
    divided = not one_by_one and threads.divides(query)
    parts = 1
    if divides_queries and divided:
        parts = max(1, threads.count() // (num_heads * max(1, len(groups))))
    heads = [
        slice(first, min(first + heads_at_once, num_heads))
        for first in range(0, num_heads, heads_at_once)
    ]
    kinds = itertools.product(groups, heads, range(parts))
    most_queries = _MOST_QUERIES if divided else _MIN_QUERIES
    return [
        Share(rows, utterances, of_heads, part, parts, index, most_queries)
        for index, ((rows, utterances), of_heads, part) in enumerate(kinds)
    ]


def _attend_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
) -> Tensor:
    """Attention of one utterance of few frames: `[T, H, D]` -> `[T, H, D]`, in fp32 at least."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_queries, num_heads, head_size = query.shape
    num_keys = key.shape[0]
    # [H, T, D]
    q, k, v = (x.transpose(0, 1).to(dtype) for x in (query, key, value))
    factor = 1.0 / math.sqrt(head_size)
    if distance_embedding is None or left + right == 0:
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(factor)
    else:
        reach = max(num_queries, num_keys)
        embedding = reached(distance_embedding, left, right, reach).to(dtype)
        by_distance = torch.matmul(q, embedding.t())  # [H, T, L + R + 1]
        columns = _columns(num_queries, num_keys, left, right)
        positions = by_distance.gather(-1, columns.expand(num_heads, -1, -1))
        scores = torch.baddbmm(positions, q, k.transpose(1, 2), beta=factor, alpha=factor)
    return torch.bmm(torch.softmax(scores, -1), v).transpose(0, 1)


@functools.lru_cache(maxsize=32)
def _columns(num_queries: int, num_keys: int, left: int, right: int) -> Tensor:
    """Where `reached`'s embedding holds the distance of a query and a key: int64 `[T, T]`."""
    reach = max(num_queries, num_keys) - 1
    left, right = min(left, reach), min(right, reach)
    with torch.inference_mode(False):
        key, query = (torch.arange(number, device="cpu") for number in (num_keys, num_queries))
        distance = key[None, :] - query[:, None]
        return distance.clamp(-left, right) + left


def groups_of_utterances(
    cu_seqlens: Tensor, seqused_k: Tensor | None
) -> Iterator[tuple[slice, list[Utterance]]]:
    """Groups of few utterances, or one long one: their rows, and where each lies within these.

    What a group needs besides the results stays in cache, and in memory that the allocator keeps.
    """
    starts = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    used = lengths if seqused_k is None else seqused_k.tolist()
    first = 0
    for last in range(1, len(starts)):
        following = starts[min(last + 1, len(starts) - 1)]
        if last == len(starts) - 1 or following - starts[first] > _GROUP_FRAMES:
            if starts[last] > starts[first]:
                inside = [
                    Utterance(starts[index] - starts[first], lengths[index], used[index])
                    for index in range(first, last)
                ]
                yield slice(starts[first], starts[last]), inside
            first = last


def longest_of(utterances: list[Utterance]) -> int:
    """Frames of the longest utterance."""
    return max(utterance.num_queries for utterance in utterances)


def _positions(
    scaled: Tensor, embedding: Tensor, left: int, right: int, max_seqlen: int
) -> Positions:
    reach = max(max_seqlen - 1, 0)
    embedding = reached(embedding, left, right, max_seqlen).to(scaled.dtype)
    num_heads, num_tokens, head_size = scaled.shape
    # In bf16 they would be rounded once more: up to a tenth of the output's error.
    statistics = torch.promote_types(scaled.dtype, torch.float32)
    rows = scaled.view(-1, head_size).to(statistics)
    # MKL: oneDNN would prepare this small product for every number of rows.
    products = F.linear(rows, embedding.to(statistics))
    products = products.view(num_heads, num_tokens, -1)
    return Positions(products, _longest(embedding), min(left, reach), min(right, reach))


def reached(embedding: Tensor, left: int, right: int, max_seqlen: int) -> Tensor:
    """The rows of `[L + R + 1, D]` whose distances a pair of frames has."""
    reach = max(max_seqlen - 1, 0)
    return embedding[left - min(left, reach) : left + min(right, reach) + 1]


class Dropout:
    """Which weights of one block of a share after another are kept.

    The backward pass takes the same blocks in the same order, and so draws the same numbers.
    """

    def __init__(self, p: float, seed: Tensor | None, share: int) -> None:
        self.keep = 1.0 - p
        self.generator: torch.Generator | None = None
        if p > 0.0:
            if seed is None:
                raise ValueError("dropout_seed is None; dropout needs int64 [2], seed and offset")
            first, second = seed.tolist()
            self.generator = torch.Generator(seed.device)
            mixed = first + 0x9E3779B97F4A7C15 * second + 0xD1B54A32D192ED03 * share
            self.generator.manual_seed(mixed % 2**63)

    def kept(self, like: Tensor) -> Tensor | None:
        """One where a weight of a block like this is kept, else zero; `None`: all are."""
        if self.generator is None:
            return None
        return torch.empty_like(like).bernoulli_(self.keep, generator=self.generator)


class Attend:
    """Attention of some heads of one group of utterances: what all blocks share.

    `query` is scaled, with the factor `1 / sqrt(D)`, and with log2(e) where the scores are in base
    2; it, `key` and `value` are `[H, N, D]`. Where sizes are few there are zeros behind the
    queries; else keys and values are contiguous.
    """

    keys: Tensor  # [H, T, D] of the utterance whose blocks run
    values: Tensor

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        max_seqlen: int,
        distance_embedding: Tensor | None,
        left: int,
        right: int,
        *,
        few_sizes: bool = False,
    ) -> None:
        num_tokens, num_heads, head_size = query.shape
        self.few_sizes = few_sizes
        behind = max_seqlen // 16 if few_sizes else 0  # as far as sizes are rounded up
        self.base_two = base_two(query.dtype)
        factor = (math.log2(math.e) if self.base_two else 1.0) / math.sqrt(head_size)
        self.query = query.new_empty(num_heads, num_tokens + behind, head_size)
        torch.mul(query.transpose(0, 1), factor, out=self.query[:, :num_tokens])
        self.query[:, num_tokens:].zero_()
        self.key, self.value = key.transpose(0, 1), value.transpose(0, 1)
        if not few_sizes:
            self.key, self.value = self.key.contiguous(), self.value.contiguous()
        self.positions: Positions | None = None
        if distance_embedding is not None:
            self.positions = _positions(self.query, distance_embedding, left, right, max_seqlen)
        self.statistics = torch.promote_types(query.dtype, torch.float32)
        self.in_range = _heads_in_range(self.query, self.key, self.positions)
        self.scratch = query.new_empty(0)

    def blocks(self, share: Share) -> Iterator[tuple[Block, slice, bool]]:
        """Blocks of queries of a share, each for several heads, or for one by itself."""
        for utterance in share.utterances:
            yield from self._blocks(utterance, share)

    def _blocks(self, utterance: Utterance, share: Share) -> Iterator[tuple[Block, slice, bool]]:
        offset, num_queries, length = utterance
        part, parts = share.part, share.parts
        first, end = num_queries * part // parts, num_queries * (part + 1) // parts
        num_queries = end - first
        if num_queries == 0:
            return
        by_head = _uses_linear(self.query.dtype, length)
        self.keys, self.values = (
            self._laid_out(x[:, offset : offset + length], by_head) for x in (self.key, self.value)
        )
        row_bytes = self.query.element_size() * length
        if by_head:
            queries = max(_MIN_QUERIES, _BLOCK_BYTES // row_bytes)
            num_blocks = -(-num_queries // queries)
        else:
            queries = min(share.most_queries, max(_MIN_QUERIES, _GROUP_BYTES // row_bytes))
            num_blocks = max(1, round(num_queries / queries))
        queries = -(-num_queries // num_blocks)
        queries = self._size(queries, by_head)
        head_bytes = row_bytes * queries
        group = max(
            1, _GROUP_BYTES // head_bytes, min(_GROUP_HEADS, 2 * _GROUP_BYTES // head_bytes)
        )
        group = 1 if by_head else group
        for start in range(first, end, queries):
            own = min(queries, end - start)
            block = Block(offset, length, start, start + self._size(own, by_head), own)
            for heads in self._groups(group):
                yield block, heads, by_head

    def _groups(self, size: int) -> list[slice]:
        """Slices of at most `size` heads, about equal."""
        num_heads = self.query.shape[0]
        size = -(-num_heads // -(-num_heads // size))
        return [slice(h, min(h + size, num_heads)) for h in range(0, num_heads, size)]

    def powers(
        self, block: Block, heads: slice, by_head: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Softmax's numerators `[G, b, T]`, their sums `[G, b, 1]`, and what was subtracted from
        the exponents."""
        query = self.query[heads, block.offset + block.start : block.offset + block.end]
        key = self.keys[heads]
        bias = None
        if self.positions is not None:
            bias = _bias(self.positions, heads, block, query.dtype)
        if by_head:
            scores = matmul_transposed(query[0], key[0])[None]  # [1, b, T]
            if bias is not None:
                bias.add_to(scores)
        else:
            scores = self._buffer(query.shape[0], query.shape[1], key.shape[1])  # [G, b, T]
            if bias is not None:
                # The product is added to it before it is rounded.
                bias.fill(scores)
            beta = 0.0 if bias is None else 1.0
            torch.baddbmm(scores, query, key.transpose(1, 2), beta=beta, out=scores)
        scores[..., block.length :] = -math.inf
        shifts = []
        if not all(self.in_range[heads]):
            maximum = scores.amax(-1, keepdim=True)
            scores.sub_(maximum)
            shifts.append(maximum)
        if bias is not None and bias.reference is not None:
            shifts.append(bias.reference)
        powers = scores.exp2_() if self.base_two else scores.exp_()
        return powers, row_sums(powers, self.statistics), shifts

    def forward(
        self,
        block: Block,
        heads: slice,
        by_head: bool,
        dropout: Dropout,
        output: Tensor,
        log_sum_exp: Tensor | None,
    ) -> None:
        """Fill the block's rows of `output` `[N, H, D]` and, where it has rows, of `log_sum_exp`
        `[H, N]`."""
        rows, value = block.rows(), self.values[heads]
        powers, total, shifts = self.powers(block, heads, by_head)
        kept = dropout.kept(powers)
        weights = powers if kept is None else powers.mul_(kept)
        if by_head:
            weighted = matmul_transposed(weights[0], value[0].t())[None]  # [1, b, D]
        else:
            weighted = torch.bmm(weights, value)  # [G, b, D]
        divisor = total if kept is None else total * dropout.keep
        own = slice(block.own)
        torch.div(weighted[:, own], divisor[:, own], out=output[rows, heads].transpose(0, 1))
        if log_sum_exp is not None:
            exponent = total.log_()
            unit = math.log(2.0) if self.base_two else 1.0
            for shift in shifts:
                exponent = exponent + shift.to(exponent.dtype) * unit
            log_sum_exp[heads, rows] = exponent.squeeze(-1).float()

    def _size(self, number: int, by_head: bool) -> int:
        """Queries or keys of a product for so many of an utterance."""
        rounds = self.few_sizes and (by_head or self.query.dtype != torch.float32)
        return rounded_up(number) if rounds else number

    def _laid_out(self, rows: Tensor, by_head: bool) -> Tensor:
        """An utterance's keys or values `[H, T, D]` as its products take them.

        Where sizes are few, contiguous, or oneDNN would copy them for every block, and with zeros
        behind them: a weight of zero does not silence NaN.
        """
        if not self.few_sizes:
            return rows
        length = rows.shape[1]
        size = self._size(length, by_head)
        if not by_head and self.query.dtype != torch.float32:
            size += -size % _WHOLE_KEYS
        return (F.pad(rows, (0, 0, 0, size - length)) if size > length else rows).contiguous()

    def _buffer(self, *shape: int) -> Tensor:
        """Memory for scores, kept between blocks."""
        numel = math.prod(shape)
        if self.scratch.numel() < numel:
            self.scratch = self.query.new_empty(numel)
        return self.scratch[:numel].view(shape)


def _heads_in_range(query: Tensor, key: Tensor, positions: Positions | None) -> list[bool]:
    """Heads none of whose scores can exceed the safe exponent, by the Cauchy-Schwarz inequality."""
    if query.dtype == torch.float16:  # its powers end at 2**16
        return [False] * query.shape[0]
    longest_query, longest_key = _longest(query), _longest(key)  # [H]
    bound = longest_query * longest_key
    if positions is not None:
        # A position's score counts from the reference of its row: twice the longest embedding.
        bound = bound + 2.0 * longest_query * positions.longest
    in_range: list[bool] = (bound <= _SAFE_EXPONENT).tolist()  # NaN is not
    return in_range


def row_sums(powers: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of the rows of `[G, b, T]` in `dtype`: `[G, b, 1]`."""
    length = powers.shape[-1]
    if powers.dtype == dtype or length < _STRETCHES_FROM:
        return powers.sum(-1, keepdim=True, dtype=dtype)
    # Without a rest, where the length can be divided: three calls fewer.
    parts = next((n for n in range(8, 33) if length % n == 0), 0)
    stretch = length // parts if parts else min(256, length // 8)
    whole = length // stretch * stretch
    stretches = powers[..., :whole].reshape(*powers.shape[:-1], -1, stretch).sum(-1)
    total = stretches.sum(-1, keepdim=True, dtype=dtype)
    return total if whole == length else total.add_(powers[..., whole:].sum(-1, keepdim=True))


def base_two(dtype: torch.dtype) -> bool:
    """Whether scores of this dtype are kept in base 2: exp in fp32 goes to MKL, four times slower
    than exp2."""
    return dtype.itemsize >= 4


def _uses_linear(dtype: torch.dtype, length: int) -> bool:
    """Whether an utterance's products go through oneDNN's linear layer, head by head."""
    return dtype == torch.float32 and length >= _LINEAR_FROM and onednn_linear(dtype)


def _longest(x: Tensor) -> Tensor:
    """The largest length of the rows of `[..., n, D]`: fp64 `[...]`."""
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return lengths.amax(-1).double()


class _Bias(NamedTuple):
    """Position scores of a block, `[G, b, T]` in four pieces; a row's reference counts as zero."""

    reference: Tensor | None  # [G, b, 1], or None where zero is the reference
    band: Tensor  # [G, b, stop - start], for the keys start to stop
    start: int
    stop: int
    beyond: Tensor  # [G, b, 1], for the keys on the other side of the band
    side: slice  # these keys
    zero: slice  # the keys that get nothing

    def add_to(self, scores: Tensor) -> None:
        scores[..., self.start : self.stop].add_(self.band)
        if self.side.start < self.side.stop:
            scores[..., self.side].add_(self.beyond)

    def fill(self, scores: Tensor) -> None:
        scores[..., self.zero].zero_()
        scores[..., self.start : self.stop].copy_(self.band)
        if self.side.start < self.side.stop:
            scores[..., self.side].copy_(self.beyond)


def band_keys(block: Block, left: int, right: int) -> tuple[int, int]:
    """First and end of the keys that are in the band of any of a block's queries."""
    start = min(max(block.start - left, 0), block.length)
    return start, max(start, min(block.end + right, block.length))


def _bias(positions: Positions, heads: slice, block: Block, dtype: torch.dtype) -> _Bias:
    """Position scores of a block of queries for the heads of a group, in `dtype`."""
    left, right = positions.left, positions.right
    num_queries = block.end - block.start
    width = num_queries + left + right
    origin = block.start - left  # key of the buffer's first column
    products = positions.products[
        heads, block.offset + block.start : block.offset + block.end
    ]  # [G, b, L + R + 1]
    start, stop = band_keys(block, left, right)
    before, after = slice(0, start), slice(stop, block.length)
    left_is_zero = start >= block.length - stop
    side, zero = (after, before) if left_is_zero else (before, after)

    band = products.new_empty(products.shape[0], num_queries, width, dtype=dtype)
    diagonal = band.as_strided(products.shape, (num_queries * width, width + 1, 1))
    if block.end - 1 <= left and block.length - 1 - block.start <= right:
        # Every key is within the band of every query.
        reference, beyond = None, products[..., :1]
        diagonal.copy_(products)
    else:
        reference = products[..., :1] if left_is_zero else products[..., -1:]
        beyond = (products[..., -1:] if left_is_zero else products[..., :1]) - reference
        beyond = beyond.to(dtype)
        mask = _beyond_band(num_queries, width, left + right, left_is_zero, dtype)
        torch.mul(mask, beyond, out=band)
        torch.sub(products, reference, out=diagonal)
    band = band[..., start - origin : stop - origin]
    return _Bias(reference, band, start, stop, beyond, side, zero)


@functools.lru_cache(maxsize=8)
def _beyond_band(
    num_queries: int, width: int, span: int, right_side: bool, dtype: torch.dtype
) -> Tensor:
    """One where a column of the band's buffer lies beyond row's own band on one side: `[b, W]`."""
    with torch.inference_mode(False):
        ones = torch.ones(num_queries, width, dtype=dtype, device="cpu")
        return ones.triu_(span + 1) if right_side else ones.tril_(-1)


def shaw_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    distance_embedding: Tensor | None,
    left: int,
    right: int,
    tile_map: Tensor | None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value `[N, H, D]`, in the dtype of `query`, and of the distance
    embedding, in float32 at least; without elements where there is none.

    `log_sum_exp`, `max_seqlen` and `tile_map` are not read.
    """
    statistics = torch.promote_types(query.dtype, torch.float32)
    grads = [query.new_empty(query.shape) for _ in range(3)]
    grad_embedding = query.new_empty(0, dtype=statistics)
    if distance_embedding is not None:
        distance_embedding = distance_embedding.to(query.dtype)
        grad_embedding = torch.zeros_like(distance_embedding, dtype=statistics)
    if query.numel() == 0:
        return grads[0], grads[1], grads[2], grad_embedding
    # A softmax does not see what is equal for all keys: one position vector has no gradient.
    embedding = distance_embedding if left + right > 0 else None

    def differentiate_share(share: Share) -> Tensor | None:
        """Fills gradients of the share's heads; returns the embedding's."""
        rows, heads = share.rows, share.heads
        tensors = (query[rows, heads], key[rows, heads], value[rows, heads])
        longest = longest_of(share.utterances)
        attend = _AttendBackward(
            Attend(*tensors, longest, embedding, left, right),
            grad[rows, heads],
            output[rows, heads],
        )
        of_embedding = None
        if embedding is not None:
            of_embedding = torch.zeros_like(embedding, dtype=statistics)
            attend.embedding = reached(embedding, left, right, longest).to(statistics)
            attend.grad_embedding = reached(of_embedding, left, right, longest)
        dropout = Dropout(dropout_p, dropout_seed, share.number)
        for block, of_heads, by_head in attend.shared.blocks(share):
            attend.block(block, of_heads, by_head, dropout)
        for target, part in zip(grads, attend.results(), strict=True):
            target[rows, heads] = part.transpose(0, 1)
        return of_embedding

    shares = shares_of(query, cu_seqlens, seqused_k, dropout_p > 0.0, divides_queries=False)
    divided = threads.divides(query)
    for of_embedding in threads.run(differentiate_share, shares, divided=divided):
        if of_embedding is not None:
            grad_embedding += of_embedding
    if base_two(query.dtype):
        grad_embedding.mul_(math.log(2.0))
    return grads[0], grads[1], grads[2], grad_embedding


class _AttendBackward:
    """Gradients of one group of utterances: what all its blocks share."""

    embedding: Tensor | None = None  # [P, D] of the distances that occur
    grad_embedding: Tensor | None = None  # [P, D], a view; log2(e) too large in base 2

    def __init__(self, shared: Attend, grad: Tensor, output: Tensor) -> None:
        self.shared = shared
        self.grad = grad.transpose(0, 1).contiguous()  # [H, N, D]
        wide = self.grad.to(shared.statistics)
        self.delta = (wide * output.transpose(0, 1)).sum(-1, keepdim=True)  # [H, N, 1]
        self.rounds = grad.dtype != shared.statistics
        self.value = shared.value
        if self.rounds:  # [H, N, D + 1]: ones for what is subtracted from a product with values
            self.value = F.pad(self.value, (0, 1), value=1.0)
        self.grad_query = torch.empty_like(shared.query, dtype=shared.statistics)
        self.grad_key = torch.zeros_like(self.grad_query)
        self.grad_value = torch.zeros_like(self.grad_query)

    def block(self, block: Block, heads: slice, by_head: bool, dropout: Dropout) -> None:
        """Add what a block of queries gives."""
        shared, rows, columns = self.shared, block.rows(), block.columns()
        powers, total, _ = shared.powers(block, heads, by_head)  # [G, b, T], [G, b, 1]
        query = shared.query[heads, rows]
        key, value = shared.key[heads, columns], self.value[heads, columns]
        kept = dropout.kept(powers)
        divided = self.grad[heads, rows].to(total.dtype) / (total * dropout.keep)
        shift = self.delta[heads, rows] / total  # [G, b, 1]
        # The difference is small beside what it is of, so it is taken before that is rounded.
        if self.rounds and kept is None:
            left = torch.cat([divided, -shift], dim=-1).to(query.dtype)  # [G, b, D + 1]
            divided = left[..., :-1]  # [G, b, D]
            ds = _product(left, value.transpose(1, 2), by_head).mul_(powers)  # [G, b, T]
        else:
            divided = divided.to(query.dtype)
            value = value[..., : query.shape[-1]]
            ds = _product(divided, value.transpose(1, 2), by_head)
            if kept is not None:
                ds.mul_(kept)
            ds = ds.to(shared.statistics).sub_(shift).mul_(powers).to(query.dtype)
        if self.rounds:
            # A row's sum is zero but for what rounded weights and a rounded output left.
            excess = row_sums(ds, shared.statistics) / total
            ds.addcmul_(powers, excess.to(ds.dtype), value=-1)
        weights = powers if kept is None else powers.mul_(kept)
        self.grad_value[heads, columns] += _product_over_queries(weights, divided, by_head)
        self.grad_key[heads, columns] += _product_over_queries(ds, query, by_head)
        grad_query = _product(ds, key, by_head).to(shared.statistics)
        if self.embedding is not None and self.grad_embedding is not None:
            assert shared.positions is not None
            reach = shared.positions.left, shared.positions.right
            by_distance = _sums_by_distance(ds, block, *reach)
            grad_query += by_distance @ self.embedding
            flat = query.flatten(0, 1).to(by_distance.dtype)
            self.grad_embedding += by_distance.flatten(0, 1).t() @ flat
        self.grad_query[heads, rows] = grad_query

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, `[H, N, D]`."""
        shared = self.shared
        # The queries hold 1 / sqrt(D), and log2(e) in base 2.
        unit = math.log(2.0) if shared.base_two else 1.0
        self.grad_query.mul_(shared.query.shape[2] ** -0.5)
        return self.grad_query, self.grad_key.mul_(unit), self.grad_value


def _product(a: Tensor, b: Tensor, by_head: bool) -> Tensor:
    """`a @ b`, `[G, m, k]` and `[G, k, n]`; one of the last dimensions of `b` is contiguous."""
    return matmul_transposed(a[0], b[0].t())[None] if by_head else torch.bmm(a, b)


def _product_over_queries(weights: Tensor, rows: Tensor, by_head: bool) -> Tensor:
    """`weights^T @ rows`, `[G, b, T]` and `[G, b, D]` -> `[G, T, D]`."""
    if by_head:
        return matmul_transposed(rows[0].t(), weights[0].t()).t()[None]
    return torch.bmm(weights.transpose(1, 2), rows)


def _sums_by_distance(ds: Tensor, block: Block, left: int, right: int) -> Tensor:
    """dP: sums of `[G, b, T]` over the keys of each clipped distance, `[G, b, L + R + 1]`."""
    group, num_queries, _ = ds.shape
    span = left + right
    width = num_queries + span
    origin = block.start - left  # key of the buffer's first column
    start, stop = band_keys(block, left, right)
    dtype = torch.promote_types(ds.dtype, torch.float32)
    band = ds.new_zeros(group, num_queries, width, dtype=dtype)
    band[..., start - origin : stop - origin] = ds[..., start:stop]
    shape, strides = (group, num_queries, span + 1), (num_queries * width, width + 1, 1)
    sums = band.as_strided(shape, strides).clone()
    sums[..., 0] += band.tril(-1).sum(-1) + ds[..., :start].sum(-1, dtype=dtype)
    sums[..., -1] += band.triu(span + 1).sum(-1) + ds[..., stop:].sum(-1, dtype=dtype)
    return sums
