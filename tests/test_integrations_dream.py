"""Dream's drop-in, on a fake with the methods of its model, beside the sampler."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead
from di4c_fast.integrations import dream
from di4c_fast.samplers import sample_confidence
from di4c_fast.testing import assert_frequency

VOCAB, MASK, WIDTH, LENGTH = 40, 39, 10, 32


@dataclasses.dataclass
class DreamModelOutput:
    sequences: Tensor = None
    history: list = None


@dataclasses.dataclass
class Config:
    max_length: int = 18
    steps: int = 6
    alg: str = "origin"
    alg_temp: float | None = None
    eps: float = 1e-3
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    mask_token_id: int = MASK
    output_history: bool = False
    return_dict_in_generate: bool = False


class FakeDream(nn.Module):
    """`diffusion_generate` and `_sample` as called there; float64; logits of the next position."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCAB, WIDTH)
            self.places = nn.Embedding(LENGTH, WIDTH)
            self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.double()
        self.conditions: list[tuple] = []
        self.own_loops = 0

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, position_ids=None, num_logits_to_keep=0):
        self.conditions.append((attention_mask, position_ids))
        h = self.embedding(input_ids)
        if isinstance(attention_mask, str):
            h = h + h.mean(1, keepdim=True) + self.places.weight[: input_ids.shape[1]]
        else:
            pairs = attention_mask[:, 0].double()
            h = h + pairs @ h / pairs.sum(-1, keepdim=True).clamp(min=1)
            h = h + self.places(position_ids)
        h = torch.tanh(h + h.roll(1, 1)) * 3.0
        return types.SimpleNamespace(logits=self.lm_head(h[:, -num_logits_to_keep:, :]))

    def diffusion_generate(self, inputs=None, generation_config=None, **kwargs):
        tokens_hook = kwargs.pop("generation_tokens_hook_func", lambda step, x, logits: x)
        logits_hook = kwargs.pop("generation_logits_hook_func", lambda step, x, logits: logits)
        return self._sample(
            inputs,
            attention_mask=kwargs.pop("attention_mask", None),
            generation_config=generation_config,
            generation_tokens_hook_func=tokens_hook,
            generation_logits_hook_func=logits_hook,
            **kwargs,
        )

    def _sample(
        self, input_ids, attention_mask, generation_config, generation_tokens_hook_func,
        generation_logits_hook_func, threshold=0.9,
    ):  # fmt: skip
        self.own_loops += 1
        return generation_tokens_hook_func(None, input_ids, None)


def expected_tokens(model, prompt, config, attention_mask=None, threshold=None):
    """By the sampler, which is held by a loop of its own, from all logits of the model."""

    def dense(tokens, t, attention_mask="full", tok_idx=None):
        return model(tokens, attention_mask, tok_idx).logits

    context = {}
    if attention_mask is not None:
        real = F.pad(attention_mask, (0, config.max_length - prompt.shape[1]), value=1) > 0
        context["attention_mask"] = real[:, None, None] & real[:, None, :, None]
        context["tok_idx"] = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)
    capped = threshold is not None
    return sample_confidence(
        dense, (len(prompt), config.max_length), mask_id=MASK, steps=config.steps, t_min=config.eps,
        rule="maskgit_plus" if capped else config.alg, schedule="even" if capped else "ancestral",
        threshold=threshold, top_k=config.top_k, top_p=config.top_p, temperature=0.0, shift=True,
        prompt=prompt, context=context,
    )  # fmt: skip


def prompt_of(batch: int = 2, length: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(MASK, (batch, length), generator=generator)


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"steps": 12}, {"steps": 17}, {"steps": 1}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.8},
     {"top_p": 1.0}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_at_temperature_0_are_those_of_the_sampler_on_all_logits(alg, changes, padded):
    model, prompt = FakeDream(1), prompt_of()
    config = Config(alg=alg, **changes)
    attention = torch.ones_like(prompt)
    if padded:
        attention[1, :2] = 0
    with dream.accelerate(model, exclude_mask=True):
        ours = model.diffusion_generate(prompt, config, attention_mask=attention)
    expected = expected_tokens(model, prompt, config, attention if padded else None)
    assert torch.equal(ours, expected)
    assert model.own_loops == 0


