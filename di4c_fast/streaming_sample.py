"""Row draws as plain tensor operations: the torch backend of `sample`, and the loss's own draws.

Shapes: R rows, V vocabulary, W = SAMPLE_BLOCK, G = ceil(V / W) blocks.

A draw from weights w (R, V), proportional to the probabilities, is

    s[g] = sum of w over block g             S[g] = s[0] + ... + s[g]
    chosen block = the last g with u[g] · S[g] < s[g]
    token = argmax of w[v] / E[v] over the chosen block,  E[v] = −log(1 − u'[v])

with u and u' the uniform numbers of the streams BLOCKS (index g) and TOKENS (index v) of `rng`.
The first line is a reservoir: block g replaces the choice with probability s[g]/S[g], so it is
chosen at the end with probability s[g]/S[G-1]. The last line is an exponential race, that is
argmax(log w − log E). A cumulative sum over all tokens would round a tail of tiny
probabilities away; the race compares each on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .draw.filters import FIRST_LOOK, NEG_INF, filter_literal_, filter_scaled_, guide
from .draw.request import SampleInputs
from .heads import Head, TensorHead
from .rng import BLOCKS, TOKENS, Integer, exponential, uniform

# Part of the definition of a draw, so the same for every backend; divisible by 4 (one Philox
# call). 816 rows of 8193 took 4.8 ms with 128 and 6.8 ms with 256 on one core: a draw costs
# V/W + W random numbers.
SAMPLE_BLOCK = 128

_CHUNK_BYTES = 8 << 20  # of a chunk on a CPU: fits the caches, and few enough chunks
_GROUP_NUMBERS = 1 << 20  # random numbers held at a time
MIN_GROUP_ROWS = 64  # so that the matrix products of a LinearHead stay efficient
BUDGET_CPU = 64 << 20  # bytes of logits of a head, or of copies of a tensor
BUDGET_GPU = 128 << 20
_CONFIDENCES = frozenset({"prob", "raw_prob", "margin", "entropy"})
_LOWEST = -1e5  # exp is 0 from here on in fp32 and fp64, so that 0·(-inf) becomes 0


def draw_from_probs(
    probs: Tensor, seed: Integer, *, step: Integer = 0, row_keys: Tensor | None = None
) -> Tensor:
    """One token per row from probabilities that exist already, without a pass over logits.

    The draw is that of `sample(probs.log(), seed=seed, step=step, row_keys=row_keys)`: the same
    token up to the rounding of sums, whatever rows are drawn together.

    Args:
        probs: (..., V), float32 or float64; not negative, 0 for excluded tokens. Rows need not be
            normalised, but their largest entry should be far from underflow.
        seed: int, or () int64 on the device of `probs`.
        step: int, or () int64.
        row_keys: int64 of the leading shape, the identity of each row; None for
            0, 1, 2, ... over the flattened leading dimensions.

    Returns:
        int64 of the leading shape. A row without mass gives 0. Not differentiable; no host sync.
    """
    vocabulary = probs.shape[-1]
    weights = probs.detach().reshape(-1, vocabulary)
    if row_keys is None:
        row_keys = torch.arange(weights.shape[0], device=weights.device)
    row_keys = row_keys.reshape(-1)
    sums = block_sums(weights)
    chosen = choose_block(sums, block_uniforms(seed, step, row_keys, vocabulary, weights.dtype))
    candidates = take_block(weights, chosen)
    winner = run_race(candidates, token_uniforms(seed, step, row_keys, chosen, weights.dtype))
    return (chosen * SAMPLE_BLOCK + winner).view(probs.shape[:-1])


def blocks_of(vocabulary: int) -> int:
    """G, the number of blocks of a row."""
    return -(-vocabulary // SAMPLE_BLOCK)


def block_sums(weights: Tensor) -> Tensor:
    """Sums over the blocks of each row, (R, V) of any row stride -> (R, G).

    A plain sum over a long row is split between threads if the row is alone, and so rounds
    differently than in a batch; sums over blocks do not.
    """
    rows, vocabulary = weights.shape
    full = vocabulary // SAMPLE_BLOCK
    sums = weights.new_empty(rows, blocks_of(vocabulary))
    if full:
        head = weights[:, : full * SAMPLE_BLOCK].unflatten(1, (full, SAMPLE_BLOCK))
        torch.sum(head, -1, out=sums[:, :full])
    if full < sums.shape[1]:
        torch.sum(weights[:, full * SAMPLE_BLOCK :], -1, out=sums[:, full])
    return sums


def block_uniforms(
    seed: Integer, step: Integer, row_keys: Tensor, vocabulary: int, dtype: torch.dtype
) -> Tensor:
    """The uniform number of every block, (R, G)."""
    return uniform(seed, step, row_keys, blocks_of(vocabulary), stream=BLOCKS, dtype=dtype)


def choose_block(sums: Tensor, uniforms: Tensor) -> Tensor:
    """The block that a sequential reservoir ends with, (R, G) sums -> (R,) int64.

    0 where no block has mass, or where a sum is NaN.
    """
    replaced = uniforms * sums.cumsum(-1) < sums
    index = torch.arange(sums.shape[-1], device=sums.device)
    return torch.where(replaced, index, 0).amax(-1)


def take_block(values: Tensor, chosen: Tensor) -> Tensor:
    """The chosen block of every row, (R, V) -> (R, W), padded with 0 beyond V."""
    vocabulary = values.shape[-1]
    whole = min(vocabulary, values.numel()) >= SAMPLE_BLOCK and values.is_contiguous()
    if whole and values.device.type == "cpu" and not torch.compiler.is_compiling():
        return _copy_block(values, chosen)
    ids = (chosen * SAMPLE_BLOCK).unsqueeze(-1) + torch.arange(SAMPLE_BLOCK, device=values.device)
    if vocabulary % SAMPLE_BLOCK == 0:
        return values.gather(1, ids)
    block = values.gather(1, ids.clamp_max(vocabulary - 1))
    return block.masked_fill_(ids >= vocabulary, 0.0)


def _copy_block(values: Tensor, chosen: Tensor) -> Tensor:
    """The same as copies of whole blocks, which cost a fraction of a gather of their elements."""
    rows, vocabulary = values.shape
    first = torch.arange(rows) * vocabulary
    start = (chosen * SAMPLE_BLOCK).clamp_max_(vocabulary - SAMPLE_BLOCK)
    windows = values.view(-1).unfold(0, SAMPLE_BLOCK, 1)  # any 128 neighbours
    block = windows.index_select(0, first + start)
    full, rest = divmod(vocabulary, SAMPLE_BLOCK)
    if rest:  # rows whose block ends with the vocabulary
        (partial,) = (chosen == full).nonzero(as_tuple=True)
        if partial.numel():
            block[partial, :rest] = values[partial, full * SAMPLE_BLOCK :]
            block[partial, rest:] = 0.0
    return block


def token_uniforms(
    seed: Integer, step: Integer, row_keys: Tensor, chosen: Tensor, dtype: torch.dtype
) -> Tensor:
    """The uniform numbers of the tokens of the chosen block, (R, W)."""
    first = chosen * SAMPLE_BLOCK
    return uniform(seed, step, row_keys, SAMPLE_BLOCK, stream=TOKENS, first=first, dtype=dtype)


def run_race(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The winner of an exponential race within a block, (R, W) -> (R,); weight 0 never wins."""
    return (weights / exponential(uniforms)).argmax(-1)


