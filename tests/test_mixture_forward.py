"""Marginal, mixture forward and joint terms of the Triton kernels, one at a time, interpreted.

Mutations and the tests that caught them: `kernels/README.md`.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from di4c_fast.kernels.triton import tuning
from di4c_fast.kernels.triton.joint import joint_terms
from di4c_fast.kernels.triton.marginal import marginal
from di4c_fast.kernels.triton.mixture_forward import mixture_forward, new_forward_sums
from di4c_fast.kernels.triton.operands import Visit, order_positions, tensor_operand

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="run by test_fused_gpu on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]

TILES = {
    "marginal_elements": 64,
    "forward_elements": 64,
    "split_columns": 32,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("components", [1, 3, 5])
def test_marginal_is_the_mean_of_softmaxes(components):
    """Catches (`mutate_kernels.py`): mean not divided."""
    logits = randn(2, components, 3, 90)
    lse = logits.logsumexp(-1).transpose(1, 2).reshape(6, components)
    q = torch.empty(6, 128)
    with tuning.override(**TILES, component_tile=4):
        marginal(tensor_operand(logits), Visit(6), 3, None, lse, q)
    truth = logits.double().softmax(-1).mean(1).reshape(6, 90)
    # A few roundings of numbers below 1.
    torch.testing.assert_close(q[:, :90].double(), truth, atol=5e-7, rtol=1e-5)
    assert q[:, 90:].isnan().all()


def test_marginal_counts_a_shown_token_as_one_hot():
    """Catches (`mutate_kernels.py`): mean not divided."""
    logits = randn(1, 3, 2, 40)
    xu = torch.tensor([[[39, 5], [6, 39], [6, 5]]])
    masked = logits.index_fill(-1, torch.tensor(39), -torch.inf)
    lse = masked.logsumexp(-1).transpose(1, 2).reshape(2, 3).contiguous()
    lse[xu[0].T != 39] = torch.nan  # as the statistics leave rows that show a token
    q = torch.empty(2, 40)
    with tuning.override(**TILES):
        marginal(tensor_operand(logits), Visit(2), 2, 39, lse, q, xu=xu)
    one_hot = torch.nn.functional.one_hot(xu, 40).double()
    prob = torch.where((xu == 39).unsqueeze(-1), masked.double().softmax(-1), one_hot)
    torch.testing.assert_close(q.double(), prob.mean(1)[0], atol=5e-7, rtol=1e-5)


def run_forward(student, teacher, log_weights, weights, q_u=None, visit=None, **tiles):
    """Sums over splits: kl_t, kl_u (B·D), mass and divergence (B·D, N)."""
    batch, components, positions, vocabulary = student.shape
    total = batch * positions
    lse = student.logsumexp(-1).transpose(1, 2).reshape(total, components)
    lse_t = teacher.logsumexp(-1).reshape(total, 1)
    with tuning.override(**{**TILES, **tiles}):
        sums = new_forward_sums(
            total,
            components,
            vocabulary,
            False,
            student.device,
            has_q=True,
            has_u=q_u is not None,
            has_c=True,
        )
        mixture_forward(
            tensor_operand(student),
            tensor_operand(teacher.unsqueeze(1)),
            Visit(total) if visit is None else visit,
            positions,
            None,
            lse=lse,
            lse_teacher=lse_t,
            log_weights=log_weights,
            teacher_weight=weights[0],
            consistency_weight=weights[1],
            sums=sums,
            has_q=True,
            has_c=True,
            q_consistency=q_u,
        )
    parts = (sums.kl_teacher, sums.kl_consistency, sums.mass, sums.divergence)
    return [part.sum(1) if part.numel() else part for part in parts], sums.tiles


def expected_forward(student, teacher, log_weights, weights, q_u):
    log_prob = student.double().log_softmax(-1)
    weighted = log_prob + log_weights.double()[:, :, None, None]
    m = weighted.logsumexp(1)
    q_t, q_u = teacher.double().softmax(-1), q_u.double().view_as(m)
    q = weights[0][:, None, None] * q_t + weights[1][:, None, None] * q_u
    share = (weighted - m.unsqueeze(1)).exp()
    batch, components, positions, _ = student.shape
    total = batch * positions
    kl = [(torch.xlogy(p, p) - p * m).sum(-1).reshape(total) for p in (q_t, q_u)]
    mass = torch.einsum("bdv,bndv->bdn", q, share).reshape(total, components)
    entropy = torch.xlogy(q_t, q_t).sum(-1)
    cross = torch.einsum("bdv,bndv->bdn", q_t, log_prob)
    divergence = (entropy.unsqueeze(-1) - cross).reshape(total, components)
    return [*kl, mass, divergence]


def problem(components=3, vocabulary=90):
    student, teacher = randn(2, components, 3, vocabulary), randn(2, 3, vocabulary, seed=1)
    log_weights = randn(2, components, seed=2).log_softmax(-1)
    weights = torch.tensor([[0.7, 1.3], [0.4, 0.0]])
    q_u = randn(6, vocabulary, seed=3).softmax(-1)
    return student, teacher, log_weights, weights, q_u


@pytest.mark.parametrize(
    ("components", "vocabulary", "tile"), [(1, 40, 32), (3, 90, 32), (5, 130, 2), (8, 16, 32)]
)
def test_forward_sums(components, vocabulary, tile):
    """Catches (`mutate_kernels.py`): split one block short; rescale
    dropped in the loop over components.
    """
    arguments = problem(components, vocabulary)
    ours, tiles = run_forward(*arguments, component_tile=tile)
    assert tiles.one_tile == (components <= tile)
    for mine, true in zip(ours, expected_forward(*arguments), strict=True):
        torch.testing.assert_close(mine.double(), true, atol=5e-6, rtol=2e-6)


def test_forward_writes_nothing_at_positions_that_are_not_active():
    arguments = problem()
    active = torch.tensor([[True, False, True], [False, False, True]])
    ours, _ = run_forward(*arguments[:4], visit=Visit(6, 0, *order_positions(active)))
    for mine in (ours[0], ours[2], ours[3]):
        assert mine[~active.flatten()].isnan().all()
        assert torch.isfinite(mine[active.flatten()]).all()


def test_class_that_only_the_teacher_has_makes_the_divergence_infinite():
    student, teacher, log_weights, weights, q_u = problem()
    student[0, :, 1, 7] = -torch.inf
    q_u[:, 7] = 0.0
    student[1, 0, 2, 8] = -torch.inf  # only one component lacks it: the marginal does not
    ours, _ = run_forward(student, teacher, log_weights, weights, q_u)
    infinite = torch.zeros(6, dtype=torch.bool)
    infinite[1] = True
    assert torch.equal(torch.isinf(ours[0]), infinite)
    assert torch.isfinite(ours[1]).all()  # q_u does not want it
    assert torch.isfinite(ours[2]).all()
    expected = torch.zeros(6, 3, dtype=torch.bool)
    expected[1], expected[5, 0] = True, True
    assert torch.equal(torch.isinf(ours[3]), expected)


def test_probabilities_below_the_fp32_range_keep_their_divergence():
    student, teacher, log_weights, weights, q_u = problem()
    student[:, :, :, 11] = -300.0  # exp underflows; m does not
    ours, _ = run_forward(student, teacher, log_weights, weights, q_u)
    truth = expected_forward(student, teacher, log_weights, weights, q_u)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=5e-5, rtol=2e-6)


@pytest.mark.parametrize("correlation", [True, False])
def test_joint_terms(correlation):
    """Catches (`mutate_kernels.py`): joint sums over positions that do not count."""
    positions = 300  # two groups of positions
    log_prob = randn(2, positions, 4, 3).log_softmax(-1) - 1.0  # (B, D, J, N)
    log_prob[0, 5, 1] = -torch.inf  # a target that no component has
    log_prob[1, 7, 2, 0] = -torch.inf  # one that one component lacks
    log_weights = randn(2, 3, seed=2).log_softmax(-1)
    active = torch.rand(2, positions, generator=torch.Generator().manual_seed(4)) < 0.7
    active[0, 5] = active[1, 7] = True
    lse = torch.zeros(2 * positions, 3)
    result = joint_terms(
        log_prob.reshape(-1, 4, 3), lse, active, log_weights, correlation=correlation
    )
    wide = log_prob.double()
    m = (wide + log_weights.double()[:, None, None]).logsumexp(-1)  # (B, D, J)
    counted = active.unsqueeze(-1).expand_as(m)
    if correlation:
        counted = counted & (m > -torch.inf)
        wide = wide - torch.where(counted, m, 0.0).unsqueeze(-1)
    joint = torch.where(counted.unsqueeze(-1), wide, 0.0).sum(1) + log_weights.double()[:, None]
    value = -joint.logsumexp(-1)
    torch.testing.assert_close(result["values"].double(), value, atol=1e-4, rtol=3e-7)
    weights = torch.where(value.isinf().unsqueeze(-1), 0.0, joint.softmax(-1))
    # fp32 log-probabilities, three hundred of them: 1e-6 in the exponent, hence relative.
    torch.testing.assert_close(result["joint"].double(), weights, atol=1e-7, rtol=3e-5)
    assert value.isinf().any() != correlation
