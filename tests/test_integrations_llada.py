"""LLaDA's drop-in, on fakes with the signatures of the repository, beside the sampler."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead, TensorHead
from di4c_fast.integrations import llada
from di4c_fast.models.linear_output import output_layer
from di4c_fast.samplers import sample_confidence

VOCAB, MASK, WIDTH, LENGTH = 60, 59, 12, 32


class FakeLLaDA(nn.Module):
    """A mask predictor with LLaDA's call and output layer, in float64."""

    def __init__(self, seed: int = 0, vocabulary: int = VOCAB, bias: bool = False, width=WIDTH):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.wte = nn.Embedding(vocabulary, width)
            self.wpe = nn.Embedding(LENGTH, width)
            self.ff_out = nn.Linear(width, vocabulary, bias=bias)
        self.double()
        self.config = types.SimpleNamespace(scale_logits=False, d_model=width)
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def get_output_embeddings(self) -> nn.Module:
        return self.ff_out

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None):
        self.calls.append((input_ids, attention_mask))
        h = self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]]
        weight = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weight = weight.unsqueeze(-1).double()
        h = torch.tanh(h + h.roll(1, 1) + (h * weight).sum(1, keepdim=True) / weight.sum(1, True))
        logits = self.ff_out(3.0 * h)
        if self.config.scale_logits:
            logits.mul_(1 / self.config.d_model**0.5)
        return types.SimpleNamespace(logits=logits)


def expected_tokens(model, prompt, attention_mask=None, *, gen_length, mask_id=MASK, **how):
    """By the sampler, which is held by a loop of its own, from all logits of the model."""

    def dense(tokens: Tensor, t: Tensor, **context: Tensor) -> Tensor:
        return model(tokens, **context).logits

    context = {}
    if attention_mask is not None:
        ones = attention_mask.new_ones(len(prompt), gen_length)
        context["attention_mask"] = torch.cat([attention_mask, ones], 1)
    size = (len(prompt), prompt.shape[1] + gen_length)
    given = {"mask_id": mask_id, "exclude_mask": False, "prompt": prompt, "context": context}
    return sample_confidence(dense, size, **given, **how)


