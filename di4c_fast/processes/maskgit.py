"""MaskGIT: masked tokens revealed by confidence, not at random.

The time is t = 1 - r with r the ratio of the schedule. At r every position is masked with
probability `masked_share(r)`, independently; the arccos schedule, arccos(r)·2/π, is that of
the paper's experiment. A teacher step draws a token at every masked position and reveals the
positions of highest confidence, so many that the share of the later ratio stays masked.

Source: MaskGIT (arXiv 2202.04200) and the VQ image experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..checks import (
    check_bool,
    check_choice,
    check_int64,
    check_number,
    check_rank,
    check_same_device,
    check_values,
    describe,
)
from ..draw.api import sample
from ..heads import Head, HeadLike, TensorHead, as_head
from ..rng import check_generator, draw_seed, generator_uniform
from .base import before, check_teacher_step, check_times, check_valid, widened
from .masked import MaskedProcess
from .reveal import (
    SCHEDULES,
    check_gumbel_temperature,
    gumbel,
    masked_share,
    most_confident,
)

__all__ = ["MaskGITProcess"]

# Rows whose logits are computed together: this many numbers (64 MiB in fp32).
_PIECE = 2**24
_ROUNDING = 1e-4  # of a position, in fp32


@dataclasses.dataclass(frozen=True)
class MaskGITProcess:
    """The process of MaskGIT; the defaults are those of the paper's VQ image experiment.

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

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    mask_id: int
    _: dataclasses.KW_ONLY
    schedule: str = "arccos"
    gumbel_temperature: float = 4.5
    teacher_steps: int | None = 8
    temperature: float = 1.0
    exclude_mask: bool = True
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        # The tokens and times of masked diffusion, so its checks.
        MaskedProcess(self.mask_id, t_min=self.t_min)
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_gumbel_temperature(self.gumbel_temperature)
        if self.teacher_steps is not None:
            if isinstance(self.teacher_steps, bool) or not isinstance(self.teacher_steps, int):
                raise TypeError(
                    f"teacher_steps must be an int or None, got {describe(self.teacher_steps)}"
                )
            if self.teacher_steps < 2:
                raise ValueError(f"teacher_steps must be at least 2, got {self.teacher_steps}")
        check_number(self.temperature, "temperature", minimum=0.0)
        check_bool(self.exclude_mask, "exclude_mask")

    @property
    def loss_mask_id(self) -> None:
        """None: all positions and all V columns count in the loss, as in the paper."""
        return None

    @property
    def component_time(self) -> None:
        """None: the component term replaces the consistency terms where t < low_t."""
        return None

    def sample_times(
        self,
        batch: int,
        *,
        low_t: float = 0.0,
        low_t_probability: float = 0.0,
        stratified: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Training times (B,), float32, as `MaskedProcess.sample_times` draws them.

        The authors draw r uniform on [0, 1) and use the component term at r >= 0.95: that is
        `low_t` = `low_t_probability` = 0.05.
        """
        return MaskedProcess(self.mask_id, t_min=self.t_min).sample_times(
            batch,
            low_t=low_t,
            low_t_probability=low_t_probability,
            stratified=stratified,
            generator=generator,
            device=device,
        )

    def corrupt(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x_t ~ q(. | x_0): every token becomes the mask with probability masked_share(1 - t).

        Arguments, result and errors as in `MaskedProcess.corrupt`.
        """
        check_int64(x0, "x0")
        check_rank(x0, "x0", exactly=2)
        check_times(t, "t", x0.shape[0], x0)
        clean = x0 != self.mask_id
        if valid is not None:
            check_valid(valid, x0, "x0")
            clean = clean | ~valid
        check_values(clean, f"x0 must not hold mask_id = {self.mask_id}")
        share = masked_share(1.0 - t, self.schedule).unsqueeze(-1)
        masked = generator_uniform(x0.shape, generator=generator, device=x0.device) < share
        if valid is not None:
            masked = masked & valid
        return x0.masked_fill(masked, self.mask_id)

    def step_time(
        self, t: Tensor, step: float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """u = max(0, t - step), the authors' min(1, r + step). `generator` is not used."""
        check_number(step, "step")
        if not 0.0 < step <= 1.0:
            raise ValueError(f"step must be in (0, 1], got {step}")
        check_times(t, "t", t.shape[0] if isinstance(t, Tensor) and t.ndim else -1, t)
        wide = widened(t)
        return before((wide - step).clamp(min=0.0), wide)

    def teacher_step(
        self,
        xt: Tensor,
        t: Tensor,
        u: Tensor,
        teacher_head: HeadLike,
        draws: int,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """K draws of x_u | x_t from one teacher pass: tokens by softmax, positions by confidence.

        Each draw takes a token at every masked position, log p of it plus annealed Gumbel noise
        as confidence, and reveals the most confident positions, of equals the first ones. With m
        masked of D positions, exactly k = m - ceil(D·masked_share(1 - u)) are revealed, none if
        that is negative, all m at u = 0. Draw k follows component k mod M of the teacher.

        Logits are computed once per masked position, however many draws there are. One host sync
        on a GPU: the number of masked positions.

        Args:
            xt: (B, D) int64.
            t, u: (B,) times, 0 <= u < t <= 1.
            teacher_head: (B, D, V) or (B, M, D, V) logits or a head, the denoiser at (x_t, t).
            draws: K >= 1.
            valid: (B, D) bool; where False a position is never revealed and D counts the
                others only. None: all.
            generator: source of randomness.

        Returns:
            (B, K, D) int64; tokens of x_t stay. No graph.
        """
        batch, positions = check_teacher_step(xt, t, u, draws, valid)
        check_generator(generator)
        head = as_head(teacher_head, "teacher_head").detach()
        self._check_head(head, xt)

        waiting = xt == self.mask_id
        total: Tensor | int = positions
        if valid is not None:
            waiting = waiting & valid
            total = valid.sum(-1)
        masked = waiting.sum(-1)
        # The small number: where D·share is an integer, rounding must not keep one more.
        keep = masked_share(1.0 - u.float(), self.schedule) * total - _ROUNDING
        keep = torch.ceil(keep).long()
        counts = (masked - keep).clamp(min=0)
        seed = draw_seed(generator, xt.device)
        # Examples that reveal nothing need no token.
        where = (waiting & (counts > 0).unsqueeze(-1)).flatten().nonzero().squeeze(-1)
        tokens, log_prob = self._draw(head, where, draws, positions, seed)

        ratio = 1.0 - t.double()
        if self.teacher_steps is not None:
            ratio = ratio * (self.teacher_steps / (self.teacher_steps - 1))
        factor = self.gumbel_temperature * (1.0 - ratio).clamp(min=0.0)
        keys = torch.arange(batch * draws, device=xt.device)
        noise = gumbel(seed, 0, keys, positions).view(batch, draws, positions)
        confidence = torch.full_like(noise, -torch.inf)
        b, d = where // positions, where % positions
        confidence[b, :, d] = log_prob + (factor.view(-1, 1, 1) * noise)[b, :, d]
        rows = counts.repeat_interleave(draws)
        reveal = most_confident(confidence.flatten(0, 1), rows).view(batch, draws, positions)
        xu = xt.unsqueeze(1).repeat(1, draws, 1)
        drawn = xu.clone()
        drawn[b, :, d] = tokens
        return torch.where(reveal, drawn, xu)

    def _draw(
        self, head: Head, where: Tensor, draws: int, positions: int, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K tokens and their log-probabilities (fp64) for each flat position b*D + d: (R, K)."""
        components = 1 if len(head.shape) == 3 else head.shape[1]
        tokens = where.new_empty((where.numel(), draws))
        log_prob = torch.empty(tokens.shape, dtype=torch.float64, device=where.device)
        k = torch.arange(draws, device=where.device)
        limit = max(_PIECE // head.shape[-1], 1)
        for start in range(0, where.numel(), limit):
            piece = slice(start, start + limit)
            at = where[piece]
            b, d = at // positions, at % positions
            keys = (b.unsqueeze(-1) * draws + k) * positions + d.unsqueeze(-1)
            for m in range(min(components, draws)):
                logits = head.take((b * components + m) * positions + d).logits()
                mine = slice(m, None, components)
                some = keys[:, mine]
                draw = sample(
                    TensorHead(logits.unsqueeze(1).expand(-1, some.shape[1], -1)),
                    temperature=self.temperature,
                    mask_id=self.mask_id if self.exclude_mask else None,
                    seed=seed,
                    row_keys=some,
                    want=("log_prob",),
                )
                assert draw.log_prob is not None
                tokens[piece, mine] = draw.token
                log_prob[piece, mine] = draw.log_prob.double()
        return tokens, log_prob

    def _check_head(self, head: Head, xt: Tensor) -> None:
        shape, sizes = tuple(head.shape), tuple(xt.shape)
        components = 1 if len(shape) == 3 else shape[1] if len(shape) == 4 else 0
        if components < 1 or (shape[0], shape[-2]) != sizes:
            raise ValueError(
                "teacher_head must have shape (B, D, V) or (B, M, D, V) with "
                f"(B, D) = {sizes}, got {shape}"
            )
        if self.exclude_mask and self.mask_id >= shape[-1]:
            raise ValueError(
                f"mask_id must be in [0, V) = [0, {shape[-1]}) of teacher_head, got "
                f"{self.mask_id}; exclude_mask=False is for teachers without its column"
            )
        check_same_device(head, "teacher_head", xt, "xt")
