"""The arguments of `loss`, checked, normalised and put into one record that every backend reads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check_bool,
    check_int64,
    check_same_device,
    check_shape,
    check_tensor,
    check_token_range,
    check_values,
    describe,
)
from ..heads import Head, HeadLike, as_head
from ..rng import draw_seed


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
class LossInputs:
    """What a backend computes the loss from. Shapes as in the legend of `loss`.

    `log_weights` is normalised and carries the graph of the caller's component log-weights.
    `static_zero` names the weights that are the number 0, so that their terms need no work.
    """

    student: Head  # (B, N, D, V)
    teacher: Head  # (B, D, V) or (B, M, D, V)
    x0: Tensor  # (B, D) int64
    consistency: Head | None  # (B, K, D, V), detached
    consistency_x: Tensor | None  # (B, K, D) int64; None: drawn by the backend
    xu: Tensor | None  # (B, K, D) int64
    active: Tensor | None  # (B, D) bool; None: every position counts
    log_weights: Tensor  # (B, N) compute dtype
    data_weight: Tensor  # (B,) compute dtype, and so the three below
    teacher_weight: Tensor
    consistency_weight: Tensor
    component_weight: Tensor
    static_zero: frozenset[str]
    mask_id: int | None
    control_variate: bool
    seed: Tensor | None  # () int64, of the draws of consistency_x
    return_terms: bool

    @property
    def batch(self) -> int:
        return self.student.shape[0]

    @property
    def components(self) -> int:
        return self.student.shape[1]

    @property
    def positions(self) -> int:
        return self.student.shape[2]

    @property
    def vocabulary(self) -> int:
        return self.student.shape[3]

    @property
    def draws(self) -> int:
        return 0 if self.consistency is None else self.consistency.shape[1]

    @property
    def teacher_components(self) -> int:
        return self.teacher.shape[1] if len(self.teacher.shape) == 4 else 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic and of the loss: fp32, or fp64 for an fp64 student."""
        return self.log_weights.dtype

    def tensors(self) -> list[Tensor | None]:
        """Every tensor of the record in a fixed order, those of heads flattened."""
        flat: list[Tensor | None] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Head):
                flat.extend(value.tensors())
            elif isinstance(value, Tensor):
                flat.append(value)
        return flat

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> LossInputs:
        """The same record over other tensors, given in the order of `tensors()`."""
        remaining = list(tensors)
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Head):
                count = len(value.tensors())
                changes[field.name] = value.with_tensors(remaining[:count])
                del remaining[:count]
            elif isinstance(value, Tensor):
                changes[field.name] = remaining.pop(0)
        assert not remaining
        return dataclasses.replace(self, **changes)


def compute_dtype(head: Head) -> torch.dtype:
    """fp32 for every input but fp64: half-precision logits are computed with in fp32."""
    return torch.promote_types(head.dtype, torch.float32)


def prepare_student(student: HeadLike) -> Head:
    head = as_head(student, "student")
    if len(head.shape) != 4:
        raise ValueError(f"student must have shape (B, N, D, V), got {tuple(head.shape)}")
    if head.shape[1] == 0:
        raise ValueError(f"student must have N >= 1 components, got shape {tuple(head.shape)}")
    if head.shape[3] == 0:
        raise ValueError(f"student must have V >= 1 classes, got shape {tuple(head.shape)}")
    for tensor in head.tensors():
        if tensor is not None:
            check_tensor(tensor, "student")
    return head


def prepare_mask_id(mask_id: int | None, vocabulary: int) -> int | None:
    if mask_id is None:
        return None
    if isinstance(mask_id, bool) or not isinstance(mask_id, int):
        raise TypeError(f"mask_id must be an int or None, got {describe(mask_id)}")
    if not 0 <= mask_id < vocabulary:
        raise ValueError(f"mask_id must be in [0, V) = [0, {vocabulary}), got {mask_id}")
    if vocabulary == 1:
        raise ValueError("mask_id excludes the only class: V must be at least 2, got 1")
    return mask_id


def prepare_log_weights(log_weights: Tensor | None, student: Head) -> Tensor:
    """Component log-weights (B, N), normalised over N in the compute dtype."""
    batch, components = student.shape[:2]
    dtype = compute_dtype(student)
    if log_weights is None:
        # Filled on the device: a copy from the host would wait for it.
        uniform = torch.full((), -math.log(components), dtype=dtype, device=student.device)
        return uniform.expand(batch, components)
    check_tensor(log_weights, "log_weights")
    if not log_weights.dtype.is_floating_point:
        raise TypeError(f"log_weights must be floating point, got {log_weights.dtype}")
    check_shape(log_weights, "log_weights", "B, N", (batch, components))
    check_same_device(log_weights, "log_weights", student, "student")
    check_values(
        ~torch.isnan(log_weights) & (log_weights != float("inf")),
        "log_weights must hold neither NaN nor +inf",
        log_weights,
    )
    check_values(
        (log_weights > float("-inf")).any(-1),
        "log_weights must leave at least one component of every example a weight above -inf",
    )
    return torch.log_softmax(log_weights.to(dtype), dim=-1)


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
    check_token_range(tokens, name, student.shape[-1])
    return tokens


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


