"""Ancestral sampling of masked diffusion, computing only what is used.

The naive loop asks the denoiser for every position at every step and then unmasks position d at
step k with probability (t_k - t_{k+1}) / t_k. That decision does not look at a logit, so
each position's step is drawn in advance: P(k) = t_k - t_{k+1} for times that start at 1, and
what remains, t_min, goes to the final argmax. Then the head computes only the rows that
unmask, a step that unmasks nothing calls no model, and a sequence that unmasks nothing at a
step is left out of the call. The law of the samples is that of the loop.

Source: the samplers of MDLM (arXiv 2406.07524) and of the masked language experiment of Di4C
(arXiv 2410.08709).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .. import rng
from ..checks import check_number
from ..draw.api import sample
from ..heads import HeadLike
from ..models.call import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    select_context,
)
from ._shared import (
    PLAN,
    REPLAN,
    check_filters,
    check_hooks,
    check_sizes,
    check_vocab_size,
    device_of,
    fill_prompt,
    latents_of,
    project,
    seed_of,
)

__all__ = ["plan_unmask_steps", "sample_masked"]


def plan_unmask_steps(
    times: Tensor, shape: tuple[int, int], *, seed: int, first_sequence: int = 0
) -> Tensor:
    """The step at which each position unmasks, drawn in advance on the CPU.

    Step k goes from times[k] to times[k + 1]. Position d of a sequence gets step k with
    probability times[k] - times[k + 1] and S = len(times) - 1, the final argmax, with
    probability times[S].

    Args:
        times: (S + 1,) decreasing, times[0] = 1.
        shape: (B, D).
        seed, first_sequence: see `sample_masked`.

    Returns:
        (B, D) int64 in [0, S], a function of (seed, number of the sequence, d) alone.
    """
    batch, positions = shape
    keys = torch.arange(batch) + first_sequence
    u = rng.uniform(seed, PLAN, keys, positions, dtype=torch.float64)
    return _step_of(u, times)


def _step_of(u: Tensor, times: Tensor) -> Tensor:
    """k such that times[k + 1] <= u < times[k]: how many of times[1:] exceed u."""
    ascending = -times[1:].to(torch.float64)
    return torch.searchsorted(ascending.contiguous(), -u, right=False)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """The rows of every step, grouped: made on the host in one go, moved to the device once."""

    sequences: Tensor  # int64, the sequences of step 0, then of step 1, ...
    sequence_cuts: list[int]  # step k: sequences[cuts[k]:cuts[k + 1]]
    flat: Tensor  # int64, positions b*D + d that unmask, by step
    local: Tensor  # int64, the same as rows of the model call of that step
    row_cuts: list[int]

    @classmethod
    def of(cls, plan: Tensor, steps: int, active_only: bool, device: torch.device) -> _Schedule:
        """plan: (B, D) int64 on the CPU, -1 for positions that keep their token."""
        batch, positions = plan.shape
        step = plan.flatten()
        flat = torch.argsort(step, stable=True)[int((step < 0).sum()) :]
        step = step[flat]
        sequence = flat // positions
        row_cuts = _cuts(step, steps)
        if active_only:
            calls, index = torch.unique_consecutive(step * batch + sequence, return_inverse=True)
            sequence_cuts = _cuts(calls // batch, steps)
            local = (index - torch.tensor(sequence_cuts)[step]) * positions + flat % positions
            sequences = calls % batch
        else:
            sequence_cuts, local, sequences = [], flat, flat.new_empty(0)
        moved = torch.cat([sequences, flat, local]).to(device)
        sizes = [sequences.numel(), flat.numel(), local.numel()]
        sequences, flat, local = moved.split(sizes)
        return cls(sequences, sequence_cuts, flat, local, row_cuts)


def _cuts(step: Tensor, steps: int) -> list[int]:
    counts = torch.bincount(step, minlength=steps + 1)
    return [0, *counts.cumsum(0).tolist()]


@torch.no_grad()
def sample_masked(
    model: Callable[..., HeadLike],
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int,
    vocab_size: int | None = None,
    latent_dim: int = 0,
    latent: Tensor | None = None,
    prompt: Tensor | None = None,
    project_fn: Callable[[Tensor], Tensor] | None = None,
    context: Context | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_sequence: int = 0,
    t_min: float = 1e-5,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    active_only: bool = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
    history: list[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw token rows from a masked diffusion model by ancestral sampling.

    Times are linspace(1, t_min, steps + 1). Step k calls `model` at time t_k and unmasks the
    positions whose turn it is; positions left after the last step take the argmax at t_min. The
    mask token is never drawn and a token, once there, stays.

    Args:
        model: callable (tokens (R, D) int64, t (R,) float32, **context) to logits (R, D, V) or
            a head, with a third argument latent (R, L) if `latent_dim` > 0. In eval mode during
            the call if it is an `nn.Module`.
        shape: (B, D).
        mask_id: the mask token.
        steps: S >= 1.
        vocab_size: V, to check the model and the prompt against; None accepts the model's.
        latent_dim: L of a mixture student; 0 for a model without λ.
        latent: λ to use: (B, L) for every step, or (S + 1, B, L), the last for the final argmax.
            None draws a fresh one per step and sequence.
        prompt: (B, P) or (P,) int64, P <= D, the first P tokens of the rows, `mask_id` where a
            token is unknown. Known tokens stay.
        project_fn: called with the tokens (B, D) at the start and after every step; returns
            (B, D) int64. Tokens that it masks again unmask later at the rate of the loop; tokens
            that it fills stay.
        context: tensors (B, ...) by keyword for the model.
        seed: int in [0, 2^63). None: taken from `generator`, or from the default generator.
        generator: source of the seed where `seed` is None.
        first_sequence: number of the first sequence. Randomness is a function of (seed, number
            of the sequence, step, position), so the same sequences come out however they are
            batched (up to the model's own rounding).
        t_min: last time.
        temperature, top_k, top_p: of the draws, as in `di4c_fast.sample`. Other values than the
            defaults are no longer the model's law.
        active_only: call the model with only the sequences that unmask something at the step.
            False keeps the batch's shape fixed.
        callback: called as callback(step, total, tokens) after each of the S steps and the
            final one, step from 1 to total = S + 1, whether or not the model ran.
        history: a list to which the tokens at the start, after every step and after the final
            argmax are appended, S + 2 tensors (B, D).
        device: where to sample; None for the prompt's device, else that of the module's
            parameters, else the CPU.

    Returns:
        (B, D) int64.

    Host syncs: before the loop one or two to read the prompt (and one to read a seed from a GPU
    generator); inside the loop none, but with `project_fn` one per step, to see what it changed.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a model or
            project_fn that returns the wrong shape as soon as it does.
    """
    batch, positions = check_sizes(
        shape,
        steps=(steps, 1),
        mask_id=(mask_id, 0),
        latent_dim=(latent_dim, 0),
        first_sequence=(first_sequence, 0),
    )
    check_vocab_size(vocab_size, mask_id)
    check_callable(model, "model")
    check_number(t_min, "t_min")
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"t_min must be in (0, 1), got {t_min}")
    check_filters(temperature, top_k, top_p)
    check_hooks(callback, history, project_fn)
    tokens = torch.full(
        (batch, positions), mask_id, dtype=torch.int64, device=device_of(device, prompt, model)
    )
    device = tokens.device
    context = check_context(context, batch, device)
    seed = seed_of(seed, generator)
    top_token = mask_id
    if prompt is not None:
        top_token = max(top_token, fill_prompt(tokens, prompt, vocab_size))
    latent = latents_of(
        latent,
        latent_dim,
        steps + 1,
        batch,
        seed=seed,
        first_sequence=first_sequence,
        device=device,
        letter="S + 1",
    )

    if project_fn is not None:
        tokens = project(project_fn, tokens)
    times = torch.linspace(1.0, t_min, steps + 1, dtype=torch.float64)
    plan = plan_unmask_steps(times, (batch, positions), seed=seed, first_sequence=first_sequence)
    plan[(tokens != mask_id).cpu()] = -1
    schedule = _Schedule.of(plan, steps, active_only, device)
    first_key = first_sequence * positions
    if history is not None:
        history.append(tokens)
    checked = False

    with evaluation_mode(model):
        for step in range(steps + 1):
            rows = slice(*schedule.row_cuts[step : step + 2])
            flat, local = schedule.flat[rows], schedule.local[rows]
            if flat.numel():
                inputs, lam, some = tokens, None, context
                if latent is not None:
                    lam = latent if latent.ndim == 2 else latent[step]
                if active_only:
                    cut = slice(*schedule.sequence_cuts[step : step + 2])
                    sequences = schedule.sequences[cut]
                    if sequences.numel() < batch:
                        inputs = tokens[sequences]
                        lam = None if lam is None else lam[sequences]
                        some = select_context(context, sequences)
                t = torch.full(
                    (inputs.shape[0],), float(times[step]), dtype=torch.float32, device=device
                )
                head = call_model(model, "model", inputs, t, lam, some, vocab_size)
                if not checked:
                    _check_vocabulary(head.shape[-1], mask_id, top_token)
                    checked = True
                draw = sample(
                    head.take(local),
                    temperature=0.0 if step == steps else temperature,
                    top_k=top_k,
                    top_p=top_p,
                    mask_id=mask_id,
                    seed=seed,
                    step=step,
                    row_keys=flat + first_key,
                    want=(),
                )
                # Not in place: the model may have kept the tensor it was given.
                tokens = tokens.flatten().index_copy(0, flat, draw.token).view(batch, positions)
            if project_fn is not None:
                tokens = project(project_fn, tokens)
                if step < steps and _replan(
                    plan, tokens, step, times, mask_id, seed, first_sequence
                ):
                    schedule = _Schedule.of(plan, steps, active_only, device)
            if history is not None:
                history.append(tokens)
            if callback is not None:
                callback(step + 1, steps + 1, tokens)
    return tokens


