"""MaskGIT sampling: every step draws all masked positions and keeps the most confident draws.

How many positions a step reveals is a schedule, known before the loop, so the loop never asks
the device how far it has got: the head computes the masked rows only, a step that reveals
nothing calls no model, a guidance weight of 0 costs no unconditional pass, and a step that
reveals all that is left needs no confidence.

Source: MaskGIT (arXiv 2202.04200), its PyTorch reproduction by valeoai, and the VQ image
experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_number
from ..models.call import Context, check_callable, check_context
from ..processes.reveal import NOISE, check_schedule, gumbel, most_confident, reveal_counts
from .arguments import MaskDrawOptions, Model, Unpack, check_counts, check_flags, sampler
from .loop import Answer, Guidance, Run, Step, moved

__all__ = ["sample_maskgit"]

RANDOMIZE = ("linear", "warm_up", "random", "none")
_WARM_UP_STEPS = 2


@sampler(MaskDrawOptions)
def sample_maskgit(
    model: Model,
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int,
    schedule: str | Sequence[int] = "arccos",
    schedule_style: Literal["di4c", "valeoai", "valeoai_v1"] = "di4c",
    guidance: float = 0.0,
    guidance_schedule: Literal["linear", "constant"] = "linear",
    unconditional: Context | None = None,
    guidance_model: Model | None = None,
    randomize: Literal["linear", "warm_up", "random", "none"] = "linear",
    gumbel_temperature: float = 4.5,
    resample: bool = False,
    exclude_mask: bool = True,
    **options: Unpack[MaskDrawOptions],
) -> Tensor:
    """Draw token rows by confidence: the sampler of MaskGIT, for mixture students too.

    Step i of n calls `model` at time t = 1 - i/n, draws a token x at every masked position and
    reveals the k_i positions of highest confidence, of equals the first ones:

        logits = (1 + w_i)·conditional - w_i·unconditional,   w_i = guidance·i/(n-1)
        x ~ softmax(logits / temperature)
        confidence = log p(x) + gumbel_temperature·(1 - i/(n-1))·Gumbel

    At n = 1 the fraction i/(n-1) is 0: one step is the first step, without guidance.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        steps: n >= 1. Each reveals at least one position, so that at most D of them work.
        schedule: "arccos", "cosine", "linear", "square", "root", or n counts k_i, in all at least
            the number of unknown positions. Counts above what is left are cut.
        schedule_style: how a name becomes counts: as in the code of Di4C, of today's valeoai
            repository or of its first version; see `di4c_fast.processes.reveal.reveal_counts`.
        latent: both halves of a guided call share it.
        prompt: P = D serves inpainting; the schedule of a row counts its unknown positions only.
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
        temperature: the `sm_temp` of the published code multiplies: it is 1/temperature. p is that
            of the drawn distribution, at temperature 0 that of temperature 1.
        resample: every step also draws the positions anew that earlier steps have revealed, as
            today's valeoai repository does (prompt tokens stay). The head then computes all rows.
        exclude_mask: never draw the mask token. False is what the published code does: with
            `resample` such a position is masked again, without it counts as revealed; the
            result may hold mask tokens. A model without a column for the mask needs False.

    The hooks hear of every step. Host syncs: before the loop two to read the prompt; inside none.
    """
    check_counts([("steps", steps, 1)])
    check_flags(resample=resample, exclude_mask=exclude_mask)
    check_schedule(schedule, steps, schedule_style)
    check_number(guidance, "guidance")
    check_choice(guidance_schedule, "guidance_schedule", ("linear", "constant"))
    check_choice(randomize, "randomize", RANDOMIZE)
    check_number(gumbel_temperature, "gumbel_temperature", minimum=0.0)
    if guidance_model is not None:
        check_callable(guidance_model, "guidance_model")
    elif guidance != 0.0 and not unconditional:
        raise ValueError(
            "guidance needs unconditional, the other half's context, or a guidance_model"
        )
    run = Run(
        model,
        shape,
        options,
        calls=steps,
        mask_id=mask_id,
        exclude_mask=exclude_mask,
        ids=None if exclude_mask else {},
        other=guidance_model,
    )
    without = check_context(unconditional, run.batch, run.device, "unconditional")
    if guidance_model is None and unconditional is not None:  # halves of one call
        kinds, wanted = (
            {key: (tuple(x.shape), x.dtype) for key, x in sorted(some.items())}
            for some in (without, run.context)
        )
        if kinds != wanted:
            raise ValueError(
                "unconditional must have the keywords, shapes and dtypes of context, "
                f"{wanted}, got {kinds}"
            )
    masked = torch.full((run.batch,), run.positions)
    if options["prompt"] is not None:
        masked = run.masked().sum(-1).cpu()
    unique, index = torch.unique(masked, return_inverse=True)
    if not isinstance(schedule, str) and sum(schedule) < max(unique.tolist(), default=0):
        raise ValueError(
            "schedule must hold counts that reveal every unknown position, "
            f"{int(unique.max())} of them, got {sum(schedule)} in all"
        )
    table = [reveal_counts(steps, int(m), schedule, schedule_style) for m in unique.tolist()]
    counts = torch.tensor(table, dtype=torch.int64).view(-1, steps)[index].T  # (S, B), revealed
    fractions = [step / max(steps - 1, 1) for step in range(steps)]
    totals = counts.cumsum(0)
    masked = totals[-1]
    left = masked - totals + counts  # before each step
    takes_part = (masked > 0).expand(steps, -1) if resample else counts > 0
    sizes = ((masked if resample else left) * takes_part).sum(-1).tolist()
    all_at_once = ((left == counts) | ~takes_part).all(-1).tolist()
    # With resampling, filled positions come first and are among those counted.
    to_reveal = (totals if resample else counts).flatten()
    takers = [row.nonzero()[:, 0] for row in takes_part]
    flat, flags, *takers = moved([to_reveal, takes_part.flatten().long(), *takers], run.device)
    to_reveal, flags = flat.view(steps, -1), flags.view(steps, -1, 1).bool()
    waiting = unknown = run.masked()  # not yet revealed; outside the prompt

    def rule() -> Iterator[Step]:
        for i, fraction in enumerate(fractions):
            weight = guidance * (1.0 if guidance_schedule == "constant" else fraction)
            given = Guidance(weight, run.tokens, without) if weight else None
            rows = run.rows_of((unknown if resample else waiting) & flags[i], sizes[i])
            time, want = 1.0 - i / steps, ("log_prob",)
            yield Step(i, time, rows, takers[i], fill, want=want, guidance=given)

    def fill(step: Step, answer: Answer) -> Tensor:
        nonlocal waiting
        i, drawn, filled = step.number, run.put(step, answer.draw.token), unknown & ~waiting
        if all_at_once[i]:
            reveal = waiting & flags[i]
        else:
            sure = confidence(step, answer).masked_fill(~waiting, -torch.inf)
            if resample:
                sure = sure.masked_fill(filled, torch.inf)
            reveal = most_confident(sure, to_reveal[i]) & waiting
        after = torch.where(reveal | filled if resample else reveal, drawn, run.tokens)
        waiting = waiting & ~reveal
        if resample and not exclude_mask:  # drawn masks are masked again
            waiting = unknown & (after == mask_id)
        return after

    def confidence(step: Step, answer: Answer) -> Tensor:
        """(B, D) fp64; of no meaning outside the rows of the step."""
        i, keys = step.number, run.sequence_keys(run.device)
        if randomize == "random" or (randomize == "warm_up" and i < _WARM_UP_STEPS):
            return rng.uniform(run.seed, NOISE + i, keys, run.positions, dtype=torch.float64)
        assert answer.draw.log_prob is not None
        sure = run.put(step, answer.draw.log_prob.double(), fill=0.0)
        if randomize == "linear":
            noise = gumbel(run.seed, i, keys, run.positions)
            sure += noise * (gumbel_temperature * (1.0 - fractions[i]))
        return sure

    return run.loop(rule())
