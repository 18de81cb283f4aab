"""Mixture backward of the Triton kernels on its own, interpreted, against autograd in fp64.

The loss that is differentiated is written down here once more, from the equations, with weights
of the targets given rather than derived.

Mutations and the tests that caught them: `kernels/README.md`.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from di4c_fast.kernels.triton import tuning
from di4c_fast.kernels.triton.joint import joint_terms
from di4c_fast.kernels.triton.mixture_backward import mixture_backward
from di4c_fast.kernels.triton.operands import Visit, order_positions, tensor_operand
from di4c_fast.kernels.triton.target_gradient import BackwardSums

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="run by test_fused_gpu on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]

B, N, D, J = 2, 3, 3, 4
TILES = {"backward_elements": 64, "split_columns": 32}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(vocabulary: int, components: int = N) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    tokens = torch.randint(0, vocabulary, (B, J, D), generator=g)
    tokens[:, 2] = tokens[:, 0]  # targets that coincide
    return {
        "student": randn(B, components, D, vocabulary),
        "teacher": randn(B, D, vocabulary, seed=1),
        "q_u": randn(B * D, vocabulary, seed=2).softmax(-1),
        "log_weights": randn(B, components, seed=3).log_softmax(-1),
        "tokens": tokens,
        "alpha": torch.rand(B, J, generator=g),
        "teacher_weight": torch.tensor([0.7, 1.3]),
        "consistency_weight": torch.tensor([0.4, 0.9]),
        "component_weight": torch.tensor([0.5, 0.0]),
        "upstream": torch.tensor([1.5, -0.5]),
    }


def expected_gradient(p: dict[str, torch.Tensor], active: torch.Tensor) -> torch.Tensor:
    student = p["student"].double().requires_grad_()
    a = p["log_weights"].double()
    log_prob = student.log_softmax(-1)
    m = (log_prob + a[:, :, None, None]).logsumexp(1)
    q_t = p["teacher"].double().softmax(-1)
    q_u = p["q_u"].double().view_as(m)
    on = active.double()

    def total(values: torch.Tensor) -> torch.Tensor:
        return (values * on).sum(-1)

    index = p["tokens"].transpose(1, 2).unsqueeze(1).expand(-1, student.shape[1], -1, -1)
    gap = log_prob.gather(-1, index) - m.gather(-1, index[:, 0]).unsqueeze(1)
    cor = -((gap * on[:, None, :, None]).sum(2) + a.unsqueeze(-1)).logsumexp(1)
    divergence = (q_t.unsqueeze(1) * (q_t.log().unsqueeze(1) - log_prob)).sum(-1)
    component = (a.exp() * (divergence * on.unsqueeze(1)).sum(-1)).sum(1)
    loss = (p["alpha"] * cor).sum(-1)
    loss = loss + p["teacher_weight"] * total(-(q_t * m).sum(-1))
    loss = loss + p["consistency_weight"] * total(-(q_u * m).sum(-1))
    loss = loss + p["component_weight"] * component
    (gradient,) = torch.autograd.grad((loss * p["upstream"]).sum(), student)
    return gradient


def kernel_gradient(p: dict[str, torch.Tensor], active: torch.Tensor, **tiles: int):
    student, teacher = p["student"], p["teacher"]
    _, components, _, vocabulary = student.shape
    total = B * D
    log_prob = student.log_softmax(-1)
    weighted = log_prob + p["log_weights"][:, :, None, None]
    m = weighted.logsumexp(1)
    q = p["teacher_weight"][:, None, None] * teacher.softmax(-1)
    q = q + p["consistency_weight"][:, None, None] * p["q_u"].view_as(m)
    mass = torch.einsum("bdv,bndv->bdn", q, (weighted - m.unsqueeze(1)).exp())
    index = p["tokens"].transpose(1, 2).unsqueeze(1).expand(-1, components, -1, -1)
    picked = log_prob.gather(-1, index).permute(0, 2, 3, 1).reshape(total, J, components)
    lse = student.logsumexp(-1).transpose(1, 2).reshape(total, components)
    joint = joint_terms(
        picked.contiguous(), lse.contiguous(), active, p["log_weights"], correlation=True
    )
    known = BackwardSums(
        tokens=p["tokens"],
        lse=lse.contiguous(),
        lse_teacher=teacher.logsumexp(-1).reshape(total, 1),
        log_weights=p["log_weights"],
        teacher_weight=p["teacher_weight"],
        consistency_weight=p["consistency_weight"],
        component_weight=p["component_weight"],
        picked=picked.contiguous(),
        marginal=joint["marginal"],
        joint=joint["joint"],
        alpha=p["alpha"],
        mass=mass.reshape(total, components).contiguous(),
        divergence=torch.zeros(total, components),
        correlation=True,
        has_q=True,
        has_c=True,
    )
    rows, count = order_positions(active)
    q_u = torch.empty(total, vocabulary + 5)  # by slot, with a row stride of its own
    q_u[:, :vocabulary] = p["q_u"][rows]
    grad = torch.empty(B, D, components, vocabulary).transpose(1, 2)
    stride_b, stride_n, stride_d, _ = grad.stride()
    with tuning.override(**{**TILES, **tiles}):
        mixture_backward(
            tensor_operand(student),
            tensor_operand(teacher.unsqueeze(1)),
            Visit(total, 0, rows, count),
            D,
            None,
            known,
            upstream=p["upstream"],
            scale=1.0,
            grad=grad,
            grad_strides=(0, stride_b, stride_n, stride_d),
            q_consistency=q_u,
        )
    return grad


ACTIVE = torch.tensor([[True, False, True], [True, True, False]])


@pytest.mark.parametrize(
    ("vocabulary", "components", "tile"), [(90, 3, 32), (31, 1, 32), (64, 4, 32), (70, 5, 2)]
)
def test_gradient_of_every_logit(vocabulary, components, tile):
    """Catches (`mutate_kernels.py`): wrong sign of kappa; coinciding
    targets not gathered; zeros not written; upstream gradient ignored; component term without
    its weight.
    """
    p = problem(vocabulary, components)
    ours = kernel_gradient(p, ACTIVE, component_tile=tile)
    truth = expected_gradient(p, ACTIVE)
    # Gradients of size 1 from a dozen fp32 operations.
    torch.testing.assert_close(ours.double(), truth, atol=3e-6, rtol=1e-5)


def test_positions_that_are_not_active_get_zeros():
    ours = kernel_gradient(problem(90), ACTIVE).transpose(1, 2)
    assert torch.count_nonzero(ours[~ACTIVE]) == 0
    assert not ours.isnan().any()


def test_gradient_sums_to_zero_over_the_classes():
    # A softmax does not change when a constant is added to its logits.
    ours = kernel_gradient(problem(90), ACTIVE)
    assert ours.sum(-1).abs().max() < 5e-6
