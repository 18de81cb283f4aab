"""The loop of every sampler: arguments, λ, prompt, calls of the model, draws, hooks.

A sampler is a rule: a generator of steps, which say what rows to draw and what becomes of the
draws. All else is here and happens once. Shapes: B sequences, D positions, R rows that a step
draws, V classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from .. import rng
from ..checks import (
    check_floating,
    check_int,
    check_int64,
    check_number,
    check_same_device,
    check_shape,
    check_token_range,
    describe,
)
from ..draw.api import sample
from ..draw.filters import filter_scaled_, row_peak
from ..draw.request import Draw
from ..heads import Head
from ..models.call import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    repeat_context,
)
from .arguments import Model, check_size, device_of, fill_prompt, seed_of
from .caches import Window

# Step numbers of the counter-based generator. λ and tokens of step k have k (in two streams),
# what a rule draws besides has RULE + k, and what is drawn before the first step has START.
RULE, START = 2**30, 2**32 - 1
PROJECTED = "the output of project_fn"
_ROWS_BYTES = 64 << 20  # of logits at a time, where the head does not say


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The unconditional logits: of a second half of the call, or of `Run.other` without λ."""

    scale: float  # w of (1 + w)·conditional − w·unconditional
    tokens: Tensor  # (B, D)
    context: Context


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a step brought: the draw of its rows, and the heads that it came from."""

    draw: Draw
    head: Head  # (R, V)
    guidance: tuple[Head, float] | None


@dataclasses.dataclass(frozen=True)
class Step:
    """What the model is asked at a step, which rows are drawn, and what becomes of the draws."""

    number: int  # from 0 on: which λ, which random numbers
    time: float | Tensor | None  # (B,), one of each; None: each one's share of masked positions
    rows: Tensor | None  # (R,) int64, b·D + d in ascending order; None: all; empty: no call
    sequences: Tensor | None = None  # int64, those with such rows, ascending; None: all
    fill: Callable[[Step, Answer], Tensor] | None = None  # new tokens (B, D); None: the draws
    greedy: bool = False  # the argmax in place of a draw
    mask: Tensor | None = None  # (B, D) bool, positions that are masked again after the draws
    want: tuple[str, ...] = ()  # statistics of the draw
    guidance: Guidance | None = None
    teacher: bool = False  # ask `Run.other` in place of the model, without λ
    tries: Tensor | None = None  # (B·n, L): n rows in place of each sequence, with these λ
    latent: int | None = None  # the step whose λ it has; None: its own
    window: Window | None = None  # of a model with a cache; rows lie in it
    temperature: float | None = None  # None: that of the run


class Run:
    """The arguments of a run, checked, and how far it has got.

    Args:
        options: `Options` or more of them, complete, and `confidence_dtype` as of `sample`.
        calls: how many steps there may be, each with its λ; None for D.
        mask_id: what the tokens are at first, unless there is a `start`.
        exclude_mask: never draw the mask.
        ids: those in the vocabulary by their argument; None for `mask_id`.
        start: (B, D) tokens of a process without masks, or a function of the run that draws them.
        other: the teacher, or the model of the unconditional logits.

    Attributes:
        tokens: (B, D), as they are.
        draws: options of every draw, as of `sample`.
        shift: position d takes its logits from row d − 1, position 0 from row 0.
        banned: ids that are never drawn.
    """

    shift = False
    banned: Tensor | None = None

    def __init__(
        self,
        model: Any,
        shape: Any,
        options: Mapping[str, object],
        *,
        calls: int | None = None,
        mask_id: Any = None,
        exclude_mask: bool = True,
        ids: dict[str, int] | None = None,
        start: Any = None,
        start_name: str = "start",
        project_fn: Any = None,
        other: Any = None,
    ):
        given: dict[str, Any] = {"prompt": None, "vocab_size": None, **options}
        self.batch, self.positions = check_size(shape)
        check_callable(model, "model")
        self.model: Model = model
        self.other: Model | None = other
        self.calls = self.positions if calls is None else calls
        self.mask_id = -1 if start is not None else check_int(mask_id, "mask_id", minimum=0)
        names = ("temperature", "top_k", "top_p", "confidence_dtype")
        self.draws: dict[str, Any] = {name: given[name] for name in names if name in given}
        # A draw of no rows checks its options before the first call of the model.
        check_number(self.draws.get("temperature", 1.0), "temperature", minimum=0.0)
        sample(torch.empty(0, 2).double(), seed=0, want=(), backend="torch", **self.draws)
        self.draws["mask_id"] = self.mask_id if exclude_mask and start is None else None
        self.device = device_of(given["device"], (given["prompt"], start), model)
        self.seed = seed_of(given["seed"], given["generator"])
        self.first_sequence = check_int(given["first_sequence"], "first_sequence", minimum=0)
        last = 2**63 // self.positions - self.batch  # positions of all sequences have numbers
        if self.first_sequence > last:
            raise ValueError(f"first_sequence must be at most {last}, got {self.first_sequence}")
        rows = torch.arange(self.batch * self.positions, device=self.device)
        self.keys = rows + self.first_sequence * self.positions
        self.vocab_size: int | None = given["vocab_size"]
        self.ids = ({"mask_id": self.mask_id} if start is None else {}) if ids is None else ids
        if self.vocab_size is not None:
            check_int(self.vocab_size, "vocab_size", minimum=2 if self.ids else 1)
        self.tokens = self.keys.new_full((self.batch, self.positions), self.mask_id)
        if callable(start):
            self.tokens = start(self)
        elif start is not None:
            self._check_tokens(start, start_name)
            self.tokens.copy_(start)
        self.ids["prompt"] = fill_prompt(self.tokens, given["prompt"], self.mask_id)
        if self.vocab_size is not None:
            self._check_ids(self.vocab_size, "vocab_size")
        self.context = check_context(given["context"], self.batch, self.device)
        self.latent = self._latents(given["latent"], given["latent_dim"])
        self.project_fn, self.callback = project_fn, given["callback"]
        for name, hook in (("project_fn", project_fn), ("callback", self.callback)):
            if hook is not None:
                check_callable(hook, name)
        self.history: list[Tensor] | None = given["history"]
        if self.history is not None and not isinstance(self.history, list):
            raise TypeError(f"history must be a list to fill or None, got {describe(self.history)}")

    def _latents(self, latent: Any, dim: Any) -> Tensor | None:
        """λ of every call: none, (B, L) or (calls, B, L) as passed, or drawn on the CPU.

        Drawn, they are a function of (seed, call, number of the sequence).
        """
        name = "latent_dim" if latent is None else "latent_dim, the last size of latent,"
        check_int(dim, name, minimum=0 if latent is None else 1)
        if latent is not None:
            check_floating(latent, "latent")
            check_same_device(latent, "latent", self.tokens, "the samples")
            one, each = (self.batch, dim), (self.calls, self.batch, dim)
            if latent.shape not in (one, each):
                raise ValueError(
                    f"latent must have shape (B, L) = {one} or (steps, B, L) = {each}, "
                    f"got {tuple(latent.shape)}"
                )
        elif dim:
            call = torch.arange(self.calls).repeat_interleave(self.batch)
            drawn = rng.uniform(self.seed, call, self.sequence_keys().repeat(self.calls), dim)
            size = {"s": self.calls, "b": self.batch}
            latent = rearrange(drawn, "(s b) l -> s b l", **size).to(self.device)
        return latent

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

    def put(self, step: Step, values: Tensor, fill: float | None = None) -> Tensor:
        """(B, D) with `values` in the rows of the step; elsewhere the tokens, or `fill`."""
        if step.rows is None:
            return values
        # Not in place: the model may have kept the tensor it was given.
        rest = self.tokens if fill is None else values.new_full(self.tokens.shape, fill)
        return rest.flatten().index_copy(0, step.rows, values).view_as(self.tokens)

    def uniform(self, step: Step, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """(R, count) numbers of the rule's own for the rows of the step."""
        keys = self.keys if step.rows is None else self.keys[step.rows]
        return rng.uniform(self.seed, RULE + step.number, keys, count, dtype=dtype)

    def loop(self, steps: Iterator[Step]) -> Tensor:
        """Take the steps, one after another; at each of them `tokens` are as they then are."""
        self._settle()
        with evaluation_mode(self.model, self.other):
            for step in steps:
                if step.rows is None or step.rows.numel():
                    # Kept until the next: memory that is freed here comes back as fresh pages.
                    answer = self._ask(step)
                    token = answer.draw.token
                    self.tokens = step.fill(step, answer) if step.fill else self.put(step, token)
                if step.mask is not None:
                    self.tokens = self.tokens.masked_fill(step.mask, self.mask_id)
                self._settle()
                if self.callback is not None:
                    self.callback(step.number + 1, self.calls, self.tokens)
        return self.tokens

    def _ask(self, step: Step) -> Answer:
        head, guidance = self._heads(step, self._local_rows(step))
        if self.banned is not None:
            head = head.exclude(self.banned)
        keys = None
        if step.tries is None:
            keys = self.keys.view_as(self.tokens) if step.rows is None else self.keys[step.rows]
        options = self.draws | ({"temperature": 0.0} if step.greedy else {})
        if step.temperature is not None:
            options["temperature"] = step.temperature
        options |= {"seed": self.seed, "step": step.number, "row_keys": keys, "want": step.want}
        draw = sample(head, guidance=guidance, **options)
        return Answer(draw, head, guidance)

    def _local_rows(self, step: Step) -> Tensor | None:
        """The rows by their numbers in the call of the model."""
        rows, window = step.rows, step.window
        if rows is None or (step.sequences is None and window is None and not self.shift):
            return rows
        sequence, position = rows // self.positions, rows % self.positions
        if step.sequences is not None and len(step.sequences) < self.batch:
            number = torch.zeros(self.batch, dtype=torch.int64, device=self.device)
            number[step.sequences] = torch.arange(len(step.sequences), device=self.device)
            sequence = number[sequence]
        start, size = (0, self.positions) if window is None else (window.start, window.size)
        if self.shift:
            position = (position - 1).clamp(min=0)
        return sequence * size + position - start

    def _heads(self, step: Step, rows: Tensor | None) -> tuple[Head, tuple[Head, float] | None]:
        """The wanted rows of the head, and `guidance` for `sample`."""
        guidance, some = step.guidance, step.sequences
        if some is not None and len(some) == self.batch:
            some = None

        def cut(values: Tensor) -> Tensor:
            return values if some is None else values[some]

        tokens, lam = cut(self.tokens), self._latent_of(step, some)
        context: Context = {key: cut(value) for key, value in self.context.items()}
        if step.tries is not None:
            count = len(step.tries) // self.batch if self.batch else 1
            tokens, lam = repeat(tokens, "b d -> (b n) d", n=count), step.tries
            context = repeat_context(context, count)
        if guidance is None:
            name, lam = ("teacher", None) if step.teacher else ("model", lam)
            head = self._call(name, step, tokens, lam, context, some)
            return (head if rows is None else head.take(rows)), None
        assert rows is not None
        others = cut(guidance.tokens)
        without = {key: cut(value) for key, value in guidance.context.items()}
        if self.other is not None:
            head = self._call("model", step, tokens, lam, context)
            other = self._call("guidance_model", step, others, None, without)
            return head.take(rows), (other.take(rows), guidance.scale)
        both = {key: torch.cat([value, without[key]]) for key, value in context.items()}
        lam = None if lam is None else torch.cat([lam, lam])
        twice = None if some is None else torch.cat([some, some + self.batch])
        head = self._call("model", step, torch.cat([tokens, others]), lam, both, twice)
        split = len(tokens) * head.shape[1]
        return head.take(rows), (head.take(rows + split), guidance.scale)

    def _latent_of(self, step: Step, some: Tensor | None = None) -> Tensor | None:
        """λ (R, L) of a step, of some of the sequences."""
        lam = self.latent
        if lam is not None and lam.ndim == 3:
            lam = lam[step.number if step.latent is None else step.latent]
        return lam if lam is None or some is None else lam[some]

    def _time_of(self, step: Step, sequences: int) -> Tensor:
        if isinstance(step.time, Tensor):
            t = step.time if step.sequences is None else step.time[step.sequences]
            return t.float()
        assert step.time is not None
        return torch.full((sequences,), step.time, dtype=torch.float32, device=self.device)

    def commit(self, step: Step, start: int, stop: int) -> None:
        """Have the model store its keys for the tokens of [start, stop), with the λ of a step."""
        tokens, lam = self.tokens[:, start:stop], self._latent_of(step)
        window = Window("causal", start, stop, start, stop, start == 0, self.positions, self.batch)
        t = torch.zeros(self.batch, device=self.device)
        arguments = (tokens, t) if lam is None else (tokens, t, lam)
        self.model.commit(*arguments, window=window, **self.context)  # type: ignore[attr-defined]

    def _call(
        self,
        name: str,
        step: Step,
        tokens: Tensor,
        lam: Tensor | None,
        context: Context,
        some: Tensor | None = None,
    ) -> Head:
        """some: the sequences of the call, for a window; with guidance those + B, too."""
        model, window = self.model if name == "model" else self.other, step.window
        assert model is not None
        timed = tokens
        if window is not None:
            batch = self.batch if step.guidance is None else 2 * self.batch
            window = dataclasses.replace(window, batch=batch, sequences=some)
            context = {**context, "window": window}  # type: ignore[dict-item]
            tokens = tokens[:, window.start : window.stop]
            timed = tokens if window.kind == "causal" else timed
        if step.time is None:
            t = torch.eq(timed, self.mask_id).float().mean(1)
        else:
            t = self._time_of(step, len(tokens))
        head = call_model(model, name, tokens, t, lam, context, self.vocab_size)
        if self.vocab_size is None:
            # What could not be checked before; later calls must have as many classes.
            self.vocab_size = head.vocabulary
            self._check_ids(self.vocab_size, "V of model")
            if self.project_fn is not None:
                known = self.tokens.masked_fill(self.masked(), 0)
                check_token_range(known, PROJECTED, self.vocab_size)
        return head

    def _check_ids(self, size: int, name: str) -> None:
        for argument, value in self.ids.items():
            if value >= size:
                raise ValueError(
                    f"{argument} must hold ids in [0, {size}), as {name} = {size}, got {value}"
                )

    def _check_tokens(self, tokens: Any, name: str) -> None:
        check_int64(tokens, name)
        check_shape(tokens, name, "B, D", self.tokens.shape)
        check_same_device(tokens, name, self.tokens, "the samples")
        bound = torch.iinfo(torch.int64).max if self.vocab_size is None else self.vocab_size
        check_token_range(tokens, name, bound)

    def _settle(self) -> None:
        """Project the tokens, and write them down."""
        if self.project_fn is not None:
            # A copy, since many projections write into their argument.
            projected = self.project_fn(self.tokens.clone())
            self._check_tokens(projected, PROJECTED)
            self.tokens = projected
        if self.history is not None:
            self.history.append(self.tokens)


