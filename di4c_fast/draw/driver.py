"""The driver of `sample`: groups of rows under a budget, filters, the passes, the fields of `Draw`.

Shapes: R rows, r rows of a group, V vocabulary.

The passes draw from logits in memory. Logits that exist with one stride from row to row are drawn
in place, others are computed group by group into a buffer. Top-p, top-k, and everything that
`confidence_dtype` asks for, is done here for every backend: the passes then draw from what is left.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends, record
from ..checks import check_values
from ..groups import of_first_rank
from ..heads import Head
from ..passes import torch_draw
from ..passes.base import Drawn, DrawOptions, Operand, Visit, padded
from .filters import FIRST_LOOK, NEG_INF, filter_literal_, filter_scaled_, guide, row_peak
from .law import block_sums
from .request import CONFIDENCES, PASS_FIELDS, SampleRequest

MIN_GROUP_ROWS = 64  # so that the matrix products of a linear head stay efficient
BUDGET_CPU = 64 << 20  # bytes of the logits of a group
BUDGET_GPU = 128 << 20
_CHUNK_BYTES = 8 << 20  # of filtered logits on a CPU: they fit the caches
_COPIES = 3  # what filters and confidences hold of a group on a GPU: its logits this many times


def sample_rows(request: SampleRequest, backend: str) -> dict[str, Tensor]:
    """The token and the wanted fields, each (R,), of the passes of a backend."""
    name = backends.resolve(backend, request.head.device, request.dtype)
    encoded = record.encode(request)
    if encoded is None or not record.is_traced(encoded[0]):  # no op can take a head of one's own
        found = _run(request, name)
    else:
        found = sample_op(*encoded, name)
    return dict(zip(("token", *request.want), found, strict=True))


@torch.library.custom_op("di4c_fast::sample", mutates_args=())
def sample_op(tensors: list[Tensor], text: str, backend: str) -> list[Tensor]:
    """The token, then the wanted fields, of an encoded `SampleRequest`."""
    return _run(record.decode(SampleRequest, tensors, text), backend)


@sample_op.register_fake
def _(tensors: list[Tensor], text: str, backend: str) -> list[Tensor]:
    request = record.decode(SampleRequest, tensors, text)
    return [
        request.row_keys.new_empty(request.rows, dtype=request.result_dtype(name))
        for name in ("token", *request.want)
    ]


def _run(request: SampleRequest, backend: str) -> list[Tensor]:
    passes = backends.passes_for(backend, request.head.device, request.dtype)
    shard = request.head.shard
    if shard is not None:
        tensors = (request.row_keys, request.step)
        shard.agree(request.facts(), request.head.device, *tensors)
        seed, mask_id = of_first_rank(request.seed, shard.group), shard.column(request.mask_id)
        request = dataclasses.replace(request, seed=seed, mask_id=mask_id)
    rows, on_cpu = request.rows, request.head.device.type == "cpu"
    guided = request.confidence is not None and request.unconditional is not None
    prepared = request.filtered or request.literal or guided
    sources = [_Source(head, passes, prepared) for head in request.heads]
    size = _group_rows(request, sources, _COPIES if prepared and not on_cpu else 0)
    part = size
    if prepared and on_cpu:
        part = max(1, _CHUNK_BYTES // (request.share * request.dtype.itemsize))
    found, look, options = [], FIRST_LOOK, request.options()
    for begin in range(0, rows, size) if rows else (0,):
        end = min(begin + size, rows)
        operands = [source.rows(begin, end) for source in sources]
        for first in range(begin, end, part) if rows else (0,):
            last = min(first + part, end)
            given = [operand.part(first - begin, last - begin) for operand in operands]
            keys, asked = request.row_keys[first:last], options.of_rows(slice(first, last))
            if prepared:
                logits = [operand.logits[:, 0] for operand in given]
                fields, look = _draw_prepared(request, passes, logits, keys, asked, look)
            else:
                fields = _fields(request, _draw(request, passes, given, keys, asked), {})
            found.append(fields)
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


class _Source:
    """The logits of one head, group by group."""

    def __init__(self, head: Head, passes: Any, in_memory: bool):
        self.head, self.passes = head.detach(), passes
        self.operand = self.head.row_operand(None if in_memory else passes)
        if self.operand is None:
            self.head = self.head.prepared(widen=False)
        self.buffer: Tensor | None = None

    def rows(self, begin: int, end: int) -> Operand:
        """Rows begin .. end - 1, one for each slot; the first group is the largest."""
        vocabulary, rows = self.head.shape[-1], end - begin
        if self.operand is not None:
            return self.operand.part(begin, end)
        device = self.head.device
        if self.buffer is None:
            sizes = (rows, padded(vocabulary))
            self.buffer = torch.empty(sizes, dtype=self.head.chunk_dtype, device=device)
        out = self.buffer[:rows, :vocabulary]
        if rows:
            self.head.load(torch.arange(begin, end, device=device), out, self.passes)
        return Operand.of_chunk(out.unsqueeze(1))


def _group_rows(request: SampleRequest, sources: list[_Source], copies: int) -> int:
    """How many rows are worked on together; all of them if nothing has to be computed for them."""
    copies += sum(source.operand is None for source in sources)
    if request.head.shard is not None:  # all ranks draw the same rows together
        copies = len(sources)
    if copies == 0:
        return max(1, request.rows)
    budget = request.budget_bytes or request.head.budget_bytes
    if budget is None:
        budget = BUDGET_CPU if request.head.device.type == "cpu" else BUDGET_GPU
    bytes_per_row = request.share * request.dtype.itemsize * copies
    return max(MIN_GROUP_ROWS, budget // bytes_per_row)


def _draw(
    request: SampleRequest, passes: Any, given: list[Operand], keys: Tensor, options: DrawOptions
) -> Drawn:
    x, *y = given
    visit, shard = Visit(0, len(keys), max(1, len(keys))), request.head.shard
    arguments = (x, y[0] if y else None, visit, keys, options)
    return passes.draw(*arguments) if shard is None else torch_draw.draw(*arguments, shard)


_FORMULAS: dict[str, Callable[[Drawn], Any]] = {
    **{name: operator.attrgetter(name) for name in ("token", *PASS_FIELDS)},
    "log_prob": lambda drawn: drawn.log_weight - drawn.log_total,
    "logsumexp": lambda drawn: drawn.shift + drawn.log_total,
    "max_log_prob": lambda drawn: -drawn.log_total,
    "prob": lambda drawn: drawn.log_weight.exp() / drawn.total,
}


def _fields(request: SampleRequest, drawn: Drawn, others: dict[str, Tensor]) -> list[Tensor]:
    """The token and the wanted fields of `Draw`; `others` take the place of those drawn."""
    bad, found = drawn.token < 0, []
    for name in ("token", *request.want):
        value = others[name] if name in others else _FORMULAS[name](drawn)
        found.append(value.masked_fill(bad, float("nan") if value.is_floating_point() else -1))
    return found


def _draw_prepared(
    request: SampleRequest,
    passes: Any,
    given: list[Tensor],
    keys: Tensor,
    options: DrawOptions,
    look: int,
) -> tuple[list[Tensor], int]:
    """The fields of rows (r, V) that guidance, temperature and filters are applied to here."""
    dtype, vocabulary, mask_id = request.dtype, request.vocabulary, request.mask_id
    temperature, shard = options.temperature, request.head.shard
    left: float | Tensor = 0.0 if options.greedy else 1.0  # of the temperature, for the passes
    if isinstance(temperature, Tensor):
        left = (temperature != 0.0).to(dtype)
        temperature = torch.where(temperature == 0.0, 1.0, temperature).unsqueeze(-1)
    logits = given[0]
    if len(given) == 2:
        logits = guide(logits, given[1], options.guidance, request.confidence_dtype or dtype)
    peak = row_peak(logits, mask_id).to(dtype)
    if shard is not None:
        (peak,) = shard.maximum(peak)
    buffer = torch.empty(len(keys), padded(vocabulary), dtype=dtype, device=keys.device)
    columns = buffer[:, :vocabulary].copy_(logits).sub_(peak)
    if mask_id is not None:
        columns[:, mask_id] = NEG_INF
    literal = raw_total = None
    if request.literal:
        literal = _Literal(request, logits, temperature if options.tempered else None)
    elif "raw_prob" in request.want:
        raw_total = block_sums(columns.exp()).sum(-1)
        if shard is not None:
            (raw_total,) = shard.sum(raw_total)
    if options.tempered:
        columns.div_(temperature)
    if request.filtered and literal is not None:
        columns.masked_fill_(literal.logits == NEG_INF, NEG_INF)
    elif request.filtered:
        look = filter_scaled_(columns, request.top_p, request.top_k, look, shard)

    wanted = options.wanted - ({"raw_prob"} if literal is None else CONFIDENCES)
    simple = dataclasses.replace(options, mask_id=None, temperature=left, wanted=wanted)
    drawn = _draw(request, passes, [Operand.of_chunk(columns.unsqueeze(1))], keys, simple)
    moved = drawn.shift + (peak / (temperature if options.tempered else 1.0))[:, 0]
    drawn = dataclasses.replace(drawn, shift=moved)
    place = drawn.token.clamp_min(0).unsqueeze(-1)
    place = place if shard is None else shard.nearest(place)
    others = {}
    if literal is not None:
        others = literal.fields(request.want, place)
    elif raw_total is not None:
        weight = (logits.gather(1, place).to(dtype) - peak)[:, 0].exp()
        if shard is not None:
            weight = shard.from_owner(weight, drawn.token)
        others["raw_prob"] = weight / raw_total
    return _fields(request, drawn, others), look


class _Literal:
    """Filters and confidences by the operations of the repositories, on whole rows (r, V)."""

    def __init__(self, request: SampleRequest, logits: Tensor, temperature: float | Tensor | None):
        dtype = request.confidence_dtype
        assert dtype is not None
        logits = logits.to(dtype)
        if request.mask_id is not None:
            logits = logits.clone()
            logits[:, request.mask_id] = NEG_INF
        self.raw_prob = logits.softmax(-1) if "raw_prob" in request.want else None
        if temperature is not None:
            scale = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
            logits = logits / scale
        if request.filtered:
            logits = filter_literal_(logits.clone(), request.top_p, request.top_k)
        self.logits = logits

    def fields(self, want: tuple[str, ...], place: Tensor) -> dict[str, Tensor]:
        """The wanted confidences, (r,) each; place (r, 1) is the token."""
        found = {}
        if self.raw_prob is not None:
            found["raw_prob"] = self.raw_prob.gather(1, place)[:, 0]
        if not CONFIDENCES.isdisjoint(want):
            prob = self.logits.softmax(-1)
            found["prob"] = prob.gather(1, place)[:, 0]
        if "margin" in want:
            top = prob.topk(min(2, prob.shape[-1]), dim=-1).values
            found["margin"] = top[:, 0] - top[:, 1] if top.shape[1] == 2 else top[:, 0]
        if "entropy" in want:
            found["entropy"] = (prob * torch.log(prob + 1e-10)).sum(-1).neg_()
        return found


def check_rows(request: SampleRequest, token: Tensor) -> None:
    """Raise for rows that could not be drawn, if `check` asks for it: (R,)."""
    if not request.check:
        return
    bad = token < 0
    if torch.compiler.is_compiling():
        check_values(~bad, "logits hold NaN or +inf, or allow no token in a row")
    elif bool(bad.any()):
        _raise_bad_row(request, int(bad.nonzero()[0, 0]))


def _raise_bad_row(request: SampleRequest, row: int) -> None:
    leading = request.head.shape[:-1] or (1,)
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(row), leading))
    if request.head.shard is not None:  # on whichever rank it is
        raise ValueError(f"logits hold NaN or +inf, or allow no token, in row {index}")
    for name, head in zip(("logits", "guidance[0]"), request.heads, strict=False):
        values = head.detach().take(torch.tensor([row], device=head.device)).logits()[0].clone()
        if request.mask_id is not None:
            values[request.mask_id] = NEG_INF
        for kind, found in (("NaN", values.isnan()), ("+inf", values == float("inf"))):
            if bool(found.any()):
                column = int(found.nonzero()[0, 0])
                raise ValueError(f"{name} must not hold {kind}, got it in row {index} at {column}")
    if request.unconditional is not None:
        raise ValueError(
            f"guidance leaves no distribution in row {index}: every token is at -inf, or one is "
            "at -inf in guidance[0] alone"
        )
    raise ValueError(f"logits allow no token in row {index}: all are -inf or the mask_id")
