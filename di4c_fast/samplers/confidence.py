"""Confidence sampling of masked diffusion language models: the rules of LLaDA, Dream, Fast-dLLM.

At every step the denoiser is asked for all masked positions of the current block, a token is
drawn at each, and only the positions with the highest confidence keep theirs. Nothing else goes
through the head: neither the prompt, nor filled positions, nor what lies behind the block. A row of
logits is read once, for the token and its confidence together.

Sources: LLaDA (arXiv 2502.09992), Dream 7B (arXiv 2508.15487), Fast-dLLM (arXiv 2505.22618).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..checks import check_bool, check_choice, check_number, describe
from ..draw.api import sample
from ..draw.request import CONFIDENCE_DTYPES, Draw
from ..heads import Head, HeadLike
from ..models.call import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    select_context,
)
from ._ranking import choose, defer, without
from ._shared import (
    check_counts,
    check_filters,
    check_hooks,
    check_sizes,
    check_vocab_size,
    device_of,
    fill_prompt,
    latents_of,
    seed_of,
)
from ._transfer import (
    Layout,
    State,
    Step,
    counted_steps,
    known_steps,
    open_steps,
    planned_steps,
)

__all__ = ["CONFIDENCE_RULES", "sample_confidence"]

# The field of `Draw` that each rule reads.
_FIELDS = {
    "low_confidence": ("raw_prob",),
    "random": (),
    "maskgit_plus": ("prob",),
    "topk_margin": ("margin",),
    "entropy": ("entropy",),
    "origin": (),
}
CONFIDENCE_RULES = tuple(_FIELDS)
# Step numbers of the generator for noise on confidences; λ takes those from 0 on.
_ORDER = 2**30


@torch.no_grad()
def sample_confidence(
    model: Callable[..., HeadLike],
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int | None = None,
    rule: str = "low_confidence",
    schedule: str = "even",
    t_min: float = 1e-3,
    block_length: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    confidence_temperature: float = 0.0,
    guidance_scale: float = 0.0,
    shift: bool = False,
    exclude_mask: bool = True,
    banned_ids: Sequence[int] = (),
    deferred_ids: Sequence[int] = (),
    eos_id: int | None = None,
    confidence_dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    latent_dim: int = 0,
    latent: Tensor | None = None,
    prompt: Tensor | None = None,
    context: Context | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_sequence: int = 0,
    active_only: bool = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
    history: list[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Fill token rows in the order of the model's confidence.

    The positions behind the prompt are filled block by block. A step of a block draws a token x
    at every masked position and lets the most confident keep theirs; confidence, by `rule`:

    | rule | confidence of x |
    |---|---|
    | low_confidence | softmax(logits)[x], without temperature, top-p, top-k (LLaDA) |
    | random | a random number (LLaDA) |
    | maskgit_plus | p[x], with p = softmax after temperature, top-p, top-k (Dream) |
    | topk_margin | the largest minus the second largest of p (Dream) |
    | entropy | Σ p log p (Dream) |
    | origin | none: every position has its turn at random, as in `sample_masked` (Dream) |

    How many keep theirs, in each sequence, with n masked positions in the block at its start:

    * schedule="even": n/S at every of the block's S steps, the remainder one by one over the
      first of them (LLaDA).
    * schedule="ancestral": int(n_now · (1 − s/t)) between the times t and s of
      linspace(1, t_min, S + 1), at the last step all (Dream).
    * threshold: the most confident, and all others with confidence >= threshold (Fast-dLLM).
    * factor: the longest run of the most confident with conf_n >= 1 − factor/(n + 1) for the n-th
      of them, and at least one (Fast-dLLM's paper; its code lets the last masked position pass
      with the last but one).

    Equal confidences: the lowest position first.

    Args:
        model: callable (tokens (R, D) int64, t (R,) float32, **context) to logits (R, D, V) or a
            head, with a third argument latent (R, L) if `latent_dim` > 0; t is the share of
            masked positions in each sequence. In eval mode during the call if it is an
            `nn.Module`.
        shape: (B, D), the prompt included.
        mask_id: the mask token.
        steps: in all blocks together, a multiple of their number. With a threshold: None for as
            many as it takes, or, with one block, a cap: after k steps no more positions are
            filled than `schedule="even"` would have filled, as in Fast-dLLM's Dream. With a
            factor: None.
        rule, schedule, t_min, threshold, factor: see above. `origin` uses the times and has no
            counts.
        block_length: None for a single block. The last block may be shorter.
        temperature, top_k, top_p: of the draws, as in `di4c_fast.sample`; 0 takes the argmax.
        confidence_temperature: 0 fills the most confident; T > 0 draws positions without
            replacement with probabilities softmax(confidence / T) (Dream's `alg_temp`).
        guidance_scale: s of u + (s + 1)·(c − u), with u from a second half of the batch whose
            prompt is masked; 0 leaves it out.
        shift: position d takes its logits from row d − 1 of the model, position 0 from row 0
            (Dream).
        exclude_mask: never draw the mask. False, as in LLaDA and Dream: the mask has its share in
            every softmax, a position that draws it stays masked, and the result may hold masks;
            with a threshold or a factor at most D steps are taken.
        banned_ids: tokens that are never drawn.
        deferred_ids: tokens that come last: their confidence is 0, and that of other tokens is
            taken without them. Only with `low_confidence`.
        eos_id: ends a sequence: when a block is done that holds it, behind the prompt, what is
            still masked becomes eos_id without asking the model. None: never.
        confidence_dtype: None for fp32, or the dtype in which a repository computes confidences:
            then bit for bit by its operations, see `di4c_fast.sample`.
        vocab_size: V, to check the model and the prompt against; None accepts the model's.
        latent_dim: L of a mixture student; 0 for a model without λ.
        latent: λ to use: (B, L) for every step, or (steps, B, L); (D, B, L) with a threshold or
            a factor. None draws a fresh one per step and sequence.
        prompt: (B, P) or (P,) int64, the first P tokens of the rows, `mask_id` where a token is
            unknown: that is filled with the first block. Known tokens stay.
        context: tensors (B, ...) by keyword for the model.
        seed: int in [0, 2^63). None: taken from `generator`, or from the default generator.
        generator: source of the seed where `seed` is None.
        first_sequence: number of the first sequence. Randomness is a function of (seed, number
            of the sequence, step, position), so the same sequences come out however they are
            batched (up to the model's own rounding).
        active_only: call the model with only the sequences that have an active position. False
            keeps the batch's shape fixed.
        callback: called as callback(step, total, tokens) after each step that called the model,
            with the step's number from 1; total is `steps`, or the bound D where a rule decides.
        history: a list to which the tokens at the start and after every step that called the
            model are appended; with `eos_id` the result may differ from its last entry, since a
            sequence is ended without a call.
        device: where to sample; None for the prompt's device, else that of the module's
            parameters, else the CPU.

    Returns:
        (B, D) int64.

    Host syncs: before the loop one to read the prompt and one to count what is masked (and one to
    read a seed from a GPU generator); inside the loop none, but with `eos_id` one per block, and
    with `threshold`, `factor` or `exclude_mask=False` one per step, to count what is still masked.

    Memory above the model's: the hidden states of the active rows, a few numbers for each, and
    the head's budget.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a model that
            returns the wrong shape as soon as it does.
    """
    batch, positions = check_sizes(
        shape,
        mask_id=(mask_id, 0),
        latent_dim=(latent_dim, 0),
        first_sequence=(first_sequence, 0),
    )
    check_vocab_size(vocab_size, mask_id)
    check_callable(model, "model")
    _check_rules(rule, schedule, t_min, threshold, factor, confidence_temperature)
    check_filters(temperature, top_k, top_p)
    check_number(guidance_scale, "guidance_scale", minimum=0.0)
    check_bool(shift, "shift")
    check_bool(exclude_mask, "exclude_mask")
    check_bool(active_only, "active_only")
    banned = _check_ids(banned_ids, "banned_ids")
    deferred = _check_ids(deferred_ids, "deferred_ids")
    if deferred and rule != "low_confidence":
        raise ValueError(f'deferred_ids needs rule="low_confidence", got {rule!r}')
    if mask_id in deferred:
        raise ValueError(f"deferred_ids must not hold the mask, {mask_id}")
    if not exclude_mask and rule == "origin":
        raise ValueError('exclude_mask=False needs a rule with counts, got rule="origin"')
    if eos_id is not None:
        check_counts([("eos_id", eos_id, 0)])
    if confidence_dtype is not None and confidence_dtype not in CONFIDENCE_DTYPES:
        known = ", ".join(str(dtype) for dtype in CONFIDENCE_DTYPES)
        raise ValueError(f"confidence_dtype must be None or one of {known}, got {confidence_dtype}")
    check_hooks(callback, history)

    tokens = torch.full(
        (batch, positions), mask_id, dtype=torch.int64, device=device_of(device, prompt, model)
    )
    device = tokens.device
    context = check_context(context, batch, device)
    seed = seed_of(seed, generator)
    top_token = fill_prompt(tokens, prompt, vocab_size) if prompt is not None else 0
    top_id = max([mask_id, *banned, *deferred, eos_id or 0])
    prompt_length = 0 if prompt is None else prompt.shape[-1]
    given = tokens != mask_id
    rest = positions - prompt_length
    if block_length is not None:
        check_counts([("block_length", block_length, 1)])
    layout = Layout(
        mask_id=mask_id,
        prompt_length=prompt_length,
        positions=positions,
        block_length=block_length or max(rest, 1),
        steps=None,
        schedule=schedule,
        t_min=t_min,
        eos_id=eos_id,
    )
    layout = _with_steps(layout, steps, threshold, factor)
    open_ended = threshold is not None or factor is not None
    total = positions if open_ended or steps is None else steps
    latent = latents_of(
        latent,
        latent_dim,
        total,
        batch,
        seed=seed,
        first_sequence=first_sequence,
        device=device,
        letter="D" if open_ended else "S",
    )
    state = State(tokens)
    plan: Iterator[Step]
    if open_ended:
        plan = open_steps(state, layout)
    elif rule == "origin":
        plan = planned_steps(state, layout, seed=seed, first_sequence=first_sequence)
    else:
        plan = (known_steps if exclude_mask else counted_steps)(state, layout)
    if history is not None:
        history.append(tokens)
    first_key = first_sequence * positions
    place = torch.arange(positions, device=device)
    everyone = torch.arange(batch, device=device)
    banned_at = torch.tensor(banned, dtype=torch.int64, device=device)
    deferred_at = torch.tensor(deferred, dtype=torch.int64, device=device)
    # The draw's logsumexp is that of the plain logits unless something changed them.
    plain = temperature in (0.0, 1.0) and top_k is None and top_p is None
    want = _FIELDS[rule] + (("logsumexp",) if deferred and plain else ())
    checked = False

    with evaluation_mode(model):
        for step in plan:
            tokens = state.tokens
            active = (tokens == mask_id) & (place < step.limit)
            flat = step.flat
            if flat is None:
                # The first `rows` of a stable sort: nonzero() would wait for the device.
                order = (~active).flatten().to(torch.int8).argsort(stable=True)
                flat = order[: step.rows]
            sequences = step.sequences if active_only else everyone
            lam = latent if latent is None or latent.ndim == 2 else latent[step.number]
            head = _call(
                model, tokens, given, sequences, lam, context, mask_id, guidance_scale, vocab_size
            )
            if not checked:
                _check_vocabulary(head.shape[-1], top_id, top_token)
                checked = True
            number = torch.zeros(batch, dtype=torch.int64, device=device)
            number[sequences] = everyone[: len(sequences)]
            rows = number[flat // positions] * positions + flat % positions
            if shift:
                rows = rows - (flat % positions > 0).long()
            guidance = None
            if guidance_scale:
                guidance = (head.take(rows + len(sequences) * positions), guidance_scale)
            taken = without(head.take(rows), banned_at)
            draw = sample(
                taken,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                guidance=guidance,
                mask_id=mask_id if exclude_mask else None,
                seed=seed,
                step=step.number,
                row_keys=flat + first_key,
                want=want,
                confidence_dtype=confidence_dtype if _FIELDS[rule] else None,
            )
            drawn = tokens.flatten().index_copy(0, flat, draw.token).view(batch, positions)
            if rule == "origin":
                tokens = drawn
            else:
                noise_step, keys = _ORDER + step.number, flat + first_key
                if rule == "random":
                    confidence = rng.uniform(seed, noise_step, keys, 1)[:, 0]
                else:
                    confidence = _confidence(draw, rule)
                if deferred:
                    total_mass = draw.logsumexp
                    if total_mass is None:
                        total_mass = sample(
                            taken,
                            temperature=0.0,
                            guidance=guidance,
                            mask_id=mask_id if exclude_mask else None,
                            want=("logsumexp",),
                        ).logsumexp
                    assert total_mass is not None
                    confidence = defer(
                        confidence, draw.token, total_mass, deferred_at, taken, guidance
                    )
                ranking = confidence
                if confidence_temperature:
                    u = rng.uniform(seed, noise_step, keys, 4)[:, 1]
                    gumbel = rng.exponential(u).log().neg()
                    ranking = confidence.float() / confidence_temperature + gumbel
                chosen = choose(confidence, ranking, flat, step.counts, active, threshold, factor)
                tokens = torch.where(chosen, drawn, tokens)
            state.tokens = tokens
            if history is not None:
                history.append(tokens)
            if callback is not None:
                callback(step.number + 1, total, tokens)
    return state.tokens


def _call(
    model: Callable[..., HeadLike],
    tokens: Tensor,
    given: Tensor,
    sequences: Tensor,
    lam: Tensor | None,
    context: Context,
    mask_id: int,
    guidance_scale: float,
    vocab_size: int | None,
) -> Head:
    """The model on some of the sequences, with guidance followed by them without their prompts."""
    everyone = len(sequences) == len(tokens)
    inputs = tokens if everyone else tokens[sequences]
    some = context if everyone else select_context(context, sequences)
    lam = lam if lam is None or everyone else lam[sequences]
    t = (inputs == mask_id).float().mean(1)
    if guidance_scale:
        without = torch.where(given if everyone else given[sequences], mask_id, inputs)
        inputs = torch.cat([inputs, without])
        t = torch.cat([t, (without == mask_id).float().mean(1)])
        lam = None if lam is None else torch.cat([lam, lam])
        some = {key: torch.cat([value, value]) for key, value in some.items()}
    return call_model(model, "model", inputs, t, lam, some, vocab_size)


def _confidence(draw: Draw, rule: str) -> Tensor:
    (field,) = _FIELDS[rule]
    value = getattr(draw, field)
    return -value if rule == "entropy" else value


def _check_rules(
    rule: Any, schedule: Any, t_min: Any, threshold: Any, factor: Any, confidence_temperature: Any
) -> None:
    check_choice(rule, "rule", CONFIDENCE_RULES)
    check_choice(schedule, "schedule", ("even", "ancestral"))
    check_number(t_min, "t_min")
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"t_min must be in (0, 1), got {t_min}")
    check_number(confidence_temperature, "confidence_temperature", minimum=0.0)
    if threshold is not None:
        check_number(threshold, "threshold")
    if factor is not None:
        check_number(factor, "factor", minimum=0.0)
    if threshold is not None and factor is not None:
        raise ValueError("threshold and factor exclude each other: pass one of them")
    if rule in ("origin", "random") and not (threshold is None and factor is None):
        name = "threshold" if factor is None else "factor"
        raise ValueError(f"{name} needs a rule with confidences of the model, got {rule!r}")
    if rule == "origin" and confidence_temperature:
        raise ValueError('confidence_temperature needs confidences, got rule="origin"')


