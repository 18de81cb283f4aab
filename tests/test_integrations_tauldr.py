"""The drop-in for tauLDR and its fork, against modules with the same names and signatures."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LogisticHead
from di4c_fast.integrations.tauldr import accelerate_tauldr, as_model, process_of
from di4c_fast.samplers import sample_gaussian
from di4c_fast.testing import assert_counts_match

S, SHAPE = 8, (1, 1, 2)
D = 2


class Rate:
    """The attributes of `GaussianTargetRate`."""

    S, rate_sigma, Q_sigma, time_base, time_exponential = S, 1.2, 4.0, 0.3, 100.0
    device = "cpu"


class ImageModel(Rate, nn.Module):
    """`ImageX0PredBase`: `net` gives locations and scales, `forward` all logits."""

    def __init__(self, fix_logistic: bool = False, latent: bool = False):
        super().__init__()
        self.data_shape, self.fix_logistic, self.lam_raw_dim = SHAPE, fix_logistic, 1
        self.calls: list[tuple[Tensor, ...]] = []
        self.net = self._net(latent)

    def _net(self, latent: bool) -> nn.Module:
        calls = self.calls

        class Net(nn.Module):
            do_lam_embed = latent

            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, x, times, lams=None):
                calls.append((x, times) if lams is None else (x, times, lams))
                assert (lams is not None) == latent
                shift = 0.0 if lams is None else 1.6 * (lams.view(-1, 1, 1, 1) > 0.5) - 0.8
                mu = self.scale * 0.3 * (x / 3.5 - 1.0) + shift
                return torch.cat([mu, torch.zeros_like(mu) + times.view(-1, 1, 1, 1)], dim=1)

        return Net()

    def forward(self, x, times, lams=None):
        out = self.net(x.view(-1, *SHAPE), times, lams)
        mu, log_scale = out[:, :1, ..., None], out[:, 1:, ..., None]
        edges = torch.linspace(-1, 1, S + 1)
        scaled = (edges - mu) * torch.exp(2 - log_scale)
        cdf = torch.sigmoid(scaled.double())
        return torch.log(cdf[..., 1:] - cdf[..., :-1] + 1e-9).float().view(len(x), D, S)


class TauLeaping:
    def __init__(self, cfg):
        self.cfg = cfg

    def sample(self, model, N, num_intermediates):
        return "original"


class PCTauLeaping(TauLeaping):
    def sample(self, model, N, num_intermediates):
        return "corrected"


class DistilChain:
    def calc_pst(
        self, model, x_t, p0t, ts, ss, sample=False, x_0=None, log_prob=False, sample_zero=False
    ):
        return ("original", sample, log_prob)


def modules() -> tuple[types.ModuleType, types.ModuleType]:
    sampling, losses = types.ModuleType("sampling"), types.ModuleType("losses")
    sampling.TauLeaping = type("TauLeaping", (TauLeaping,), {"sample": TauLeaping.sample})
    sampling.PCTauLeaping = type("PCTauLeaping", (PCTauLeaping,), {"sample": PCTauLeaping.sample})
    losses.DistilChain = type("DistilChain", (DistilChain,), {"calc_pst": DistilChain.calc_pst})
    return sampling, losses


def config(initial_dist: str = "gaussian", num_steps: int = 4) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        data=types.SimpleNamespace(shape=list(SHAPE), S=S),
        sampler=types.SimpleNamespace(
            num_steps=num_steps, min_t=0.02, eps_ratio=1e-9, initial_dist=initial_dist
        ),
    )


def test_each_module_has_its_own_methods_replaced():
    sampling, losses = modules()

    def now():
        classes = (sampling.TauLeaping.sample, sampling.PCTauLeaping.sample)
        return *classes, losses.DistilChain.calc_pst

    before = now()
    with accelerate_tauldr(sampling, losses):
        assert all(new is not old for new, old in zip(now(), before, strict=True))
    with accelerate_tauldr(losses):
        assert now()[:2] == before[:2]
        assert now()[2] is not before[2]
    assert now() == before


@pytest.mark.parametrize("name", ["TauLeaping", "PCTauLeaping"])
def test_sampler_classes_sample_from_the_exact_posterior(name):
    sampling, _ = modules()
    model = ImageModel()
    with accelerate_tauldr(sampling):
        torch.manual_seed(3)
        samples, x_hist, x0_hist = getattr(sampling, name)(config()).sample(model, 50, 2)
    for array, shape in ((samples, (50, D)), (x_hist, (2, 50, D)), (x0_hist, (2, 50, D))):
        assert isinstance(array, np.ndarray)
        assert array.shape == shape
        assert array.dtype == np.int64
    times = [float(call[1][0]) for call in model.calls]
    assert times == pytest.approx(torch.linspace(1.0, 0.02, 4).tolist())
    assert model.calls[0][0].shape == (50, *SHAPE)
    torch.manual_seed(3)
    history: list[Tensor] = []
    expected = sample_gaussian(
        as_model(model), (50, D), process=process_of(model, t_min=0.02), steps=4, history=history
    )
    assert np.array_equal(samples, expected.numpy())
    # Saved steps: the first and the last, before the call.
    assert np.array_equal(x_hist, torch.stack([history[0], history[3]]).numpy())
    assert np.array_equal(x0_hist[1], expected.numpy())


def test_students_of_the_fork_get_fresh_latents():
    sampling, _ = modules()
    model = ImageModel(latent=True)
    with accelerate_tauldr(sampling):
        sampling.TauLeaping(config()).sample(model, 5, 0)
    drawn = torch.stack([call[2] for call in model.calls])
    assert drawn.shape == (4, 5, 1)
    assert len(drawn.unique()) == 20


def test_no_saved_steps_give_empty_histories():
    sampling, _ = modules()
    with accelerate_tauldr(sampling):
        _, x_hist, x0_hist = sampling.TauLeaping(config("uniform")).sample(ImageModel(), 5, 0)
    assert x_hist.size == x0_hist.size == 0


@pytest.mark.parametrize("fix_logistic", [False, True])
def test_image_models_become_logistic_heads(fix_logistic):
    model = ImageModel(fix_logistic)
    tokens, t = torch.randint(0, S, (6, D)), torch.rand(6)
    head = as_model(model)(tokens, t)
    assert isinstance(head, LogisticHead)
    assert head.clamp == ("min" if fix_logistic else "left")
    ours, theirs = head.logits().softmax(-1), model(tokens, t).softmax(-1)
    # The clamps of the two forms, 1e-6 and 1e-9.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_other_models_give_their_logits():
    def network(tokens, t):
        return torch.zeros(*tokens.shape, S)

    assert as_model(network)(torch.zeros(2, D).long(), torch.ones(2)).shape == (2, D, S)


def test_process_has_the_numbers_of_the_model():
    process = process_of(ImageModel(), t_min=0.05)
    assert (process.num_classes, process.rate_sigma, process.target_sigma) == (8, 1.2, 4.0)
    assert (process.time_base, process.time_exponential, process.t_min) == (0.3, 100.0, 0.05)


# calc_pst


def bridge(ts: float, ss: float, x_t: int) -> Tensor:
    """(x_0, x_s) posterior by the matrix exponential."""
    process = process_of(Rate())
    rate, base = process.transitions.rate, process.time_exponential

    def q(s, t):
        return torch.matrix_exp(rate * process.time_base * (base**t - base**s))

    joint = q(0.0, ss) * q(ss, ts)[:, x_t]
    return joint / joint.sum(1, keepdim=True)


def test_posterior_draws_follow_the_exact_law_at_times_of_their_own():
    _, losses = modules()
    rows = 12_000
    p0 = torch.rand(S, generator=torch.Generator().manual_seed(0)) + 0.05
    p0t = (p0 / p0.sum()).expand(2, rows, S)
    x_t = torch.tensor([[1], [5]], dtype=torch.int32).expand(-1, rows)
    ts, ss = torch.tensor([0.9, 0.4]), torch.tensor([0.6, 0.38])
    torch.manual_seed(0)
    with accelerate_tauldr(losses):
        x_s, probabilities = losses.DistilChain().calc_pst(Rate(), x_t, p0t, ts, ss, sample=True)
        x_0 = losses.DistilChain().calc_pst(
            Rate(), x_t, p0t, ts, 0 * ss, sample=True, sample_zero=True
        )
    assert x_s.shape == x_0.shape == (2, rows)
    assert probabilities.shape == (2 * rows, S)
    for b in range(2):
        law = p0.double() @ bridge(float(ts[b]), float(ss[b]), int(x_t[b, 0]))
        assert_counts_match(torch.bincount(x_s[b], minlength=S), law, name=f"example {b}")
        assert_counts_match(torch.bincount(x_0[b], minlength=S), p0)


def test_posterior_of_given_clean_tokens_and_its_probabilities():
    _, losses = modules()
    x_0 = torch.tensor([[0, 3]]).expand(10_000, -1)
    x_t = torch.tensor([[6, 2]]).expand(10_000, -1)
    times = torch.full((10_000,), 0.8), torch.full((10_000,), 0.5)
    with accelerate_tauldr(losses):
        torch.manual_seed(1)
        x_s, probabilities = losses.DistilChain().calc_pst(
            Rate(), x_t, torch.full((10_000, D, S), 1 / S), *times, sample=True, x_0=x_0
        )
    for d, (clean, noisy) in enumerate([(0, 6), (3, 2)]):
        law = bridge(0.8, 0.5, noisy)[clean]
        # Products of float32 matrices.
        torch.testing.assert_close(
            probabilities.view(-1, D, S)[0, d].double(), law, rtol=1e-5, atol=1e-7
        )
        assert_counts_match(torch.bincount(x_s[:, d], minlength=S), law)


def test_what_is_not_a_draw_stays_with_the_original():
    _, losses = modules()
    p0t = torch.full((1, D, S), 1 / S)
    with accelerate_tauldr(losses):
        result = losses.DistilChain().calc_pst(
            Rate(), torch.zeros(1, D), p0t, torch.ones(1), torch.ones(1) / 2, log_prob=True
        )
    assert result == ("original", False, True)


# Bad input


def test_modules_are_checked_before_anything_is_replaced():
    sampling, _ = modules()
    before = sampling.TauLeaping.sample
    with pytest.raises(TypeError, match="modules must have one of the classes TauLeaping"):
        accelerate_tauldr(sampling, types)
    assert sampling.TauLeaping.sample is before
    with pytest.raises(TypeError, match="accelerate_tauldr needs"):
        accelerate_tauldr()


def test_models_of_another_rate_are_refused():
    sampling, losses = modules()
    with accelerate_tauldr(sampling, losses):
        with pytest.raises(TypeError, match="without S, rate_sigma, Q_sigma"):
            sampling.TauLeaping(config()).sample(nn.Linear(1, 1), 3, 1)
        with pytest.raises(TypeError, match="network, with a Gaussian rate, must have the attr"):
            losses.DistilChain().calc_pst(
                nn.Linear(1, 1), torch.zeros(1, D), torch.ones(1, D, S), None, None, sample=True
            )


def test_unknown_initial_laws_are_refused():
    sampling, _ = modules()
    with (
        accelerate_tauldr(sampling),
        pytest.raises(ValueError, match=r"cfg\.sampler\.initial_dist must be one of 'gaussian'"),
    ):
        sampling.TauLeaping(config("masked")).sample(ImageModel(), 3, 1)


@wrong(
    [
        ({"p0t": torch.ones(1, D, S + 1)}, ValueError, "p0t must have V = 8 classes, got 9"),
        ({"x_t": torch.zeros(2, D)}, ValueError, "x_t must have shape (B, D) = (1, 2)"),
        ({"ss": torch.tensor([0.9])}, ValueError, "ss must hold times with 0 <= ss <= ts"),
    ]
)
def test_posterior_draws_check_their_arguments(wrong: Wrong):
    _, losses = modules()
    arguments = {
        "model": Rate(), "x_t": torch.zeros(1, D), "p0t": torch.full((1, D, S), 1 / S),
        "ts": torch.tensor([0.8]), "ss": torch.tensor([0.5]), "sample": True, **wrong.what,
    }  # fmt: skip
    with accelerate_tauldr(losses), wrong.raises():
        losses.DistilChain().calc_pst(**arguments)


def test_networks_that_cannot_be_called_are_refused():
    with pytest.raises(TypeError, match="network must be callable, got int 3"):
        as_model(3)
