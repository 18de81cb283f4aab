"""Wrong arguments of the MaskGIT sampler are named, with what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from di4c_fast.samplers import sample_maskgit


def uniform_model(tokens: Tensor, t: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, 5)


GOOD = {"mask_id": 4, "steps": 2, "seed": 0}
LABEL = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int"),
        ({"mask_id": -1}, ValueError, "mask_id must be at least 0"),
        ({"mask_id": None}, TypeError, "mask_id must be an int"),
        ({"mask_id": 7}, ValueError, r"mask_id must be in \[0, V\) = \[0, 5\) of model"),
        ({"mask_id": 4, "vocab_size": 4}, ValueError, r"mask_id must be in \[0, vocab_size\)"),
        ({"vocab_size": 1}, ValueError, "vocab_size must be at least 2"),
        ({"vocab_size": 6}, ValueError, "model must return logits over V = 6 classes"),
        ({"schedule": "cubic"}, ValueError, "schedule must be one of 'arccos'"),
        ({"schedule": 3}, TypeError, "schedule must be a name or a sequence of counts"),
        ({"schedule": [1, 2, 3]}, ValueError, "schedule must hold steps = 2 counts, got 3"),
        ({"schedule": [1, 2.0]}, TypeError, r"schedule\[1\] must be an int"),
        ({"schedule": [-1, 2]}, ValueError, r"schedule\[0\] must not be negative, got -1"),
        ({"schedule_style": "jax"}, ValueError, "schedule_style must be one of 'di4c'"),
        ({"guidance": "high"}, TypeError, "guidance must be a number"),
        ({"guidance": math.nan}, ValueError, "guidance must be finite"),
        ({"guidance": 1.0}, ValueError, "guidance needs unconditional"),
        ({"guidance_schedule": "cosine"}, ValueError, "guidance_schedule must be one of"),
        ({"guidance_model": 3}, TypeError, "guidance_model must be callable"),
        ({"unconditional": [LABEL]}, TypeError, "unconditional must be a mapping"),
        ({"unconditional": {"a": LABEL[:1]}}, ValueError, r"unconditional\['a'\] must have B = 2"),
        (
            {"context": {"a": LABEL}, "unconditional": {"b": LABEL}},
            ValueError,
            r"unconditional must have the keywords of context, \['a'\], got \['b'\]",
        ),
        (
            {"context": {"a": LABEL}, "unconditional": {"a": LABEL.float()}},
            ValueError,
            r"unconditional\['a'\] must have the shape and dtype of context\['a'\]",
        ),
        (
            {"context": {"a": LABEL}, "unconditional": {"a": LABEL.view(2, 1)}},
            ValueError,
            r"unconditional\['a'\] must have the shape and dtype of context\['a'\]",
        ),
        ({"context": {"a": LABEL[:1]}}, ValueError, r"context\['a'\] must have B = 2"),
        ({"randomize": "quadratic"}, ValueError, "randomize must be one of 'linear'"),
        ({"gumbel_temperature": -1.0}, ValueError, "gumbel_temperature must be finite and at"),
        ({"gumbel_temperature": None}, TypeError, "gumbel_temperature must be a number"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and at least 0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\]"),
        ({"resample": 1}, TypeError, "resample must be True or False"),
        ({"exclude_mask": None}, TypeError, "exclude_mask must be True or False"),
        ({"latent_dim": -1}, ValueError, "latent_dim must be at least 0"),
        ({"latent": torch.zeros(2, 1)}, ValueError, "latent needs latent_dim >= 1"),
        (
            {"latent_dim": 1, "latent": torch.zeros(3, 2, 1)},
            ValueError,
            r"latent must have shape \(B, L\) = \(2, 1\) or \(S, B, L\) = \(2, 2, 1\)",
        ),
        ({"prompt": torch.zeros(7, dtype=torch.int64)}, ValueError, "must not be longer"),
        ({"prompt": torch.full((1,), 5)}, ValueError, r"prompt must hold token ids in \[0, V\)"),
        ({"prompt": torch.full((1,), -1)}, ValueError, "prompt must hold token ids"),
        (
            {"prompt": torch.full((1,), 5), "vocab_size": 5},
            ValueError,
            r"prompt must hold token ids in \[0, 5\), got 5",
        ),
        ({"prompt": torch.zeros(1)}, TypeError, "prompt must have dtype torch.int64"),
        ({"generator": torch.Generator()}, ValueError, "seed and generator exclude each other"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\)"),
        ({"first_sequence": -1}, ValueError, "first_sequence must be at least 0"),
        ({"callback": 1}, TypeError, "callback must be callable"),
        ({"history": ()}, TypeError, "history must be a list"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        sample_maskgit(uniform_model, (2, 6), **{**GOOD, **changes})


@pytest.mark.parametrize("shape", [3, "ab", (1, 2, 3)])
def test_a_wrong_shape_is_named(shape):
    with pytest.raises(TypeError, match=r"shape must be \(B, D\)"):
        sample_maskgit(uniform_model, shape, **GOOD)


def test_a_model_that_is_none_or_returns_the_wrong_shape_is_named():
    with pytest.raises(TypeError, match="model must be callable"):
        sample_maskgit(None, (2, 6), **GOOD)
    with pytest.raises(ValueError, match="model must return logits of shape"):
        sample_maskgit(lambda tokens, t: torch.zeros(2, 5), (2, 6), **GOOD)
    with pytest.raises(ValueError, match="guidance_model must return logits over V = 5"):
        sample_maskgit(
            uniform_model,
            (2, 6),
            guidance=1.0,
            guidance_model=lambda tokens, t: torch.zeros(2, 6, 4),
            **GOOD,
        )
