"""The MDLM drop-in, on a stand-in with the attributes and signatures of `Diffusion`."""

from __future__ import annotations

import copy
import math
import types

import dit_models
import pytest
import torch
from dit_models import DIT, MASK, VOCAB, LogLinear, ancestral_law
from torch import Tensor, nn
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead, TensorHead
from di4c_fast.integrations.mdlm import accelerate_mdlm, as_model
from di4c_fast.testing import assert_counts_match


class Average:
    """The repository's EMA: store, copy_to, restore."""

    def __init__(self, parameters):
        self.shadow = [0.5 * p.detach().clone() for p in parameters]

    def store(self, parameters):
        self.kept = [p.detach().clone() for p in parameters]

    def copy_to(self, parameters):
        for p, s in zip(parameters, self.shadow, strict=True):
            p.data.copy_(s)

    def restore(self, parameters):
        for p, s in zip(parameters, self.kept, strict=True):
            p.data.copy_(s)


class Diffusion(nn.Module):
    """The names of the Lightning module that sampling touches."""

    def __init__(self, *, batch: int = 3, length: int = 2, **changes):
        super().__init__()
        self.backbone, self.noise = DIT(), LogLinear()
        self.mask_index, self.parameterization = MASK, "subs"
        self.time_conditioning = changes.pop("time_conditioning", False)
        self.sampler = changes.pop("sampler", "ddpm_cache")
        self.parameterization = changes.pop("parameterization", "subs")
        self.ema = Average(self.backbone.parameters()) if changes.pop("ema", False) else None
        space = types.SimpleNamespace
        self.config = space(
            loader=space(eval_batch_size=batch),
            model=space(length=length),
            noise=space(type=changes.pop("noise", "loglinear")),
            sampling=space(steps=4, noise_removal=changes.pop("noise_removal", True)),
        )
        assert not changes
        self.original: list[tuple] = []

    @property
    def device(self):
        return torch.device("cpu")

    def _sample(self, num_steps=None, eps=1e-5):
        self.original.append((num_steps, eps))
        return "original"

    def restore_model_and_sample(self, num_steps, eps=1e-5):
        if self.ema:
            self.ema.store(self.backbone.parameters())
            self.ema.copy_to(self.backbone.parameters())
        self.backbone.eval()
        samples = self._sample(num_steps=num_steps, eps=eps)
        if self.ema:
            self.ema.restore(self.backbone.parameters())
        self.backbone.train()
        return samples


def masked(shape: tuple[int, int], fraction: float = 0.5) -> Tensor:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB - 1, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < fraction, MASK, tokens)


def test_the_repositorys_entry_samples_through_the_package():
    model = Diffusion(batch=5, length=7)
    with accelerate_mdlm(model):
        tokens = model.restore_model_and_sample(num_steps=3)
        assert model._sample().shape == (5, 7)  # steps of the configuration
    assert model.original == []
    assert tokens.shape == (5, 7)
    assert tokens.dtype == torch.int64
    assert int(tokens.max()) < MASK


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "ddpm_cache"])
def test_tokens_have_the_law_of_the_repositorys_loop(sampler, time_conditioning):
    model = Diffusion(batch=20_000, sampler=sampler, time_conditioning=time_conditioning).eval()
    times = [1.0, 0.7, 0.4]
    sigmas = [-math.log1p(-0.999 * t) if time_conditioning else 0.0 for t in times]
    law = ancestral_law(model.backbone, times, sigmas)
    torch.manual_seed(0)
    with accelerate_mdlm(model):
        tokens = model._sample(num_steps=2, eps=0.4)
    counts = torch.bincount(tokens[:, 0] * VOCAB + tokens[:, 1], minlength=VOCAB**2)
    assert_counts_match(counts, law)
    assert len(model.backbone.calls) == 3 + 2  # the last layer is tried once, in two calls


