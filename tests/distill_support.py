"""Models, sizes and times that the tests of the distillation step share."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from di4c_fast.draw.api import sample
from di4c_fast.heads import LinearHead
from di4c_fast.models.latent import LatentShift
from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig, distill_step

B, D, VOCAB, MASK = 4, 5, 6, 5
PROCESS = MaskedProcess(MASK)
CONFIG = DistillConfig(components=3, draws=2, teacher_step=0.37, low_t=0.6, backend="reference")
X0 = torch.randint(0, MASK, (B, D), generator=torch.Generator().manual_seed(0))
HIGH, LOW, MIXED = [0.9, 0.65, 0.7, 0.8], [0.5, 0.4, 0.3, 0.55], [0.5, 0.9, 0.4, 0.7]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder(nn.Module):
    """A model in float64 that remembers its calls."""

    def __init__(self, latent: bool, seed: int = 0, head: bool = False, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, 8)
        self.position = nn.Parameter(torch.randn(D, 8))
        self.time = nn.Linear(1, 8)
        self.latent = LatentShift(8, zero_init=False) if latent else None
        self.mix = nn.Linear(8, 8)
        self.out = nn.Linear(8, VOCAB)
        self.dropout = nn.Dropout(dropout)
        self.double()
        self.head = head
        self.calls: list[dict] = []

    def forward(self, tokens, t, latent=None, **context):
        assert tokens.dtype == torch.int64
        self.calls.append(
            {
                "tokens": tokens,
                "t": t,
                "latent": latent,
                "context": context,
                "grad": torch.is_grad_enabled(),
                "training": self.training,
            }
        )
        h = (
            self.embed(tokens)
            + self.position
            + self.time(t.to(self.time.weight.dtype)[:, None])[:, None]
        )
        if self.latent is not None:
            h = self.latent(h, latent)
        h = torch.tanh(self.mix(h.cumsum(1) + h.flip(1)))
        h = self.dropout(h)
        return LinearHead(h, self.out.weight, self.out.bias) if self.head else self.out(h)


def models(**options) -> tuple[Recorder, Recorder]:
    """A student and its teacher."""
    return Recorder(True, **options), Recorder(False, **{"seed": 1, **options})


def step(student, teacher, t=None, config=CONFIG, seed=0, x0=X0, **options):
    """`distill_step` with what this module has; times may be a list."""
    t = torch.tensor(t) if isinstance(t, list) else t
    options = {"process": PROCESS, "config": config, "generator": rng(seed), "t": t, **options}
    return distill_step(student, teacher, x0, **options)


@dataclasses.dataclass(frozen=True)
class UniformNoise:
    """Every token is replaced by a uniform one with probability t."""

    component_time: float | None = 0.125
    loss_mask_id: int | None = None

    def sample_times(self, batch, *, low_t=0.0, low_t_probability=0.0, generator=None, device=None):
        assert (low_t, low_t_probability) == (0.0, 0.0) or self.component_time is None
        return torch.rand(batch, generator=generator).clamp(min=0.01)

    def corrupt(self, x0, t, *, valid=None, generator=None):
        replaced = torch.rand(x0.shape, generator=generator) < t[:, None]
        if valid is not None:
            replaced = replaced & valid
        return torch.where(replaced, torch.randint(VOCAB, x0.shape, generator=generator), x0)

    def step_time(self, t, step, *, generator=None):
        return t / 2

    def teacher_step(self, xt, t, u, teacher_head, draws, *, valid=None, generator=None):
        head = teacher_head.logits()
        head = head if head.ndim == 3 else head.logsumexp(1)
        rows = head.unsqueeze(1).expand(-1, draws, -1, -1)
        token = sample(rows.flatten(0, 2), seed=int(torch.randint(99, (), generator=generator)))
        return token.token.view(xt.shape[0], draws, -1)
