"""Confidence sampling of masked diffusion language models: the rules of LLaDA, Dream, Fast-dLLM.

Only the masked positions of the current block go through the head: neither the prompt, nor filled
positions, nor what lies behind the block. A row of logits is read once, for the token and its
confidence together.

Sources: LLaDA (arXiv 2502.09992), Dream 7B (arXiv 2508.15487), Fast-dLLM (arXiv 2505.22618).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_int, check_number, check_within, describe
from ..draw.api import sample
from ..heads import Head
from .arguments import MaskDrawOptions, Model, Unpack, check_counts, check_flags, sampler
from .blocks import Blocks
from .caches import WINDOWS, check_latents, check_window
from .loop import Answer, Guidance, Run, Step, single_logits

__all__ = ["CONFIDENCE_RULES", "sample_confidence"]

# The statistic of the draw that each rule reads, and its sign.
_FIELDS: dict[str, tuple[str, int] | None] = {
    "low_confidence": ("raw_prob", 1),
    "random": None,
    "maskgit_plus": ("prob", 1),
    "topk_margin": ("margin", 1),
    "entropy": ("entropy", -1),
    "origin": None,
}
CONFIDENCE_RULES = tuple(_FIELDS)


@sampler(MaskDrawOptions, temperature=0.0)
def sample_confidence(
    model: Model,
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
    confidence_temperature: float = 0.0,
    guidance_scale: float = 0.0,
    shift: bool = False,
    exclude_mask: bool = True,
    banned_ids: Sequence[int] = (),
    deferred_ids: Sequence[int] = (),
    eos_id: int | None = None,
    confidence_dtype: torch.dtype | None = None,
    active_only: bool = True,
    window: str = "all",
    lead: bool = False,
    latent_every: str = "step",
    **options: Unpack[MaskDrawOptions],
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

    What the model is called on, by `window`:

    | window | first call of a block | later calls |
    |---|---|---|
    | all | all positions | all positions |
    | suffix | all positions | from the block's start on (Fast-dLLM's prefix cache) |
    | block | all positions | the block (Fast-dLLM's dual cache) |
    | causal | the block | the block (BD3LM); `model.commit` stores what is before it, once |

    With "suffix" and "block" what is outside the call is seen as it was at the block's first call:
    the tokens are no longer exactly those of "all". All but "all" need a model with a cache, see
    `di4c_fast.samplers.caches`; the head has only the rows of the call, and what a sequence becomes
    still does not depend on the others, which are all in the same block.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        model: t is the share of masked positions in each sequence.
        steps: in all blocks together, a multiple of their number. With a threshold: None for as
            many as it takes, or, with one block, a cap: after k steps no more positions are
            filled than `schedule="even"` would have filled, as in Fast-dLLM's Dream. With a
            factor: None.
        rule, schedule, t_min, threshold, factor: see above. `origin` uses the times and has no
            counts. A threshold of probabilities or margins is in [0, 1].
        block_length: None for a single block. The last block may be shorter.
        temperature: 0 takes the argmax.
        confidence_temperature: 0 fills the most confident; T > 0 draws positions without
            replacement with probabilities softmax(confidence / T) (Dream's `alg_temp`).
        guidance_scale: s of u + (s + 1)·(c − u), with u from a second half of the batch whose
            prompt is masked; 0 leaves it out.
        shift: position d takes its logits from row d − 1 of the model, position 0 from row 0
            (Dream).
        exclude_mask: never draw the mask. False, as in LLaDA and Dream: the mask has its share in
            every softmax, a position that draws it stays masked, and the result may hold masks;
            with a threshold or a factor at most D steps are taken. With window="all" later blocks
            try again what was left masked; with the others it stays, and a cache sees the mask.
        banned_ids: tokens that are never drawn.
        deferred_ids: tokens that come last: their confidence is 0, and that of other tokens is
            taken without them. Only with `low_confidence`.
        eos_id: ends a sequence: when a block is done that holds it, behind the prompt, what is
            still masked becomes eos_id without asking the model. None: never.
        confidence_dtype: None for fp32, or the dtype in which a repository computes confidences:
            then bit for bit by its operations, see `di4c_fast.sample`.
        window: see above. "causal" knows no guidance and no shift, whose rows are committed.
        lead: the first step of every block fills its first position and no other (Fast-dLLM's
            cached Dream). Only with a window, and schedule="ancestral", a threshold or a factor.
        latent_every: "block" keeps the λ of a block's first step to its end, as a cache needs it: a
            window other than "all" refuses a fresh λ per step.
        latent: (D, B, L) for λ per step with a threshold or a factor.
        prompt: its unknown tokens are filled with the first block; a window other than "all" needs
            all of them known.

    The hooks hear of the steps that call the model; their total is `steps`, or the bound D where
    a rule decides. With `eos_id` the result may differ from the last entry of `history`, since a
    sequence is ended without a call.

    Host syncs: before the loop one to read the prompt and one to count what is masked, with a
    window one more to see that the prompt is known; inside none, but with `eos_id` one per block,
    and with `threshold`, `factor` or `exclude_mask=False` one per step, to count what is still
    masked. A model's cache may have its own. Memory above the model's: the hidden states of the
    active rows, a few numbers for each, and the head's budget.
    """
    check_choice(rule, "rule", CONFIDENCE_RULES)
    check_choice(schedule, "schedule", ("even", "ancestral"))
    check_within(t_min, "t_min", "(0, 1)")
    check_number(guidance_scale, "guidance_scale", minimum=0.0)
    check_number(confidence_temperature, "confidence_temperature", minimum=0.0)
    check_number(0.0 if threshold is None else threshold, "threshold")
    check_number(0.0 if factor is None else factor, "factor", minimum=0.0)
    check_flags(shift=shift, exclude_mask=exclude_mask, active_only=active_only, lead=lead)
    check_choice(window, "window", WINDOWS)
    check_latents(window, latent_every, options)
    given_ids = {"banned_ids": banned_ids, "deferred_ids": deferred_ids}
    banned, deferred = (_check_ids(ids, name) for name, ids in given_ids.items())
    check_int(mask_id, "mask_id", minimum=0)
    optional = (("steps", steps, 1), ("eos_id", eos_id, 0), ("block_length", block_length, 1))
    check_counts([count for count in optional if count[1] is not None])
    open_ended, origin = threshold is not None or factor is not None, rule == "origin"
    field = _FIELDS[rule]  # None for origin and random
    cached, causal = window != "all", window == "causal"
    bounded = threshold is None or rule == "entropy" or 0.0 <= threshold <= 1.0
    name, late = "threshold" if factor is None else "factor", "low_confidence"
    for wrong, message in (
        (threshold is not None and factor is not None, "threshold and factor exclude each other"),
        (not bounded, f"threshold must be in [0, 1] with rule={rule!r}, got {threshold}"),
        (open_ended and field is None, f"{name} needs confidences, got rule={rule!r}"),
        (origin and confidence_temperature, "confidence_temperature needs a rule but origin"),
        (origin and not exclude_mask, "exclude_mask=False needs a rule with counts, got origin"),
        (deferred and rule != late, f"deferred_ids needs rule={late!r}, got {rule!r}"),
        (steps and factor is not None, f"steps must be None with a factor, got {steps}"),
        (not open_ended and steps is None, "steps must be an int, or threshold or factor given"),
        (
            not cached and open_ended and latent_every == "block",
            f"latent_every='block' with a {name} "
            "needs a window other than 'all', where sequences are in blocks of their own",
        ),
        (
            causal and guidance_scale,
            "guidance_scale needs a cache of its own, which window='causal' has not",
        ),
        (
            causal and shift,
            "shift needs the row before a block, which is committed with window='causal'",
        ),
        (lead and not cached, "lead needs a window other than 'all'"),
        (lead and origin, "lead needs a rule with counts, got origin"),
        (
            lead and schedule == "even" and not open_ended,
            "lead needs schedule='ancestral', a threshold or a factor",
        ),
        (mask_id in deferred, f"deferred_ids must not hold the mask, {mask_id}"),
        (eos_id == mask_id, f"eos_id must not hold the mask, {mask_id}"),
    ):
        if wrong:
            raise ValueError(message)
    ids = {"banned_ids": max(banned, default=0), "deferred_ids": max(deferred, default=0)}
    run = Run(
        model,
        shape,
        {**options, "confidence_dtype": confidence_dtype},
        calls=None if open_ended else steps,
        mask_id=mask_id,
        exclude_mask=exclude_mask,
        ids={"mask_id": mask_id, "eos_id": eos_id or 0, **ids},
    )
    run.shift = shift
    prompt = options["prompt"]
    length = 0 if prompt is None else prompt.shape[-1]
    check_window(model, window, block_length, length, run.positions)
    run.banned = torch.tensor(banned, device=run.device) if banned else None
    last = torch.tensor(deferred, device=run.device) if deferred else None
    want = () if field is None else (field[0],)
    if field is None:
        run.draws["confidence_dtype"] = None
    # The draw's logsumexp is that of the plain logits unless something changed them.
    changed = run.draws["temperature"] not in (0.0, 1.0) or options["top_k"] or options["top_p"]
    if last is not None and not changed:
        want = (*want, "logsumexp")
    how = (schedule, t_min, eos_id, threshold is not None, window, lead)
    blocks = Blocks(run, prompt, block_length, steps, *how)
    if open_ended:
        fills = blocks.counted(open_ended=True) if cached else blocks.open()
    else:
        fills = blocks.known(origin=origin) if exclude_mask else blocks.counted()
    given, place = ~run.masked(), torch.arange(run.positions, device=run.device)
    active, counts = given, None  # of the step

    def filling() -> Iterator[Step]:
        nonlocal active, counts
        before: Step | None = None
        committed = 0
        for fill in fills:
            active, counts = run.masked() & (place < fill.limit), fill.counts
            if fill.begin:
                active &= place >= fill.begin
            if blocks.turns is not None:
                active = active & (blocks.turns == fill.number)
            rows = run.rows_of(active, fill.size)
            guidance = None
            if guidance_scale:
                without = torch.where(given, mask_id, run.tokens)
                guidance = Guidance(guidance_scale, without, run.context)
            some = fill.sequences if active_only else None
            how = None if origin else keep
            lam = fill.opening if latent_every == "block" else None
            step = Step(
                fill.number, None, rows, some, how,
                want=want, guidance=guidance, latent=lam, window=fill.window,
            )  # fmt: skip
            if causal and committed < fill.begin:
                run.commit(before or step, committed, fill.begin)
                committed = fill.begin
            before = step
            yield step

    def keep(step: Step, answer: Answer) -> Tensor:
        if field is None:
            confidence = run.uniform(step, 1, torch.float32)[:, 0]
        else:
            confidence = getattr(answer.draw, field[0]) * field[1]
        if last is not None:
            confidence = _deferred(confidence, answer, run.draws["mask_id"], last)
        ranking = confidence
        if confidence_temperature:
            noise = rng.exponential(run.uniform(step, 4, torch.float32)[:, 1]).log().neg()
            ranking = confidence.float() / confidence_temperature + noise
        ranked = run.put(step, ranking, fill=-torch.inf)
        order = ranked.argsort(dim=1, descending=True, stable=True)
        passes = torch.ones_like(active)
        if open_ended:
            bound: Any = threshold if factor is None else 1.0 - factor / (place + 2).double()
            passes = run.put(step, confidence, fill=-torch.inf).gather(1, order) >= bound
            passes[:, 0] = True
            passes = passes if factor is None else passes.int().cumprod(1).bool()
        if counts is not None:
            passes &= place < counts.unsqueeze(1)
        chosen = torch.zeros_like(active).scatter_(1, order, passes) & active
        return torch.where(chosen, run.put(step, answer.draw.token), run.tokens)

    return run.loop(filling())


