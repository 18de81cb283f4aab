"""Tiny masked language models of `transformers`, randomly initialised; skips where it is absent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

VOCAB, MASK, WIDTH, POSITIONS = 23, 4, 16, 12
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
FAMILIES = ("Bert", "Roberta", "ModernBert", "DistilBert")


def tiny(family: str, seed: int = 0, **options) -> nn.Module:
    """The masked language model of a family, in eval mode as a loaded one is."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "intermediate_size": 32, "vocab_size": VOCAB, "pad_token_id": 1}
    if family == "DistilBert":
        sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": VOCAB}
    sizes["max_position_embeddings"] = POSITIONS + 2 if family == "Roberta" else POSITIONS
    if family == "ModernBert":
        sizes |= dict.fromkeys(("cls_token_id", "bos_token_id"), 0)
        sizes |= dict.fromkeys(("sep_token_id", "eos_token_id"), 2)
    config = getattr(transformers, f"{family}Config")(**sizes, **options)
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # sharper than the usual start, biases included
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
