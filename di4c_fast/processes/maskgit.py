"""MaskGIT: masked tokens revealed by confidence, not at random.

The time is t = 1 - r with r the ratio of the schedule. At r every position is masked with
probability `masked_share(r)`, independently; the arccos schedule, arccos(r)·2/π, is that of
the paper's experiment. A teacher step reveals so many positions that the share of the later ratio
stays masked.

Source: MaskGIT (arXiv 2202.04200) and the VQ image experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor

from ..checks import check_bool, check_choice, check_int, check_number, check_within
from ..draw.api import sample
from ..heads import TensorHead
from ..rng import draw_seed
from .base import Source, TeacherStep
from .masked import MaskingProcess
from .reveal import SCHEDULES, gumbel, masked_share, most_confident

__all__ = ["MaskGITProcess"]

# Rows whose logits are computed together: this many numbers (64 MiB in fp32).
_PIECE = 2**24
_ROUNDING = 1e-4  # of a position, in fp32


@dataclasses.dataclass(frozen=True)
class MaskGITProcess(MaskingProcess):
    """The process of MaskGIT; the defaults are those of the paper's VQ image experiment.

    All positions and all V columns count in the loss (`loss_mask_id` is None), as in the paper. Its
    training, with `exclude_mask=False` here, stands in `di4c_fast.integrations.maskgit`. Its r is
    1 - t.

    Args:
        mask_id: id of the mask token (the paper: 1024, the class after the codes).
        schedule: share of masked positions over r: "arccos", "cosine", "linear", "square" or
            "root".
        gumbel_temperature: of the noise on the teacher's confidence at r = 0 (the paper: 4.5).
        teacher_steps: T of the annealing factor max(0, 1 - r·T/(T-1)), which is that of a
            sampler with T steps (the paper: 8); None for 1 - r. The authors' factor goes
            negative past r = 1 - 1/T, where it prefers the least likely tokens; here it stays 0.
        temperature: divides the teacher's logits in the draws of tokens, not in the loss; 0 is
            the argmax. The `sm_temp` of the authors' code is 1/temperature.
        exclude_mask: never draw the mask token. False is the authors' behaviour: a position that
            draws it counts as revealed. Needed for a teacher without a column for the mask.
        t_min: smallest training time.
    """

    couples_positions: ClassVar[bool] = True  # the most confident of all are revealed

    mask_id: int
    _: dataclasses.KW_ONLY
    schedule: str = "arccos"
    gumbel_temperature: float = 4.5
    teacher_steps: int | None = 8
    temperature: float = 1.0
    exclude_mask: bool = True
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        check_int(self.mask_id, "mask_id", minimum=0)
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_number(self.gumbel_temperature, "gumbel_temperature", minimum=0.0)
        if self.teacher_steps is not None:
            check_int(self.teacher_steps, "teacher_steps", minimum=2)
        check_number(self.temperature, "temperature", minimum=0.0)
        check_bool(self.exclude_mask, "exclude_mask")
        check_within(self.t_min, "t_min", "(0, 1)")

    def share(self, t: Tensor) -> Tensor:
        return masked_share(1.0 - t, self.schedule)

    def earlier(self, t: Tensor, step: float, generator: Source) -> Tensor:
        """u = max(0, t - step), the authors' min(1, r + step); not random."""
        return (t - step).clamp(min=0.0)

    def stepped(self, step: TeacherStep) -> Tensor:
        """Tokens by softmax, positions by confidence.

        Each draw takes a token at every masked position, log p of it plus annealed Gumbel noise
        as confidence, and reveals the most confident positions, of equals the first ones. With m
        masked of D positions (those in `valid` only), exactly k = m - ceil(D·masked_share(1 - u))
        are revealed, none if that is negative, all m at u = 0.

        Logits are computed once per masked position, however many draws there are. One host sync
        on a GPU: the number of masked positions.
        """
        xt, (batch, positions), draws = step.xt, step.xt.shape, step.draws
        waiting = self.waiting(step)
        total = positions if step.valid is None else step.valid.sum(-1)
        # The small number: where D·share is an integer, rounding must not keep one more.
        keep = masked_share(1.0 - step.u.float(), self.schedule) * total - _ROUNDING
        counts = (waiting.sum(-1) - torch.ceil(keep).long()).clamp(min=0)
        seed = draw_seed(step.generator, xt.device)
        # Examples that reveal nothing need no token.
        where = (waiting & (counts > 0).unsqueeze(-1)).flatten().nonzero().squeeze(-1)
        b, d = where // positions, where % positions
        tokens, log_prob = self._draw(step, b, d, seed)

        ratio = 1.0 - step.t.double()
        if self.teacher_steps is not None:
            ratio = ratio * (self.teacher_steps / (self.teacher_steps - 1))
        factor = self.gumbel_temperature * (1.0 - ratio).clamp(min=0.0)
        keys = torch.arange(batch * draws, device=xt.device)
        noise = rearrange(gumbel(seed, 0, keys, positions), "(b k) d -> b k d", k=draws)
        confidence = torch.full_like(noise, -torch.inf)
        confidence[b, :, d] = log_prob + (factor.view(-1, 1, 1) * noise)[b, :, d]
        xu = repeat(xt, "b d -> b k d", k=draws)
        drawn = xu.clone()
        drawn[b, :, d] = tokens
        return torch.where(most_confident(confidence, counts.unsqueeze(-1)), drawn, xu)

    def _draw(self, step: TeacherStep, b: Tensor, d: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """K tokens and their log-probabilities (fp64) at each position d of example b: (R, K)."""
        components, draws, positions = step.components, step.draws, step.xt.shape[1]
        tokens = b.new_empty((b.numel(), draws))
        log_prob = torch.empty(tokens.shape, dtype=torch.float64, device=b.device)
        k = torch.arange(draws, device=b.device)
        keys = (b.unsqueeze(-1) * draws + k) * positions + d.unsqueeze(-1)
        mask_id = self.mask_id if self.exclude_mask else None
        options: dict[str, Any] = {"temperature": self.temperature, "mask_id": mask_id}
        options |= {"seed": seed, "want": ("log_prob",)}
        limit = max(_PIECE // step.head.vocabulary, 1)
        for start in range(0, b.numel(), limit):
            piece = slice(start, start + limit)
            for m in range(min(components, draws)):
                rows = (b[piece] * components + m) * positions + d[piece]
                mine = slice(m, None, components)
                some = keys[piece, mine]
                logits = repeat(step.head.take(rows).logits(), "r v -> r k v", k=some.shape[1])
                head = TensorHead(logits).replaced(shard=step.head.shard)
                draw = sample(head, row_keys=some, **options)
                assert draw.log_prob is not None
                tokens[piece, mine] = draw.token
                log_prob[piece, mine] = draw.log_prob.double()
        return tokens, log_prob
