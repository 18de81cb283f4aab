"""For the tests of samplers: denoisers that note their calls, all samplers."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from di4c_fast.heads import LinearHead, LogisticHead
from di4c_fast.processes import GaussianProcess
from di4c_fast.samplers import (
    sample_analytic,
    sample_canvas,
    sample_confidence,
    sample_gaussian,
    sample_masked,
    sample_maskgit,
    sample_psi,
    sample_remasked,
    sample_uniform_state,
)
from di4c_fast.testing import assert_counts_match
from tools.own_head import Capped

VOCAB, MASK, D, WIDTH = 11, 10, 14, 6
PROCESS = GaussianProcess(VOCAB, rate_sigma=1.5, target_sigma=3.0, time_base=0.05)


class Denoiser(nn.Module):
    """Logits that depend on position, neighbours, the mean of all tokens, time, λ and label.

    In float64, so that no draw and no order of confidences hangs on rounding.
    """

    def __init__(
        self,
        seed: int = 0,
        kind: str = "own",
        scale: float = 1.5,
        mask_bias: float = 0.0,
        timed: bool = True,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.embedding = nn.Parameter(normal(VOCAB, WIDTH))
        self.position = nn.Buffer(normal(D, WIDTH))
        self.weight = nn.Buffer(normal(VOCAB, WIDTH) * scale)
        self.bias = nn.Buffer(0.2 * normal(VOCAB))
        self.biases = nn.Buffer(normal(D, VOCAB))
        self.bias[MASK] += mask_bias
        self.inner = nn.Dropout(0.5)
        self.kind, self.timed = kind, timed
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.modes: list[bool] = []
        self.rows: list[Tensor] = []
        self.on_call = lambda: None

    def hidden(self, tokens: Tensor, t: Tensor, latent: Tensor | None, label: Tensor | None):
        position = self.position[: tokens.shape[1]]
        h = self.embedding[tokens]
        h = h + 0.7 * h.roll(1, 1) + position + h.mean(1, keepdim=True)
        for values in (t if self.timed else None, label):
            if values is not None:
                h = h + values.to(h.dtype).view(-1, 1, 1)
        if latent is not None:
            h = h + 2 * (latent[:, :1, None].to(h.dtype) - 0.5) * position
        return torch.tanh(h)

    def forward(
        self, tokens: Tensor, t: Tensor, latent: Tensor | None = None, label: Tensor | None = None
    ):
        self.on_call()
        self.inputs.append(tokens)
        self.times.append(t)
        self.latents += [] if latent is None else [latent]
        self.labels += [] if label is None else [label]
        self.modes.append(self.training)
        h = self.hidden(tokens, t, latent, label)
        if self.kind == "linear":
            return LinearHead(h, self.weight, self.bias)
        if self.kind == "positional":
            return LinearHead(h, self.weight, self.biases[: tokens.shape[1]])
        if self.kind == "logistic":
            return LogisticHead(h[..., 0], h[..., 1] - 1.0, VOCAB, clamp="min")
        head = Capped(h, self.weight, self.bias)
        head.taken = self.rows
        return head.logits() if self.kind == "tensor" else head

    def logits(self, tokens: Tensor) -> Tensor:
        """(D,) -> (D, V), dense, at time 1."""
        head = self.forward(tokens[None], torch.ones(1))
        return (head if isinstance(head, Tensor) else head.logits())[0].detach()


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A sampler with options, and how many steps it takes besides `steps`."""

    function: Callable[..., Tensor]
    options: dict[str, Any]
    last: int = 0

    def __call__(self, model, shape=(4, D), **changes) -> Tensor:
        return self.function(model, shape, **{"seed": 5, **self.options, **changes})

    def takes(self, *names: str) -> bool:
        known = set(inspect.signature(self.function).parameters)
        if "mask_id" not in self.options:  # where masks are optional
            known.discard("mask_id")
        return set(names) <= known


