"""The discretised logistic in the Triton kernels: bins, slopes, and the backward kernel.

Mutations and the tests that caught them: `kernels/README.md`. The kernels use another form of the
bins than the head (see `_tl.logistic_tile`); both are compared with the head in fp64.
"""

from __future__ import annotations

import pytest
import torch

from di4c_fast import LogisticHead

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from di4c_fast.kernels.triton._tl import logistic_slopes, logistic_tile, slopes_at  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="run by test_fused_gpu on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]

KINDS = {"left": 1, "min": 2}


@triton.jit
def _bins_kernel(
    mu_ptr, scale_ptr, logits_ptr, slope_mu_ptr, slope_scale_ptr, V, eps, KIND: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, C)
    cols = tl.arange(0, W)
    mu, log_scale = tl.load(mu_ptr + c), tl.load(scale_ptr + c)
    place = c[:, None] * V + cols[None, :]
    keep = (cols < V)[None, :] & (c >= 0)[:, None]
    tl.store(logits_ptr + place, logistic_tile(mu, log_scale, cols, V, eps, KIND), mask=keep)
    slope_mu, slope_scale = logistic_slopes(mu, log_scale, cols, V, eps, KIND)
    tl.store(slope_mu_ptr + place, slope_mu, mask=keep)
    tl.store(slope_scale_ptr + place, slope_scale, mask=keep)


@triton.jit
def _slopes_at_kernel(
    mu_ptr, scale_ptr, tokens_ptr, slope_mu_ptr, slope_scale_ptr, V, eps, KIND: tl.constexpr,
    C: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, C)
    j = tl.arange(0, J)
    mu, log_scale = tl.load(mu_ptr + c), tl.load(scale_ptr + c)
    slopes = slopes_at(mu, log_scale, tl.load(tokens_ptr + j), V, eps, KIND)
    place = j[:, None] * C + c[None, :]
    tl.store(slope_mu_ptr + place, slopes[0])
    tl.store(slope_scale_ptr + place, slopes[1])


MU = torch.tensor([0.0, 0.3, -0.9, 1.4, 0.01, -0.5, 0.7, -2.0])
LOG_SCALE = torch.tensor([0.0, -2.0, 1.5, 0.5, -3.0, 4.0, 2.5, -1.0])


def bins(clamp: str, vocabulary: int):
    logits, slope_mu, slope_scale = (torch.empty(8, vocabulary) for _ in range(3))
    _bins_kernel[(1,)](
        MU, LOG_SCALE, logits, slope_mu, slope_scale, vocabulary, 1e-6, KIND=KINDS[clamp], C=8,
        W=triton.next_power_of_2(vocabulary),
    )  # fmt: skip
    return logits, slope_mu, slope_scale


def expected_bins(clamp: str, vocabulary: int):
    mu, log_scale = (x.double().requires_grad_() for x in (MU, LOG_SCALE))

    def logits(mu, log_scale):
        return LogisticHead(mu, log_scale, vocabulary, clamp=clamp).logits()

    jacobians = torch.autograd.functional.jacobian(logits, (mu, log_scale))
    diagonal = [j.diagonal(dim1=0, dim2=2).transpose(0, 1) for j in jacobians]
    return logits(mu, log_scale).detach(), *diagonal


@pytest.mark.parametrize("clamp", ["left", "min"])
@pytest.mark.parametrize("vocabulary", [11, 64])
def test_bins_and_slopes(clamp, vocabulary):
    """Catches (`mutate_kernels.py`): slope of the wrong tail."""
    # Edges are fp32 differences scaled by up to e^5, which is their absolute error in units of
    # 6e-8; slopes have another factor of that scale, and where all mass is below eps nearly all
    # digits of a ratio of tiny numbers are lost: hence relative to the largest slope of the row.
    # With "min" both forms agree up to eps where the bin has mass, so rounding decides which is
    # the smaller; their slopes differ by eps over that mass.
    bound = 3e-5 if clamp == "left" else 3e-4
    for mine, true in zip(bins(clamp, vocabulary), expected_bins(clamp, vocabulary), strict=True):
        size = true.abs().amax(-1, keepdim=True)
        assert ((mine.double() - true).abs() / size).max() < bound


@pytest.mark.parametrize("clamp", ["left", "min"])
def test_slopes_at_tokens_are_those_of_the_bins(clamp):
    tokens = torch.tensor([3, 0, 10, 3])
    _, slope_mu, slope_scale = bins(clamp, 11)
    ours = [torch.empty(4, 8), torch.empty(4, 8)]
    _slopes_at_kernel[(1,)](MU, LOG_SCALE, tokens, *ours, 11, 1e-6, KIND=KINDS[clamp], C=8, J=4)
    for mine, true in zip(ours, (slope_mu, slope_scale), strict=True):
        torch.testing.assert_close(mine, true[:, tokens].T, rtol=1e-5, atol=1e-5)