def first_true(wanted: Tensor, count: int) -> Tensor:
    """The numbers of the `count` True elements of a vector, without asking the device."""
    return torch.sort((~wanted).to(torch.uint8), stable=True).indices[:count]


def single_logits(
    head: Head,
    tokens: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """The logit of one token (R,) per row of a head (R, V), in fp32, or fp64 for fp64 heads.

    After temperature, which is positive, and filters, as of `sample`; -inf where those remove it.
    """
    dtype = torch.promote_types(head.dtype, torch.float32)
    rows = torch.arange(len(tokens), device=tokens.device)
    # A head of one's own computes whole rows for them.
    size = (head.budget_bytes or _ROWS_BYTES) // (head.shape[-1] * dtype.itemsize)
    shard = head.shard
    columns = tokens if shard is None else shard.nearest(tokens)

    def of(some: Tensor) -> Tensor:
        picked = head.logits_at(some, columns[some]).to(dtype)
        if top_k is None and top_p is None:
            return picked
        whole = head.take(some).logits().to(dtype)
        peak = row_peak(whole, None)
        if shard is not None:
            (peak,) = shard.maximum(peak)
        whole = (whole - peak) / temperature
        filter_scaled_(whole, top_p, top_k, shard=shard)
        left = whole.gather(1, columns[some].unsqueeze(1))[:, 0]
        return picked.masked_fill(left == -torch.inf, -torch.inf)

    found = torch.cat([of(some) for some in rows.split(max(1, size))]) / temperature
    return found if shard is None else shard.from_owner(found, tokens)


def moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype, each (n,), on the device, moved in one go."""
    if not tensors:
        return []
    return list(torch.cat(tensors).to(device).split([t.numel() for t in tensors]))
