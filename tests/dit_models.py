"""A stand-in with the structure of the networks of MDLM and SDTT, students of Di4C included."""

from __future__ import annotations

import types

import torch
from torch import Tensor, nn

from di4c_fast.models.latent import sinusoid

VOCAB, MASK, WIDTH = 6, 5, 8
BOS, EOS = 0, 1


class FinalLayer(nn.Module):
    """Normalisation, modulation by the condition, and the linear layer."""

    def __init__(self):
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH)
        self.adaLN_modulation = nn.Linear(1, 2 * WIDTH)
        self.linear = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DIT(nn.Module):
    """forward(indices (R, D), sigma (R,)) to logits (R, D, V); positions see each other."""

    def __init__(self, seed: int = 0, student: bool = False, scale: float = 1.0):
        super().__init__()
        self.scale, self.is_di4c = scale, student
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vocab_embed = nn.Embedding(VOCAB, WIDTH)
            self.places = nn.Parameter(torch.randn(64, WIDTH))
            self.mix = nn.Linear(WIDTH, WIDTH)
            self.output_layer = FinalLayer()
            if student:
                self.latent_projection = nn.Sequential(nn.Linear(128, WIDTH))
                nn.init.normal_(self.latent_projection[0].weight, std=0.5)
            nn.init.normal_(self.output_layer.linear.weight, std=0.6)
        self.dropout = nn.Dropout(0.5)
        self.calls: list[types.SimpleNamespace] = []
        self.rows_of_the_head = 0
        self.output_layer.linear.register_forward_hook(self._count)

    def _count(self, module: nn.Module, arguments: tuple, output: Tensor) -> None:
        self.rows_of_the_head += output.shape[0] * output.shape[1]

    def forward(self, indices: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == indices.shape[:1]
        call = types.SimpleNamespace(tokens=indices, sigma=sigma, training=self.training)
        self.calls.append(call)
        x = self.vocab_embed(indices) + self.places[: indices.shape[1]]
        if self.is_di4c:
            z = torch.rand(len(x))
            token = self.latent_projection(sinusoid(1000.0 * z, 128))
            x = torch.cat([x, token[:, None]], dim=1)
        x = self.dropout(torch.tanh(x + self.mix(x.mean(1, keepdim=True))))
        x = self.output_layer(x, sigma[:, None])
        return self.scale * x[:, : indices.shape[1]]

    def forget(self) -> None:
        self.calls.clear()
        self.rows_of_the_head = 0


class LogLinear(nn.Module):
    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.log1p(-0.999 * t), 0.999 / (1 - 0.999 * t)


class SDTT(nn.Module):
    """The names of the Lightning module that sampling touches."""

    def __init__(
        self, *, student: bool = False, time_conditioning: bool = False, eps: float = 1e-5, T=0
    ):
        super().__init__()
        self.backbone, self.noise = DIT(student=student), LogLinear()
        self.mask_index, self.time_conditioning, self.T = MASK, time_conditioning, T
        self.sampling_eps = eps
        self.tokenizer = types.SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS)
        self.config = types.SimpleNamespace(model=types.SimpleNamespace(length=11))

    @property
    def device(self):
        return next(self.parameters()).device

    def _t_to_sigma(self, t):
        assert t.ndim == 1
        if self.T:
            t = (t * self.T).int() / self.T + 1 / self.T
        sigma, rate = self.noise(t)
        return sigma[:, None], 1 - torch.exp(-sigma[:, None]), rate

    def sample(self, *arguments, **options):
        return "original"


def probabilities(network: DIT, tokens: Tensor, sigma: float = 0.0) -> Tensor:
    """softmax without the mask, fp64 (R, D, V)."""
    with torch.no_grad():
        logits = network(tokens, torch.full((len(tokens),), sigma)).double()
    logits[..., MASK] = -torch.inf
    return logits.softmax(-1)


def ancestral_law(network: DIT, times: list[float], sigmas: list[float]) -> Tensor:
    """The law (V, V) of two positions under the loop of the repositories, by enumeration.

    `times` has S + 1 entries, the last one that of the argmax; `sigmas` as many.
    """
    states = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    law = torch.zeros(VOCAB * VOCAB, dtype=torch.float64)
    law[-1] = 1.0  # both masked
    for k, sigma in enumerate(sigmas):
        p = probabilities(network, states, sigma)
        if k < len(times) - 1:
            stay = times[k + 1] / times[k]
            move = (1 - stay) * p
            move[..., MASK] = stay
        else:
            move = torch.nn.functional.one_hot(p.argmax(-1), VOCAB).double()
        kept = torch.nn.functional.one_hot(states, VOCAB).double()
        move = torch.where((states == MASK)[..., None], move, kept)
        step = torch.einsum("sa,sb->sab", move[:, 0], move[:, 1]).flatten(1)
        law = law @ step
    network.forget()
    return law