def prepare_weight(value: float | Tensor, name: str, student: Head) -> tuple[Tensor, bool]:
    """A weight per example (B,) in the compute dtype, and whether it is the number 0."""
    batch, dtype = student.shape[0], compute_dtype(student)
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.dtype.is_complex:
            raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
        if value.ndim != 0 and tuple(value.shape) != (batch,):
            raise ValueError(
                f"{name} must be a float or have shape (B,) = ({batch},), got {tuple(value.shape)}"
            )
        check_same_device(value, name, student, "student")
        check_values(
            torch.isfinite(value) & (value >= 0),
            f"{name} must be finite and not negative",
            value,
        )
        if value.requires_grad:
            raise ValueError(
                f"{name} is not differentiable: pass {name}.detach(), or weight the terms "
                "outside with reduction='none'"
            )
        return value.detach().to(dtype).expand(batch), False
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a Tensor, got {describe(value)}")
    if not 0.0 <= float(value) < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    weight = torch.full((), float(value), dtype=dtype, device=student.device)
    return weight.expand(batch), float(value) == 0.0


def prepare_inputs(
    student: HeadLike,
    teacher: HeadLike,
    x0: Tensor,
    *,
    consistency: HeadLike | None,
    consistency_x: Tensor | None,
    xt: Tensor | None,
    xu: Tensor | None,
    mask_id: int | None,
    valid: Tensor | None,
    log_weights: Tensor | None,
    data_weight: float | Tensor,
    teacher_weight: float | Tensor,
    consistency_weight: float | Tensor,
    component_weight: float | Tensor,
    control_variate: bool,
    generator: torch.Generator | None,
    return_terms: bool,
) -> LossInputs:
    """Check every argument of `loss` and build the record, before any work starts."""
    check_bool(control_variate, "control_variate")
    check_bool(return_terms, "return_terms")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {describe(generator)}")
    student_head = prepare_student(student)
    batch, _, positions, vocabulary = student_head.shape
    mask_id = prepare_mask_id(mask_id, vocabulary)

    teacher_head = as_head(teacher, "teacher")
    shape = tuple(teacher_head.shape)
    matches = shape == (batch, positions, vocabulary) or (
        len(shape) == 4
        and shape[1] >= 1
        and (shape[0], *shape[2:]) == (batch, positions, vocabulary)
    )
    if not matches:
        raise ValueError(
            f"teacher must have shape (B, D, V) = {(batch, positions, vocabulary)} or "
            f"(B, M, D, V) with M >= 1, got {shape}"
        )
    check_same_device(teacher_head, "teacher", student_head, "student")

    active = prepare_active(xt, valid, mask_id, student_head)
    x0 = prepare_tokens(x0, "x0", "B, D", (batch, positions), student_head, valid)
    check_targets_allowed(x0, "x0", mask_id, active)

    weights = {
        "data_weight": data_weight,
        "teacher_weight": teacher_weight,
        "consistency_weight": consistency_weight,
        "component_weight": component_weight,
    }
    prepared = {name: prepare_weight(value, name, student_head) for name, value in weights.items()}
    normalised = prepare_log_weights(log_weights, student_head)

    consistency_head, seed = None, None
    if consistency is None:
        for name, value in (("consistency_x", consistency_x), ("xu", xu)):
            if value is not None:
                raise ValueError(f"{name} needs consistency: the student's logits at x_u")
    else:
        consistency_head = as_head(consistency, "consistency").detach()
        shape = tuple(consistency_head.shape)
        sizes = (batch, positions, vocabulary)
        if len(shape) != 4 or shape[1] == 0 or (shape[0], *shape[2:]) != sizes:
            raise ValueError(
                f"consistency must have shape (B, K, D, V) with K >= 1 and (B, D, V) = "
                f"{(batch, positions, vocabulary)}, got {shape}"
            )
        check_same_device(consistency_head, "consistency", student_head, "student")
        draws = shape[1]
        if xu is not None:
            if mask_id is None:
                raise ValueError("xu needs mask_id: without it no position is revealed")
            xu = prepare_tokens(xu, "xu", "B, K, D", (batch, draws, positions), student_head, valid)
        if consistency_x is None:
            # Last of all, so that no mistake advances the generator.
            seed = draw_seed(generator, student_head.device)
        else:
            sizes = (batch, draws, positions)
            consistency_x = prepare_tokens(
                consistency_x, "consistency_x", "B, K, D", sizes, student_head, valid
            )
            check_targets_allowed(consistency_x, "consistency_x", mask_id, active)
            if xu is not None:
                counts = xu != mask_id if active is None else (xu != mask_id) & active[:, None]
                check_values(
                    (consistency_x == xu) | ~counts,
                    "consistency_x must equal xu at positions that xu has revealed",
                    consistency_x,
                )
    return LossInputs(
        student=student_head,
        teacher=teacher_head.detach(),
        x0=x0,
        consistency=consistency_head,
        consistency_x=consistency_x,
        xu=xu,
        active=active,
        log_weights=normalised,
        **{name: weight for name, (weight, _) in prepared.items()},
        static_zero=frozenset(name for name, (_, zero) in prepared.items() if zero),
        mask_id=mask_id,
        control_variate=control_variate,
        seed=seed,
        return_terms=return_terms,
    )
