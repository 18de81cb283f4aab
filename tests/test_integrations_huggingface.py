"""Masked language models of Hugging Face as denoisers: the same logits, only those asked for."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from cached_models import compiled
from huggingface_models import FAMILIES, MASK, POSITIONS, VOCAB, WIDTH, tiny, transformers
from torch import nn
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead, TensorHead
from di4c_fast.integrations.huggingface import CachedLM, MaskedLM, has_linear_head
from di4c_fast.samplers import sample_masked
from di4c_fast.samplers.caches import Window
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


# Decoders that keep keys


def decoder(family: str, **options) -> nn.Module:
    """A tiny causal language model of a family in float64, in eval mode."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 32, **options}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    if family == "GPT2":
        sizes = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    elif "num_key_value_heads" not in sizes:
        sizes["num_key_value_heads"] = 2
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, name)(config).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


LONG = torch.randint(5, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(12) >= torch.tensor([[0], [2], [5]])
DECODERS = [("Llama", {}), ("Qwen2", {}), ("GPT2", {}), ("Llama", {"attn_implementation": "eager"})]


def window(kind: str, start: int, stop: int, first: bool = False) -> Window:
    begin, end = (start, stop) if kind == "causal" else (5, 8)
    return Window(kind, begin, end, start, stop, first, 12, 3)


@pytest.mark.parametrize(("family", "options"), DECODERS, ids=str)
def test_a_decoder_sees_both_sides_and_keeps_keys(family, options):
    model = CachedLM(decoder(family, **options), block_length=3)
    close = lambda one, other: torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # noqa: E731
    whole = model(LONG, attention_mask=REAL)
    assert isinstance(whole, LinearHead)
    whole = whole.logits()
    later = LONG.clone()
    later[:, -1] = 5 + (LONG[:, -1] - 4) % (VOCAB - 5)
    assert bool((model(later, attention_mask=REAL).logits()[:, 5] != whole[:, 5]).any())
    for kind, stop in (("suffix", 12), ("block", 8)):
        model(LONG, T, window=window(kind, 0, 12, True), attention_mask=REAL)
        for _ in range(2):
            part = model(LONG[:, 5:stop], T, window=window(kind, 5, stop), attention_mask=REAL)
            close(part.logits(), whole[:, 5:stop])
    for row, missing in ((1, 2), (2, 5)):  # as without padding
        close(model(LONG[row : row + 1, missing:]).logits()[0], whole[row, missing:])
    # What is committed together or one after another is the same, and what is behind unseen.
    found = []
    for bounds in ([0, 9], [0, 3, 6, 9], [0, 6, 9]):
        for start, stop in itertools.pairwise(bounds):
            w = window("causal", start, stop, start == 0)
            model.commit(LONG[:, start:stop], T, window=w, attention_mask=REAL)
        last = model(LONG[:, 9:], T, window=window("causal", 9, 12), attention_mask=REAL)
        found.append(last.logits())
        close(found[-1], found[0])


def test_a_decoder_fills_batches_as_one_by_one_in_every_window():
    prompt, real = LONG[:, :6], REAL[:, :6]
    for kind in ("all", "suffix", "block", "causal"):
        model = CachedLM(decoder("Llama"), block_length=3 if kind == "causal" else None)
        for how in ({"steps": 4}, {"threshold": 0.4, "steps": None}):
            how |= {"mask_id": MASK, "block_length": 3, "window": kind}
            context = {"attention_mask": F.pad(real, (0, 6), value=True)}
            both = sample_confidence(model, (3, 12), prompt=prompt, context=context, **how)
            for row, tokens in zip((0, 1, 2), both, strict=True):
                cut = {"attention_mask": context["attention_mask"][row : row + 1]}
                alone = {"prompt": prompt[row : row + 1], "context": cut}
                one = sample_confidence(model, (1, 12), **alone, **how)
                assert torch.equal(one[0], tokens)


@wrong(
    [
        (lambda: CachedLM(lambda x: x), TypeError, "model must be an nn.Module"),
        (lambda: CachedLM(tiny("ModernBert")), TypeError, "model must take past_key_values and"),
        (lambda: CachedLM(decoder("Gemma2", num_key_value_heads=2, head_dim=4)), TypeError,
         "full attention in all layers, got Gemma2ForCausalLM ... with full_attention, sliding"),
        (lambda: CachedLM(decoder("Llama"), block_length=0), "block_length must be at least 1"),
        (lambda: CachedLM(compiled(decoder("Llama"))), "model must not be compiled to keep keys"),
    ]
)  # fmt: skip
def test_models_that_keep_no_keys_are_refused(wrong: Wrong):
    with wrong.raises():
        wrong.what()
