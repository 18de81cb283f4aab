"""The distillation loss of Di4C and the likelihoods of a mixture of products."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor

from .. import backends
from ..backends import Backend
from ..checks import check_choice, check_whole, without_autocast
from ..groups import check_apart, group_name, shared_errors
from ..heads import HeadLike
from ..passes.base import Values
from .packed import pack_problem, pad_problem
from .problem import (
    LossTerms,
    Problem,
    prepare_loss,
    prepare_rows_problem,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LossTerms", "correlation", "loss", "mixture_log_prob"]

Reduction = Literal["mean", "sum", "none"]

REDUCTIONS = ("mean", "sum", "none")


class _Options(TypedDict, total=False):
    """The options of `loss` that do not change what it returns."""

    consistency: HeadLike | None
    consistency_x: Tensor | None
    xt: Tensor | None
    xu: Tensor | None
    mask_id: int | None
    valid: Tensor | None
    log_weights: Tensor | None
    cu_seqlens: Tensor | None
    data_weight: float | Tensor
    teacher_weight: float | Tensor
    consistency_weight: float | Tensor
    component_weight: float | Tensor
    control_variate: bool
    reduction: Reduction
    generator: torch.Generator | None
    position_group: Any
    backend: Backend


@overload
def loss(
    student: HeadLike,
    teacher: HeadLike,
    x0: Tensor,
    *,
    return_terms: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def loss(
    student: HeadLike,
    teacher: HeadLike,
    x0: Tensor,
    *,
    return_terms: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, LossTerms]: ...


def loss(
    student: HeadLike,
    teacher: HeadLike,
    x0: Tensor,
    *,
    consistency: HeadLike | None = None,
    consistency_x: Tensor | None = None,
    xt: Tensor | None = None,
    xu: Tensor | None = None,
    mask_id: int | None = None,
    valid: Tensor | None = None,
    log_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    data_weight: float | Tensor = 1.0,
    teacher_weight: float | Tensor = 1.0,
    consistency_weight: float | Tensor = 1.0,
    component_weight: float | Tensor = 0.0,
    control_variate: bool = True,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
    position_group: Any = None,
    backend: Backend = "auto",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, LossTerms]:
    """The Di4C distillation loss of a mixture-of-products student, in nats.

    With l = log_softmax(student), p = exp l, a = log_softmax(log_weights), the marginal
    m[d,v] = logsumexp_n(a_n + l[n,d,v]), and cor(x) = -logsumexp_n(a_n + sum_d (l[n,d,x_d] -
    m[d,x_d])), the loss of one example is

        data_weight          * cor(x0)
        + teacher_weight     * sum_d KL(q_T[d] || m[d])
        + consistency_weight * (mean_k cor(x^k) + sum_d KL(q_u[d] || m[d]))
        + component_weight   * sum_n e^{a_n} sum_d KL(q_T[d] || p[n,d])

    where q_T is the mean over M of softmax(teacher) and q_u the mean over K of
    softmax(consistency). Equivalent PyTorch, without masks and for one example (B = 1):

        l = student[0].log_softmax(-1)                             # (N, D, V)
        m = l.logsumexp(0) - math.log(N)                           # (D, V)
        def cor(x):                                                # x (D,)
            i = x[None, :, None].expand(N, -1, 1)
            joint = l.gather(-1, i).squeeze(-1) - m.gather(-1, x[:, None]).squeeze(-1)
            return math.log(N) - joint.sum(-1).logsumexp(0)
        def kl(q):                                                 # q (D, V)
            return (q.xlogy(q) - q * m).sum()
        q_t, q_u = teacher[0].softmax(-1), consistency[0].softmax(-1).mean(0)
        loss = (data_weight * cor(x0[0]) + teacher_weight * kl(q_t)
                + consistency_weight * (torch.stack([cor(x) for x in consistency_x[0]]).mean()
                                        + kl(q_u)))

    Shapes: B examples, N components of the student, M components of the teacher, K consistency
    draws, D positions, V classes.

    Args:
        student: logits (B, N, D, V), a tensor or a head. fp64, fp32, bf16 or fp16.
        teacher: logits (B, D, V) or (B, M, D, V), a tensor or a head.
        x0: (B, D) int64, the data.
        consistency: logits (B, K, D, V) of the student at x_u, a tensor or a head; None leaves
            the consistency terms out.
        consistency_x: (B, K, D) int64, row k drawn from component k of `consistency`; None draws
            it here. The tokens are a function of one seed taken from `generator`.
        xt: (B, D) int64, the noisy tokens; needs `mask_id`. Positions where xt != mask_id
            contribute no loss, no gradient and no work.
        xu: (B, K, D) int64, the tokens of the consistency draws; needs `mask_id`. Where draw k
            has revealed a token, that token takes the place of its softmax and of its draw.
        mask_id: the id of the mask token, excluded from every softmax; None if there is none.
        valid: (B, D) bool; False (padding, prompt) contributes no loss, no gradient, no work, and
            the tokens there may be anything, such as -100.
        log_weights: (B, N) log-weights of the components, normalised here; None for uniform.
        cu_seqlens: (S + 1,) int32 or int64, cumulative lengths 0 .. T of a packed batch: S
            sequences one after the other in the T positions of one row. B above is then 1 and D
            is T, but for `log_weights` (S, N), weights (S,) and what comes back, (S,) for B:
            every sequence is an example, with its own joint terms. None: the batch is not packed.
        data_weight, teacher_weight, consistency_weight, component_weight: finite and not
            negative, a float or a tensor (B,). A term of weight 0 is left out, even if infinite.
        control_variate: False replaces cor(x) by -log sum_n e^{a_n} prod_d p[n,d,x_d] and drops
            both KL terms to the marginal.
        reduction: "mean" or "sum" over the batch, or "none".
        generator: source of the seed of the draws; None for the default generator.
        position_group: process group whose ranks have other positions of the same examples, in
            the order of the ranks and any number each; sums over d are then those over all of
            them, and every rank gets the value of one process with all positions. Gradients are
            those of this rank's positions: what all positions share is to be summed over the
            ranks, but for `log_weights`, whose gradient is complete. None: these are all.
        backend: "triton" (GPU kernels), "cpu" (C++, any head of fp32, bf16 or fp16), "torch"
            (plain operations, any device), "reference" (dense, autograd), or "auto": triton on a
            GPU, cpu on a CPU, torch where that cannot run.
        return_terms: also return the unweighted terms.

    Returns:
        The loss, a scalar or (B,), in fp32 (fp64 for fp64 logits); with `return_terms` a tuple
        of the loss and `LossTerms`. An empty batch and a batch without any active position
        give 0.

    Differentiable with respect to the tensors behind `student` and to `log_weights`; `teacher`
    and `consistency` are detached. Gradients have the dtype of their tensor. Autocast is off
    inside: the dtype of a tensor says how it is computed with. All backends but the reference
    raise RuntimeError on double backward and on forward-mode derivatives.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what was expected and what
            came. Values of tensors (token ranges, weights) are checked with ValueError on the CPU;
            on a GPU by a device-side assertion without a host sync, which surfaces as a
            RuntimeError at the next synchronising call.
        RuntimeError: a backend asked for by name cannot run here.

    Source: the distillation, data and consistency losses with control variates of Di4C (arXiv
    2410.08709), and the published training code of its three systems, whose losses and gradients
    it reproduces.
    """
    with shared_errors(student, position_group):
        check_choice(reduction, "reduction", REDUCTIONS)
        check_choice(backend, "backend", backends.names())
        problem = prepare_loss(
            student,
            teacher,
            x0,
            {
                "data": data_weight,
                "teacher": teacher_weight,
                "consistency": consistency_weight,
                "component": component_weight,
            },
            consistency=consistency,
            consistency_x=consistency_x,
            xt=xt,
            xu=xu,
            mask_id=mask_id,
            valid=valid,
            log_weights=log_weights,
            cu_seqlens=cu_seqlens,
            control_variate=control_variate,
            generator=generator,
            return_terms=return_terms,
        )
        problem = _laid_out(problem, position_group)
    with without_autocast(problem.student.device):
        values = _evaluate(problem, backend)
    value = values.loss
    if reduction == "mean":
        value = value.mean() if len(value) else value.sum()
    elif reduction == "sum":
        value = value.sum()
    if not return_terms:
        return value
    rows, none = values.rows, torch.zeros_like(values.component)
    consistency = rows[:, 1:].mean(1) if rows.shape[1] > 1 else none
    terms = (rows[:, 0], values.teacher_kl, consistency, values.consistency_kl, values.component)
    return value, LossTerms(*(term.detach() for term in terms))


def _laid_out(problem: Problem, position_group: Any) -> Problem:
    """The problem of positions on several ranks, or of sequences in one row."""
    if position_group is not None:
        name = group_name(position_group, "position_group")
        check_apart(problem.student.shard, position_group)
        problem = dataclasses.replace(problem, position_group=name)
    return problem if problem.ends is None else pack_problem(problem)


def _evaluate(problem: Problem, backend: Backend) -> Values:
    # Import statements rather than importlib: torch.compile traces through them.
    if backend == "reference":
        from ..reference import loss as reference

        check_whole(problem.student, 'backend="reference"', problem.position_group)
        if problem.ends is not None:
            problem = pad_problem(reference.with_draws(problem))
        return reference.evaluate(problem)
    from .op import evaluate

    return evaluate(problem, backends.resolve(backend, problem.student.device, problem.dtype))


def mixture_log_prob(
    student: HeadLike,
    x: Tensor,
    *,
    xt: Tensor | None = None,
    mask_id: int | None = None,
    valid: Tensor | None = None,
    log_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_group: Any = None,
    backend: Backend = "auto",
) -> Tensor:
    """Joint log-likelihood of token rows under a mixture of products, in nats.

    Equivalent PyTorch, without masks:

        l = student.log_softmax(-1)                                    # (B, N, D, V)
        i = x.transpose(1, 2).unsqueeze(1).expand(-1, N, -1, -1)       # (B, N, D, K)
        a = log_weights.log_softmax(-1)                                # (B, N)
        (l.gather(-1, i).sum(2) + a.unsqueeze(-1)).logsumexp(1)        # (B, K)

    Args:
        student: logits (B, N, D, V), a tensor or a head.
        x: (B, K, D) int64, or (B, D) for one row per example.
        xt, mask_id, valid, log_weights, cu_seqlens, position_group, backend: as in `loss`; only
            active positions count.

    Returns:
        (B, K), or (B,) for x (B, D); fp32 (fp64 for fp64 logits). -inf for impossible rows.

    Differentiable with respect to the tensors behind `student` and to `log_weights`.

    Raises:
        TypeError, ValueError, RuntimeError: as `loss`.

    Source: the mixture denoiser of Di4C (arXiv 2410.08709); `loss` uses it when `control_variate`
    is off.
    """
    given = (xt, mask_id, valid, log_weights, cu_seqlens)
    return _token_rows(backend, position_group, False, student, x, *given)


def correlation(
    student: HeadLike,
    x: Tensor,
    *,
    xt: Tensor | None = None,
    mask_id: int | None = None,
    valid: Tensor | None = None,
    log_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_group: Any = None,
    backend: Backend = "auto",
) -> Tensor:
    """Dimensional correlation term cor(x) of token rows under a mixture, in nats.

    The sum of the marginal log-likelihoods of the positions minus the joint log-likelihood:

        sum_d log_marginal(x_d) - mixture_log_prob(student, x)

    computed without the cancellation of the two sums. Exactly 0 for one component, negative
    where the mixture finds the tokens more likely together than apart.

    Args, Returns, Raises: as `mixture_log_prob`.

    Differentiable with respect to the tensors behind `student` and to `log_weights`.

    Source: the control variates of Di4C (arXiv 2410.08709).
    """
    given = (xt, mask_id, valid, log_weights, cu_seqlens)
    return _token_rows(backend, position_group, True, student, x, *given)


def _token_rows(
    backend: Backend,
    position_group: Any,
    correlation: bool,
    student: HeadLike,
    x: Tensor,
    *others: Any,
) -> Tensor:
    with shared_errors(student, position_group):
        check_choice(backend, "backend", backends.names())
        problem, single = prepare_rows_problem(correlation, student, x, *others)
        problem = _laid_out(problem, position_group)
    with without_autocast(problem.student.device):
        rows = _evaluate(problem, backend).rows
    rows = rows if correlation else 0.0 - rows
    return rows.squeeze(1) if single else rows
