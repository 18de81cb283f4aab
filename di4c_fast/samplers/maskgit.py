"""MaskGIT sampling: every step draws all masked positions and keeps the most confident draws.

How many positions a step reveals is a schedule, known before the loop, so the loop never asks
the device how far it has got: the head computes the masked rows only, a step that reveals
nothing calls no model, a guidance weight of 0 costs no unconditional pass, and a step that
reveals all that is left needs no confidence.

Source: MaskGIT (arXiv 2202.04200), its PyTorch reproduction by valeoai, and the VQ image
experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_number
from ..heads import HeadLike
from ..models.call import Context, check_callable, check_context
from ..processes.reveal import (
    NOISE,
    check_gumbel_temperature,
    check_schedule,
    gumbel,
    most_confident,
    reveal_counts,
)
from .arguments import check_counts, check_filters
from .loop import Answer, Guidance, Rule, Run, Visit, check_flags, moved

__all__ = ["sample_maskgit"]

RANDOMIZE = ("linear", "warm_up", "random", "none")
_WARM_UP_STEPS = 2


class _MaskGIT(Rule):
    """counts (S, B) on the CPU; weights: of guidance, one per step; factors: of the noise."""

    def __init__(
        self,
        counts: Tensor,
        weights: list[float],
        factors: list[float],
        randomize: str,
        resample: bool,
        options: dict[str, Any],
        unconditional: Context,
    ):
        self.counts, self.weights, self.factors = counts, weights, factors
        self.randomize, self.resample, self.options = randomize, resample, options
        self.unconditional = unconditional

    def visits(self, run: Run) -> Iterator[Visit]:
        steps, counts, resample = len(self.counts), self.counts, self.resample
        totals = counts.cumsum(0)
        masked = totals[-1]
        left = masked - totals + counts  # before each step
        takes_part = (masked > 0).expand(steps, -1) if resample else counts > 0
        sizes = ((masked if resample else left) * takes_part).sum(-1).tolist()
        self.all_at_once = ((left == counts) | ~takes_part).all(-1).tolist()
        # With resampling, filled positions come first and are among those counted.
        to_reveal = (totals if resample else counts).flatten()
        takers = [row.nonzero()[:, 0] for row in takes_part]
        flat, flags, *takers = moved([to_reveal, takes_part.flatten().long(), *takers], run.device)
        self.to_reveal, self.flags = flat.view(steps, -1), flags.view(steps, -1).bool()
        self.waiting = self.unknown = run.masked()  # not yet revealed; outside the prompt
        for step in range(steps):
            guidance = None
            if self.weights[step]:
                apart = run.other is not None
                guidance = Guidance(self.weights[step], run.tokens, self.unconditional, apart)
            wanted = (self.unknown if resample else self.waiting) & self.flags[step].unsqueeze(1)
            rows = run.rows_of(wanted, sizes[step])
            time = 1.0 - step / steps
            yield Visit(step, time, rows, takers[step], want=("log_prob",), guidance=guidance)

    def fill(self, run: Run, visit: Visit, answer: Answer) -> Tensor:
        step, drawn = visit.number, run.put(visit, answer.draw.token)
        filled = self.unknown & ~self.waiting
        if self.all_at_once[step]:
            reveal = self.waiting & self.flags[step].unsqueeze(1)
        else:
            confidence = self._confidence(run, visit, answer).masked_fill(~self.waiting, -torch.inf)
            if self.resample:
                confidence = confidence.masked_fill(filled, torch.inf)
            reveal = most_confident(confidence, self.to_reveal[step]) & self.waiting
        after = torch.where(reveal | filled if self.resample else reveal, drawn, run.tokens)
        self.waiting = self.waiting & ~reveal
        if self.resample and self.options["mask_id"] is None:  # drawn masks are masked again
            self.waiting = self.unknown & (after == run.mask_id)
        return after

    def _confidence(self, run: Run, visit: Visit, answer: Answer) -> Tensor:
        """(B, D) fp64; of no meaning outside the rows of the visit."""
        step, keys = visit.number, run.sequence_keys(run.device)
        if self.randomize == "random" or (self.randomize == "warm_up" and step < _WARM_UP_STEPS):
            return rng.uniform(run.seed, NOISE + step, keys, run.positions, dtype=torch.float64)
        if self.randomize == "linear":
            noise = gumbel(run.seed, step, keys, run.positions) * self.factors[step]
        else:
            noise = torch.zeros(run.tokens.shape, dtype=torch.float64, device=run.device)
        assert answer.draw.log_prob is not None
        assert visit.rows is not None
        log_prob = answer.draw.log_prob.double()
        return noise.flatten().index_add(0, visit.rows, log_prob).view_as(noise)


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
    check_counts([("steps", steps, 1), ("mask_id", mask_id, 0)])
    check_flags(resample=resample, exclude_mask=exclude_mask)
    if guidance_model is not None:
        check_callable(guidance_model, "guidance_model")
    check_schedule(schedule, steps, schedule_style)
    check_number(guidance, "guidance")
    check_choice(guidance_schedule, "guidance_schedule", ("linear", "constant"))
    check_choice(randomize, "randomize", RANDOMIZE)
    check_gumbel_temperature(gumbel_temperature)
    options = check_filters(temperature, top_k, top_p)
    run = Run(model, shape, device, prompt)
    run.other = guidance_model
    run.set_seed(seed, generator, first_sequence)
    ids = {"mask_id": mask_id} if exclude_mask else {}
    run.set_vocabulary(vocab_size, ids, " unless exclude_mask=False")
    run.set_tokens(mask_id, prompt, context)
    if guidance != 0.0 and guidance_model is None and not unconditional:
        raise ValueError(
            "guidance needs unconditional, the context of the unconditional half, "
            "or a guidance_model"
        )
    alike = guidance_model is None and unconditional is not None
    unconditional = _check_unconditional(unconditional, run, alike)
    run.set_latents(latent, latent_dim, steps)
    run.set_hooks(callback, history)
    masked = torch.full((run.batch,), run.positions)
    if prompt is not None:
        masked = run.masked().sum(-1).cpu()
    counts = _counts(masked, steps, schedule, schedule_style)
    fractions = [step / max(steps - 1, 1) for step in range(steps)]
    weights = [guidance * (1.0 if guidance_schedule == "constant" else x) for x in fractions]
    factors = [gumbel_temperature * (1.0 - fraction) for fraction in fractions]
    options["mask_id"] = mask_id if exclude_mask else None
    rule = _MaskGIT(counts, weights, factors, randomize, resample, options, unconditional)
    return run.loop(rule, steps)


def _counts(masked: Tensor, steps: int, schedule: str | Sequence[int], style: str) -> Tensor:
    """(S, B): how many positions each step reveals, for `masked` (B,) unknown ones."""
    unique, index = torch.unique(masked, return_inverse=True)
    if not isinstance(schedule, str) and sum(schedule) < max(unique.tolist(), default=0):
        raise ValueError(
            "schedule must hold counts that reveal every unknown position, "
            f"{int(unique.max())} of them, got {sum(schedule)} in all"
        )
    table = [reveal_counts(steps, int(m), schedule, style) for m in unique.tolist()]
    return torch.tensor(table, dtype=torch.int64).view(-1, steps)[index].T


def _check_unconditional(unconditional: Any, run: Run, alike: bool) -> Context:
    """alike: both halves of a guided call are concatenated."""
    try:
        checked = check_context(unconditional, run.batch, run.device)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("context", "unconditional", 1)) from None
    if not alike:
        return checked
    if checked.keys() != run.context.keys():
        raise ValueError(
            f"unconditional must have the keywords of context, {sorted(run.context)}, "
            f"got {sorted(checked)}"
        )
    for key, value in run.context.items():
        got, wanted = ((tuple(x.shape), x.dtype) for x in (checked[key], value))
        if got != wanted:
            raise ValueError(
                f"unconditional[{key!r}] must have the shape and dtype of context[{key!r}], "
                f"{wanted}, got {got}"
            )
    return checked
