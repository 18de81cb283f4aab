"""Masked language models of Hugging Face as denoisers of this package.

    model = MaskedLM(AutoModelForMaskedLM.from_pretrained(name))
    tokens = sample_masked(model, (B, D), mask_id=tokenizer.mask_token_id, steps=32)

Nothing of `transformers` is imported. `di4c_fast.models.wrappers` makes students of such models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import describe
from ..heads import Head, TensorHead
from .call import Wrapper, check_module
from .linear_output import call_for_head, gives_linear_logits, output_layer

__all__ = ["MaskedLM", "has_linear_head"]


class MaskedLM(Wrapper):
    """A masked language model as a callable (tokens, t, **context) → head.

    Equivalent PyTorch: `model(tokens, **context).logits`; but where the logits are one linear
    layer applied to hidden states, the result is `LinearHead(hidden, weight, bias)` and only
    those rows are ever computed that somebody asks for.

    t is not used: these models see the noise in the mask tokens. Every class counts as the model
    gives it, special tokens included.

    Args:
        model: an `nn.Module` called as model(tokens (R, D), **context) that returns an object with
            `logits` (R, D, V), such as `BertForMaskedLM`. Held, not copied; weights, state
            dictionary (below "model.") and modes are its own.
        linear_head: whether the logits come from `model.get_output_embeddings()` alone; None asks
            `has_linear_head`, which calls the model once. False always gives all logits. True
            needs a model whose output layer is plain.
    """

    def __init__(self, model: nn.Module, *, linear_head: bool | None = None):
        check_module(model)
        if linear_head is None:
            linear_head = has_linear_head(model)
        elif not isinstance(linear_head, bool):
            raise TypeError(f"linear_head must be True, False or None, got {describe(linear_head)}")
        elif linear_head and output_layer(model) is None:
            raise ValueError(
                "linear_head=True needs a model whose get_output_embeddings() is a plain "
                f"nn.Linear, got {type(model).__name__}"
            )
        super().__init__(model)
        self.linear_head = linear_head

    def forward(self, tokens: Tensor, t: Tensor | None = None, **context: Any) -> Head:
        """(R, D) int64 to a head (R, D, V); the context goes to the model (attention_mask ...)."""
        if self.linear_head:
            return call_for_head(self.model, tokens, **context)
        return TensorHead(self.model(tokens, **context).logits)

    def extra_repr(self) -> str:
        return f"linear_head={self.linear_head}"


def has_linear_head(model: nn.Module) -> bool:
    """Whether the model's logits are its output layer's, with nothing done to them afterwards.

    Looked up first (`get_output_embeddings()` must be a plain `nn.Linear`), then tried with two
    tokens in eval mode: the logits must be `F.linear(hidden, weight, bias)` bit for bit. A model
    without memory (meta) is believed.
    """
    layer = output_layer(model)
    if layer is None or layer.weight.is_meta:
        return layer is not None
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=layer.weight.device)
    return gives_linear_logits(model, layer, lambda: model(tokens).logits, tokens)
