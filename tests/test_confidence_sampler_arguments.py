"""Wrong arguments of the confidence sampler are named, with what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from confidence_cases import MASK, VOCAB
from naming import stable_id

from di4c_fast.samplers import sample_confidence


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"shape": (2,)}, TypeError, r"shape must be \(B, D\)"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float 2.0"),
        ({"steps": None}, ValueError, "steps must be an int without a threshold or a factor"),
        ({"steps": 3, "block_length": 3}, ValueError, "multiple of the number of blocks, 2, got 3"),
        ({"block_length": 0}, ValueError, "block_length must be at least 1, got 0"),
        ({"block_length": 2.5}, TypeError, "block_length must be an int"),
        ({"mask_id": -1}, ValueError, "mask_id must be at least 0, got -1"),
        ({"mask_id": 11}, ValueError, r"must be in \[0, V\) = \[0, 11\) of model, got 11"),
        ({"mask_id": 12, "vocab_size": 11}, ValueError, r"mask_id must be in \[0, vocab_size\)"),
        ({"vocab_size": 12}, ValueError, "model must return logits over V = 12 classes"),
        ({"rule": "confidence"}, ValueError, "rule must be one of 'low_confidence', 'random'"),
        ({"schedule": "cosine"}, ValueError, "schedule must be one of 'even', 'ancestral'"),
        ({"t_min": 0.0}, ValueError, r"t_min must be in \(0, 1\), got 0.0"),
        ({"t_min": "a"}, TypeError, "t_min must be a number"),
        ({"threshold": "a", "steps": None}, TypeError, "threshold must be a number"),
        ({"threshold": 0.5, "steps": 6, "block_length": 3}, ValueError, "steps caps a threshold"),
        ({"factor": -1.0, "steps": None}, ValueError, "factor must be finite and at least 0"),
        ({"factor": 1.0}, ValueError, "steps must be None with a factor, got 2"),
        ({"factor": 1.0, "threshold": 0.5}, ValueError, "threshold and factor exclude each other"),
        ({"threshold": 0.5, "rule": "random"}, ValueError, "threshold needs a rule with confiden"),
        ({"factor": 0.5, "rule": "origin"}, ValueError, "factor needs a rule with confidences"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"confidence_temperature": -1.0}, ValueError, "confidence_temperature must be finite"),
        ({"confidence_temperature": 1.0, "rule": "origin"}, ValueError, "needs confidences"),
        ({"guidance_scale": -0.5}, ValueError, "guidance_scale must be finite and at least 0"),
        ({"shift": 1}, TypeError, "shift must be True or False"),
        ({"exclude_mask": None}, TypeError, "exclude_mask must be True or False"),
        ({"exclude_mask": False, "rule": "origin"}, ValueError, "exclude_mask=False needs a rule"),
        ({"active_only": 0}, TypeError, "active_only must be True or False"),
        ({"banned_ids": 3}, TypeError, "banned_ids must be a sequence of ints"),
        ({"banned_ids": [1, -2]}, ValueError, r"banned_ids\[1\] must be at least 0, got -2"),
        ({"banned_ids": [11]}, ValueError, r"banned_ids .* \[0, 11\) of model, got 11"),
        ({"deferred_ids": "ab"}, TypeError, "deferred_ids must be a sequence of ints"),
        ({"deferred_ids": [10]}, ValueError, "deferred_ids must not hold the mask, 10"),
        ({"deferred_ids": [1], "rule": "entropy"}, ValueError, "deferred_ids needs rule="),
        ({"eos_id": -1}, ValueError, "eos_id must be at least 0, got -1"),
        ({"confidence_dtype": torch.int64}, ValueError, "confidence_dtype must be None or one of"),
        ({"latent_dim": -1}, ValueError, "latent_dim must be at least 0, got -1"),
        (
            {"latent": torch.zeros(3, 1), "latent_dim": 1},
            ValueError,
            r"latent must have shape \(B, L\) = \(2, 1\) or \(S, B, L\) = \(2, 2, 1\)",
        ),
        ({"prompt": torch.zeros(2, 6).long()}, ValueError, "longer than the sequence, D = 5"),
        ({"prompt": torch.tensor([0, 11])}, ValueError, r"prompt must hold .* of model, got 11"),
        ({"prompt": torch.tensor([0, -1])}, ValueError, r"prompt must hold .* \[0, V\), got -1"),
        ({"context": {"a": torch.zeros(3)}}, ValueError, r"context\['a'\] must have B = 2"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"generator": 1}, TypeError, "generator must be a torch.Generator or None"),
        ({"first_sequence": -1}, ValueError, "first_sequence must be at least 0, got -1"),
        ({"callback": 1}, TypeError, "callback must be callable"),
        ({"history": ()}, TypeError, "history must be a list to fill or None"),
        ({"model": 3}, TypeError, "model must be callable, got int"),
        ({"model": lambda x, t: torch.zeros(2, 4, 11)}, ValueError, "model must return logits of"),
        ({"model": lambda x, t: torch.full((2, 5, 11), torch.nan)}, ValueError, "must not hold"),
    ],
    ids=stable_id,
)  # fmt: skip
def test_what_is_wrong_is_named(changes, error, message):
    arguments = {
        "model": lambda x, t: torch.zeros(*x.shape, VOCAB),
        "shape": (2, 5),
        "mask_id": MASK,
        "steps": 2,
        **changes,
    }
    with pytest.raises(error, match=message):
        sample_confidence(**arguments)
