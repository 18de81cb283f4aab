"""The arguments of `sample`, checked, normalised and put into one record for every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check_bool,
    check_floating,
    check_int,
    check_int64,
    check_mask_id,
    check_number,
    check_same_device,
    check_same_shard,
    check_shape,
    check_values,
    check_within,
    describe,
)
from ..heads import Head, HeadLike, as_head
from ..passes.base import DrawOptions
from ..rng import Integer, check_generator, draw_seed

CONFIDENCE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Draw(NamedTuple):
    """What `sample` returns, each field of the leading shape of the logits; None if not wanted.

    "The drawn distribution" is the softmax of the logits after guidance, exclusion of `mask_id`,
    temperature, top-p and top-k, in this order. At temperature 0 it is taken at temperature 1,
    so that the statistics still tell how sure the model is. Logarithms are in nats.
    """

    token: Tensor
    """int64, the drawn token."""
    log_prob: Tensor | None = None
    """Log-probability of the token under the drawn distribution."""
    logsumexp: Tensor | None = None
    """logsumexp of the logits behind the drawn distribution."""
    argmax: Tensor | None = None
    """int64, the most probable token; the lowest id among equals."""
    max_log_prob: Tensor | None = None
    """Log-probability of `argmax`."""
    entropy: Tensor | None = None
    """Entropy of the drawn distribution."""
    margin: Tensor | None = None
    """Largest minus second largest probability of the drawn distribution."""
    prob: Tensor | None = None
    """Probability of the token under the drawn distribution."""
    raw_prob: Tensor | None = None
    """Probability of the token at temperature 1 without top-p and top-k (LLaDA's confidence)."""


STATISTICS = Draw._fields[1:]
CONFIDENCES = frozenset({"prob", "raw_prob", "margin", "entropy"})  # of `confidence_dtype`
PASS_FIELDS = frozenset({"argmax", "entropy", "margin", "raw_prob"})  # that passes are asked for


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """The checked arguments of `sample`. R is the number of rows, the product of the leading
    shape."""

    head: Head  # (..., V)
    unconditional: Head | None  # (..., V)
    guidance_scale: float | Tensor  # number, or (R,) work dtype
    temperature: float | Tensor  # number, or (R,) work dtype
    top_k: int | None  # None: no restriction, and so the next two
    top_p: float | None
    mask_id: int | None
    seed: Tensor  # () int64
    step: Tensor  # () int64
    row_keys: Tensor  # (R,) int64
    want: tuple[str, ...]  # of STATISTICS, in their order
    confidence: str | None  # name of a dtype
    check: bool
    budget_bytes: int | None

    def facts(self) -> dict[str, Any]:
        """What ranks that share the vocabulary have to agree about, beside integers of tensors."""
        names = ("guidance_scale", "temperature", "top_k", "top_p", "mask_id", "want")
        facts = {name: getattr(self, name) for name in names}
        facts = {n: "a tensor" if isinstance(v, Tensor) else v for n, v in facts.items()}
        budget = self.budget_bytes or self.head.budget_bytes
        shape, guided = tuple(self.head.shape[:-1]), self.unconditional is not None
        facts |= {"shape": shape, "guided": guided, "budget_bytes": budget}
        for head in self.heads:
            facts |= {f"guidance: {k}" if k in facts else k: v for k, v in head.facts().items()}
        return facts

    @property
    def rows(self) -> int:
        return self.head.shape[:-1].numel()

    @property
    def vocabulary(self) -> int:
        return self.head.shape[-1]

    @property
    def share(self) -> int:
        """The columns that memory is planned for: the same number on all ranks of a group."""
        return self.vocabulary if self.head.shard is None else self.head.shard.share

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the statistics."""
        return self.head.work_dtype

    @property
    def confidence_dtype(self) -> torch.dtype | None:
        return None if self.confidence is None else getattr(torch, self.confidence)

    @property
    def filtered(self) -> bool:
        return self.top_k is not None or self.top_p is not None

    @property
    def literal(self) -> bool:
        """The filters and confidences are those of whole rows in `confidence_dtype`."""
        asked = self.filtered or not CONFIDENCES.isdisjoint(self.want)
        return self.confidence is not None and asked

    @property
    def heads(self) -> list[Head]:
        return [self.head] if self.unconditional is None else [self.head, self.unconditional]

    def options(self) -> DrawOptions:
        """What the passes are asked where they draw from the logits of the heads themselves."""
        return DrawOptions(
            mask_id=self.mask_id,
            seed=self.seed,
            step=self.step,
            temperature=self.temperature,
            guidance=self.guidance_scale,
            wanted=frozenset(self.want) & PASS_FIELDS,
        )

    def result_dtype(self, name: str) -> torch.dtype:
        if name in ("token", "argmax"):
            return torch.int64
        return (name in CONFIDENCES and self.confidence_dtype) or self.dtype


def prepare_request(
    logits: HeadLike,
    *,
    temperature: float | Tensor,
    top_k: int | None,
    top_p: float | None,
    guidance: tuple[HeadLike, float | Tensor] | None,
    mask_id: int | None,
    seed: Integer | None,
    step: Integer,
    row_keys: Tensor | None,
    generator: torch.Generator | None,
    want: str | Iterable[str],
    confidence_dtype: torch.dtype | None,
    check: bool | None,
    budget_bytes: int | None,
) -> SampleRequest:
    """Check the arguments of `sample` and normalise them; see there for their meaning."""
    head = as_head(logits, "logits")
    vocabulary = head.vocabulary
    if vocabulary < 1:
        raise ValueError(f"logits must have at least one column, got shape {tuple(head.shape)}")
    heat = _per_row(temperature, "temperature", head, minimum=0.0)
    limits = torch.finfo(head.work_dtype)
    if isinstance(heat, float) and heat and not limits.tiny <= heat <= limits.max:
        raise ValueError(
            f"temperature must be 0 or between {limits.tiny:.1e} and {limits.max:.1e} for logits "
            f"of {head.dtype}, got {heat}"
        )
    unconditional: Head | None = None
    scale: float | Tensor = 0.0
    if guidance is not None:
        unconditional, scale = _prepare_guidance(guidance, head)
    mask_id = check_mask_id(mask_id, vocabulary)
    if top_k is not None:
        check_int(top_k, "top_k", minimum=1)
        top_k = top_k if top_k < vocabulary else None
    if top_p is not None:
        check_within(top_p, "top_p", "(0, 1]")
        top_p = float(top_p) if top_p < 1.0 else None
    if confidence_dtype is not None and confidence_dtype not in CONFIDENCE_DTYPES:
        known = ", ".join(str(dtype) for dtype in CONFIDENCE_DTYPES)
        raise ValueError(f"confidence_dtype must be None or one of {known}, got {confidence_dtype}")
    if confidence_dtype is not None and head.shard is not None:
        raise ValueError("confidence_dtype needs whole rows: it must be None for a shard of logits")
    if budget_bytes is not None:
        check_int(budget_bytes, "budget_bytes", minimum=1)
    if check is not None:
        check_bool(check, "check")
    rows = head.shape[:-1].numel()
    if row_keys is None:
        row_keys = torch.arange(rows, device=head.device)
    else:
        check_int64(row_keys, "row_keys")
        check_shape(row_keys, "row_keys", "the leading shape of logits", head.shape[:-1])
        check_same_device(row_keys, "row_keys", head, "logits")
    greedy = isinstance(heat, float) and heat == 0.0
    return SampleRequest(
        head=head,
        unconditional=unconditional,
        guidance_scale=scale,
        temperature=heat,
        top_k=top_k,
        top_p=top_p,
        mask_id=mask_id,
        seed=_prepare_seed(seed, generator, head.device, greedy),
        step=_prepare_integer(step, "step", head.device),
        row_keys=row_keys.reshape(-1),
        want=_prepare_want(want),
        confidence=None if confidence_dtype is None else str(confidence_dtype).split(".")[1],
        check=head.device.type == "cpu" if check is None else check,
        budget_bytes=budget_bytes,
    )


def _per_row(
    value: Any, name: str, head: Head, *, minimum: float = float("-inf")
) -> float | Tensor:
    """A number, or a tensor of the leading shape (or one number) as (R,) in the compute dtype."""
    if not isinstance(value, Tensor):
        check_number(value, name, minimum=minimum)
        return float(value)
    check_floating(value, name)
    check_same_device(value, name, head, "logits")
    leading = head.shape[:-1]
    if value.ndim:
        check_shape(value, name, "the leading shape of logits", leading)
    condition = value.isfinite()
    bound = ""
    if minimum != float("-inf"):
        condition, bound = condition & (value >= minimum), f" and at least {minimum:g}"
    check_values(condition, f"{name} must be finite{bound}", value)
    return value.detach().to(head.work_dtype).expand(leading).reshape(-1)


def _prepare_guidance(guidance: Any, head: Head) -> tuple[Head, float | Tensor]:
    if not isinstance(guidance, (tuple, list)) or len(guidance) != 2:
        raise TypeError(
            f"guidance must be a pair (unconditional logits, scale), got {describe(guidance)}"
        )
    unconditional = as_head(guidance[0], "guidance[0]")
    check_shape(unconditional, "guidance[0]", "the shape of logits", head.shape)
    check_same_shard(unconditional, "guidance[0]", head, "logits")
    check_same_device(unconditional, "guidance[0]", head, "logits")
    return unconditional.within(head.work_dtype), _per_row(guidance[1], "guidance[1]", head)


def _prepare_seed(
    seed: Any, generator: torch.Generator | None, device: torch.device, greedy: bool
) -> Tensor:
    check_generator(generator)
    if seed is None and not greedy:
        return draw_seed(generator, device)
    if seed is not None and generator is not None:
        raise ValueError("seed and generator cannot both be given: a generator draws the seed")
    return _prepare_integer(0 if seed is None else seed, "seed", device)


def _prepare_integer(value: Any, name: str, device: torch.device) -> Tensor:
    """() int64 on the device, without a sync; ints are taken modulo 2^64."""
    if isinstance(value, Tensor):
        check_int64(value, name)
        check_shape(value, name, "a 0-dimensional tensor", ())
        if value.device != device and value.device.type != "cpu":
            raise ValueError(f"{name} must be on {device} or the CPU, got {value.device}")
        if value.device == device or torch.compiler.is_compiling():
            return value.to(device)
        value = int(value)  # a tensor on the CPU
    value = (check_int(value, name) + (1 << 63)) % (1 << 64) - (1 << 63)
    # Filled in by a kernel: a copy from pageable memory would wait for the device.
    return torch.full((), value, dtype=torch.int64, device=device)


def _prepare_want(want: Any) -> tuple[str, ...]:
    if want == "all":
        return STATISTICS
    names = (want,) if isinstance(want, str) else tuple(want)
    for name in names:
        if name not in STATISTICS:
            known = ", ".join(repr(known) for known in STATISTICS)
            raise ValueError(f"want must hold names out of {known}, or be 'all', got {name!r}")
    return tuple(name for name in STATISTICS if name in names)
