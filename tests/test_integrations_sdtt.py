"""The SDTT drop-in, on a stand-in with the attributes and signatures of `MultiRoundSDTT`."""

from __future__ import annotations

import math

import pytest
import torch
from dit_models import (
    BOS,
    EOS,
    MASK,
    SDTT,
    VOCAB,
    ancestral_law,
    probabilities,
)
from torch import Tensor, nn
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead, TensorHead
from di4c_fast.integrations.sdtt import accelerate_sdtt, as_model, latent_dim
from di4c_fast.samplers import sample_masked
from di4c_fast.testing import assert_counts_match


def pair_counts(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens[:, 0] * VOCAB + tokens[:, 1], minlength=VOCAB**2)


def test_sample_goes_through_the_package():
    model = SDTT()
    with accelerate_sdtt(model):
        tokens = model.sample(n_samples=3, num_steps=4, seq_len=7)
        assert model.sample(2, 3, None).shape == (2, 11)  # the length of the configuration
    assert tokens.shape == (3, 7)
    assert tokens.dtype == torch.int64
    assert int(tokens.max()) < MASK


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("sampler", ["ancestral", "analytic"])
def test_tokens_have_the_law_of_the_repositorys_loop(sampler, time_conditioning):
    model = SDTT(eps=0.4, time_conditioning=time_conditioning).eval()
    times = [1.0, 0.7, 0.4]
    sigmas = [-math.log1p(-0.999 * t) if time_conditioning else 0.0 for t in times]
    if sampler == "analytic":
        sigmas[:2] = [0.0, 0.0]  # the steps are unconditional there, the argmax is not
    law = ancestral_law(model.backbone, times, sigmas)
    torch.manual_seed(0)
    with accelerate_sdtt(model):
        tokens = model.sample(n_samples=20_000, num_steps=2, seq_len=2, sampler=sampler)
    assert_counts_match(pair_counts(tokens), law)


def test_the_noise_level_is_the_models_own():
    model = SDTT(time_conditioning=True, T=1024, eps=0.01).eval()
    with accelerate_sdtt(model):
        model.sample(n_samples=60, num_steps=4, seq_len=20)
    seen = [call.sigma for call in model.backbone.calls][2:]
    for sigma, t in zip(seen, [1.0, 0.7525, 0.505, 0.2575, 0.01], strict=True):
        level, _, _ = model._t_to_sigma(torch.tensor([t]))
        assert float(level) > -math.log1p(-0.999 * t)  # quantised upwards
        torch.testing.assert_close(sigma, level[0].expand_as(sigma))


def test_students_mix_over_fresh_latents():
    model = SDTT(student=True, eps=1e-9).eval()
    calls = 400  # of the grid on which the law is integrated
    everything_masked = torch.full((calls, 2), MASK)
    grid = (torch.arange(calls) + 0.5) / calls
    heads = as_model(model)(everything_masked, torch.ones(calls), grid[:, None])
    logits = heads.logits().double().detach()
    logits[..., MASK] = -torch.inf
    p = logits.softmax(-1)
    law = torch.einsum("na,nb->ab", p[:, 0], p[:, 1]).flatten()
    torch.manual_seed(0)
    with accelerate_sdtt(model):
        tokens = model.sample(n_samples=20_000, num_steps=1, seq_len=2)
    assert_counts_match(pair_counts(tokens), law)
    # λ matters: independent draws from the marginals are far from this law.
    product = torch.outer(p[:, 0].mean(0), p[:, 1].mean(0)).flatten()
    with pytest.raises(AssertionError, match="chi-square"):
        assert_counts_match(pair_counts(tokens), product)


def test_students_follow_the_latent_that_they_are_given(monkeypatch):
    model = SDTT(student=True).eval()
    assert latent_dim(model) == 1
    assert latent_dim(SDTT()) == 0
    tokens, lam = torch.full((3, 5), MASK), torch.tensor([0.1, 0.5, 0.9])
    call = as_model(model)
    head = call(tokens, torch.ones(3), lam[:, None])
    assert isinstance(head, LinearHead)
    assert head.shape == (3, 5, VOCAB)
    assert not bool(torch.isclose(head.logits()[0], head.logits()[2]).all())
    monkeypatch.setattr(torch, "rand", lambda *size: lam)
    torch.testing.assert_close(head.logits(), model.backbone(tokens, torch.zeros(3)))
    drawn = call(tokens, torch.ones(3))
    torch.testing.assert_close(drawn.logits(), head.logits())
    monkeypatch.undo()
    fixed = torch.full((4, 1), 0.3)
    options = {"mask_id": MASK, "steps": 2, "latent_dim": 1, "latent": fixed, "seed": 1}
    assert torch.equal(
        sample_masked(call, (4, 6), **options), sample_masked(call, (4, 6), **options)
    )


def test_only_rows_that_unmask_go_through_the_last_layer():
    model = SDTT(student=True).eval()
    with accelerate_sdtt(model):
        model.sample(n_samples=1, num_steps=1, seq_len=2)  # the trial
        model.backbone.forget()
        model.sample(n_samples=4, num_steps=200, seq_len=30)
    assert model.backbone.rows_of_the_head == 0
    assert sum(len(call.tokens) for call in model.backbone.calls) <= 4 * 30