masked = {"mask_id": MASK, "steps": 4}
warm = {**masked, "temperature": 0.9}
SAMPLERS = {
    "masked": Sampler(sample_masked, masked, 1),
    "masked, whole batch": Sampler(sample_masked, {**masked, "active_only": False}, 1),
    "analytic": Sampler(sample_analytic, masked, 1),
    "remasked": Sampler(sample_remasked, {**masked, "eta": 0.4}, 1),
    "remasked, loop": Sampler(
        sample_remasked, {**masked, "steps": 8, "rule": "loop", "eta": 0.1, "active_only": False}, 1
    ),
    "remasked, conf": Sampler(sample_remasked, {**masked, "rule": "conf"}, 1),
    "psi": Sampler(sample_psi, {**masked, "middle_mode": "constant-0.5"}, 1),
    "psi, uniform": Sampler(
        sample_psi, {"vocab_size": VOCAB, "steps": 4, "middle_mode": "max-capped-0.3"}, 1
    ),
    "uniform": Sampler(sample_uniform_state, {"vocab_size": VOCAB, "steps": 4}, 1),
    "uniform, greedy": Sampler(
        sample_uniform_state, {"vocab_size": VOCAB, "steps": 4, "last_step": "greedy"}, 1
    ),
    "canvas": Sampler(
        sample_canvas, {"vocab_size": VOCAB, "steps": 4, "mean_entropy": None, "active_only": False}
    ),
    "canvas, ending": Sampler(
        sample_canvas,
        {"vocab_size": VOCAB, "steps": 6, "entropy_bound": 3.0}
        | {"mean_entropy": 1.1, "stable_steps": 0},
    ),
    "gaussian": Sampler(sample_gaussian, {"process": PROCESS, "steps": 4}),
    "maskgit": Sampler(sample_maskgit, masked),
    "maskgit, resampled": Sampler(sample_maskgit, {**masked, "resample": True}),
    "confidence": Sampler(sample_confidence, warm),
    "confidence, blocks": Sampler(
        sample_confidence, {**warm, "block_length": 7, "rule": "entropy"}
    ),
    "confidence, random": Sampler(
        sample_confidence, {**warm, "rule": "random", "active_only": False}
    ),
    "confidence, drawn": Sampler(
        sample_confidence, {**warm, "rule": "topk_margin", "confidence_temperature": 0.5}
    ),
    "origin": Sampler(sample_confidence, {**warm, "rule": "origin", "block_length": 7}),
    "threshold": Sampler(
        sample_confidence,
        {"mask_id": MASK, "threshold": 0.4, "temperature": 0.9, "block_length": 7},
    ),
    "factor": Sampler(
        sample_confidence, {"mask_id": MASK, "factor": 1.5, "rule": "maskgit_plus"}
    ),
}  # fmt: skip
# One of each function.
FUNCTIONS = (
    "masked", "analytic", "remasked", "psi", "uniform", "canvas", "gaussian", "maskgit",
    "confidence",
)  # fmt: skip


def prompts(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(MASK, (batch, length), generator=torch.Generator().manual_seed(seed))


class Tabular:
    """Any denoiser of a few tokens: a table of logits per state, half of λ and label.

    In float64, so that no token hangs on rounding, which may depend on a row's place in a batch.
    """

    def __init__(
        self, seed: int, latent: bool = False, labels: int = 1, timed: bool = True, size=(3, 4)
    ):
        generator = torch.Generator().manual_seed(seed)
        positions, vocab = size
        self.powers = vocab ** torch.arange(positions - 1, -1, -1)
        self.states = vocab**positions
        shape = (labels, 1 + latent, self.states, positions, vocab)
        self.table = 1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.timed = timed
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None, label=0) -> Tensor:
        self.calls.append((tokens, t, latent))
        component = 0 if latent is None else (latent[:, 0] > 0.5).long()
        logits = self.table[label, component, self.state_of(tokens)]
        return logits * (0.5 + t.double().view(-1, 1, 1)) if self.timed else logits

    def state_of(self, tokens: Tensor) -> Tensor:
        """Number of a token row (..., D) in base V."""
        return (tokens * self.powers).sum(-1)

    def counts_of(self, tokens: Tensor) -> Tensor:
        return torch.bincount(self.state_of(tokens), minlength=self.states)


def constant(logits: Tensor) -> Callable[..., Tensor]:
    """A denoiser that always gives these logits (V,)."""
    return lambda tokens, t: logits.expand(*tokens.shape, len(logits))


def assert_same_law(ours: Tensor, theirs: Tensor, vocab: int) -> None:
    """Two samples (B, D) have one law of pairs of tokens.

    The noise of the second sample adds to that of the first: the first is thinned by as much, and
    the second then taken as exact.
    """
    for i, j in itertools.combinations(range(ours.shape[1]), 2):
        ours_, theirs_ = (
            torch.bincount(x[:, i] * vocab + x[:, j], minlength=vocab**2) for x in (ours, theirs)
        )
        share = 1 / (1 + float(ours_.sum()) / float(theirs_.sum()))
        assert_counts_match((ours_ * share).round().long(), theirs_.double() + 1e-9)


def reveal_law(
    logits: Tensor, row: Sequence[int], mask_id: int, reveal: int, factor: float
) -> dict[tuple[int, ...], float]:
    """Law of the next row of MaskGIT by enumeration of tokens and of the order of confidences.

    Sorting log p + factor·Gumbel is drawing without replacement with weights p^(1/factor).
    """
    masked = [d for d, token in enumerate(row) if token == mask_id]
    logits = logits.double().clone()
    logits[:, mask_id] = -math.inf
    p = logits.softmax(-1)
    law: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(p.shape[-1]), repeat=len(masked)):
        token = dict(zip(masked, tokens, strict=True))
        drawn = {d: float(p[d, v]) for d, v in token.items()}
        if not math.prod(drawn.values()):
            continue
        if factor == 0.0:
            orders = {tuple(sorted(masked, key=lambda d: -drawn[d])[:reveal]): 1.0}
        else:
            weight = {d: x ** (1.0 / factor) for d, x in drawn.items()}
            orders = {}
            for order in itertools.permutations(masked, reveal):
                left, share = sum(weight.values()), 1.0
                for d in order:
                    share *= weight[d] / left
                    left -= weight[d]
                orders[order] = share
        for order, share in orders.items():
            after = tuple(token[d] if d in order else old for d, old in enumerate(row))
            law[after] = law.get(after, 0.0) + math.prod(drawn.values()) * share
    return law
