"""The confidence rule of MaskGIT: schedules, annealed Gumbel noise, exactly k positions revealed.

The ratio r in [0, 1] says how far a row has got: a share `masked_share(r)` of its positions is
still masked. The time of this package is t = 1 - r.

Source: MaskGIT (arXiv 2202.04200), the PyTorch reproduction by valeoai, and the VQ image
experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_int, describe

SCHEDULES = ("arccos", "cosine", "linear", "square", "root")
STYLES = ("di4c", "valeoai", "valeoai_v1")

# Added to the number of the step, so that the noise shares no number with draws of λ.
NOISE = 3 * 2**30

_POWERS = {"root": 0.5, "linear": 1.0, "square": 2.0}


def masked_share(ratio: Tensor, schedule: str) -> Tensor:
    """The share of positions that is masked at the ratio r: 1 at r = 0, 0 at r = 1.

    "arccos": arccos(r)·2/π; "cosine": cos(r·π/2); "linear": 1 - r; "square": 1 - r²;
    "root": 1 - √r. Shape and dtype of `ratio`, which is in [0, 1].
    """
    if schedule in _POWERS:
        share = 1.0 - ratio ** _POWERS[schedule]
    elif schedule == "cosine":
        share = torch.cos(ratio * math.pi * 0.5)
    else:
        share = torch.arccos(ratio) / (math.pi * 0.5)
    return share.clamp(0.0, 1.0)


def reveal_counts(
    steps: int, positions: int, schedule: str | Sequence[int] = "arccos", style: str = "di4c"
) -> list[int]:
    """How many of `positions` masked positions each step reveals; the sum is `positions`.

    Computed in fp32 as the published code does, so that the counts are the same. Styles:

    * "di4c", the authors': round(D·masked_share(i/n)) remain masked before step i.
    * "valeoai", today's: floor(D·(1 - masked_share(i/(n-1)))) and at least i + 1 are revealed
      after step i.
    * "valeoai_v1": round(D·w_i) in step i with w_i in proportion to masked_share(1 - i/(n-1)).

    In all of them every step reveals at least one position while there are any, never more than
    there are, and the last step reveals the rest, so n = 1 and n > D work too.

    Args:
        schedule: a name, or the counts themselves, of which later ones are cut to what is left.

    >>> reveal_counts(4, 256)
    [41, 44, 53, 118]
    """
    if positions == 0:
        return [0] * steps
    if not isinstance(schedule, str):
        wanted = [int(count) for count in schedule]
    elif style == "valeoai":
        ratio = torch.linspace(0, 1, steps, dtype=torch.float32)
        # Powers directly: 1 - (1 - r^p) could fall below an integer that r^p reaches.
        power = _POWERS.get(schedule)
        share = 1.0 - masked_share(ratio, schedule) if power is None else ratio**power
        totals = (share * positions).int().tolist()
        totals = [0, *(max(total, i + 1) for i, total in enumerate(totals))]
        wanted = [after - before for before, after in itertools.pairwise(totals)]
    elif style == "valeoai_v1":
        share = masked_share(torch.linspace(1, 0, steps, dtype=torch.float32), schedule)
        total = float(share.sum())
        shares = share / share.sum() if total > 0.0 else torch.ones_like(share) / steps
        wanted = [max(int(count), 1) for count in (shares * positions).round().tolist()]
    else:
        ratio = torch.linspace(0, 1, steps + 1, dtype=torch.float32)
        left = (masked_share(ratio, schedule) * positions).round().int().tolist()
        wanted = [max(before - after, 1) for before, after in itertools.pairwise(left)]
    totals = [min(total, positions) for total in itertools.accumulate(wanted[:-1])]
    return [after - before for before, after in itertools.pairwise([0, *totals, positions])]


def check_schedule(schedule: Any, steps: int, style: Any) -> None:
    """A known name, or one count for each step."""
    check_choice(style, "schedule_style", STYLES)
    if isinstance(schedule, str):
        check_choice(schedule, "schedule", SCHEDULES)
        return
    if not isinstance(schedule, Sequence):
        raise TypeError(
            f"schedule must be a name or a sequence of counts, got {describe(schedule)}"
        )
    for i, count in enumerate(schedule):
        check_int(count, f"schedule[{i}]", minimum=0)
    if len(schedule) != steps:
        raise ValueError(f"schedule must hold steps = {steps} counts, got {len(schedule)}")


def gumbel(seed: rng.Integer, step: int, keys: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise (R, count), fp64, a function of (seed, step, key, index) alone."""
    uniforms = rng.uniform(seed, NOISE + step, keys, count, dtype=torch.float64)
    return -rng.exponential(uniforms).log()


def most_confident(confidence: Tensor, counts: Tensor) -> Tensor:
    """Which positions have the `counts` highest confidences of their row; of equals the first.

    Args:
        confidence: (..., D).
        counts: int64 in [0, D], broadcast against (...).

    Returns:
        (..., D) bool with exactly counts[r] True in row r. No host sync.

    >>> most_confident(torch.tensor([[0.5, 0.9, 0.5, 0.5]]), torch.tensor([3]))
    tensor([[ True,  True,  True, False]])
    """
    order = torch.sort(confidence, dim=-1, descending=True, stable=True).indices
    within = torch.arange(confidence.shape[-1], device=confidence.device) < counts.unsqueeze(-1)
    return torch.empty_like(within.expand_as(order)).scatter_(-1, order, within.expand_as(order))


def confident(confidence: Tensor, threshold: float, counts: Tensor) -> Tensor:
    """Which positions exceed a threshold, and at least the `counts` most confident of their row.

    Arguments and result as of `most_confident`.

    >>> confident(torch.tensor([[0.5, 0.9, 0.8], [0.1, 0.2, 0.1]]), 0.7, torch.tensor([1, 1]))
    tensor([[False,  True,  True],
            [False,  True, False]])
    """
    return (confidence > threshold) | most_confident(confidence, counts)
