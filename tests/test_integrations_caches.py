"""Caches of Fast-dLLM's classes: tokens, batches, padding, what is refused."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from cached_models import Attention, Cached, FastDream, FastModel, compiled
from sampler_cases import MASK, VOCAB, prompts
from torch import Tensor, nn
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead
from di4c_fast.integrations import dream, llada
from di4c_fast.samplers import sample_confidence
from di4c_fast.samplers.caches import Window

P, GEN, LENGTH = 6, 8, 4
WINDOWS = {False: "suffix", True: "block"}
SIZES = {"gen_length": GEN, "block_length": LENGTH, "mask_id": MASK}
HOWS = [{"steps": 8}, {"steps": 4}, {"threshold": 0.4}, {"factor": 1.2}]


def expected_tokens(model: Attention, prompt: Tensor, window: str, **how) -> Tensor:
    """By the sampler with a cache that the tests of windows hold."""
    size = (len(prompt), P + GEN)
    given = {"mask_id": MASK, "block_length": LENGTH, "exclude_mask": False, "prompt": prompt}
    how = {"steps": None, **how}
    return sample_confidence(Cached(model), size, window=window, **{**given, **how})


def padded(batch: int = 3) -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts of several lengths, together with their padding and its mask."""
    alone = [prompts(1, n, n) for n in (P, 3, 4)[:batch]]
    together = torch.cat([F.pad(row, (P - row.shape[1], 0)) for row in alone])
    return alone, together, torch.stack([torch.arange(P) >= P - row.shape[1] for row in alone])


@pytest.mark.parametrize("window", ["suffix", "block"])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_llada_fills_as_the_sampler_does_and_counts_its_calls(how, window):
    model = Attention(2)
    fast = FastModel(model)
    prompt = prompts(3, P)
    ours, calls = llada.generate_fast_dllm(fast, prompt, window=window, **how, **SIZES)
    assert torch.equal(ours, expected_tokens(model, prompt, window, **how))
    assert calls == fast.count > 2
    head = llada.cached_denoiser(fast)(
        prompt, torch.ones(3), window=Window(window, 2, 4, 0, P, True, P, 3)
    )
    assert type(head) is LinearHead


class Relative(FastModel):
    """A model of the order alone, as one with rotated keys is: padding on the left is not seen."""

    def __init__(self, seed: int):
        super().__init__(Attention(seed))
        self.model.places.zero_()


@pytest.mark.parametrize("window", ["all", "suffix", "block"])
def test_prompts_padded_on_the_left_are_those_of_one_by_one(window):
    alone, together, real = padded()
    fast = Relative(1)
    for how in HOWS:
        ours, _ = llada.generate_fast_dllm(
            fast, together, attention_mask=real.long(), window=window, **how, **SIZES
        )
        for row, tokens in zip(alone, ours, strict=True):
            one, _ = llada.generate_fast_dllm(fast, row, window=window, **how, **SIZES)
            assert torch.equal(tokens[P:], one[0, row.shape[1] :])
    call = llada.cached_denoiser(fast)
    seen, blind = (
        call(together, torch.ones(3), attention_mask=mask).logits()[:, -1] for mask in (real, None)
    )
    assert (seen != blind).any(1).tolist() == [False, True, True]


def fast_dllm_module(**more):
    def generate(
        model, prompt, steps=128, gen_length=128, block_length=128, temperature=0.,
        remasking='low_confidence', mask_id=126336, threshold=None,
    ):  # fmt: skip
        return "theirs"

    names = ("generate", "generate_with_prefix_cache", "generate_with_dual_cache")
    return types.SimpleNamespace(**{**dict.fromkeys(names, generate), **more})


def test_accelerate_replaces_all_three_loops_and_puts_them_back():
    module, model, prompt = fast_dllm_module(), Attention(3), prompts(1, P)
    before = vars(module).copy()
    with llada.accelerate(module, seed=0):
        for name, window in (("prefix", "suffix"), ("dual", "block")):
            tokens, calls = getattr(module, f"generate_with_{name}_cache")(
                FastModel(model), prompt, steps=4, **SIZES
            )
            assert torch.equal(tokens, expected_tokens(model, prompt, window, steps=4))
            assert calls == 4
        plain, _ = module.generate(FastModel(model), prompt, steps=4, **SIZES)
        assert plain.shape == tokens.shape
    assert vars(module) == before
    with pytest.raises(TypeError, match=r"module.generate_with_dual_cache must have the arguments"):
        llada.accelerate(fast_dllm_module(generate_with_dual_cache=lambda model: None))


