"""MaskGIT sampling: every step draws all masked positions and keeps the most confident draws.

How many positions a step reveals is a schedule, known before the loop, so the loop never asks
the device how far it has got: the head computes the masked rows only, a step that reveals
nothing calls no model, a guidance weight of 0 costs no unconditional pass, and a step that
reveals all that is left needs no confidence.

Source: MaskGIT (arXiv 2202.04200), its PyTorch reproduction by valeoai, and the VQ image
experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import rng
from ..checks import check_bool, check_choice, check_number
from ..draw.api import sample
from ..heads import Head, HeadLike
from ..models.call import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    select_context,
)
from ..processes.reveal import (
    NOISE,
    check_gumbel_temperature,
    check_schedule,
    gumbel,
    most_confident,
    reveal_counts,
)
from ._shared import (
    check_counts,
    check_filters,
    check_hooks,
    check_sizes,
    device_of,
    fill_prompt,
    latents_of,
    seed_of,
)

__all__ = ["sample_maskgit"]

RANDOMIZE = ("linear", "warm_up", "random", "none")
_WARM_UP_STEPS = 2


@torch.no_grad()
def sample_maskgit(
    model: Callable[..., HeadLike],
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int,
    schedule: str | Sequence[int] = "arccos",
    schedule_style: Literal["di4c", "valeoai", "valeoai_v1"] = "di4c",
    vocab_size: int | None = None,
    latent_dim: int = 0,
    latent: Tensor | None = None,
    prompt: Tensor | None = None,
    context: Context | None = None,
    guidance: float = 0.0,
    guidance_schedule: Literal["linear", "constant"] = "linear",
    unconditional: Context | None = None,
    guidance_model: Callable[..., HeadLike] | None = None,
    randomize: Literal["linear", "warm_up", "random", "none"] = "linear",
    gumbel_temperature: float = 4.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    resample: bool = False,
    exclude_mask: bool = True,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_sequence: int = 0,
    callback: Callable[[int, int, Tensor], None] | None = None,
    history: list[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw token rows by confidence: the sampler of MaskGIT, for mixture students too.

    Step i of n calls `model` at time t = 1 - i/n, draws a token x at every masked position and
    reveals the k_i positions of highest confidence, of equals the first ones:

        logits = (1 + w_i)·conditional - w_i·unconditional,   w_i = guidance·i/(n-1)
        x ~ softmax(logits / temperature)
        confidence = log p(x) + gumbel_temperature·(1 - i/(n-1))·Gumbel

    At n = 1 the fraction i/(n-1) is 0: one step is the first step, without guidance.

    Args:
        model: callable (tokens (R, D) int64, t (R,) float32, **context) to logits (R, D, V) or
            a head, with a third argument latent (R, L) if `latent_dim` > 0. In eval mode during
            the call if it is an `nn.Module`.
        shape: (B, D).
        mask_id: the mask token.
        steps: n >= 1. Each reveals at least one position, so that at most D of them work.
        schedule: "arccos", "cosine", "linear", "square", "root", or n counts k_i. Counts above
            what is left are cut, and the last step reveals what is left.
        schedule_style: how a name becomes counts: as in the code of Di4C, of today's valeoai
            repository or of its first version; see `di4c_fast.processes.reveal.reveal_counts`.
        vocab_size: V, to check the model and the prompt against; None accepts the model's.
        latent_dim: L of a mixture student; 0 for a model without λ.
        latent: λ to use: (B, L) for every step, or (n, B, L). None draws a fresh one per step
            and sequence. Both halves of a guided call share it.
        prompt: (B, P) or (P,) int64, P <= D, the first P tokens of the rows, `mask_id` where a
            token is unknown (P = D serves inpainting). Known tokens stay, and the schedule of a
            row counts its unknown ones only.
        context: tensors (B, ...) by keyword for the model, such as class labels.
        guidance: w, weight of classifier-free guidance at the last step; 0 for none.
        guidance_schedule: "linear" is the ramp above; "constant" is w at every step, at n = 1 too.
        unconditional: what replaces `context` in the unconditional half: the same keywords and
            shapes, such as the label that stands for no class. Both halves are one call of 2R
            rows.
        guidance_model: another model for the unconditional logits, such as the teacher of a
            student; called without λ as guidance_model(tokens, t, **unconditional).
        randomize: "linear" is the confidence above. "none": log p alone. "random": uniform
            numbers alone. "warm_up": uniform numbers in the first two steps, then log p.
        gumbel_temperature: of the noise at the first step; at least 0.
        temperature, top_k, top_p: of the draws, as in `di4c_fast.sample`. The `sm_temp` of the
            published code multiplies: it is 1/temperature. p is that of the drawn distribution,
            at temperature 0 that of temperature 1.
        resample: every step also draws the positions anew that earlier steps have revealed, as
            today's valeoai repository does (prompt tokens stay). The head then computes all rows.
        exclude_mask: never draw the mask token. False is what the published code does: with
            `resample` such a position is masked again, without it counts as revealed; the
            result may hold mask tokens. A model without a column for the mask needs False.
        seed: int in [0, 2^63). None: taken from `generator`, or from the default generator.
        generator: source of the seed where `seed` is None.
        first_sequence: number of the first sequence. Randomness is a function of (seed, number
            of the sequence, step, position), so the same sequences come out however they are
            batched (up to the model's own rounding).
        callback: called as callback(step, n, tokens) after each step, step from 1 to n.
        history: a list to which the tokens at the start and after every step are appended,
            n + 1 tensors (B, D).
        device: where to sample; None for the prompt's device, else that of the module's
            parameters, else the CPU.

    Returns:
        (B, D) int64.

    Host syncs: before the loop two to read the prompt (and one to read a seed from a GPU
    generator); inside the loop none.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a model
            that returns the wrong shape as soon as it does.
    """
    batch, positions = check_sizes(
        shape,
        steps=(steps, 1),
        mask_id=(mask_id, 0),
        latent_dim=(latent_dim, 0),
        first_sequence=(first_sequence, 0),
    )
    check_bool(resample, "resample")
    check_bool(exclude_mask, "exclude_mask")
    if vocab_size is not None:
        check_counts([("vocab_size", vocab_size, 1 + exclude_mask)])
        if exclude_mask and mask_id >= vocab_size:
            raise ValueError(
                f"mask_id must be in [0, vocab_size) = [0, {vocab_size}) "
                f"unless exclude_mask=False, got {mask_id}"
            )
    check_callable(model, "model")
    if guidance_model is not None:
        check_callable(guidance_model, "guidance_model")
    check_schedule(schedule, steps, schedule_style)
    check_number(guidance, "guidance")
    check_choice(guidance_schedule, "guidance_schedule", ("linear", "constant"))
    check_choice(randomize, "randomize", RANDOMIZE)
    check_gumbel_temperature(gumbel_temperature)
    check_filters(temperature, top_k, top_p)
    check_hooks(callback, history)
    tokens = torch.full(
        (batch, positions), mask_id, dtype=torch.int64, device=device_of(device, prompt, model)
    )
    device = tokens.device
    context = check_context(context, batch, device)
    if guidance != 0.0 and guidance_model is None and not unconditional:
        raise ValueError(
            "guidance needs unconditional, the context of the unconditional half, "
            "or a guidance_model"
        )
    same_model = guidance_model is None and unconditional is not None
    unconditional = _check_unconditional(unconditional, batch, device)
    if same_model:
        _check_alike(unconditional, context)
    seed = seed_of(seed, generator)
    top_token = -1
    masked = torch.full((batch,), positions)
    if prompt is not None:
        limit = None if vocab_size is None else max(vocab_size, mask_id + 1)
        top_token = fill_prompt(tokens, prompt, limit)
        masked = (tokens == mask_id).sum(-1).cpu()
    latent = latents_of(
        latent,
        latent_dim,
        steps,
        batch,
        seed=seed,
        first_sequence=first_sequence,
        device=device,
    )

    plan = _Plan.of(masked, steps, schedule, schedule_style, resample, device)
    keys = torch.arange(batch, device=device) + first_sequence
    waiting = tokens == mask_id  # positions that no step has revealed yet
    unknown = waiting  # positions outside the prompt
    if history is not None:
        history.append(tokens)
    checked = False

    with evaluation_mode(model, guidance_model):
        for step in range(steps):
            if plan.active[step]:
                fraction = step / (steps - 1) if steps > 1 else 0.0
                weight = guidance if guidance_schedule == "constant" else guidance * fraction
                some = plan.sequences(step)
                lam = latent if latent is None or latent.ndim == 2 else latent[step]
                part = _Sequences(tokens, lam, context, unconditional, keys, waiting, unknown)
                part = part if some is None else part.select(some)
                rows = _rows(part.unknown if resample else part.waiting, plan.rows[step])
                t = torch.full(
                    (part.tokens.shape[0],), 1.0 - step / steps, dtype=torch.float32, device=device
                )
                head, guide = _call(model, guidance_model, weight, part, t, rows, vocab_size)
                if not checked:
                    _check_vocabulary(head.shape[-1], mask_id, exclude_mask, top_token)
                    checked = True
                b, d = rows // positions, rows % positions
                draw = sample(
                    head,
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    guidance=guide,
                    mask_id=mask_id if exclude_mask else None,
                    seed=seed,
                    step=step,
                    row_keys=part.keys[b] * positions + d,
                    want=("log_prob",),
                )
                assert draw.log_prob is not None
                drawn = part.tokens.flatten().index_copy(0, rows, draw.token)
                drawn = drawn.view_as(part.tokens)
                if plan.all_at_once[step]:
                    reveal = part.waiting
                else:
                    noise = _noise(randomize, seed, step, part.keys, positions)
                    factor = gumbel_temperature * (1.0 - fraction)
                    confidence = _confidence(draw.log_prob, rows, noise, randomize, step, factor)
                    confidence = confidence.masked_fill(~part.waiting, -torch.inf)
                    counts = plan.counts[step]
                    counts = counts if some is None else counts[some]
                    if resample:
                        # Filled positions come first and are among those counted.
                        confidence = confidence.masked_fill(part.unknown & ~part.waiting, torch.inf)
                    reveal = most_confident(confidence, counts) & part.waiting
                replaced = reveal | (part.unknown & ~part.waiting) if resample else reveal
                after = torch.where(replaced, drawn, part.tokens)
                left = part.waiting & ~reveal
                if resample and not exclude_mask:
                    left = part.unknown & (after == mask_id)
                if some is not None:
                    # Not in place: the model may have kept the tensor it was given.
                    after = tokens.index_copy(0, some, after)
                    left = waiting.index_copy(0, some, left)
                tokens, waiting = after, left
            if history is not None:
                history.append(tokens)
            if callback is not None:
                callback(step + 1, steps, tokens)
    return tokens


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What every step does, made on the host and moved to the device once."""

    active: list[int]  # how many sequences take part in the step
    rows: list[int]  # how many rows the head computes
    all_at_once: list[bool]  # the step reveals all that is masked
    counts: Tensor  # (S, B) int64, revealed in the step; with resampling, up to its end
    cuts: list[int]
    order: Tensor  # the sequences of the steps in which only some take part, one after another

    @classmethod
    def of(
        cls,
        masked: Tensor,
        steps: int,
        schedule: str | Sequence[int],
        style: str,
        resample: bool,
        device: torch.device,
    ) -> _Plan:
        """masked: (B,) on the CPU, how many positions of each sequence are unknown."""
        batch = masked.shape[0]
        unique, index = torch.unique(masked, return_inverse=True)
        table = [reveal_counts(steps, int(m), schedule, style) for m in unique.tolist()]
        counts = torch.tensor(table, dtype=torch.int64).view(-1, steps)[index].T  # (S, B)
        totals = counts.cumsum(0)
        remaining = masked - totals + counts
        takes_part = (masked > 0).expand(steps, -1) if resample else counts > 0
        per_row = masked.expand(steps, -1) if resample else remaining
        all_at_once = ((remaining == counts) | ~takes_part).all(-1)
        active = takes_part.sum(-1)
        # Where only some sequences take part, their numbers.
        partial = (active < batch) & (active > 0)
        order = (takes_part & partial.unsqueeze(-1)).nonzero()[:, 1]
        cuts = torch.where(partial, active, 0).cumsum(0)
        per_step = (totals if resample else counts).contiguous()
        return cls(
            active.tolist(),
            (per_row * takes_part).sum(-1).tolist(),
            all_at_once.tolist(),
            per_step.to(device),
            [0, *cuts.tolist()],
            order.to(device),
        )

    def sequences(self, step: int) -> Tensor | None:
        """The sequences that take part in the step; None for all."""
        if self.cuts[step] == self.cuts[step + 1]:
            return None
        return self.order[self.cuts[step] : self.cuts[step + 1]]


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """The per-sequence tensors of a step, so that they are cut together."""

    tokens: Tensor
    latent: Tensor | None
    context: Context
    unconditional: Context
    keys: Tensor
    waiting: Tensor
    unknown: Tensor

    def select(self, index: Tensor) -> _Sequences:
        return _Sequences(
            self.tokens[index],
            None if self.latent is None else self.latent[index],
            select_context(self.context, index),
            select_context(self.unconditional, index),
            self.keys[index],
            self.waiting[index],
            self.unknown[index],
        )


def _rows(wanted: Tensor, count: int) -> Tensor:
    """The flat numbers of the `count` True elements, in order, without asking the device."""
    if wanted.device.type == "cpu":
        return wanted.flatten().nonzero().squeeze(-1)
    return _first_true(wanted.flatten(), count)


def _first_true(wanted: Tensor, count: int) -> Tensor:
    return torch.sort((~wanted).to(torch.uint8), stable=True).indices[:count]


def _call(
    model: Callable[..., HeadLike],
    guidance_model: Callable[..., HeadLike] | None,
    weight: float,
    part: _Sequences,
    t: Tensor,
    rows: Tensor,
    vocab_size: int | None,
) -> tuple[Head, tuple[Head, float] | None]:
    """The wanted rows of the conditional head, and `guidance` for `sample`."""
    tokens, latent, context = part.tokens, part.latent, part.context
    if weight == 0.0:
        return call_model(model, "model", tokens, t, latent, context, vocab_size).take(rows), None
    if guidance_model is not None:
        head = call_model(model, "model", tokens, t, latent, context, vocab_size)
        other = call_model(
            guidance_model, "guidance_model", tokens, t, None, part.unconditional, head.shape[-1]
        )
        return head.take(rows), (other.take(rows), weight)
    both = {key: torch.cat([value, part.unconditional[key]]) for key, value in context.items()}
    latent = None if latent is None else torch.cat([latent, latent])
    head = call_model(
        model, "model", torch.cat([tokens, tokens]), torch.cat([t, t]), latent, both, vocab_size
    )
    return head.take(rows), (head.take(rows + tokens.numel()), weight)


def _noise(randomize: str, seed: int, step: int, keys: Tensor, positions: int) -> Tensor:
    """(R, D) fp64: what the confidence adds to, or puts in place of, log p."""
    if randomize == "linear":
        return gumbel(seed, step, keys, positions)
    if randomize == "random" or (randomize == "warm_up" and step < _WARM_UP_STEPS):
        return rng.uniform(seed, NOISE + step, keys, positions, dtype=torch.float64)
    return torch.zeros((keys.shape[0], positions), dtype=torch.float64, device=keys.device)


def _confidence(
    log_prob: Tensor, rows: Tensor, noise: Tensor, randomize: str, step: int, factor: float
) -> Tensor:
    """(R, D) fp64, where `rows` says; elsewhere of no meaning."""
    if randomize == "random" or (randomize == "warm_up" and step < _WARM_UP_STEPS):
        return noise
    scaled = noise * factor if randomize == "linear" else noise
    return scaled.flatten().index_add(0, rows, log_prob.double()).view_as(noise)


def _check_unconditional(unconditional: Any, batch: int, device: torch.device) -> Context:
    try:
        return check_context(unconditional, batch, device)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("context", "unconditional", 1)) from None


def _check_alike(unconditional: Context, context: Context) -> None:
    """Both halves of a guided call can be concatenated."""
    if unconditional.keys() != context.keys():
        raise ValueError(
            f"unconditional must have the keywords of context, {sorted(context)}, "
            f"got {sorted(unconditional)}"
        )
    for key, value in context.items():
        other = unconditional[key]
        if other.shape != value.shape or other.dtype != value.dtype:
            raise ValueError(
                f"unconditional[{key!r}] must have the shape and dtype of context[{key!r}], "
                f"{tuple(value.shape)} {value.dtype}, got {tuple(other.shape)} {other.dtype}"
            )


def _check_vocabulary(vocabulary: int, mask_id: int, exclude_mask: bool, top_token: int) -> None:
    """What could not be checked before the model had said how many classes there are."""
    if exclude_mask and mask_id >= vocabulary:
        raise ValueError(
            f"mask_id must be in [0, V) = [0, {vocabulary}) of model unless exclude_mask=False, "
            f"got {mask_id}"
        )
    if exclude_mask and vocabulary < 2:
        raise ValueError(f"model must return at least 2 classes with a mask_id, got {vocabulary}")
    if top_token >= vocabulary and top_token != mask_id:
        raise ValueError(
            f"prompt must hold token ids in [0, V) = [0, {vocabulary}) of model, got {top_token}"
        )