def _check_ids(ids: Any, name: str) -> list[int]:
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise TypeError(f"{name} must be a sequence of ints, got {describe(ids)}")
    check_counts([(f"{name}[{i}]", value, 0) for i, value in enumerate(ids)])
    return list(ids)


def _with_steps(layout: Layout, steps: Any, threshold: Any, factor: Any) -> Layout:
    """The layout with the steps of a block."""
    if steps is None:
        if threshold is None and factor is None:
            raise ValueError("steps must be an int without a threshold or a factor, got None")
        return layout
    check_counts([("steps", steps, 1)])
    if factor is not None:
        raise ValueError(f"steps must be None with a factor, got {steps}")
    if threshold is not None and layout.blocks > 1:
        raise ValueError(
            f"steps caps a threshold in a single block only, got {layout.blocks} blocks"
        )
    if steps % layout.blocks:
        raise ValueError(
            f"steps must be a multiple of the number of blocks, {layout.blocks}, got {steps}"
        )
    return Layout(**{**vars(layout), "steps": steps // layout.blocks})


def _check_vocabulary(vocabulary: int, top_id: int, top_token: int) -> None:
    """What could not be checked before the model had said how many classes there are."""
    if vocabulary < 2:
        raise ValueError(f"model must return at least 2 classes with a mask_id, got {vocabulary}")
    if top_id >= vocabulary:
        raise ValueError(
            "mask_id, eos_id, banned_ids and deferred_ids must be in [0, V) = "
            f"[0, {vocabulary}) of model, got {top_id}"
        )
    if top_token >= vocabulary:
        raise ValueError(
            f"prompt must hold token ids in [0, V) = [0, {vocabulary}) of model, got {top_token}"
        )
