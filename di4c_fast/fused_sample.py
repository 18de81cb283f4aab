"""The triton backend of `sample`: a custom op around the kernels of `kernels/row_draw.py`.

Shapes: R rows, V vocabulary, C hidden width.

Plain logits, a linear head and a logistic head go straight into the op `di4c_fast::sample_rows`:
one read of each row, the linear head multiplied chunk by chunk, the bins of the logistic one in
registers only. What the kernels do not know is first turned into logits of a group of rows by
tensor operations, and the op then draws from those:

* top-p, top-k, and the confidences of `confidence_dtype`, by the operations of the torch backend;
* heads of other kinds, logistic heads with eps = 0, logits that are strided along V, and leading
  dimensions that no three strides describe.

Logits in fp64, and rows of more than 2^19 columns, go to the torch backend: the kernels compute in
fp32, and hold one number per block of a row in registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from . import streaming_sample
from .checks import check_values
from .draw.filters import NEG_INF, filter_scaled_, guide
from .draw.request import SampleInputs
from .fused import on_device_of
from .fused_heads import LINEAR, LOGISTIC, TENSOR, HeadSpec, padded
from .heads import Head, LinearHead, LogisticHead, TensorHead
from .kernels.triton.operands import Operand, logistic_operand, tensor_operand
from .kernels.triton.row_draw import MAX_VOCABULARY, Results, Rows, Wanted, row_draw, scratch_bytes
from .kernels.triton.tuning import launch_parameters
from .rng import Integer

__all__ = ["sample_rows"]

_CONFIDENCES = frozenset({"prob", "raw_prob", "margin", "entropy"})
_COPIES = 4  # what filters and confidences hold of a group: its logits in fp32 and as much again


def sample_rows(inputs: SampleInputs) -> dict[str, Tensor]:
    """The triton backend of `sample`: the token and the wanted fields, each (R,)."""
    if inputs.dtype == torch.float64 or inputs.vocabulary > MAX_VOCABULARY:
        return streaming_sample.sample_rows(inputs)
    heads = [head for head in (inputs.head, inputs.unconditional) if head is not None]
    literal = inputs.confidence_dtype is not None and bool(
        inputs.filtered or inputs.want & _CONFIDENCES or inputs.unconditional is not None
    )
    if inputs.filtered or literal:
        fields = _in_groups(inputs, heads, _draw_prepared)
    elif not _direct(heads):
        fields = _in_groups(inputs, heads, _draw_logits)
    else:
        fields = _draw(inputs, slice(0, inputs.rows), heads)
    _check(inputs, fields["token"])
    return {name: fields[name] for name in ("token", *inputs.want)}


def _check(inputs: SampleInputs, token: Tensor) -> None:
    if not inputs.check:
        return
    bad = token < 0
    if torch.compiler.is_compiling():
        check_values(~bad, "logits hold NaN or +inf, or allow no token in a row")
    elif bool(bad.any()):
        streaming_sample.raise_bad_row(inputs, int(bad.nonzero()[0, 0]))


def _direct(heads: list[Head]) -> bool:
    """Whether the op takes these heads as they are."""
    strides = []
    for head in heads:
        if isinstance(head, TensorHead):
            logits = head.logits()
            if logits.stride(-1) != 1 and logits.shape[-1] > 1:
                return False
            strides.append(logits.stride()[:-1])
        elif isinstance(head, LogisticHead):
            if head.eps == 0.0:
                return False
            strides.append(head.mu.stride())
        elif not isinstance(head, LinearHead):
            return False
    return _three_strides(heads[0].shape[:-1], strides) is not None


def _three_strides(
    shape: torch.Size | tuple[int, ...], strides: list[tuple[int, ...]]
) -> tuple[tuple[int, int, int], list[tuple[int, int, int]]] | None:
    """Leading dimensions as three at most: their sizes, and the strides of each tensor.

    Neighbouring dimensions are one where every tensor steps through them evenly. None if more than
    three remain.

    >>> _three_strides((2, 3, 4, 5), [(60, 20, 5, 1)])
    ((1, 1, 120), [(0, 0, 1)])
    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        even = all(
            step and step[-1] == stride[axis] * size
            for step, stride in zip(steps, strides, strict=True)
        )
        if sizes and even:
            sizes[-1] *= size
            for step, stride in zip(steps, strides, strict=True):
                step[-1] = stride[axis]
        else:
            sizes.append(size)
            for step, stride in zip(steps, strides, strict=True):
                step.append(stride[axis])
    if len(sizes) > 3:
        return None
    missing = 3 - len(sizes)
    first, second, third = [1] * missing + sizes
    padded_steps = [(*[0] * missing, *step) for step in steps]
    return (first, second, third), [(step[0], step[1], step[2]) for step in padded_steps]


