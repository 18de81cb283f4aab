"""The loop of every sampler: arguments, λ, prompt, calls of the model, draws, hooks.

A sampler is a `Rule`: which rows to draw at a step, and what becomes of the draws. All else is
here and happens once. Shapes: B sequences, D positions, R rows that a step draws, V classes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..checks import (
    check_bool,
    check_int64,
    check_same_device,
    check_shape,
    check_token_range,
    check_values,
    describe,
)
from ..draw.api import sample
from ..draw.request import Draw
from ..heads import Head, HeadLike
from ..models.call import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    repeat_context,
    select_context,
)
from .arguments import check_counts, check_latent, check_size, device_of, fill_prompt, seed_of

# Step numbers of the counter-based generator. λ and tokens of step k have k (in two streams),
# what a rule draws besides has RULE + k, and what is drawn before the first step has START.
RULE, START = 2**30, 2**32 - 1
_ROWS_BYTES = 64 << 20  # of logits at a time, where the head does not say


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The unconditional logits: of a second half of the call, or of `Run.other` without λ."""

    scale: float  # w of (1 + w)·conditional − w·unconditional
    tokens: Tensor  # (B, D)
    context: Context
    apart: bool = False  # ask `Run.other`


@dataclasses.dataclass(frozen=True)
class Visit:
    """One step: what the model is asked, and which rows are drawn."""

    number: int  # from 0 on: which λ, which random numbers
    time: float | None  # None: the share of masked positions of each sequence
    rows: Tensor | None  # (R,) int64, b·D + d in ascending order; None: all; empty: no call
    sequences: Tensor | None = None  # int64, those with such rows, ascending; None: all
    greedy: bool = False  # the argmax in place of a draw
    want: tuple[str, ...] = ()  # statistics of the draw
    guidance: Guidance | None = None
    teacher: bool = False  # ask `Run.other` in place of the model, without λ
    tries: Tensor | None = None  # (B·n, L): n rows in place of each sequence, with these λ


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a visit brought: the draw of its rows, and the heads that it came from."""

    draw: Draw
    head: Head  # (R, V)
    guidance: tuple[Head, float] | None


class Rule(abc.ABC):
    """What makes a sampler, in two methods."""

    options: Mapping[str, Any] = MappingProxyType({})  # of every draw, as of `di4c_fast.sample`
    shift = False  # position d takes its logits from row d − 1, position 0 from row 0
    banned: Tensor | None = None  # ids that are never drawn

    @abc.abstractmethod
    def visits(self, run: Run) -> Iterator[Visit]:
        """The steps, one after another; `run.tokens` holds the tokens as they then are."""

    def fill(self, run: Run, visit: Visit, answer: Answer) -> Tensor:
        """The tokens (B, D) after a visit, as a new tensor: every row takes its draw."""
        return run.put(visit, answer.draw.token)


class Run:
    """The arguments of a run, checked as they are set, and its tokens (B, D) as they are."""

    def __init__(self, model: Any, shape: Any, device: Any = None, given: Any = None):
        """given: tokens whose device serves where `device` is None."""
        self.batch, self.positions = check_size(shape)
        check_callable(model, "model")
        self.model: Callable[..., HeadLike] = model
        self.other: Callable[..., HeadLike] | None = None
        size = (self.batch, self.positions)
        self.tokens = torch.empty(size, dtype=torch.int64, device=device_of(device, given, model))
        self.device = self.tokens.device

    def set_seed(self, seed: Any, generator: Any, first_sequence: Any) -> None:
        check_counts([("first_sequence", first_sequence, 0)])
        self.seed, self.first_sequence = seed_of(seed, generator), first_sequence
        rows = torch.arange(self.batch * self.positions, device=self.device)
        self.keys = rows + first_sequence * self.positions

    def set_vocabulary(self, vocab_size: Any, ids: dict[str, int], unless: str = "") -> None:
        """ids: those in the vocabulary by their argument; unless: what to do if they are not."""
        self.vocab_size: int | None = vocab_size
        self.ids, self.unless = ids, unless
        if vocab_size is not None:
            check_counts([("vocab_size", vocab_size, 2 if ids else 1)])
            self._check_ids("vocab_size", f" = [0, {vocab_size})")

    def set_tokens(self, mask_id: int, prompt: Any, context: Any) -> None:
        """Masks behind the known tokens of the prompt; what the model is given besides."""
        self.mask_id = mask_id
        self.tokens.fill_(mask_id)
        self._set_prompt(prompt, context)

    def _set_prompt(self, prompt: Any, context: Any) -> None:
        self.top_known = 0
        if prompt is not None:
            self.top_known = fill_prompt(self.tokens, prompt, self.mask_id, self.vocab_size)
        self.context = check_context(context, self.batch, self.device)

    def set_start(self, start: Any, name: str, vocab_size: int, prompt: Any, context: Any) -> None:
        """The same for a process without masks, whose start is the argument `name`."""
        check_int64(start, name)
        check_shape(start, name, "B, D", self.tokens.shape)
        check_same_device(start, name, self.tokens, "the samples")
        check_token_range(start, name, vocab_size)
        self.tokens.copy_(start)
        self.mask_id = -1  # no token is
        self._set_prompt(prompt, context)

    def set_latents(self, latent: Any, latent_dim: Any, calls: int, letter: str = "S") -> None:
        """λ of every call: none, (B, L) or (calls, B, L) as passed, or drawn on the CPU.

        Drawn, they are a function of (seed, call, number of the sequence).
        """
        check_counts([("latent_dim", latent_dim, 0)])
        if latent is not None:
            check_latent(latent, latent_dim, calls, self.batch, self.device, letter)
        elif latent_dim:
            call = torch.arange(calls).repeat_interleave(self.batch)
            drawn = rng.uniform(self.seed, call, self.sequence_keys().repeat(calls), latent_dim)
            latent = drawn.view(calls, self.batch, latent_dim).to(self.device)
        self.latent = latent

    def set_hooks(self, callback: Any, history: Any, project_fn: Any = None) -> None:
        for name, hook in (("project_fn", project_fn), ("callback", callback)):
            if hook is not None:
                check_callable(hook, name)
        if history is not None and not isinstance(history, list):
            raise TypeError(f"history must be a list to fill or None, got {describe(history)}")
        self.callback, self.history, self.project_fn = callback, history, project_fn

    # What a rule asks

    def sequence_keys(self, device: torch.device | str = "cpu") -> Tensor:
        """(B,) the numbers of the sequences."""
        return torch.arange(self.batch, device=device) + self.first_sequence

    def masked(self) -> Tensor:
        """(B, D) bool."""
        return torch.eq(self.tokens, self.mask_id)

    def rows_of(self, wanted: Tensor, count: int) -> Tensor:
        """The flat numbers of the `count` True elements of `wanted` (B, D), without a sync."""
        if wanted.device.type == "cpu":
            return wanted.flatten().nonzero()[:, 0]
        return first_true(wanted.flatten(), count)

    def put(self, visit: Visit, values: Tensor) -> Tensor:
        """The tokens with `values` in the rows of the visit."""
        if visit.rows is None:
            return values
        # Not in place: the model may have kept the tensor it was given.
        return self.tokens.flatten().index_copy(0, visit.rows, values).view_as(self.tokens)

    def uniform(self, visit: Visit, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(R, count) numbers of the rule's own for the rows of the visit."""
        keys = self.keys if visit.rows is None else self.keys[visit.rows]
        return rng.uniform(self.seed, RULE + visit.number, keys, count, dtype=dtype)

    # The loop

    def loop(self, rule: Rule, total: int) -> Tensor:
        """Take the steps of the rule; `total` is what the callback is told."""
        self._project()
        if self.history is not None:
            self.history.append(self.tokens)
        with evaluation_mode(self.model, self.other):
            for visit in rule.visits(self):
                if visit.rows is None or visit.rows.numel():
                    # Kept until the next: memory that is freed here comes back as fresh pages.
                    answer = self._ask(rule, visit)
                    self.tokens = rule.fill(self, visit, answer)
                self._project()
                if self.history is not None:
                    self.history.append(self.tokens)
                if self.callback is not None:
                    self.callback(visit.number + 1, total, self.tokens)
        return self.tokens

    def _ask(self, rule: Rule, visit: Visit) -> Answer:
        head, guidance = self._heads(visit, self._local_rows(rule, visit))
        if rule.banned is not None:
            head = head.exclude(rule.banned)
        keys = None
        if visit.tries is None:
            keys = self.keys.view_as(self.tokens) if visit.rows is None else self.keys[visit.rows]
        options = dict(rule.options) | ({"temperature": 0.0} if visit.greedy else {})
        draw = sample(
            head,
            guidance=guidance,
            seed=self.seed,
            step=visit.number,
            row_keys=keys,
            want=visit.want,
            **options,
        )
        return Answer(draw, head, guidance)

    def _local_rows(self, rule: Rule, visit: Visit) -> Tensor | None:
        """The rows by their numbers in the call of the model."""
        rows = visit.rows
        if rows is None:
            return None
        position = rows % self.positions
        if visit.sequences is not None:
            number = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
            number[visit.sequences] = torch.arange(len(visit.sequences), device=self.device)
            rows = number[rows // self.positions] * self.positions + position
        return rows - (position > 0).long() if rule.shift else rows

    def _heads(self, visit: Visit, rows: Tensor | None) -> tuple[Head, tuple[Head, float] | None]:
        """The wanted rows of the head, and `guidance` for `sample`."""
        guidance, context = visit.guidance, self.context
        some = visit.sequences
        if some is not None and len(some) == self.batch:
            some = None

        def cut(values: Tensor) -> Tensor:
            return values if some is None else values[some]

        if some is not None:
            context = select_context(context, some)
        tokens = cut(self.tokens)
        lam = self.latent
        if lam is not None:
            lam = cut(lam if lam.ndim == 2 else lam[visit.number])
        if visit.tries is not None:
            count = len(visit.tries) // self.batch if self.batch else 1
            tokens, lam = tokens.repeat_interleave(count, dim=0), visit.tries
            context = repeat_context(context, count)
        if visit.teacher:
            head = self._call("teacher", visit, tokens, None, context)
        elif guidance is None or guidance.apart:
            head = self._call("model", visit, tokens, lam, context)
        if guidance is None:
            return (head if rows is None else head.take(rows)), None
        assert rows is not None
        others = cut(guidance.tokens)
        without = {key: cut(value) for key, value in guidance.context.items()}
        if guidance.apart:
            other = self._call("guidance_model", visit, others, None, without)
            return head.take(rows), (other.take(rows), guidance.scale)
        both = {key: torch.cat([value, without[key]]) for key, value in context.items()}
        lam = None if lam is None else torch.cat([lam, lam])
        head = self._call("model", visit, torch.cat([tokens, others]), lam, both)
        return head.take(rows), (head.take(rows + tokens.numel()), guidance.scale)

    def _call(
        self, name: str, visit: Visit, tokens: Tensor, lam: Tensor | None, context: Context
    ) -> Head:
        model = self.model if name == "model" else self.other
        assert model is not None
        if visit.time is None:
            t = torch.eq(tokens, self.mask_id).float().mean(1)
        else:
            t = torch.full((len(tokens),), visit.time, dtype=torch.float32, device=self.device)
        head = call_model(model, name, tokens, t, lam, context, self.vocab_size)
        if self.vocab_size is None:
            # What could not be checked before; later calls must have as many classes.
            self.vocab_size = head.shape[-1]
            self._check_ids("V", f" = [0, {self.vocab_size}) of model")
            if self.top_known >= self.vocab_size:
                raise ValueError(
                    f"prompt must hold token ids in [0, V) = [0, {self.vocab_size}) of model, "
                    f"got {self.top_known}"
                )
        return head

    def _check_ids(self, bound: str, detail: str) -> None:
        size = self.vocab_size
        assert size is not None
        if self.ids and size < 2:
            raise ValueError(f"model must return at least 2 classes with a mask_id, got {size}")
        for name, value in self.ids.items():
            if value >= size:
                raise ValueError(
                    f"{name} must be in [0, {bound}){detail}{self.unless}, got {value}"
                )

    def _project(self) -> None:
        if self.project_fn is None:
            return
        # A copy, since many projections write into their argument.
        projected, name = self.project_fn(self.tokens.clone()), "the output of project_fn"
        check_int64(projected, name)
        if projected.shape != self.tokens.shape:
            raise ValueError(
                f"project_fn must return tokens of shape (B, D) = {tuple(self.tokens.shape)}, "
                f"got {tuple(projected.shape)}"
            )
        check_same_device(projected, name, self.tokens, "its input")
        inside, bound = projected >= 0, "V"
        if self.vocab_size is not None:
            inside, bound = inside & (projected < self.vocab_size), str(self.vocab_size)
        check_values(inside, f"{name} must hold token ids in [0, {bound})", projected)
        self.tokens = projected


def first_true(wanted: Tensor, count: int) -> Tensor:
    """The numbers of the `count` True elements of a vector, without asking the device."""
    return torch.sort((~wanted).to(torch.uint8), stable=True).indices[:count]


def single_logits(head: Head, tokens: Tensor) -> Tensor:
    """The logit of one token (R,) per row of a head (R, V), in fp32, or fp64 for fp64 heads."""
    dtype = torch.promote_types(head.dtype, torch.float32)
    rows = torch.arange(len(tokens), device=tokens.device)
    # A head of one's own computes whole rows for them.
    size = (head.budget_bytes or _ROWS_BYTES) // (head.shape[-1] * dtype.itemsize)
    parts = [head.logits_at(some, tokens[some]).to(dtype) for some in rows.split(max(1, size))]
    return torch.cat(parts)


def moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype, each (n,), on the device, moved in one go."""
    if not tensors:
        return []
    return list(torch.cat(tensors).to(device).split([t.numel() for t in tensors]))


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        check_bool(value, name)
