"""One record for every evaluation of the loss, a likelihood or a correlation, and its checks.

Shapes: B examples, N components of the student, M of the teacher, K consistency draws, D positions,
V classes, J target rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check_bool,
    check_cu_seqlens,
    check_int64,
    check_mask_id,
    check_same_device,
    check_same_shard,
    check_shape,
    check_tensor,
    check_token_range,
    check_values,
    describe,
    warn_of_probabilities,
)
from ..heads import Head, HeadLike, as_head
from ..passes.base import Mixture
from ..rng import check_generator, draw_seed


class LossTerms(NamedTuple):
    """The five terms of the loss, unweighted, detached, each of shape (B,), in nats.

    With `control_variate=False` the two correlations are the negative joint log-likelihoods
    that take their place, and the two marginal terms, which drop out, are 0. Without
    consistency logits both consistency terms are 0.
    """

    data_correlation: Tensor
    teacher_marginal: Tensor
    consistency_correlation: Tensor
    consistency_marginal: Tensor
    component: Tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be evaluated. `log_weights` carries the graph of the caller's log-weights.

    Weights are (B,) in the work dtype and contiguous.
    """

    student: Head  # (B, N, D, V)
    tokens: Tensor  # (B, J, D) int64 target rows; with `seed` K more are drawn behind them
    log_weights: Tensor  # (B, N) work dtype, normalised
    active: Tensor | None = None  # (B, D) bool; None: every position counts
    mask_id: int | None = None
    correlation: bool = True  # of the target rows; False: their negative joint log-likelihood
    teacher: Head | None = None  # (B, D, V) or (B, M, D, V), detached
    consistency: Head | None = None  # (B, K, D, V), detached
    data_weight: Tensor | None = None  # None: `Values.loss` is not asked for
    teacher_weight: Tensor | None = None
    consistency_weight: Tensor | None = None
    component_weight: Tensor | None = None
    xu: Tensor | None = None  # (B, K, D) int64
    seed: Tensor | None = None  # () int64: the last K target rows are drawn from `consistency`
    marginal: bool = False  # the KL terms to the marginal are asked for
    component: bool = False  # `Values.component` is asked for
    position_group: str | None = None  # of ranks that have the other positions
    # Of a packed batch every position is an example, and values, log-weights and weights are those
    # of S sequences; see `loss.packed`.
    ends: Tensor | None = None  # (S + 1,) int64 cumulative lengths
    sequence: Tensor | None = None  # (B,) int64 of each position

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, N, D, V."""
        batch, components, positions, vocabulary = self.student.shape
        return batch, components, positions, vocabulary

    def facts(self) -> dict[str, Any]:
        """What ranks have to agree about, beside tokens and how many positions they have."""
        names = ("mask_id", "correlation", "marginal", "component")
        facts = {name: getattr(self, name) for name in names}
        for name in ("student", "teacher", "consistency"):
            head = getattr(self, name)
            facts[name] = head and tuple(head.shape[:-2])
            facts |= {f"{name}: {k}": v for k, v in (head.facts() if head else {}).items()}
        return facts | {"targets": self.targets, "drawn": self.seed is not None}

    @property
    def targets(self) -> int:
        """J."""
        drawn = 0
        if self.seed is not None:
            assert self.consistency is not None
            drawn = self.consistency.shape[1]
        return self.tokens.shape[1] + drawn

    @property
    def dtype(self) -> torch.dtype:
        """The work dtype, that of all arithmetic and of the values."""
        return self.log_weights.dtype

    def mixture(self, by_sequence: bool = False) -> Mixture:
        """What the passes need of it; weights by sequence of a packed batch, or by position."""
        none = self.log_weights[:, 0].detach()
        mask_id, xu, shard = self.mask_id, self.xu, self.student.shard
        if shard is not None:
            mask_id = shard.column(self.mask_id)
            if xu is not None:
                assert self.mask_id is not None
                hidden = -1 if mask_id is None else mask_id
                local = shard.local(xu)
                xu = torch.where(xu.eq(self.mask_id), hidden, local)

        def by_example(values: Tensor | None) -> Tensor:
            if values is None:
                return none
            values = values.detach()
            if self.sequence is None or by_sequence:
                return values.contiguous()
            return values[self.sequence]

        return Mixture(
            mask_id,
            xu,
            by_example(self.log_weights),
            by_example(self.teacher_weight),
            by_example(self.consistency_weight),
            self.marginal,
            self.component,
            self.correlation,
            self.data_weight,
            self.component_weight,
        )


def prepare_student(student: HeadLike) -> Head:
    head = as_head(student, "student")
    if len(head.shape) != 4:
        hint = ""
        if len(head.shape) == 3:
            sizes = "0, (B, N)" if isinstance(student, Tensor) else "B, N"
            hint = f"; rows of all components become one with student.unflatten({sizes})"
        raise ValueError(f"student must have shape (B, N, D, V), got {tuple(head.shape)}{hint}")
    if head.shape[1] == 0:
        raise ValueError(f"student must have N >= 1 components, got shape {tuple(head.shape)}")
    if head.shape[3] == 0:
        raise ValueError(f"student must have V >= 1 classes, got shape {tuple(head.shape)}")
    _check_tensors(head, "student")
    warn_of_probabilities(student, "student")
    return head


def _check_tensors(head: Head, name: str) -> None:
    for tensor in head.tensors():
        if tensor is not None:
            check_tensor(tensor, name)
            if tensor.device.type == "meta":
                raise TypeError(f"{name} must hold data, got {describe(tensor)}")
            if tensor.numel() == 0 and head.shape.numel() > 0:
                raise ValueError(
                    f"a tensor behind {name} is empty, shape {tuple(tensor.shape)}: a sharded "
                    "parameter has to be gathered first"
                )


def prepare_log_weights(
    log_weights: Tensor | None, student: Head, batch: int, letter: str
) -> Tensor:
    """Component log-weights (B, N), normalised over N in the compute dtype."""
    components = student.shape[1]
    dtype = student.work_dtype
    if log_weights is None:
        # Filled on the device: a copy from the host would wait for it.
        sizes, share = (batch, components), -math.log(components)
        return torch.full(sizes, share, dtype=dtype, device=student.device)
    check_tensor(log_weights, "log_weights")
    if not log_weights.dtype.is_floating_point:
        raise TypeError(f"log_weights must be floating point, got {log_weights.dtype}")
    check_shape(log_weights, "log_weights", f"{letter}, N", (batch, components))
    check_same_device(log_weights, "log_weights", student, "student")
    log_weights = log_weights.to(dtype)
    check_values(
        ~torch.isnan(log_weights) & (log_weights != float("inf")),
        "log_weights must hold neither NaN nor +inf",
        log_weights,
    )
    check_values(
        (log_weights > float("-inf")).any(-1),
        "log_weights must leave at least one component of every example a weight above -inf",
    )
    return torch.log_softmax(log_weights, dim=-1)


def prepare_ends(cu_seqlens: Tensor | None, student: Head) -> tuple[Tensor | None, int, str]:
    """Cumulative lengths of a packed batch, or None; the number of examples, and its letter."""
    batch, _, positions, _ = student.shape
    if cu_seqlens is None:
        return None, batch, "B"
    if batch != 1:
        raise ValueError(
            f"student must have shape (1, N, T, V) with cu_seqlens, got {tuple(student.shape)}"
        )
    ends = check_cu_seqlens(cu_seqlens, positions, student.device)
    return ends, ends.numel() - 1, "S"


def prepare_active(
    xt: Tensor | None, valid: Tensor | None, mask_id: int | None, student: Head
) -> Tensor | None:
    """The positions that count: valid ones that are masked in xt. None if all count."""
    batch, _, positions, _ = student.shape
    active = None
    if valid is not None:
        check_tensor(valid, "valid")
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must have dtype torch.bool, got {valid.dtype}")
        check_shape(valid, "valid", "B, D", (batch, positions))
        check_same_device(valid, "valid", student, "student")
        active = valid
    if xt is not None:
        if mask_id is None:
            raise ValueError("xt needs mask_id: without it there are no masked positions")
        xt = prepare_tokens(xt, "xt", "B, D", (batch, positions), student, valid)
        masked = xt == mask_id
        active = masked if active is None else active & masked
    return active


def prepare_rows(x: Any, student: Head, valid: Tensor | None) -> tuple[Tensor, bool]:
    """Token rows (B, K, D), and whether they came as one row (B, D) per example."""
    batch, _, positions, _ = student.shape
    check_int64(x, "x")
    if x.ndim == 2:
        single = prepare_tokens(x, "x", "B, D", (batch, positions), student, valid)
        return single.unsqueeze(1), True
    if x.ndim != 3:
        raise ValueError(
            f"x must have shape (B, D) = {(batch, positions)} or (B, K, D), got {tuple(x.shape)}"
        )
    sizes = (batch, x.shape[1], positions)
    return prepare_tokens(x, "x", "B, K, D", sizes, student, valid), False


def prepare_tokens(
    tokens: Any,
    name: str,
    letters: str,
    sizes: Sequence[int],
    student: Head,
    valid: Tensor | None = None,
) -> Tensor:
    """The tokens, checked; where `valid` (B, D) is False they may be anything and become 0."""
    check_int64(tokens, name)
    check_shape(tokens, name, letters, sizes)
    check_same_device(tokens, name, student, "student")
    if valid is not None:  # padding is often marked by an id such as -100
        tokens = tokens.masked_fill(~(valid if tokens.ndim == 2 else valid.unsqueeze(1)), 0)
    check_token_range(tokens, name, student.vocabulary)
    inference = not torch.compiler.is_compiling() and tokens.is_inference()
    return tokens.clone() if inference else tokens  # backward saves no inference tensors


def check_targets_allowed(
    tokens: Tensor, name: str, mask_id: int | None, active: Tensor | None
) -> None:
    """A target equal to the mask token would have probability zero wherever it counts."""
    if mask_id is None:
        return
    allowed = tokens != mask_id
    if active is not None:
        allowed = allowed | ~(active if tokens.ndim == 2 else active.unsqueeze(1))
    check_values(
        allowed, f"{name} must not hold mask_id = {mask_id} at positions that count", tokens
    )


def prepare_weight(
    value: float | Tensor, name: str, student: Head, batch: int, letter: str
) -> tuple[Tensor, bool]:
    """A weight per example (B,) in the compute dtype, and whether it is the number 0."""
    dtype = student.work_dtype
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.dtype.is_complex:
            raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
        if value.ndim != 0 and tuple(value.shape) != (batch,):
            raise ValueError(
                f"{name} must be a float or have shape ({letter},) = ({batch},), "
                f"got {tuple(value.shape)}"
            )
        check_same_device(value, name, student, "student")
        check_values(
            torch.isfinite(value.to(dtype)) & (value >= 0),
            f"{name} must be finite and not negative",
            value,
        )
        if value.requires_grad:
            raise ValueError(
                f"{name} is not differentiable: pass {name}.detach(), or weight the terms "
                "outside with reduction='none'"
            )
        return value.detach().to(dtype).expand(batch).contiguous(), False
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a Tensor, got {describe(value)}")
    if not 0 <= value <= torch.finfo(dtype).max:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    weight = torch.full((batch,), float(value), dtype=dtype, device=student.device)
    return weight, float(value) == 0.0


def prepare_target(logits: HeadLike, name: str, student: Head, letters: str) -> Head:
    """The teacher, (B, D, V) or (B, M, D, V), or the student at x_u, (B, K, D, V), detached.

    letters: of the shape in messages.
    """
    head = as_head(logits, name)
    batch, _, *sizes = student.shape
    shape = tuple(head.shape)
    several = len(shape) == 4 and shape[1] >= 1
    single = "M" in letters and not several
    if not (several or single) or (shape if single else shape[:1] + shape[2:]) != (batch, *sizes):
        raise ValueError(
            f"{name} must have shape {letters} and (B, D, V) = {(batch, *sizes)}, got {shape}"
        )
    check_same_shard(head, name, student, "student")
    check_same_device(head, name, student, "student")
    _check_tensors(head, name)
    warn_of_probabilities(logits, name)
    return _target(head, student)


def _target(head: Head, student: Head) -> Head:
    """Detached, no wider than what it is computed in, and fit to be saved for backward."""
    head = head.detach().within(student.work_dtype)
    if torch.compiler.is_compiling():
        return head
    tensors = head.tensors()
    if not any(t is not None and t.is_inference() for t in tensors):
        return head
    return head.with_tensors(
        [t.clone() if t is not None and t.is_inference() else t for t in tensors]
    )


def prepare_loss(
    student: HeadLike,
    teacher: HeadLike,
    x0: Tensor,
    given_weights: dict[str, float | Tensor],
    *,
    consistency: HeadLike | None,
    consistency_x: Tensor | None,
    xt: Tensor | None,
    xu: Tensor | None,
    mask_id: int | None,
    valid: Tensor | None,
    log_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    control_variate: bool,
    generator: torch.Generator | None,
    return_terms: bool,
) -> Problem:
    """Check every argument of `loss` and build its problem, before any work starts."""
    check_bool(control_variate, "control_variate")
    check_bool(return_terms, "return_terms")
    check_generator(generator)
    head = prepare_student(student)
    batch, _, positions, _ = head.shape
    ends, examples, letter = prepare_ends(cu_seqlens, head)
    mask_id = check_mask_id(mask_id, head.vocabulary)
    letters = "(B, D, V) or (B, M, D, V) with M >= 1"
    teacher_head = prepare_target(teacher, "teacher", head, letters)
    active = prepare_active(xt, valid, mask_id, head)
    x0 = prepare_tokens(x0, "x0", "B, D", (batch, positions), head, valid)
    check_targets_allowed(x0, "x0", mask_id, active)
    prepared = {
        name: prepare_weight(value, f"{name}_weight", head, examples, letter)
        for name, value in given_weights.items()
    }
    weights = {name: weight for name, (weight, _) in prepared.items()}
    normalised = prepare_log_weights(log_weights, head, examples, letter)

    draws, seed = None, None
    if consistency is None:
        for name, value in (("consistency_x", consistency_x), ("xu", xu)):
            if value is not None:
                raise ValueError(f"{name} needs consistency: the student's logits at x_u")
    else:
        draws = prepare_target(consistency, "consistency", head, "(B, K, D, V) with K >= 1")
        sizes = (batch, draws.shape[1], positions)
        if xu is not None:
            if mask_id is None:
                raise ValueError("xu needs mask_id: without it no position is revealed")
            xu = prepare_tokens(xu, "xu", "B, K, D", sizes, head, valid)
        if consistency_x is None:
            # Last of all, so that no mistake advances the generator.
            seed = draw_seed(generator, head.device)
        else:
            consistency_x = prepare_tokens(
                consistency_x, "consistency_x", "B, K, D", sizes, head, valid
            )
            check_targets_allowed(consistency_x, "consistency_x", mask_id, active)
            if xu is not None:
                counts = xu != mask_id if active is None else (xu != mask_id) & active[:, None]
                check_values(
                    (consistency_x == xu) | ~counts,
                    "consistency_x must equal xu at positions that xu has revealed",
                    consistency_x,
                )

    def asked(name: str) -> bool:
        return return_terms or not prepared[name][1]

    tokens = x0.unsqueeze(1)
    if draws is None or not asked("consistency"):
        draws, xu, seed = None, None, None
    else:
        if consistency_x is not None:
            if xu is not None:
                assert mask_id is not None
                consistency_x = torch.where(xu.ne(mask_id), xu, consistency_x)
            tokens = torch.cat([tokens, consistency_x], dim=1)
    marginal = control_variate and (asked("teacher") or draws is not None)
    component = asked("component")
    problem = Problem(
        student=head,
        tokens=tokens,
        log_weights=normalised,
        active=active,
        mask_id=mask_id,
        correlation=control_variate,
        teacher=teacher_head if marginal or component else None,
        consistency=draws,
        data_weight=weights["data"],
        teacher_weight=weights["teacher"],
        consistency_weight=weights["consistency"],
        component_weight=weights["component"],
        xu=xu,
        seed=seed,
        marginal=marginal,
        component=component,
        ends=ends,
    )
    return problem


def prepare_rows_problem(
    correlation: bool,
    student: HeadLike,
    x: Tensor,
    xt: Tensor | None,
    mask_id: int | None,
    valid: Tensor | None,
    log_weights: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Problem, bool]:
    """The problem without distributions of `mixture_log_prob` and `correlation`, and whether x came
    as one row for each example."""
    head = prepare_student(student)
    ends, examples, letter = prepare_ends(cu_seqlens, head)
    mask_id = check_mask_id(mask_id, head.vocabulary)
    active = prepare_active(xt, valid, mask_id, head)
    tokens, single = prepare_rows(x, head, valid)
    check_targets_allowed(tokens, "x", mask_id, active)
    weights = prepare_log_weights(log_weights, head, examples, letter)
    return Problem(head, tokens, weights, active, mask_id, correlation, ends=ends), single