def test_an_argmax_ends_it_only_where_masks_remain():
    model = SDTT(eps=0.5).eval()
    with accelerate_sdtt(model):
        tokens = model.sample(
            n_samples=50, num_steps=1, seq_len=9, project_fn=lambda x: torch.full_like(x, 3)
        )
        assert model.backbone.calls == []
        assert bool((tokens == 3).all())
        model.sampling_eps = 1 - 1e-9
        tokens = model.sample(n_samples=2, num_steps=1, seq_len=9)
    everything_masked = torch.full((2, 9), MASK)
    assert torch.equal(tokens, probabilities(model.backbone, everything_masked).argmax(-1))


@pytest.mark.parametrize("projected", [False, True])
def test_fixed_ends_stay(projected):
    model = SDTT().eval()
    seen: list[Tensor] = []

    def project_fn(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        tokens[:, 1:3] = 4
        tokens[:, 0] = BOS if len(seen) > 1 else 2  # the ends come after the first projection
        return tokens

    with accelerate_sdtt(model):
        tokens = model.sample(
            n_samples=4,
            num_steps=3,
            seq_len=8,
            add_bos=True,
            add_eos=True,
            **({"project_fn": project_fn} if projected else {}),
        )
    assert bool((tokens[:, 0] == BOS).all())
    assert bool((tokens[:, -1] == EOS).all())
    first = model.backbone.calls[-1].tokens
    assert bool((first[:, 0] == BOS).all())
    if projected:
        assert bool((tokens[:, 1:3] == 4).all())
        assert bool((seen[1][:, 0] == BOS).all())
        assert bool((seen[0] == MASK)[:, 3:].all())


@pytest.mark.parametrize(("eps", "calls"), [(1e-9, 4), (1 - 1e-9, 5)])
def test_projections_are_called_as_often_as_there(eps, calls):
    seen: list[Tensor] = []

    def project_fn(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return tokens

    model = SDTT(eps=eps).eval()
    with accelerate_sdtt(model):
        model.sample(n_samples=3, num_steps=3, seq_len=4, project_fn=project_fn)
    assert len(seen) == calls  # start, three steps, and the argmax where masks remain


def test_projections_bring_masks_back_at_the_rate_of_the_loop():
    model = SDTT(eps=0.2).eval()
    calls: list[int] = []

    def project_fn(tokens: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:  # after the first step, at time 0.6
            tokens[:] = MASK
        return tokens

    with accelerate_sdtt(model):
        model.sample(n_samples=20_000, num_steps=2, seq_len=2, project_fn=project_fn)
    law = ancestral_law(model.backbone, [0.6, 0.2], [0.0, 0.0])
    torch.manual_seed(1)
    calls.clear()
    with accelerate_sdtt(model):
        tokens = model.sample(n_samples=20_000, num_steps=2, seq_len=2, project_fn=project_fn)
    assert_counts_match(pair_counts(tokens), law)


def test_the_mode_of_the_network_stays_as_it_is():
    model = SDTT()
    with accelerate_sdtt(model):
        model.sample(n_samples=2, num_steps=1, seq_len=3)
        assert [call.training for call in model.backbone.calls] == [False, False, True]
        model.eval()
        model.sample(n_samples=2, num_steps=1, seq_len=3)
        assert not model.backbone.calls[-1].training


def test_compiled_students_draw_their_latent_themselves():
    model = SDTT(student=True).eval()
    model.backbone._orig_mod = None
    assert latent_dim(model) == 0
    head = as_model(model)(torch.full((2, 3), MASK), torch.ones(2))
    assert isinstance(head, TensorHead)
    with accelerate_sdtt(model):
        assert model.sample(n_samples=2, num_steps=2, seq_len=3).shape == (2, 3)


def test_progress_is_shown_on_request(capsys):
    model = SDTT()
    with accelerate_sdtt(model):
        model.sample(n_samples=1, num_steps=2, seq_len=3)
        assert capsys.readouterr().err == ""
        model.sample(n_samples=1, num_steps=2, seq_len=3, verbose=True)
    assert "3/3" in capsys.readouterr().err


# Bad input


def test_what_is_no_sdtt_is_named():
    for function in (accelerate_sdtt, as_model, latent_dim):
        with pytest.raises(TypeError, match="model must have the attributes backbone, _t_to_sig"):
            function(nn.Linear(1, 1))


def test_latents_are_checked():
    call = as_model(SDTT(student=True))
    with pytest.raises(ValueError, match=r"latent must have shape \(R, L\) = \(2, 1\), got \(2,\)"):
        call(torch.full((2, 3), MASK), torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match=r"latent must have shape \(R, L\) = \(2, 0\)"):
        as_model(SDTT())(torch.full((2, 3), MASK), torch.ones(2), torch.ones(2, 1))


@wrong(
    [
        ({"sampler": "euler"}, ValueError, "sampler must be one of 'ancestral', 'analytic'"),
        ({"cache_preds": True}, ValueError, "cache_preds must be False"),
        ({"cache_preds": 1}, TypeError, "cache_preds must be True or False"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0"),
        ({"n_samples": -1}, ValueError, "n_samples must be at least 0, got -1"),
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1, got 0"),
        ({"project_fn": 3}, TypeError, "project_fn must be callable, got int 3"),
        ({"project_fn": lambda x: x[:1]}, ValueError, "project_fn must have shape ...(3, 4)"),
    ]
)
def test_wrong_arguments_are_named(wrong: Wrong):
    model = SDTT()
    with accelerate_sdtt(model), wrong.raises():
        model.sample(**{"n_samples": 3, "num_steps": 2, "seq_len": 4, **wrong.what})