def _deferred(confidence: Tensor, answer: Answer, mask_id: int | None, ids: Tensor) -> Tensor:
    """Confidences p(x)/(1 − p(ids)), and 0 for the ids (E,) themselves."""
    total = answer.draw.logsumexp
    if total is None:  # of the logits without temperature and filters
        plain: dict[str, Any] = {"guidance": answer.guidance, "mask_id": mask_id}
        total = sample(answer.head, temperature=0.0, want=("logsumexp",), **plain).logsumexp
    assert total is not None
    own = _columns(answer.head, ids)
    if answer.guidance is not None:
        head, scale = answer.guidance
        other = _columns(head, ids)
        guided = other + (scale + 1) * (own - other)
        own = torch.where(own == -torch.inf, own, guided)
    share = (own - total.unsqueeze(1)).exp().sum(1)
    others = (confidence / (1.0 - share).clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(torch.isin(answer.draw.token, ids), 0.0, others).to(confidence.dtype)


def _columns(head: Head, ids: Tensor) -> Tensor:
    """The logits of some columns, (R, E) in fp32 or fp64, without the others."""
    count = head.shape[0]
    return torch.stack([single_logits(head, token.expand(count)) for token in ids], 1)


def _check_ids(ids: Any, name: str) -> list[int]:
    if not isinstance(ids, Sequence) or isinstance(ids, str):
        raise TypeError(f"{name} must be a sequence of ints, got {describe(ids)}")
    return [check_int(value, f"{name}[{i}]", minimum=0) for i, value in enumerate(ids)]
