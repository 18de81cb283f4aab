"""Wrong arguments of the masked sampler are named, with what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch
from masked_sampler_cases import MASK, VOCAB

from di4c_fast.samplers import sample_masked


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float 2.0"),
        ({"shape": (2, 0)}, ValueError, r"shape\[1\] must be at least 1, got 0"),
        ({"shape": (2,)}, TypeError, r"shape must be \(B, D\)"),
        ({"mask_id": -1}, ValueError, "mask_id must be at least 0, got -1"),
        ({"mask_id": 4}, ValueError, r"mask_id must be in \[0, V\) = \[0, 4\) of model, got 4"),
        ({"mask_id": 7, "vocab_size": 5}, ValueError, r"mask_id must be in \[0, vocab_size\)"),
        ({"vocab_size": 5}, ValueError, r"model must return logits over V = 5 classes, got shape"),
        ({"latent_dim": -1}, ValueError, "latent_dim must be at least 0, got -1"),
        ({"latent": torch.zeros(2, 1)}, ValueError, "latent needs latent_dim >= 1, got 0"),
        (
            {"latent": torch.zeros(3, 1), "latent_dim": 1},
            ValueError,
            r"latent must have shape \(B, L\) = \(2, 1\) or \(S \+ 1, B, L\) = \(4, 2, 1\), got",
        ),
        (
            {"prompt": torch.zeros(2, 6).long()},
            ValueError,
            "longer than the sequence, D = 5, got 6",
        ),
        ({"prompt": torch.zeros(3, 2).long()}, ValueError, r"prompt must have shape \(B, P\)"),
        ({"prompt": torch.zeros(2, 2)}, TypeError, "prompt must have dtype torch.int64"),
        ({"prompt": torch.tensor([0, -1])}, ValueError, r"prompt must hold .* \[0, V\), got -1"),
        (
            {"prompt": torch.tensor([0, 9]), "vocab_size": 4},
            ValueError,
            r"prompt must hold token ids in \[0, 4\), got 9",
        ),
        (
            {"prompt": torch.tensor([0, 9])},
            ValueError,
            r"prompt must hold token ids in \[0, V\) = \[0, 4\) of model, got 9",
        ),
        ({"t_min": 0.0}, ValueError, r"t_min must be in \(0, 1\), got 0.0"),
        ({"t_min": math.nan}, ValueError, "t_min must be finite"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int or None"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an int or None"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"generator": 1}, TypeError, "generator must be a torch.Generator or None"),
        ({"device": "nowhere"}, ValueError, "device must be one that torch can use.*'nowhere'"),
        ({"device": 3.5}, ValueError, "device must be one that torch can use here, got 3.5"),
        ({"model": 3}, TypeError, "model must be callable, got int"),
        ({"project_fn": 3}, TypeError, "project_fn must be callable"),
        ({"callback": "bar"}, TypeError, "callback must be callable"),
        ({"history": True}, TypeError, "history must be a list to fill or None"),
        ({"context": {"label": torch.zeros(3)}}, ValueError, r"context\['label'\] must have B = 2"),
        ({"context": [torch.zeros(2)]}, TypeError, "context must be a mapping of tensors"),
        ({"project_fn": lambda x: x[:, :2]}, ValueError, "project_fn must return tokens of shape"),
        ({"project_fn": lambda x: x.float()}, TypeError, "output of project_fn must have dtype"),
        ({"model": lambda x, t: torch.zeros(2, 5)}, ValueError, "model must return logits of sha"),
        (
            {"model": lambda x, t: torch.zeros(1, 5, 4)},
            ValueError,
            r"model must return logits of shape \(R, D, V\) .* = \(2, 5\) .* got \(1, 5, 4\)",
        ),
        ({"model": lambda x, t: x}, TypeError, "the output of model must be floating point"),
        ({"model": lambda x, t: None}, TypeError, "the output of model must be a Tensor of logits"),
        ({"model": lambda x, t: torch.zeros(2, 5, 1), "mask_id": 0}, ValueError, "at least 2 cl"),
    ],
)
def test_what_is_wrong_is_named(changes, error, message):
    arguments = {
        "model": lambda x, t: torch.zeros(*x.shape, VOCAB),
        "shape": (2, 5),
        "mask_id": MASK,
        "steps": 3,
        "t_min": 0.1,
        "active_only": False,
        **changes,
    }
    with pytest.raises(error, match=message):
        sample_masked(**arguments)