def blocks_of(model: nn.Module, prompt: Tensor, mask=None, dual=False, history=False, **changes):
    """Dream's loop in blocks, by the call that its `diffusion_generate` makes."""
    given = {"steps": 6, "alg": "entropy", "alg_temp": None, "eps": 1e-3, "temperature": 0.0}
    given |= {"top_p": None, "top_k": None, "mask_token_id": MASK, "output_history": history}
    given |= {"max_length": prompt.shape[1] + GEN, "return_dict_in_generate": history}
    more = {"threshold": changes.pop("threshold", 0.9), "dual_cache": dual}
    more["block_length"] = changes.pop("block_length", LENGTH)
    config = types.SimpleNamespace(**{**given, **changes})
    model._sample = lambda *args, **kwargs: "theirs"
    with dream.accelerate(model):
        return model._sample(prompt, attention_mask=mask, generation_config=config, **more)


@pytest.mark.parametrize("dual", [False, True])
def test_dream_fills_the_first_position_of_a_block_from_the_row_before(dual):
    model, prompt = Attention(4), prompts(3, P)
    how = {"lead": True, "shift": True}
    for alg in ("entropy", "maskgit_plus"):
        ours = blocks_of(FastDream(model), prompt, dual=dual, alg=alg)
        ancestral = {"rule": "entropy", "schedule": "ancestral", "steps": 6, **how}
        assert torch.equal(ours, expected_tokens(model, prompt, WINDOWS[dual], **ancestral))
    for threshold in (0.1, 0.5):
        given = {"alg": "confidence_threshold", "threshold": threshold}
        output = blocks_of(FastDream(model), prompt, dual=dual, history=True, **given)
        by_threshold = {"rule": "maskgit_plus", "threshold": threshold, **how}
        tokens = expected_tokens(model, prompt, WINDOWS[dual], **by_threshold)
        assert torch.equal(output.sequences, tokens)
        assert torch.equal(output.history[-1], tokens)
    first = output.history[0]
    assert ((first != MASK).sum(1) == P + 1).all()


@pytest.mark.parametrize("dual", [False, True])
def test_dreams_padded_prompts_are_those_of_one_by_one(dual):
    alone, together, real = padded()
    fast = FastDream(Attention(5))
    fast.model.places.zero_()
    for how in ({}, {"alg": "confidence_threshold", "threshold": 0.3}):
        ours = blocks_of(fast, together, real.long(), dual, **how)
        for row, tokens in zip(alone, ours, strict=True):
            assert torch.equal(
                tokens[P:], blocks_of(fast, row, None, dual, **how)[0, row.shape[1] :]
            )


class Unmasked(FastModel):
    """Without torch's attention, which alone a mask can reach."""

    def forward(self, input_ids, past_key_values=None, use_cache=False, replace_position=None):
        zero = input_ids.new_zeros(*input_ids.shape, VOCAB).double()
        return types.SimpleNamespace(logits=zero, past_key_values=[])


@wrong(
    [
        (lambda: llada.cached_denoiser(lambda x: x), TypeError,
         "model must take past_key_values, replace_position, use_cache, as LLaDAMo"),
        (lambda: dream.cached_denoiser(3), TypeError, "model must be callable, got int"),
        (lambda: llada.cached_denoiser(compiled(FastModel(Attention()))),
         "model must not be compiled to keep keys"),
        (lambda: llada.generate_fast_dllm(
            Unmasked(Attention()), prompts(1, P), window="block", steps=4,
            attention_mask=torch.ones(1, P), **SIZES), "attention_mask needs a model with torch's"),
        (lambda: blocks_of(FastDream(Attention()), prompts(1, P), block_length=3),
         "block_length must divide the 8 tokens to generate, got 3"),
        (lambda: blocks_of(FastDream(Attention()), prompts(1, P), steps=5),
         "steps must be a multiple of the number of blocks, 2, got 5"),
        (lambda: blocks_of(FastDream(Attention()), prompts(1, P), steps=2),
         "steps must be at least 2 per block with lead=True, got 2"),
        (lambda: llada.generate_fast_dllm(
            FastModel(Attention()), prompts(1, P), window="causal", steps=4, **SIZES),
         "window='causal' needs a model with a cache for it"),
    ]
)  # fmt: skip
def test_what_does_not_work_is_named(wrong: Wrong):
    with wrong.raises():
        wrong.what()
