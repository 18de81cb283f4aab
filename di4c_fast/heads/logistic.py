"""Logits of a discretised logistic distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_choice, check_floating, check_int, check_same_device, check_within
from ..passes.base import Bins, Operand
from .base import BuiltInHead, set_leading, take_leading


@final
class LogisticHead(BuiltInHead):
    """Logits of a truncated discretised logistic distribution, two numbers per row.

    The V = num_classes bins divide [-1, 1] evenly; bin v has the logit
    `log(F(right_v) - F(left_v))` with F the logistic distribution function of location `mu` and
    scale `exp(log_scale - 2)`. Computed in fp32 (fp64 for fp64 input), as

        left, right = (edge - mu) * exp(2 - log_scale)
        logit = logsigmoid(right) + log(sigmoid(-left) * (1 - exp(left - right)) + eps)

    which equals `logsigmoid(right) + log1p(eps - exp(logsigmoid(left) - logsigmoid(right)))`, the
    form of the sources, without its cancellation.

    Source: D3PM (arXiv 2107.03006, appendix B) and the CIFAR-10 model of tauLDR.

    Args:
        mu: (...), floating point, location.
        log_scale: same shape, log of the scale with an offset of 2.
        num_classes: V, the number of bins, at least 2.
        eps: keeps the logarithm finite in bins without mass; with 0 the bins are computed exactly.
        clamp: "left" uses the form above; "min" takes the minimum with the same form of the
            upper tail, `logsigmoid(-left) + log(sigmoid(right) * (1 - exp(left - right)) + eps)`,
            which is right in both tails.

    Differentiable with respect to `mu` and `log_scale`.

    Raises:
        TypeError, ValueError: wrong kinds, shapes, dtypes, devices, `num_classes` < 2, negative
            `eps`, unknown `clamp`.
    """

    options = ("num_classes", "eps", "clamp")

    def __init__(
        self,
        mu: Tensor,
        log_scale: Tensor,
        num_classes: int,
        eps: float = 1e-6,
        clamp: Literal["left", "min"] = "left",
    ):
        check_floating(mu, "mu")
        check_floating(log_scale, "log_scale")
        if mu.shape != log_scale.shape:
            raise ValueError(
                f"log_scale must have the shape of mu {tuple(mu.shape)}, "
                f"got {tuple(log_scale.shape)}"
            )
        check_same_device(log_scale, "log_scale", mu, "mu")
        check_int(num_classes, "num_classes", minimum=2)
        check_within(eps, "eps", "[0, 1)")
        check_choice(clamp, "clamp", ("left", "min"))
        self.mu, self.log_scale = mu, log_scale
        self.num_classes = int(num_classes)
        self.eps = float(eps)
        self.clamp: Literal["left", "min"] = clamp

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.mu.shape, self.num_classes))

    @property
    def dtype(self) -> torch.dtype:
        return self.mu.dtype

    @property
    def chunk_dtype(self) -> torch.dtype:
        return self.work_dtype

    @property
    def device(self) -> torch.device:
        return self.mu.device

    def logits(self) -> Tensor:
        left, right, width, _ = self._bins()
        # 1 - F(left)/F(right) = F(-left) (1 - e^(left - right)): the product has no cancellation.
        mass = -torch.expm1(-width)
        if self.eps == 0.0:  # the plain bin, where both forms agree; its mass may underflow
            return F.logsigmoid(right) + F.logsigmoid(-left) + torch.log(mass)
        lower = F.logsigmoid(right) + torch.log(torch.sigmoid(-left) * mass + self.eps)
        if self.clamp == "left":
            return lower
        upper = F.logsigmoid(-left) + torch.log(torch.sigmoid(right) * mass + self.eps)
        return torch.minimum(lower, upper)

    def _bins(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled edges (..., V) each, scaled width and inverse scale (..., 1)."""
        work = self.work_dtype
        edges = torch.linspace(-1.0, 1.0, self.num_classes + 1, device=self.device, dtype=work)
        inverse_scale = torch.exp(2.0 - self.log_scale.to(work)).unsqueeze(-1)
        scaled = (edges - self.mu.to(work).unsqueeze(-1)) * inverse_scale
        return (
            scaled[..., :-1],
            scaled[..., 1:],
            inverse_scale * (2.0 / self.num_classes),
            (inverse_scale),
        )

    def _slopes(self) -> tuple[Tensor, Tensor]:
        """d logit / d mu and d logit / d log_scale of every bin, (..., V) each."""
        left, right, width, inverse_scale = self._bins()
        above, below = torch.sigmoid(-left), torch.sigmoid(right)
        not_above, not_below = torch.sigmoid(left), torch.sigmoid(-right)

        def slopes(by_left: Tensor, by_right: Tensor, by_width: Tensor) -> tuple[Tensor, Tensor]:
            # left, right and width all fall with log_scale; the edges fall with mu.
            by_scale = -left * by_left - right * by_right - width * by_width
            return -inverse_scale * (by_left + by_right), by_scale

        if self.eps == 0.0:
            return slopes(-not_above, not_below, 1.0 / torch.expm1(width))
        mass, rest = -torch.expm1(-width), torch.exp(-width)
        lower_sum = above * mass + self.eps
        lower = slopes(-mass * above * not_above / lower_sum, not_below, rest * above / lower_sum)
        if self.clamp == "left":
            return lower
        upper_sum = below * mass + self.eps
        upper = slopes(-not_above, mass * below * not_below / upper_sum, rest * below / upper_sum)
        # log F(right) + log lower_sum against log F(-left) + log upper_sum; equal ones share.
        gap = F.logsigmoid(right) + lower_sum.log() - F.logsigmoid(-left) - upper_sum.log()
        part = 0.5 - 0.5 * gap.sign()
        return tuple(part * a + (1.0 - part) * b for a, b in zip(lower, upper, strict=True))  # type: ignore[return-value]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.mu, self.log_scale)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> LogisticHead:
        mu, log_scale = tensors
        return self.replaced(mu=mu, log_scale=log_scale)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> LogisticHead:
        return self.with_tensors([change(self.mu), change(self.log_scale)])

    def operand(self, passes: Any = None) -> Operand | None:
        batch, *components, positions = self.mu.shape
        return self._operand(passes, (batch, *(components or [1]), positions))

    def row_operand(self, passes: Any = None) -> Operand | None:
        return self._operand(passes, (self.mu.numel(),))

    def _operand(self, passes: Any, sizes: tuple[int, ...]) -> Operand | None:
        """mu and log_scale of (B, C, D), or of one row for each slot."""
        if self.num_classes > getattr(passes, "READS_BINS", 0):
            return None
        mu, log_scale = (
            tensor.to(self.work_dtype).reshape(sizes).contiguous()
            for tensor in (self.mu, self.log_scale)
        )
        bins = Bins(log_scale, self.eps, self.clamp)
        if len(sizes) == 1:
            return Operand(mu, (1, 0, 0, 0), 1, self.num_classes, bins)
        stride_b, stride_c, stride_d = mu.stride()
        strides = (0, stride_b, stride_c, stride_d)
        return Operand(mu, strides, sizes[1], self.num_classes, bins)

    def load(self, rows: Tensor, out: Tensor, passes: Any = None) -> None:
        with torch.no_grad():
            out.copy_(self._taken(rows).logits())

    def add_gradient(
        self, sums: list[Tensor | None], rows: Tensor, gradient: Tensor, logits: Tensor
    ) -> None:
        for total, slope in zip(sums, self._taken(rows)._slopes(), strict=True):
            if total is not None:
                part = (gradient * slope).sum(-1)
                set_leading(total, rows, self.mu.shape, part.to(total.dtype))

    def _taken(self, rows: Tensor) -> LogisticHead:
        """`take(rows).detach()` without a check of `rows`."""
        leading = self.mu.shape
        return self.map_rows(lambda tensor: take_leading(tensor.detach(), rows, leading))