def test_networks_are_given_the_noise_level_of_the_repository():
    model = Diffusion(batch=50, length=20, time_conditioning=True).eval()
    with accelerate_mdlm(model):
        model._sample(num_steps=2, eps=0.1)
        seen = [call.sigma for call in model.backbone.calls][2:]
        model.time_conditioning = False
        model.backbone.forget()
        model._sample(num_steps=2, eps=0.1)
    for sigma, t in zip(seen, [1.0, 0.55, 0.1], strict=True):
        # The times are rounded to fp32, near 1 magnified by 1/(1 - 0.999).
        torch.testing.assert_close(
            sigma, torch.full_like(sigma, -math.log1p(-0.999 * t)), rtol=1e-4, atol=0
        )
    assert all(not bool(call.sigma.any()) for call in model.backbone.calls)


def test_only_rows_that_unmask_go_through_the_last_layer():
    model = Diffusion(batch=4, length=30).eval()
    with accelerate_mdlm(model):
        model._sample(num_steps=1)  # the trial
        model.backbone.forget()
        model._sample(num_steps=200)
    assert model.backbone.rows_of_the_head == 0
    assert len(model.backbone.calls) <= 4 * 30  # fewer calls than steps
    assert sum(len(call.tokens) for call in model.backbone.calls) <= 4 * 30


def test_without_noise_removal_masks_remain():
    model = Diffusion(batch=200, length=50, noise_removal=False).eval()
    with accelerate_mdlm(model):
        tokens = model._sample(num_steps=2, eps=0.3)
        model.config.sampling.noise_removal = True
        assert not bool((model._sample(num_steps=2, eps=0.3) == MASK).any())
    share = float((tokens == MASK).double().mean())
    assert abs(share - 0.3) < 5 * math.sqrt(0.3 * 0.7 / tokens.numel())


def test_averaged_weights_are_used_and_restored():
    model = Diffusion(batch=1, length=12, ema=True)
    live = copy.deepcopy(model.backbone.state_dict())
    averaged = copy.deepcopy(model)
    averaged.ema.copy_to(averaged.backbone.parameters())
    averaged.backbone.eval()
    # Times so close to 1 that everything is left to the argmax.
    with accelerate_mdlm(model), accelerate_mdlm(averaged):
        tokens = model.restore_model_and_sample(1, eps=1 - 1e-9)
        expected = averaged._sample(1, eps=1 - 1e-9)
        plain = copy.deepcopy(model)
        plain.ema = None
        assert not torch.equal(plain.restore_model_and_sample(1, eps=1 - 1e-9), tokens)
    assert torch.equal(tokens, expected)
    assert model.backbone.training
    torch.testing.assert_close(model.backbone.state_dict(), live, rtol=0, atol=0)


def test_the_mode_of_the_network_stays_as_it_is():
    model = Diffusion()
    with accelerate_mdlm(model):
        model._sample(num_steps=1)
        assert model.backbone.training
        assert [call.training for call in model.backbone.calls] == [False, False, True]
        assert model.backbone.dropout.training


@pytest.mark.parametrize(
    "changes",
    [
        {"parameterization": "sedd"},
        {"parameterization": "d3pm"},
        {"parameterization": "ar"},
        {"sampler": "analytic"},
        {"noise": "cosine"},
    ],
)
def test_what_has_another_law_stays_with_the_repository(changes):
    model = Diffusion(**changes)
    with accelerate_mdlm(model):
        assert model.restore_model_and_sample(7, eps=0.1) == "original"
    assert model.original == [(7, 0.1)]
    assert model.backbone.calls == []


# The network as a model of this package


def test_models_give_linear_heads_with_the_logits_of_the_network():
    model = Diffusion(time_conditioning=True).eval()
    tokens, t = masked((4, 9)), torch.tensor([0.1, 0.4, 0.8, 1.0])
    call = as_model(model)
    call(tokens, t)
    model.backbone.forget()
    head = call(tokens, t)
    assert isinstance(head, LinearHead)
    assert head.weight is model.backbone.output_layer.linear.weight
    assert model.backbone.rows_of_the_head == 0
    torch.testing.assert_close(head.logits(), model.backbone(tokens, model.noise(t)[0]))