def sample_rows(inputs: SampleInputs) -> dict[str, Tensor]:
    """The torch backend of `sample`: the token and the wanted fields, each (R,).

    Rows are worked on in groups, groups in chunks. A group holds the logits of a head (those of a
    plain tensor are not copied) and the random numbers; a chunk is what the passes over the
    vocabulary touch, small enough to stay in the cache of a CPU.
    """
    size = _group_rows(inputs)
    groups = [
        _sample_group(inputs, slice(begin, min(begin + size, inputs.rows)))
        for begin in range(0, inputs.rows, size)
    ]
    if not groups:
        groups = [_finish(inputs, _Group(inputs, slice(0, 0)))]
    return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}


def _group_rows(inputs: SampleInputs) -> int:
    vocabulary, on_cpu = inputs.vocabulary, inputs.head.device.type == "cpu"
    rows = max(MIN_GROUP_ROWS, _GROUP_NUMBERS // (blocks_of(vocabulary) + SAMPLE_BLOCK))
    heads = [head for head in (inputs.head, inputs.unconditional) if head is not None]
    if on_cpu and all(_row_view(head) is not None for head in heads):
        return rows
    budget = inputs.budget_bytes or getattr(inputs.head, "budget_bytes", None)
    if budget is None:
        budget = BUDGET_CPU if on_cpu else BUDGET_GPU
    bytes_per_row = vocabulary * len(heads) * inputs.dtype.itemsize
    return min(rows, max(MIN_GROUP_ROWS, budget // bytes_per_row))


def _row_view(head: Head) -> Tensor | None:
    """The logits of a plain tensor as (R, V) if that needs no copy."""
    if not isinstance(head, TensorHead):
        return None
    logits = head.logits().detach()
    try:
        return logits.view(head.shape[:-1].numel(), logits.shape[-1])
    except RuntimeError:
        return None


def row_logits(head: Head, rows: slice) -> Tensor:
    """The logits of some rows, (r, V)."""
    view = _row_view(head)
    if view is not None:
        return view[rows]
    taken = head.take(torch.arange(rows.start, rows.stop, device=head.device))
    return taken.logits().detach()


class _Group:
    """A group of r rows: its randomness and parameters, and what its chunks leave behind."""

    def __init__(self, inputs: SampleInputs, rows: slice):
        self.rows = rows
        self.row_keys = inputs.row_keys[rows]
        self.scale = inputs.guidance_scale
        if isinstance(self.scale, Tensor):
            self.scale = self.scale[rows]
        self.temperature = inputs.effective_temperature()
        self.greedy: Tensor | None = None  # (r,) bool: which rows take the argmax
        if isinstance(self.temperature, Tensor):
            assert isinstance(inputs.temperature, Tensor)
            self.temperature = self.temperature[rows].unsqueeze(-1)
            self.greedy = inputs.temperature[rows] == 0.0
        self.look = FIRST_LOOK
        self.uniforms: Tensor | None = None
        if not inputs.greedy and blocks_of(inputs.vocabulary) > 1:
            self.uniforms = block_uniforms(
                inputs.seed, inputs.step, self.row_keys, inputs.vocabulary, inputs.dtype
            )
        device, dtype = inputs.head.device, inputs.dtype
        confidence_dtype = inputs.confidence_dtype or dtype
        r = rows.stop - rows.start
        self.chosen = torch.zeros(r, dtype=torch.int64, device=device)  # block of the token
        self.argmax = torch.zeros(r, dtype=torch.int64, device=device)
        self.peak = torch.empty(r, dtype=dtype, device=device)  # largest logit
        self.total = torch.empty(r, dtype=dtype, device=device)  # sum of exp(logit - peak)
        self.entropy = torch.empty(r, dtype=confidence_dtype, device=device)
        self.margin = torch.empty(r, dtype=confidence_dtype, device=device)
        # Of the chosen block, (r, W): exp(logit - peak), and the probabilities of the two
        # confidences that do not follow from it.
        self.weights = torch.empty(r, SAMPLE_BLOCK, dtype=dtype, device=device)
        self.prob, self.raw_prob = (
            torch.empty(r, SAMPLE_BLOCK, dtype=confidence_dtype, device=device) if needed else None
            for needed in (_literal_prob(inputs), _separate_raw_prob(inputs))
        )


def _literal_prob(inputs: SampleInputs) -> bool:
    return "prob" in inputs.want and inputs.confidence_dtype is not None


def _separate_raw_prob(inputs: SampleInputs) -> bool:
    differs = inputs.confidence_dtype is not None or inputs.tempered or inputs.filtered
    return "raw_prob" in inputs.want and differs


def _sample_group(inputs: SampleInputs, rows: slice) -> dict[str, Tensor]:
    group = _Group(inputs, rows)
    logits = row_logits(inputs.head, rows)
    unconditional = None
    if inputs.unconditional is not None:
        unconditional = row_logits(inputs.unconditional, rows)
    count = size = rows.stop - rows.start
    if logits.device.type == "cpu":
        size = min(size, max(1, _CHUNK_BYTES // (inputs.vocabulary * inputs.dtype.itemsize)))
    width = blocks_of(inputs.vocabulary) * SAMPLE_BLOCK
    scratch = torch.empty(size, width, dtype=inputs.dtype, device=logits.device)
    for begin in range(0, count, size):
        chunk = slice(begin, min(begin + size, count))
        other = None if unconditional is None else unconditional[chunk]
        _chunk_pass(inputs, group, chunk, logits[chunk], other, scratch[: chunk.stop - begin])
    return _finish(inputs, group)


def _chunk_pass(
    inputs: SampleInputs,
    group: _Group,
    chunk: slice,
    logits: Tensor,
    unconditional: Tensor | None,
    scratch: Tensor,
) -> None:
    """All passes over the vocabulary for the rows `chunk` of a group: (r, V), scratch (r, G·W)."""
    want, vocabulary = inputs.want, inputs.vocabulary
    temperature, scale = (
        value[chunk] if isinstance(value, Tensor) else value
        for value in (group.temperature, group.scale)
    )
    if unconditional is not None:
        logits = guide(logits, unconditional, scale, inputs.confidence_dtype or inputs.dtype)

    # Logits minus the largest of their row; excluded tokens and the padding are -inf.
    peak = row_peak(logits, inputs.mask_id).to(inputs.dtype)
    columns = scratch[:, :vocabulary]
    subtract(logits, peak, columns)
    if inputs.mask_id is not None:
        columns[:, inputs.mask_id] = NEG_INF
    scratch[:, vocabulary:] = NEG_INF

    raw_prob = None
    literal = None
    if inputs.confidence_dtype is not None and (inputs.filtered or want & _CONFIDENCES):
        literal = LiteralConfidence(inputs, logits, temperature)
        raw_prob = literal.raw_prob
    elif group.raw_prob is not None:
        raw_prob = columns.exp()
        raw_prob.div_(block_sums(raw_prob).sum(-1, keepdim=True))
    peak = peak / temperature
    if inputs.tempered:
        scratch.div_(temperature)
    if inputs.filtered and literal is not None:
        columns.masked_fill_(literal.logits == NEG_INF, NEG_INF)
        top = scratch.amax(-1, keepdim=True)
        scratch.sub_(top)
        peak += top
    elif inputs.filtered:
        group.look = filter_scaled_(columns, inputs.top_p, inputs.top_k, group.look)
    group.peak[chunk] = peak[:, 0]

    # What needs the logits themselves.
    blocks = scratch.unflatten(1, (-1, SAMPLE_BLOCK))
    second = None
    if inputs.greedy or group.greedy is not None or want & {"argmax", "margin"}:
        group.argmax[chunk], second = _largest_two(blocks)
    if "entropy" in want and literal is None:
        weights = scratch.exp()
        products = scratch.clamp_(min=_LOWEST).mul_(weights)
        weighted_log = block_sums(products).sum(-1)
        blocks = weights.unflatten(1, (-1, SAMPLE_BLOCK))
    else:
        scratch.exp_()

    # What needs their exponentials.
    sums = blocks.sum(-1)
    total = group.total[chunk] = sums.sum(-1)
    if group.uniforms is not None:
        chosen = choose_block(sums, group.uniforms[chunk])
        if group.greedy is not None:
            chosen = torch.where(group.greedy[chunk], group.argmax[chunk] // SAMPLE_BLOCK, chosen)
        group.chosen[chunk] = chosen
    elif inputs.greedy:
        group.chosen[chunk] = group.argmax[chunk] // SAMPLE_BLOCK
    chosen = group.chosen[chunk]
    group.weights[chunk] = blocks[torch.arange(len(chosen), device=chosen.device), chosen]
    if group.raw_prob is not None:
        assert raw_prob is not None
        group.raw_prob[chunk] = take_block(raw_prob, chosen)
    if literal is not None:
        if group.prob is not None:
            group.prob[chunk] = take_block(literal.prob, chosen)
        literal.statistics(group.margin[chunk], group.entropy[chunk])
        return
    if "margin" in want:
        assert second is not None
        group.margin[chunk] = (1.0 - second.exp()) / total
    if "entropy" in want:
        group.entropy[chunk] = total.log() - weighted_log / total


def row_peak(logits: Tensor, mask_id: int | None) -> Tensor:
    """The largest logit of every row but for the column of the mask, (r, V) -> (r, 1)."""
    if mask_id is None:
        return logits.amax(-1, keepdim=True)
    sides = [side for side in (logits[:, :mask_id], logits[:, mask_id + 1 :]) if side.shape[1]]
    peaks = [side.amax(-1, keepdim=True) for side in sides]
    return peaks[0] if len(peaks) == 1 else torch.maximum(*peaks)


def subtract(logits: Tensor, peak: Tensor, out: Tensor) -> None:
    """out = logits − peak. A row at -inf throughout becomes NaN, which `_finish` reports."""
    if logits.dtype == out.dtype:
        torch.sub(logits, peak, out=out)
    else:
        out.copy_(logits).sub_(peak)


def _largest_two(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The column of the largest value, the lowest of equals, and the second largest value."""
    tops = blocks.amax(-1)
    block = tops.argmax(-1, keepdim=True)
    values = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, SAMPLE_BLOCK)).squeeze(1)
    place = values.argmax(-1, keepdim=True)
    within = values.scatter_(1, place, NEG_INF).amax(-1)
    outside = tops.scatter_(1, block, NEG_INF).amax(-1)
    return (block * SAMPLE_BLOCK + place)[:, 0], torch.maximum(within, outside)


class LiteralConfidence:
    """Confidences by the operations of the repositories, on whole rows, in their dtype."""

    def __init__(self, inputs: SampleInputs, logits: Tensor, temperature: float | Tensor):
        dtype = inputs.confidence_dtype
        assert dtype is not None
        logits = logits.to(dtype)
        if inputs.mask_id is not None:
            logits = logits.clone()
            logits[:, inputs.mask_id] = NEG_INF
        self.want = inputs.want
        self.raw_prob = logits.softmax(-1) if "raw_prob" in self.want else None
        if inputs.tempered:
            scale = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
            logits = logits / scale
        if inputs.filtered:
            logits = filter_literal_(logits.clone(), inputs.top_p, inputs.top_k)
        self.logits = logits
        if self.want & {"prob", "margin", "entropy"}:
            self.prob = logits.softmax(-1)

    def statistics(self, margin: Tensor, entropy: Tensor) -> None:
        if "margin" in self.want:
            top = self.prob.topk(min(2, self.prob.shape[-1]), dim=-1).values
            margin.copy_(top[:, 0] - top[:, 1] if top.shape[1] == 2 else top[:, 0])
        if "entropy" in self.want:
            entropy.copy_((self.prob * torch.log(self.prob + 1e-10)).sum(-1).neg_())


def _finish(inputs: SampleInputs, group: _Group) -> dict[str, Tensor]:
    """The race within the chosen blocks, and the fields that follow from it, (r,)."""
    if inputs.greedy:
        winner = group.argmax % SAMPLE_BLOCK
    else:
        uniforms = token_uniforms(
            inputs.seed, inputs.step, group.row_keys, group.chosen, inputs.dtype
        )
        winner = run_race(group.weights, uniforms)
        if group.greedy is not None:
            winner = torch.where(group.greedy, group.argmax % SAMPLE_BLOCK, winner)
    bad = ~(group.total > 0)
    if inputs.check and bool(bad.any()):
        raise_bad_row(inputs, group.rows.start + int(bad.nonzero()[0, 0]))
    place = winner.unsqueeze(-1)
    weight = group.weights.gather(1, place)[:, 0]
    log_total = group.total.log()
    fields = {
        "log_prob": lambda: weight.log() - log_total,
        "logsumexp": lambda: group.peak + log_total,
        "argmax": lambda: group.argmax,
        "max_log_prob": lambda: -log_total,
        "entropy": lambda: group.entropy,
        "margin": lambda: group.margin,
        "prob": lambda: _picked(group.prob, place, weight / group.total),
        "raw_prob": lambda: _picked(group.raw_prob, place, weight / group.total),
    }
    result = {name: field() for name, field in fields.items() if name in inputs.want}
    result["token"] = group.chosen * SAMPLE_BLOCK + winner
    return {
        name: value.masked_fill(bad, float("nan") if value.is_floating_point() else -1)
        for name, value in result.items()
    }


def _picked(block: Tensor | None, place: Tensor, otherwise: Tensor) -> Tensor:
    return otherwise if block is None else block.gather(1, place)[:, 0]


def raise_bad_row(inputs: SampleInputs, row: int) -> None:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(row), inputs.leading or (1,)))
    heads = {"logits": inputs.head, "guidance[0]": inputs.unconditional}
    for name, head in heads.items():
        if head is None:
            continue
        values = row_logits(head, slice(row, row + 1))[0].clone()
        if inputs.mask_id is not None:
            values[inputs.mask_id] = NEG_INF
        for kind, found in (("NaN", values.isnan()), ("+inf", values == float("inf"))):
            if bool(found.any()):
                column = int(found.nonzero()[0, 0])
                raise ValueError(f"{name} must not hold {kind}, got it in row {index} at {column}")
    if inputs.unconditional is not None:
        raise ValueError(
            f"guidance leaves no distribution in row {index}: every token is at -inf, or one is "
            "at -inf in guidance[0] alone"
        )
    raise ValueError(f"logits allow no token in row {index}: all are -inf or the mask_id")