def test_the_history_holds_every_step_also_those_that_fill_nothing():
    model, prompt = FakeDream(2), prompt_of(1)
    config = Config(alg="entropy", steps=17, output_history=True, return_dict_in_generate=True)
    with dream.accelerate(model, exclude_mask=True):
        output = model.diffusion_generate(prompt, config)
    assert type(output) is DreamModelOutput
    left, counts, times = 12, [], torch.linspace(1, config.eps, 18)
    for step in range(17):
        left -= left if step == 16 else int(left * (1 - times[step + 1] / times[step]))
        counts.append(left)
    assert [int((state == MASK).sum()) for state in output.history] == counts
    assert len(set(counts)) < 17
    assert torch.equal(output.history[-1], expected_tokens(model, prompt, config))
    config.output_history = False
    with dream.accelerate(model):
        assert model.diffusion_generate(prompt, config).history is None


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.95])
@pytest.mark.parametrize("steps", [3, 6, 12])
def test_a_threshold_fills_no_more_than_the_steps_allow(threshold, steps):
    model, prompt = FakeDream(3), prompt_of(1)
    config = Config(
        alg="confidence_threshold", steps=steps, output_history=True, return_dict_in_generate=True
    )
    with dream.accelerate(model, exclude_mask=True):
        output = model.diffusion_generate(prompt, config, threshold=threshold)
    calls = len(model.conditions)
    assert torch.equal(output.sequences, expected_tokens(model, prompt, config, None, threshold))
    assert torch.equal(output.history[-1], output.sequences)
    left = [int((state == MASK).sum()) for state in output.history]
    assert len(left) == calls
    assert all(masked >= 12 - 12 // steps * (k + 1) for k, masked in enumerate(left))


def test_origin_fills_positions_at_random_and_computes_each_once():
    model = FakeDream(4)
    config = Config(max_length=8, steps=2, return_dict_in_generate=True, output_history=True)
    rows = []
    taken = LinearHead.take

    def spy(head, index):
        rows.append(index.numel())
        return taken(head, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearHead, "take", spy)
        with dream.accelerate(model, seed=1):
            output = model.diffusion_generate(prompt_of(2000, 4), config)
    assert bool((output.sequences != MASK).all())
    first = int((output.history[0][:, 4:] != MASK).sum())
    assert_frequency(first, 8000, (1 - 1e-3) / 2)
    assert max(rows) <= 8000 - min(first, 8000 - first)


def test_hooks_run_the_models_own_loop():
    model, prompt = FakeDream(5), prompt_of(1)
    seen = []

    def tokens_hook(step, x, logits):
        seen.append(step)
        return x

    with dream.accelerate(model):
        model.diffusion_generate(prompt, Config(), generation_tokens_hook_func=tokens_hook)
        assert (model.own_loops, seen) == (1, [None])
        model.diffusion_generate(
            prompt, Config(), generation_logits_hook_func=lambda step, x, logits: logits
        )
        assert model.own_loops == 2
        model.diffusion_generate(prompt, Config())
        assert model.own_loops == 2


def test_the_denoiser_returns_the_linear_head_of_the_model():
    model, tokens = FakeDream(8), prompt_of()
    head = dream.denoiser(model)(tokens, torch.ones(2))
    assert type(head) is LinearHead
    assert head.weight is model.lm_head.weight
    assert_close(head.logits(), model(tokens, "full").logits)
    assert model.conditions[0] == ("full", None)


def test_an_output_class_of_our_own_where_the_model_has_none():
    class Other:
        _sample = staticmethod(lambda *args, **kwargs: None)
        get_output_embeddings = None

        def __call__(self, tokens, attention_mask, tok_idx):
            return types.SimpleNamespace(logits=torch.zeros(*tokens.shape, VOCAB))

    model = Other()
    with dream.accelerate(model, exclude_mask=True):
        output = model._sample(prompt_of(), None, Config(return_dict_in_generate=True))
    assert type(output) is dream.DreamOutput
    assert bool((output.sequences[:, 6:] == 0).all())


@wrong(
    [
        ({"model": object()}, TypeError, "model must have Dream's method _sample"),
        ({"exclude_mask": 1}, TypeError, "exclude_mask must be True or False"),
        ({"confidence_dtype": "bf16"}, "confidence_dtype must be None or one of"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ]
)
def test_wrong_arguments_are_named(wrong: Wrong):
    config = Config(alg="entropy")
    with wrong.raises(), dream.accelerate(**{"model": (model := FakeDream()), **wrong.what}):
        model.diffusion_generate(prompt_of(), config)


@wrong(
    [
        ({"alg": "greedy"}, "alg must be one of 'origin', 'maskgit_plus'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"eps": 0.0}, "t_min must be in (0, 1), got 0.0"),
        ({"max_length": 5}, "prompt must have shape ... P <= D = 5, got (2, 6)"),
    ]
)
def test_wrong_configurations_are_named_when_generating(wrong: Wrong):
    model = FakeDream()
    with dream.accelerate(model), wrong.raises():
        model.diffusion_generate(prompt_of(), Config(**wrong.what))


def test_draws_are_a_function_of_the_seed():
    model = FakeDream(7)
    config = Config(alg="entropy", temperature=1.0, top_p=0.95, alg_temp=0.5)
    drawn = []
    for seed in (1, 1, 2):
        with dream.accelerate(model, seed=seed):
            drawn.append(model.diffusion_generate(prompt_of(), config))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