def test_the_network_of_the_hugging_face_checkpoint_is_looked_into():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = DIT()

        def forward(self, input_ids, timesteps):
            return types.SimpleNamespace(logits=self.backbone(input_ids, timesteps))

    model = Diffusion()
    model.backbone = Wrapper().eval()
    tokens, t = masked((3, 5)), torch.ones(3)
    head = as_model(model)(tokens, t)
    assert isinstance(head, LinearHead)
    torch.testing.assert_close(head.logits(), model.backbone(tokens, 0 * t).logits)


def test_the_output_embedding_of_the_mamba_variant_is_used():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lm_head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB, bias=False)

        def get_output_embeddings(self):
            return self.lm_head

    class DiMamba(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Inner()

        def forward(self, indices, sigma):
            return self.model.lm_head(self.model.embedding(indices).cumsum(1))

    model = Diffusion()
    model.backbone = DiMamba()
    tokens, t = masked((3, 5)), torch.ones(3)
    head = as_model(model)(tokens, t)
    assert isinstance(head, LinearHead)
    torch.testing.assert_close(head.logits(), model.backbone(tokens, t))


@pytest.mark.parametrize("case", ["scaled", "scattered", "other layer", "compiled", "function"])
def test_networks_of_another_structure_give_all_logits(case):
    model = Diffusion().eval()
    network: object = model.backbone
    if case == "scaled":
        network.scale = 1.01
    elif case == "scattered":
        # SEDD sets the logit of the present token, which needs the rows.
        forward = network.forward
        network.forward = lambda x, s: torch.scatter(forward(x, s), -1, x[..., None], 0.0)
    elif case == "other layer":
        network.output_layer.linear = nn.Sequential(nn.Linear(dit_models.WIDTH, VOCAB))
    elif case == "compiled":
        network._orig_mod = None
    else:
        del model.backbone
        model.backbone = lambda x, s: network(x, s)
    tokens, t = masked((3, 5)), torch.ones(3)
    head = as_model(model)(tokens, t)
    assert isinstance(head, TensorHead)
    torch.testing.assert_close(head.logits(), model.backbone(tokens, 0 * t), rtol=0, atol=0)
    torch.manual_seed(0)
    with accelerate_mdlm(model):
        assert int(model._sample(num_steps=2).max()) < MASK


def test_compiled_networks_get_whole_batches():
    model = Diffusion(batch=4, length=30).eval()
    model.backbone._orig_mod = None
    with accelerate_mdlm(model):
        model._sample(num_steps=100)
    assert {len(call.tokens) for call in model.backbone.calls} == {4}


def test_the_dtype_of_autocast_inside_the_network_is_kept():
    model = Diffusion().eval()
    network, inner = model.backbone, model.backbone.forward

    def forward(indices, sigma):
        assert not torch.is_autocast_enabled("cpu")  # the user's is off around the network
        with torch.autocast("cpu", torch.bfloat16):
            return inner(indices, sigma)

    network.forward = forward
    tokens, t = masked((3, 5)), torch.ones(3)
    with torch.autocast("cpu", torch.bfloat16):
        head = as_model(model)(tokens, t)
    assert isinstance(head, LinearHead)
    assert head.dtype == torch.bfloat16
    # One rounding to bfloat16 more or less.
    torch.testing.assert_close(head.logits(), network(tokens, 0 * t), rtol=2**-6, atol=2**-7)


# Bad input


def test_what_is_no_mdlm_is_named():
    with pytest.raises(TypeError, match=r"model must have the attributes backbone, .* without noi"):
        accelerate_mdlm(types.SimpleNamespace(backbone=1))
    with pytest.raises(TypeError, match="model must have the attributes backbone"):
        as_model(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="parameterization must be 'subs', got 'sedd'"):
        as_model(Diffusion(parameterization="sedd"))


@wrong(
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_steps": 2.0}, TypeError, "num_steps must be an int"),
        ({"eps": 0.0}, "t_min must be in (0, 1), got 0"),
    ]
)
def test_wrong_arguments_are_named(wrong: Wrong):
    model = Diffusion()
    with accelerate_mdlm(model), wrong.raises():
        model._sample(**wrong.what)
