"""Why few steps gain or lose: the likelihood of loops that are filled in at once.

The loops are the teacher's own, one residue at a time, in frameworks that training never saw. All
or half of a loop is hidden and filled in in one step. The teacher's law is then a product over
residues. The student's has two parts: the product of its marginals, which at best is the teacher's,
and what the mixture adds to it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from di4c_fast import correlation, mixture_log_prob
from di4c_fast.heads import as_head
from di4c_fast.models import draw_latents
from di4c_fast.models.call import repeat_context
from di4c_fast.processes import MaskedProcess
from di4c_fast.training.corpus import Corpus

from .data import MASK

HIDDEN = (1.0, 0.5)
LATENTS, CHUNK = 64, 8


@dataclasses.dataclass(frozen=True)
class OneStep:
    """Nats per hidden residue, all filled in at once; smaller is better.

    Attributes:
        teacher: the product that the teacher is.
        marginals: the student's marginals as a product, so without what λ ties together.
        student: the mixture over λ.
        teacher_entropy, student_entropy: of the marginals.
    """

    teacher: float
    marginals: float
    student: float
    teacher_entropy: float
    student_entropy: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in dataclasses.asdict(self).items()}


Likelihoods = dict[float, OneStep]  # by share of hidden residues


@torch.no_grad()
def one_step(
    teacher: nn.Module, student: nn.Module, dim: int, loops: Corpus, seed: int
) -> Likelihoods:
    """By share of hidden residues of the loops."""
    generator, process = torch.Generator().manual_seed(seed), MaskedProcess(MASK)
    found = {}
    for share in HIDDEN:
        sums = torch.zeros(6, dtype=torch.float64)
        for first in range(0, len(loops), CHUNK):
            part = loops.take(slice(first, first + CHUNK))
            t = torch.full((len(part),), share)
            xt = process.corrupt(part.tokens, t, valid=part.valid, generator=generator)
            sums += _sums(teacher, student, dim, part, xt, t, generator)
        found[share] = OneStep(*(sums[:5] / sums[5]).tolist())
    return found


def _sums(
    teacher: nn.Module,
    student: nn.Module,
    dim: int,
    part: Corpus,
    xt: Tensor,
    t: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """(6,): nats of teacher, marginals, student, the entropies, and how many residues."""
    rows = len(part)
    latent = draw_latents(rows, LATENTS, dim, stratified=True, generator=generator)
    many = repeat_context({"xt": xt, "t": t, **part.context}, LATENTS)
    tokens, times = many.pop("xt"), many.pop("t")
    product = as_head(teacher(xt, t, **part.context)).logits().float().unsqueeze(1)
    mixture = as_head(student(tokens, times, latent.flatten(0, 1), **many)).logits().float()
    mixture = mixture.unflatten(0, (rows, LATENTS))
    options = {"xt": xt, "mask_id": MASK, "valid": part.valid}
    nats = [-mixture_log_prob(z, part.tokens, **options) for z in (product, mixture)]
    # cor = -log(mixture) + log(product of the marginals)
    marginals = nats[1] - correlation(mixture, part.tokens, **options)
    hidden = (xt == MASK) & part.valid
    entropies = [_entropy(z, hidden) for z in (product, mixture)]
    sums = [nats[0].sum(), marginals.sum(), nats[1].sum(), *entropies, hidden.sum()]
    return torch.stack([value.double() for value in sums])


def _entropy(logits: Tensor, hidden: Tensor) -> Tensor:
    """Of the marginals of (B, N, D, V), summed over hidden residues."""
    masked = logits.clone()
    masked[..., MASK] = -torch.inf
    chance = masked.softmax(-1).mean(1)
    return (torch.special.entr(chance).sum(-1) * hidden).sum()


def table(likelihoods: list[Likelihoods]) -> str:
    """Mean over the seeds."""
    lines = [
        "nats per hidden residue of the teacher's own loops, all filled in at once",
        f"  hidden{'teacher':>10}{'student':>9}{'its marginals alone':>21}"
        f"{'entropy of marginals, teacher':>32}{'student':>9}",
    ]
    for share in likelihoods[0]:
        mean = {
            field.name: sum(getattr(one[share], field.name) for one in likelihoods)
            / len(likelihoods)
            for field in dataclasses.fields(OneStep)
        }
        lines.append(
            f"{share:>8.0%}{mean['teacher']:>10.3f}{mean['student']:>9.3f}"
            f"{mean['marginals']:>21.3f}{mean['teacher_entropy']:>32.3f}"
            f"{mean['student_entropy']:>9.3f}"
        )
    return "\n".join(lines)