def prompt_of(batch: int = 2, length: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(MASK, (batch, length), generator=generator)


def test_the_signatures_are_those_of_the_repositories():
    def arguments(function):
        return [
            (name, None if p.default is p.empty else p.default)
            for name, p in inspect.signature(function).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]

    shared = [("steps", 128), ("gen_length", 128), ("block_length", 128), ("temperature", 0.0)]
    assert arguments(llada.generate) == [
        ("model", None), ("prompt", None), ("attention_mask", None), *shared, ("cfg_scale", 0.0),
        ("remasking", "low_confidence"), ("mask_id", 126336), ("logits_eos_inf", False),
        ("confidence_eos_eot_inf", False),
    ]  # fmt: skip
    assert arguments(llada.generate_fast_dllm) == [
        ("model", None), ("prompt", None), *shared, ("remasking", "low_confidence"),
        ("mask_id", 126336), ("threshold", None), ("factor", None),
    ]  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize("sizes", [(8, 16, 16), (6, 12, 4), (16, 16, 8)])
def test_tokens_at_temperature_0_are_those_of_the_sampler_on_all_logits(sizes, cfg, bias):
    model, prompt = FakeLLaDA(1, bias=bias), prompt_of()
    attention = torch.ones_like(prompt)
    attention[1, :2] = 0
    names = dict(zip(("steps", "gen_length", "block_length"), sizes, strict=True))
    ours = llada.generate(model, prompt, attention, cfg_scale=cfg, mask_id=MASK, **names)
    expected = expected_tokens(model, prompt, attention, guidance_scale=cfg, **names)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("how", [{"threshold": h} for h in (0.02, 0.3, 0.9)] + [{"factor": 50.0}])
def test_thresholds_and_factors_give_the_tokens_of_the_sampler_and_count_the_calls(how):
    model, prompt = FakeLLaDA(2), prompt_of(1)
    sizes = {"gen_length": 16, "block_length": 8}
    ours, calls = llada.generate_fast_dllm(model, prompt, steps=4, mask_id=MASK, **how, **sizes)
    assert calls == len(model.calls)
    assert calls == 2 or "threshold" in how
    assert torch.equal(ours, expected_tokens(model, prompt, steps=None, **how, **sizes))


def test_end_tokens_are_banned_or_deferred_by_the_repositorys_ids():
    model = FakeLLaDA(3, vocabulary=126400, width=3)
    with torch.no_grad():
        # Ends that would win often.
        model.ff_out.weight[[llada.EOS_ID, llada.EOT_ID]] *= 4
    prompt = prompt_of()
    sizes = {"steps": 4, "gen_length": 8, "block_length": 8}
    mask = llada.MASK_ID
    plain = llada.generate(model, prompt, **sizes)
    assert bool(torch.isin(plain, torch.tensor([llada.EOS_ID, llada.EOT_ID])).any())
    banned = llada.generate(model, prompt, logits_eos_inf=True, **sizes)
    expected = expected_tokens(model, prompt, banned_ids=(llada.EOS_ID,), mask_id=mask, **sizes)
    assert torch.equal(banned, expected)
    deferred = llada.generate(model, prompt, confidence_eos_eot_inf=True, **sizes)
    ends = (llada.EOS_ID, llada.EOT_ID)
    expected = expected_tokens(model, prompt, deferred_ids=ends, mask_id=mask, **sizes)
    assert torch.equal(deferred, expected)


def test_the_output_layer_works_on_active_rows_alone():
    model, rows = FakeLLaDA(4), []
    model.ff_out.register_forward_hook(lambda m, inputs, output: rows.append(output.numel()))
    llada.generate(model, prompt_of(), steps=4, gen_length=8, block_length=4, mask_id=MASK)
    assert rows == [0] * 4
    assert len(model.ff_out._forward_pre_hooks) == 0


def test_the_denoiser_returns_the_linear_head_of_the_model():
    tokens = prompt_of()
    t = torch.ones(2)
    for bias, scaled in ((False, False), (True, False), (True, True)):
        model = FakeLLaDA(5, bias=bias)
        model.config.scale_logits = scaled
        head = llada.denoiser(model)(tokens, t)
        assert type(head) is LinearHead
        assert head.weight is model.ff_out.weight
        assert_close(head.logits(), model(tokens).logits)


def test_a_model_without_a_plain_output_layer_gives_its_logits():
    tokens, t = prompt_of(), torch.ones(2)

    class Adapted(nn.Linear):
        pass

    odd = FakeLLaDA(6)
    odd.ff_out = Adapted(WIDTH, VOCAB, bias=False).double()
    tied = FakeLLaDA(6)
    tied.get_output_embeddings = lambda: tied.unused
    tied.unused = nn.Linear(WIDTH, VOCAB).double()
    for model in (odd, tied, lambda x, **k: FakeLLaDA(6)(x)):
        head = llada.denoiser(model)(tokens, t)
        assert type(head) is TensorHead
        assert torch.equal(head.logits(), model(tokens).logits)
    assert output_layer(odd) is None
    assert output_layer(None) is None


def test_a_failing_model_keeps_no_hook():
    model = FakeLLaDA(7)
    with pytest.raises(IndexError):
        llada.denoiser(model)(torch.full((1, 4), VOCAB + 3), torch.ones(1))
    assert len(model.ff_out._forward_pre_hooks) == 0


def test_random_remasking_and_temperatures_are_a_function_of_the_seed():
    sizes = {"steps": 4, "gen_length": 8, "block_length": 8, "mask_id": MASK}
    options = {"temperature": 1.0, "remasking": "random", "exclude_mask": True, **sizes}
    first, again, other = (
        llada.generate(FakeLLaDA(8), prompt_of(), seed=seed, **options) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool((first != MASK).all())


def llada_module():
    def generate(
        model, prompt, attention_mask=None, steps=128, gen_length=128, block_length=128,
        temperature=0., cfg_scale=0., remasking='low_confidence', mask_id=126336,
        logits_eos_inf=False, confidence_eos_eot_inf=False,
    ):  # fmt: skip
        return "llada"

    return types.SimpleNamespace(generate=generate)


def fast_dllm_module():
    def generate(
        model, prompt, steps=128, gen_length=128, block_length=128, temperature=0.,
        remasking='low_confidence', mask_id=126336, threshold=None,
    ):  # fmt: skip
        return "fast"

    return types.SimpleNamespace(generate=generate)


def test_accelerate_replaces_generate():
    sizes = {"steps": 4, "gen_length": 8, "block_length": 8, "mask_id": MASK}
    model, prompt = FakeLLaDA(9), prompt_of(1)
    expected = expected_tokens(model, prompt, steps=4, gen_length=8, block_length=8)
    module = llada_module()
    with llada.accelerate(module, exclude_mask=True):
        assert torch.equal(module.generate(model, prompt, **sizes), expected)
    module = fast_dllm_module()
    with llada.accelerate(module):
        tokens, calls = module.generate(model, prompt, **sizes)
    assert torch.equal(tokens, expected)
    assert calls == 4


@wrong(
    [
        (types.SimpleNamespace(), TypeError, "module must have a function generate"),
        (
            types.SimpleNamespace(generate=lambda a, b: a),
            TypeError,
            "module.generate must have the arguments of LLaDA's or of Fast-dLLM's, got a, b",
        ),
    ]
)
def test_modules_of_others_are_refused(wrong: Wrong):
    with wrong.raises():
        llada.accelerate(wrong.what)


@wrong(
    [
        ({"gen_length": 9}, "gen_length must be a multiple of block_length, 4, got 9"),
        ({"steps": 5}, "steps must be a multiple of the number of blocks, 2, got 5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"gen_length": 0}, "gen_length must be at least 1, got 0"),
        ({"block_length": 1.0}, TypeError, "block_length must be an int"),
        ({"remasking": "entropy"}, "remasking must be one of 'low_confidence', 'ran"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"cfg_scale": -1.0}, "guidance_scale must be finite and at least 0"),
        ({"prompt": torch.zeros(3).long()}, "prompt must have 2 dimensions"),
        ({"prompt": torch.zeros(1, 3)}, TypeError, "prompt must have dtype torch.int64"),
        ({"attention_mask": [1]}, TypeError, "attention_mask must be a Tensor"),
        (
            {"attention_mask": torch.ones(2, 3)},
            "attention_mask must have shape (B, P) = (2, 6), got (2, 3)",
        ),
        ({"nonsense": 1}, TypeError, "nonsense"),
        ({"model": None}, TypeError, "model must be callable, got NoneType None"),
    ]
)
def test_what_is_wrong_is_named(wrong: Wrong):
    arguments = {
        "model": FakeLLaDA(0), "prompt": prompt_of(), "mask_id": MASK,
        "steps": 4, "gen_length": 8, "block_length": 4, **wrong.what,
    }  # fmt: skip
    with wrong.raises():
        llada.generate(**arguments)
