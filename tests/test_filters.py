"""Guidance, top-p and top-k on rows of logits."""

from __future__ import annotations

import math

import pytest
import torch
from sample_cases import normal

from di4c_fast.draw.filters import filter_literal_, filter_scaled_, guide
from di4c_fast.reference.draw import transformed_logits_ref

INF = math.inf


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("quantum", [None, 0.5])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_finds_the_set_of_a_full_sort(scale, quantum, top_p):
    """Rows from flat to peaked, with many ties; several looks at the candidates."""
    logits = normal(20, 3000, scale=scale).double()
    logits[5] = 0.0
    if quantum is not None:
        logits = (logits / quantum).round() * quantum
    logits -= logits.amax(-1, keepdim=True)
    expected = transformed_logits_ref(logits, top_p=top_p)
    for look in (1, 128, 2999, 5000):
        filtered = logits.clone()
        filter_scaled_(filtered, top_p, None, look)
        # Sums of equal probabilities may pass top_p one token earlier or later by rounding.
        difference = (filtered == -INF) != (expected == -INF)
        assert difference.sum(-1).amax() <= 1
        assert difference[5].any() or difference.any(-1).sum() <= 1


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, None), (None, 9), (0.9, 4), (0.2, 50)])
def test_both_filters_are_those_of_the_reference(top_p, top_k):
    logits = normal(30, 700).double()
    logits[3, 100:] = -INF
    logits -= logits.amax(-1, keepdim=True)
    expected = transformed_logits_ref(logits, top_p=top_p, top_k=top_k)
    assert filter_literal_(logits.clone(), top_p, top_k).equal(expected)
    filter_scaled_(logits, top_p, top_k)
    assert logits.equal(expected)


def test_the_next_look_fits_the_rows_seen():
    peaked = torch.full((4, 5000), -30.0)
    peaked[:, 0] = 0.0
    assert filter_scaled_(peaked, 0.5, None, 5000) < 1000
    flat = torch.zeros(4, 5000)
    assert filter_scaled_(flat, 0.5, None) > 2500


def test_guidance_follows_the_dtype_it_is_given():
    c, u = normal(4, 50).bfloat16(), normal(4, 50, seed=1).bfloat16()
    assert guide(c, u, 0.5, torch.bfloat16).equal(u + 1.5 * (c - u))
    exact = guide(c, u, torch.full((4,), 0.5, dtype=torch.float64), torch.float64)
    torch.testing.assert_close(exact, u.double() + 1.5 * (c.double() - u.double()))