def _replan(
    plan: Tensor,
    tokens: Tensor,
    step: int,
    times: Tensor,
    mask_id: int,
    seed: int,
    first_sequence: int,
) -> bool:
    """Bring the plan in line with what `project_fn` changed; True if it had to change.

    A position masked again after `step` is masked at time s = times[step + 1]; the loop would
    unmask it at step k > `step` with probability (times[k] - times[k + 1]) / s.
    """
    masked = (tokens == mask_id).cpu()
    waiting = plan > step
    filled, again = waiting & ~masked, masked & ~waiting
    plan[~masked] = -1
    if bool(again.any()):
        keys = torch.arange(plan.shape[0]) + first_sequence
        u = rng.uniform(seed, REPLAN + step, keys, plan.shape[1], dtype=torch.float64)
        fresh = _step_of(u * times[step + 1], times)
        plan[again] = fresh[again]
    return bool(filled.any()) or bool(again.any())


def _check_vocabulary(vocabulary: int, mask_id: int, top_token: int) -> None:
    """What could not be checked before the model had said how many classes there are."""
    if mask_id >= vocabulary:
        raise ValueError(f"mask_id must be in [0, V) = [0, {vocabulary}) of model, got {mask_id}")
    if vocabulary < 2:
        raise ValueError(f"model must return at least 2 classes with a mask_id, got {vocabulary}")
    if top_token >= vocabulary:
        raise ValueError(
            f"prompt must hold token ids in [0, V) = [0, {vocabulary}) of model, got {top_token}"
        )
