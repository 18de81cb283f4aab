"""DiffusionGemma: the drop-in beside transformers' own step, on a tiny model of random weights."""

from __future__ import annotations

import functools

import pytest
import torch

from di4c_fast import LinearHead, rng, sample
from di4c_fast.integrations import diffusion_gemma
from di4c_fast.samplers import sample_canvas
from di4c_fast.samplers.canvas import accepted
from di4c_fast.samplers.loop import RULE, START

gemma = pytest.importorskip("transformers.models.diffusion_gemma")
generation = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
VOCABULARY = 64


@functools.cache
def model():
    vision = {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    vision |= {"head_dim": 16, "position_embedding_size": 16}
    text = gemma.DiffusionGemmaTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        max_position_embeddings=128,
        sliding_window=16,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    config = gemma.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=8)
    made = gemma.DiffusionGemmaForBlockDiffusion(config).eval()
    made.lm_head.weight.data.mul_(20.0)  # some positions are sure of their token
    return made


def generate(**options):
    gemma_model = model()
    torch.manual_seed(1)  # of the random canvases
    prompt = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 24, "max_denoising_steps": 9, **options}
    return gemma_model.generate(prompt, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler_config": generation.EntropyBoundSamplerConfig(entropy_bound=6.0)},
        {"stability_threshold": 0, "confidence_threshold": 1.5},
        {"stability_threshold": 2, "confidence_threshold": 3.0, "t_min": 0.1, "t_max": 0.4},
    ],
)
def test_sequences_are_those_of_transformers_where_the_random_numbers_are(options, monkeypatch):
    def multinomial(probs, num_samples):
        assert num_samples == 1
        return sample(probs.log(), seed=7).token.unsqueeze(-1)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        expected = generate(**options)
    monkeypatch.setattr(diffusion_gemma, "sample", functools.partial(sample, seed=7))
    with diffusion_gemma.accelerate(model()):
        found = generate(**options)
    assert found.sequences.equal(expected.sequences)
    assert found.tokens_per_forward.equal(expected.tokens_per_forward)
    assert len(found.sequences.unique()) > 8


def test_runs_repeat_with_the_default_generator_and_the_handle_undoes_it():
    before = model()._denoising_step
    with diffusion_gemma.accelerate(model()):
        first, second = generate().sequences, generate().sequences
    assert first.equal(second)
    assert model()._denoising_step == before


def test_another_sampler_and_other_criteria_are_asked_as_before(monkeypatch):
    asked = []

    class Sampler(generation.EntropyBoundSampler):
        def accept_canvas(self, *arguments):
            asked.append("sampler")
            return super().accept_canvas(*arguments)

    class Criteria(generation.StableAndConfidentStoppingCriteria):
        def __call__(self, argmax_canvas, logits, **kwargs):
            asked.append(tuple(logits.shape))
            return super().__call__(argmax_canvas, logits)

    monkeypatch.setattr(generation, "EntropyBoundSampler", Sampler)
    monkeypatch.setattr(generation, "StableAndConfidentStoppingCriteria", Criteria)
    with diffusion_gemma.accelerate(model()):
        generate(max_new_tokens=8)
    assert asked[:2] == ["sampler", (3, 8, VOCABULARY)]


def test_entropy_bound_accepts_what_transformers_accepts():
    logits = 4 * torch.randn(5, 11, 40, generator=torch.Generator().manual_seed(3))
    entropy = sample(logits, seed=0, want=("entropy",)).entropy
    for bound in (0.01, 0.5, 3.0, 1e9):
        config = generation.EntropyBoundSamplerConfig(entropy_bound=bound)
        theirs = generation.EntropyBoundSampler(config, 11, 40, 1)
        canvas = torch.zeros(5, 11, dtype=torch.int64)
        theirs.accept_canvas(canvas, canvas, logits, 1)
        assert accepted(entropy, bound).equal(theirs.accepted_token_mask)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="without _denoising_step, _prepare_sampler"):
        diffusion_gemma.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', .* got 'fast'"):
        diffusion_gemma.accelerate(model(), backend="fast")


class Captured(Exception):
    """The arguments of the first denoising step."""


@pytest.mark.parametrize(("stable", "mean_entropy", "count"), [(1, 2.6, 9), (0, 1.0, 3)])
def test_the_canvas_sampler_gives_the_canvas_of_transformers_through_a_capped_head(
    stable, mean_entropy, count, monkeypatch
):
    made, how = model(), {"max_new_tokens": 8, "max_denoising_steps": 9, "t_min": 0.1, "t_max": 0.4}
    how |= {"stability_threshold": stable, "confidence_threshold": mean_entropy}
    how |= {"sampler_config": generation.EntropyBoundSamplerConfig(entropy_bound=4.0)}
    keys, drawn = torch.arange(3 * 8), []

    def uniform(low, high, size, device):
        number = START if not drawn else RULE + len(drawn) - 1
        u = rng.uniform(7, number, keys, 1, dtype=torch.float64)
        return (u * high).long().view(size)

    def multinomial(probs, num_samples):
        drawn.append(sample(probs.log(), seed=7, step=len(drawn)).token)
        return drawn[-1].unsqueeze(-1)

    def step(**arguments):
        raise Captured(arguments)

    prompt = torch.randint(3, 60, (3, 5), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(made, "_finalize_canvas", lambda input_ids, finished_sequences, **_: (
        input_ids, finished_sequences))  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        patch.setattr(torch, "randint", uniform)
        expected = made.generate(prompt, **how).sequences[:, 5:]
    monkeypatch.setattr(made, "_denoising_step", step)
    with pytest.raises(Captured) as caught:
        made.generate(prompt, **how)
    (given,) = caught.value.args
    before, calls = [None], []

    def denoiser(tokens, t):
        hidden = []
        with made.lm_head.register_forward_pre_hook(lambda _, inputs: hidden.extend(inputs)):
            logits = given["decoder_forward"](
                decoder_input_ids=tokens,
                self_conditioning_logits=before[0],
                decoder_attention_mask=given["mask_mapping"],
                cache=given["cache"],
                decoder_position_ids=given["decoder_position_ids"],
            ).logits
        before[0] = logits / (0.1 + 0.3 * float(t[0]))
        calls.append(len(tokens))
        return LinearHead(hidden[0], made.lm_head.weight, softcap=made.final_logit_softcapping)

    tokens = sample_canvas(
        denoiser, (3, 8), vocab_size=VOCABULARY, steps=9, entropy_bound=4.0, first_temperature=0.4,
        last_temperature=0.1, stable_steps=stable, mean_entropy=mean_entropy, active_only=False,
        seed=7,
    )  # fmt: skip
    assert tokens.equal(expected)
    assert len(calls) == len(drawn) == count
