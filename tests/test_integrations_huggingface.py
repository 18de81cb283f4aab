"""Masked language models of Hugging Face as denoisers: the same logits, only those asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from huggingface_models import FAMILIES, MASK, POSITIONS, VOCAB, tiny
from torch import nn
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead, TensorHead
from di4c_fast.integrations.huggingface import MaskedLM, has_linear_head
from di4c_fast.samplers import sample_masked
from di4c_fast.samplers.confidence import sample_confidence

TOKENS = torch.randint(5, VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
MASKED = TOKENS.masked_fill(torch.arange(7) % 2 == 0, MASK)
T = torch.ones(3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_holds_the_logits_of_the_model(family):
    model = tiny(family)
    attention = torch.ones_like(MASKED)
    attention[0, 5:] = 0
    wrapped = MaskedLM(model)
    for context in ({}, {"attention_mask": attention}):
        head = wrapped(MASKED, T, **context)
        assert isinstance(head, LinearHead)
        assert head.shape == (3, 7, VOCAB)
        assert head.weight is model.get_output_embeddings().weight
        # The bias is added after the product instead of within it.
        torch.testing.assert_close(
            head.logits(), model(MASKED, **context).logits, rtol=1e-5, atol=1e-6
        )


def test_the_output_layer_sees_no_rows_during_the_call():
    model = tiny("Bert")
    wrapped = MaskedLM(model)
    rows = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, arguments, output: rows.append(output.shape[:-1].numel())
    )
    wrapped(MASKED, T)
    assert rows == [0]


def test_gradients_reach_all_weights_and_the_tied_one_from_both_sides():
    one, other = tiny("Bert"), tiny("Bert")
    MaskedLM(one)(MASKED, T).logits().square().sum().backward()
    other(MASKED).logits.square().sum().backward()
    for (name, ours), (_, expected) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        # Sums in another order.
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-3, atol=1e-3, msg=name)


class Capped(nn.Module):
    """A model that does something to its logits after the output layer."""

    def __init__(self, model, cap=True):
        super().__init__()
        self.inner, self.cap = model, cap

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, tokens, **context):
        output = self.inner(tokens, **context)
        if self.cap:
            output.logits = 30.0 * torch.tanh(output.logits / 30.0)
        return output


def test_logits_that_are_changed_after_the_output_layer_are_given_as_they_are():
    assert has_linear_head(Capped(tiny("Bert"), cap=False))
    model = Capped(tiny("Bert")).eval()
    assert not has_linear_head(model)
    head = MaskedLM(model)(MASKED, T)
    assert isinstance(head, TensorHead)
    assert torch.equal(head.logits(), model(MASKED).logits)


def test_models_without_a_plain_output_layer_give_their_logits():
    model = tiny("Bert")
    model.get_output_embeddings = lambda: None
    assert not has_linear_head(model)
    assert isinstance(MaskedLM(model)(MASKED, T), TensorHead)
    assert isinstance(MaskedLM(tiny("Bert"), linear_head=False)(MASKED, T), TensorHead)


def test_asking_leaves_modes_and_hooks_as_they_were():
    model = tiny("Bert").train()
    model.bert.eval()
    wrapped = MaskedLM(model)
    assert wrapped.training
    assert model.training
    assert not model.bert.training
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_the_adapter_has_the_weights_of_the_model():
    model = tiny("Bert")
    wrapped = MaskedLM(model)
    assert set(wrapped.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    other = copy.deepcopy(wrapped)
    with torch.no_grad():
        other.model.get_output_embeddings().bias.add_(1.0)
    before = wrapped(MASKED, T).logits()
    torch.testing.assert_close(other(MASKED, T).logits(), before + 1.0)
    assert "linear_head=True" in repr(wrapped)


@pytest.mark.parametrize("family", FAMILIES)
def test_samplers_give_the_tokens_of_the_plain_logits(family):
    model = tiny(family)
    wrapped = MaskedLM(model)
    prompt = TOKENS[:, :3]

    def plain(tokens, t):
        return model(tokens).logits

    drawn = {}
    for name, denoiser in (("head", wrapped), ("logits", plain)):
        masked = sample_masked(
            denoiser, (3, POSITIONS), mask_id=MASK, steps=4, prompt=prompt, seed=3
        )
        confident = sample_confidence(
            denoiser, (3, POSITIONS), mask_id=MASK, steps=4, prompt=prompt, seed=3
        )
        drawn[name] = torch.stack([masked, confident])
        assert torch.equal(drawn[name][:, :, :3], prompt.expand(2, -1, -1))
        assert not bool((drawn[name] == MASK).any())
    # Logits differ in their last bits only: no draw hangs on those.
    assert torch.equal(drawn["head"], drawn["logits"])


@wrong(
    [
        (("bert", None), TypeError, "model must be an nn.Module, got str 'bert'"),
        (
            (nn.Linear(2, 2), True),
            "linear_head=True needs a model whose get_output_embeddings()... got Linear",
        ),
        ((nn.Linear(2, 2), 1), TypeError, "linear_head must be True, False or None, got int 1"),
    ]
)
def test_the_adapter_names_what_is_wrong(wrong: Wrong):
    model, linear_head = wrong.what
    with wrong.raises():
        MaskedLM(model, linear_head=linear_head)
