"""Random problems for the tests of the loss, and a plain loss to compare with.

`naive_loss` shares no code with the package: it removes the mask column and the positions that do
not count, example by example, and writes the equations of the loss down with log_softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import di4c_fast

# For float64, where rounding leaves about 1e-15 of the largest summand: a thousand times that for
# sums of a few dozen terms, and far below what any wrong factor makes.
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
TERMS = (
    ("data_correlation", "data_weight"),
    ("teacher_marginal", "teacher_weight"),
    ("consistency_correlation", "consistency_weight"),
    ("consistency_marginal", "consistency_weight"),
    ("component", "component_weight"),
)


def random_tokens(generator: torch.Generator, shape, vocabulary: int, mask_id: int | None = None):
    """Uniform over the classes that are not the mask."""
    if mask_id is None:
        return torch.randint(vocabulary, shape, generator=generator)
    tokens = torch.randint(vocabulary - 1, shape, generator=generator)
    return tokens + (tokens >= mask_id).long()


def make_problem(
    seed: int = 0,
    *,
    batch: int = 2,
    components: int = 3,
    positions: int = 5,
    vocabulary: int = 7,
    draws: int | None = 2,
    teacher_components: int | None = None,
    mask_id: int | None = None,
    revealed: bool = False,
    padded: bool = False,
    weighted: bool = False,
    scale: float = 1.5,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> dict[str, Any]:
    """Arguments of `di4c_fast.loss`; `settings` are passed on.

    mask_id: adds xt with about 60% masks; revealed: adds xu with about 40% revealed tokens;
    padded: adds valid; weighted: adds component log-weights; draws=None: no consistency.
    """
    g = torch.Generator().manual_seed(seed)
    shape = (batch, positions, vocabulary)

    def logits(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=g, dtype=torch.float64) * scale).to(dtype)

    problem: dict[str, Any] = {
        "student": logits(batch, components, *shape[1:]),
        "x0": random_tokens(g, shape[:2], vocabulary, mask_id),
    }
    if teacher_components is None:
        problem["teacher"] = logits(*shape)
    else:
        problem["teacher"] = logits(batch, teacher_components, *shape[1:])
    if draws is not None:
        problem["consistency"] = logits(batch, draws, *shape[1:])
        problem["consistency_x"] = random_tokens(g, (batch, draws, positions), vocabulary, mask_id)
    if mask_id is not None:
        problem["mask_id"] = mask_id
        xt = random_tokens(g, shape[:2], vocabulary, mask_id)
        masked = torch.rand(shape[:2], generator=g) < 0.6
        masked[:, 0] = True
        problem["xt"] = torch.where(masked, mask_id, xt)
        if revealed:
            xu = problem["consistency_x"]
            hidden = torch.rand(xu.shape, generator=g) < 0.6
            problem["xu"] = torch.where(hidden, mask_id, xu)
    if padded:
        problem["valid"] = torch.rand(shape[:2], generator=g) < 0.7
        problem["valid"][:, 0] = True
    if weighted:
        problem["log_weights"] = logits(batch, components)
    return problem | settings


def _columns(logits: Tensor, mask_id: int | None) -> Tensor:
    """Logits without the mask column."""
    if mask_id is None:
        return logits
    return torch.cat([logits[..., :mask_id], logits[..., mask_id + 1 :]], -1)


def _ids(tokens: Tensor, mask_id: int | None) -> Tensor:
    """Token ids after the mask column is gone."""
    return tokens if mask_id is None else tokens - (tokens > mask_id).long()


def _kl(target: Tensor, log_prob: Tensor) -> Tensor:
    return (torch.xlogy(target, target) - target * log_prob).sum()


def naive_terms(problem: dict[str, Any], example: int) -> dict[str, Tensor]:
    """The five terms of one example; every class must have a finite logit."""
    mask_id, control_variate = problem.get("mask_id"), problem.get("control_variate", True)
    student = problem["student"]
    dtype = torch.promote_types(student.dtype, torch.float32)
    keep = torch.ones(student.shape[-2], dtype=torch.bool)
    if problem.get("valid") is not None:
        keep &= problem["valid"][example]
    if problem.get("xt") is not None:
        keep &= problem["xt"][example] == mask_id

    def rows(logits: Tensor) -> Tensor:
        part = logits[example]
        part = part if part.ndim == 3 else part.unsqueeze(0)
        return _columns(part.to(dtype), mask_id)[:, keep]

    log_prob = rows(student).log_softmax(-1)  # [N, A, V]
    weights = problem.get("log_weights")
    if weights is None:
        weights = torch.full(log_prob.shape[:1], -math.log(log_prob.shape[0]), dtype=dtype)
    else:
        weights = weights[example].to(dtype).log_softmax(-1)
    marginal = torch.logsumexp(log_prob + weights[:, None, None], 0)
    index = torch.arange(int(keep.sum()))

    def score(tokens: Tensor) -> Tensor:
        x = _ids(tokens, mask_id)[keep]
        joint = torch.logsumexp(weights + log_prob[:, index, x].sum(1), 0)
        if not control_variate:
            return -joint
        inside = (log_prob[:, index, x] - marginal[index, x]).sum(1)
        return -torch.logsumexp(weights + inside, 0)

    teacher = rows(problem["teacher"].detach()).softmax(-1).mean(0)
    zero = log_prob.new_zeros(())
    terms = {
        "data_correlation": score(problem["x0"][example]),
        "teacher_marginal": _kl(teacher, marginal) if control_variate else zero,
        "consistency_correlation": zero,
        "consistency_marginal": zero,
        "component": sum(
            (weights[n].exp() * _kl(teacher, log_prob[n]) for n in range(len(weights))), zero
        ),
    }
    if problem.get("consistency") is not None:
        prob = rows(problem["consistency"].detach()).softmax(-1)
        draws = problem["consistency_x"][example]
        if problem.get("xu") is not None:
            xu = problem["xu"][example]
            shown = (xu != mask_id)[:, keep]
            one_hot = torch.zeros_like(prob).scatter_(
                -1, _ids(xu, mask_id)[:, keep].clamp_max(prob.shape[-1] - 1).unsqueeze(-1), 1.0
            )
            prob = torch.where(shown.unsqueeze(-1), one_hot, prob)
        terms["consistency_correlation"] = torch.stack([score(x) for x in draws]).mean()
        if control_variate:
            terms["consistency_marginal"] = _kl(prob.mean(0), marginal)
    return terms


def naive_loss(problem: dict[str, Any]) -> Tensor:
    """The loss of every example, (B,)."""
    defaults = {"component_weight": 0.0}
    values = []
    for example in range(problem["student"].shape[0]):
        total: Tensor | float = 0.0
        for term, name in TERMS:
            weight = problem.get(name, defaults.get(name, 1.0))
            if isinstance(weight, Tensor) and weight.ndim == 1:
                weight = weight[example]
            total = total + weight * naive_terms(problem, example)[term]
        values.append(total)
    return torch.stack(values)


def run_loss(problem: dict[str, Any], **settings: Any):
    """`di4c_fast.loss` of a problem."""
    arguments = problem | settings
    return di4c_fast.loss(
        arguments.pop("student"), arguments.pop("teacher"), arguments.pop("x0"), **arguments
    )


def loss_and_gradients(
    problem: dict[str, Any], wanted=("student", "log_weights"), **settings: Any
) -> dict[str, Tensor]:
    """The loss and the gradients of the named tensor arguments."""
    leaves = {
        name: problem[name].detach().clone().requires_grad_()
        for name in wanted
        if isinstance(problem.get(name), Tensor)
    }
    value = run_loss(problem | leaves, **settings)
    value.sum().backward()
    return {"loss": value.detach()} | {
        name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None
    }