# Groups of rows -------------------------------------------------------------------------------


def _in_groups(
    inputs: SampleInputs,
    heads: list[Head],
    draw: Callable[[SampleInputs, slice, list[Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    budget = _budget(inputs)
    size = budget // (inputs.vocabulary * inputs.dtype.itemsize * (len(heads) + _COPIES - 1))
    size = max(streaming_sample.MIN_GROUP_ROWS, size)
    starts = range(0, inputs.rows, size) or [0]
    groups = []
    for begin in starts:
        rows = slice(begin, min(begin + size, inputs.rows))
        logits = [streaming_sample.row_logits(head, rows).contiguous() for head in heads]
        groups.append(draw(inputs, rows, logits))
    return {name: torch.cat([group[name] for group in groups]) for name in groups[0]}


def _budget(inputs: SampleInputs) -> int:
    budget = inputs.budget_bytes or getattr(inputs.head, "budget_bytes", None)
    if budget is None:
        on_cpu = inputs.head.device.type == "cpu"
        budget = streaming_sample.BUDGET_CPU if on_cpu else streaming_sample.BUDGET_GPU
    return budget


def _draw_logits(inputs: SampleInputs, rows: slice, logits: list[Tensor]) -> dict[str, Tensor]:
    return _draw(inputs, rows, [TensorHead(tensor) for tensor in logits])


def _draw_prepared(inputs: SampleInputs, rows: slice, given: list[Tensor]) -> dict[str, Tensor]:
    """Draw from logits (r, V) that filters and temperature have been applied to here."""
    want, vocabulary = inputs.want, inputs.vocabulary
    temperature, scale = (
        value[rows] if isinstance(value, Tensor) else value
        for value in (inputs.effective_temperature(), inputs.guidance_scale)
    )
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    logits = given[0]
    if len(given) == 2:
        logits = guide(logits, given[1], scale, inputs.confidence_dtype or inputs.dtype)
    peak = streaming_sample.row_peak(logits, inputs.mask_id).to(inputs.dtype)
    buffer = torch.empty(
        logits.shape[0], padded(vocabulary), dtype=inputs.dtype, device=logits.device
    )
    columns = buffer[:, :vocabulary]
    streaming_sample.subtract(logits, peak, columns)
    if inputs.mask_id is not None:
        columns[:, inputs.mask_id] = NEG_INF
    raw_total = None
    if "raw_prob" in want and inputs.confidence_dtype is None:
        raw_total = columns.logsumexp(-1, keepdim=True)
    literal = None
    if inputs.confidence_dtype is not None and (inputs.filtered or want & _CONFIDENCES):
        literal = streaming_sample.LiteralConfidence(inputs, logits, temperature)
    if inputs.tempered:
        columns.div_(temperature)
    if inputs.filtered and literal is not None:
        columns.masked_fill_(literal.logits == NEG_INF, NEG_INF)
    elif inputs.filtered:
        filter_scaled_(columns, inputs.top_p, inputs.top_k)

    heat = inputs.temperature
    if isinstance(heat, Tensor):
        heat = (heat[rows] != 0.0).to(inputs.dtype)
    elif heat != 0.0:
        heat = 1.0
    simple = dataclasses.replace(
        inputs,
        unconditional=None,
        mask_id=None,
        temperature=heat,
        want=want - {"raw_prob"} if literal is None else want - _CONFIDENCES,
    )
    fields = _draw(simple, rows, [TensorHead(columns)], temperatures_of_rows=True)
    if "logsumexp" in fields:
        fields["logsumexp"] = fields["logsumexp"] + (peak / temperature)[:, 0]
    bad = fields["token"] < 0
    place = fields["token"].clamp_min(0).unsqueeze(-1)
    if raw_total is not None:
        raw = (logits.gather(1, place).to(inputs.dtype) - peak - raw_total).exp()
        fields["raw_prob"] = raw[:, 0]
    if literal is not None:
        rows_of = torch.empty(2, len(bad), dtype=inputs.confidence_dtype, device=bad.device)
        literal.statistics(rows_of[0], rows_of[1])
        chosen = {"margin": rows_of[0], "entropy": rows_of[1]}
        if literal.raw_prob is not None:
            chosen["raw_prob"] = literal.raw_prob.gather(1, place)[:, 0]
        if "prob" in want:
            chosen["prob"] = literal.prob.gather(1, place)[:, 0]
        for name in want & _CONFIDENCES:
            fields[name] = chosen[name]
    return {
        name: value.masked_fill(bad, float("nan") if value.is_floating_point() else -1)
        for name, value in fields.items()
    }


# The op ---------------------------------------------------------------------------------------


def _draw(
    inputs: SampleInputs, rows: slice, heads: list[Head], *, temperatures_of_rows: bool = False
) -> dict[str, Tensor]:
    """Token and wanted fields of some rows, whose heads are `heads`."""
    device = inputs.head.device
    temperature, scale = inputs.temperature, inputs.guidance_scale
    if isinstance(temperature, Tensor) and not temperatures_of_rows:
        temperature = temperature[rows]
    if isinstance(scale, Tensor):
        scale = scale[rows]
    gain = scale + 1
    raw = "raw_prob" in inputs.want and inputs.tempered
    wanted = Wanted(
        greedy=inputs.greedy,
        argmax="argmax" in inputs.want,
        entropy="entropy" in inputs.want,
        margin="margin" in inputs.want,
        raw=raw,
    )
    split = [_split_head(head) for head in heads]
    token, argmax, values = draw_rows(
        split[0][1],
        split[1][1] if len(split) == 2 else [],
        inputs.row_keys[rows].contiguous(),
        temperature if isinstance(temperature, Tensor) else None,
        gain if isinstance(gain, Tensor) else None,
        _integer(inputs.seed, device),
        _integer(inputs.step, device),
        1.0 if isinstance(temperature, Tensor) else temperature,
        1.0 if isinstance(gain, Tensor) else gain,
        -1 if inputs.mask_id is None else inputs.mask_id,
        _budget(inputs),
        ";".join(spec.encode() for spec, _ in split),
        _encode(wanted),
    )
    fields = dict(zip(wanted.values, values.unbind(), strict=True))
    fields |= {"token": token, "argmax": argmax}
    if not raw:
        fields["raw_prob"] = fields["prob"]
    return {name: fields[name] for name in ("token", *inputs.want)}


def _integer(value: Integer, device: torch.device) -> Tensor:
    """A seed or step as () int64 on the device, without a sync; ints are taken modulo 2^64."""
    if isinstance(value, Tensor):
        if value.device == device or torch.compiler.is_compiling():
            return value.to(device)
        value = int(value)  # a tensor on the CPU
    value = (value + (1 << 63)) % (1 << 64) - (1 << 63)
    # Filled in by a kernel: a copy from pageable memory would wait for the device.
    return torch.full((), value, dtype=torch.int64, device=device)


def _split_head(head: Head) -> tuple[HeadSpec, list[Tensor]]:
    """The spec and the tensors of a head: logits; mu, log_scale; hidden (R, C), weight[, bias[,
    position of every row]]."""
    if isinstance(head, LogisticHead):
        spec = HeadSpec(LOGISTIC, head.num_classes, head.eps, head.clamp)
        return spec, [head.mu.detach(), head.log_scale.detach()]
    if isinstance(head, LinearHead):
        tensors = [head.hidden.detach().reshape(-1, head.hidden.shape[-1]), head.weight.detach()]
        if head.bias is not None:
            tensors.append(head.bias.detach())
            if head.bias.ndim == 2:
                rows = torch.arange(tensors[0].shape[0], device=head.device)
                tensors.append(head.positions(rows))
        return HeadSpec(LINEAR), tensors
    return HeadSpec(TENSOR), [head.logits().detach()]


def _encode(wanted: Wanted) -> str:
    return " ".join(name for name, asked in dataclasses.asdict(wanted).items() if asked)


def _decode(text: str) -> Wanted:
    return Wanted(**dict.fromkeys(text.split(), True))


class _Rows:
    """The logits of the rows of one head, as an operand for all of them or for each chunk."""

    def __init__(self, spec: HeadSpec, tensors: list[Tensor]):
        self.spec, self.tensors = spec, tensors
        self.linear = spec.kind == LINEAR
        if self.linear:
            self.vocabulary = tensors[1].shape[0]
        elif spec.kind == LOGISTIC:
            self.vocabulary = spec.num_classes
            if tensors[0].stride() != tensors[1].stride():
                self.tensors = [tensor.contiguous() for tensor in tensors]
        else:
            self.vocabulary = tensors[0].shape[-1]
        self._buffer: Tensor | None = None

    @property
    def leading(self) -> torch.Size:
        whole = self.spec.kind == LOGISTIC
        return self.tensors[0].shape if whole else self.tensors[0].shape[:-1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the leading dimensions; those of a logistic head may have changed."""
        return self.tensors[0].stride()[: len(self.leading)]

    @property
    def bytes_per_row(self) -> int:
        return padded(self.vocabulary) * self.tensors[0].element_size() if self.linear else 0

    def operand(
        self, begin: int, end: int, sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> Operand:
        """For rows begin .. end - 1; a linear head computes them into a buffer of its own."""
        if self.linear:
            return _slot_operand(self._products(begin, end))
        if self.spec.kind == LOGISTIC:
            mu, log_scale = (tensor.as_strided(sizes, strides) for tensor in self.tensors)
            spec = self.spec
            return logistic_operand(mu, log_scale, spec.num_classes, spec.eps, spec.clamp)
        logits = self.tensors[0]
        return tensor_operand(logits.as_strided((*sizes, self.vocabulary), (*strides, 1)))

    def _products(self, begin: int, end: int) -> Tensor:
        hidden, weight, *bias = self.tensors
        hidden, weight = hidden[begin:end], weight.to(hidden.dtype)
        if self._buffer is None:
            self._buffer = hidden.new_empty(end - begin, padded(self.vocabulary))
        out = self._buffer[: end - begin, : self.vocabulary]
        if not bias:
            return torch.mm(hidden, weight.t(), out=out)
        offset = bias[0].to(hidden.dtype)
        if len(bias) == 1:
            return torch.addmm(offset, hidden, weight.t(), out=out)
        out.copy_(offset[bias[1][begin:end]])
        return out.addmm_(hidden, weight.t())


def _slot_operand(logits: Tensor) -> Operand:
    """Logits (r, V) addressed by slot."""
    strides = (logits.stride(0), 0, 0, 0)
    return Operand(logits, logits, 1, logits.shape[-1], strides)


@torch.library.custom_op("di4c_fast::sample_rows", mutates_args=())
def draw_rows(
    conditional: list[Tensor],
    unconditional: list[Tensor],
    row_keys: Tensor,
    temperatures: Tensor | None,
    gains: Tensor | None,
    seed: Tensor,
    step: Tensor,
    temperature: float,
    gain: float,
    mask_id: int,
    budget_bytes: int,
    specs: str,
    wanted: str,
) -> list[Tensor]:
    """Token (R,), argmax (R,) or (0,), values (fields, R) fp32; see `row_draw`."""
    asked = _decode(wanted)
    results = _results(row_keys, asked)
    count = row_keys.shape[0]
    if count == 0:
        return [results.token, results.argmax, results.values]
    given = [conditional, unconditional] if unconditional else [conditional]
    decoded = [HeadSpec.decode(text) for text in specs.split(";")]
    sources = [_Rows(spec, tensors) for spec, tensors in zip(decoded, given, strict=True)]
    placed = [source for source in sources if not source.linear]
    sizes: tuple[int, int, int] = (1, 1, count)
    strides: list[tuple[int, int, int]] = []
    if placed:
        found = _three_strides(placed[0].leading, [source.strides for source in placed])
        if found is None:  # log_scale has other strides than mu
            for source in placed:
                source.tensors = [tensor.contiguous() for tensor in source.tensors]
            found = _three_strides(placed[0].leading, [source.strides for source in placed])
        assert found is not None
        sizes, strides = found
    with on_device_of(row_keys):
        chunk = max(1, launch_parameters(row_keys.device).sample_scratch_bytes)
        chunk //= scratch_bytes(sources[0].vocabulary, asked)
        linear_bytes = sum(source.bytes_per_row for source in sources)
        if linear_bytes:
            least = streaming_sample.MIN_GROUP_ROWS
            chunk = min(chunk, max(least, budget_bytes // linear_bytes))
        chunk = max(1, min(chunk, count))
        for begin in range(0, count, chunk):
            end = min(begin + chunk, count)
            step_of = iter(strides)
            operands = [
                source.operand(begin, end, sizes, () if source.linear else next(step_of))
                for source in sources
            ]
            row_draw(
                operands[0],
                operands[1] if len(operands) == 2 else None,
                Rows(begin, end - begin, sizes[1:]),
                None if mask_id < 0 else mask_id,
                temperature=temperature if temperatures is None else temperatures,
                gain=gain if gains is None else gains,
                row_keys=row_keys,
                seed=seed,
                step=step,
                wanted=asked,
                results=results,
            )
    return [results.token, results.argmax, results.values]


def _results(row_keys: Tensor, wanted: Wanted) -> Results:
    rows = row_keys.shape[0]
    return Results(
        torch.empty_like(row_keys),
        row_keys.new_empty(rows if wanted.argmax else 0),
        row_keys.new_empty(len(wanted.values), rows, dtype=torch.float32),
    )


@draw_rows.register_fake
def _(*args: object) -> list[Tensor]:
    row_keys, wanted = args[2], args[12]
    assert isinstance(row_keys, Tensor)
    assert isinstance(wanted, str)
    results = _results(row_keys, _decode(wanted))
    return [results.token, results.argmax, results.values]
