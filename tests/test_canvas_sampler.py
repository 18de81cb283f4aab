"""The canvas sampler: when sequences end, which rows are asked, its law beside transformers."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from sampler_cases import Denoiser, Tabular, assert_same_law
from torch import Tensor

from di4c_fast.samplers import sample_canvas
from di4c_fast.testing import assert_draws_match
from tools.own_head import OwnHead

SIZE = (3, 4)  # positions, classes
sample = functools.partial(sample_canvas, vocab_size=SIZE[1])


def sure_of(sequences: Tensor, asked: list[int]):
    """Flat logits, but for the sequences with a label, which want their label from the start."""

    def model(tokens, t, label):
        asked.append(len(tokens))
        sure = 100.0 * torch.nn.functional.one_hot(label, SIZE[1]).double()
        return torch.where(label > 0, 1.0, 0.0)[:, None, None] * sure[:, None].expand(
            *tokens.shape, -1
        )

    return functools.partial(sample, model, (len(sequences), 5), context={"label": sequences})


@pytest.mark.parametrize("stable_steps", [0, 1, 2])
@pytest.mark.parametrize("active_only", [True, False])
def test_sequences_end_where_the_argmax_stands_still(stable_steps, active_only):
    asked: list[int] = []
    labels, history = torch.tensor([1, 0, 3]), []
    run = sure_of(labels, asked)
    how = {"steps": 5, "stable_steps": stable_steps, "active_only": active_only, "seed": 0}
    tokens = run(**how, history=history)
    assert asked == [3] * (stable_steps + 1) + [1 if active_only else 3] * (4 - stable_steps)
    expected = labels.unsqueeze(1).expand(3, 5)  # the argmax of flat logits is 0
    assert tokens.equal(expected)
    # The flat one is random until the last step.
    assert [bool((state[1] == 0).all()) for state in history] == [False] * 5 + [True]
    for state in history[1:]:
        assert state[[0, 2]].equal(expected[[0, 2]])
    asked.clear()
    sure_of(torch.tensor([1, 2]), asked)(**how, mean_entropy=0.01)
    assert asked == [2] * (stable_steps + 1)
    asked.clear()
    sure_of(torch.tensor([1, 2]), asked)(**how, mean_entropy=None)
    assert asked == [2] * 5


def test_the_start_and_new_tokens_are_uniform():
    history: list[Tensor] = []
    flat = lambda tokens, t: torch.zeros(*tokens.shape, SIZE[1])  # noqa: E731
    sample(flat, (5000, 3), steps=2, entropy_bound=0.0, seed=5, history=history)
    for state in history[:2]:
        assert_draws_match(state, torch.ones(SIZE[1]))


def test_prompts_never_go_through_the_head_and_its_rows_are_asked_in_groups():
    model, prompt = Denoiser(), torch.tensor([[1, 4], [0, 0]])
    how = {"vocab_size": 11, "steps": 3, "mean_entropy": None, "seed": 0}
    sample(model, (2, 6), prompt=prompt, **how)
    assert [rows.tolist() for rows in model.rows] == [[2, 3, 4, 5, 8, 9, 10, 11]] * 3
    head = OwnHead(torch.randn(2, 80, 11))
    head.budget_bytes = 1
    sample(lambda tokens, t: head, (2, 80), **how)
    assert max(head.computed) == 64  # of 160


@pytest.mark.parametrize("ends", [None, 0.9])
def test_rows_have_the_joint_law_of_the_steps_of_transformers(ends):
    generation = pytest.importorskip(
        "transformers.models.diffusion_gemma.generation_diffusion_gemma"
    )
    steps, bound, batch, model = 4, 0.6, 20_000, Tabular(5, size=SIZE)
    sampler = generation.EntropyBoundSampler(SimpleNamespace(entropy_bound=bound), *SIZE, steps)
    heat = generation.LinearTemperatureScheduleLogitsProcessor(0.3, 1.2, steps)
    stop = ends and generation.StableAndConfidentStoppingCriteria(1, ends)
    embedding = SimpleNamespace(weight=torch.zeros(1, dtype=torch.float64))
    network = SimpleNamespace(
        config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=SIZE[1])),
        model=SimpleNamespace(decoder=SimpleNamespace(embed_tokens=embedding)),
    )
    step = generation.DiffusionGemmaGenerationMixin._denoising_step
    torch.manual_seed(0)
    canvas = argmax = sampler.initialize_canvas(batch, torch.device("cpu"))
    logits, ended = None, torch.zeros(batch, dtype=torch.bool)
    for left in range(steps, 0, -1):
        time = torch.tensor(left / steps)

        def forward(decoder_input_ids, time=time, **_):
            return SimpleNamespace(logits=model(decoder_input_ids, time))

        canvas, argmax, logits, ended = step(
            network, forward, canvas, argmax, None, None, logits, None, None, ended, left,
            sampler, heat, stop,
        )  # fmt: skip
    how = {"steps": steps, "entropy_bound": bound, "mean_entropy": ends}
    heats = {"first_temperature": 1.2, "last_temperature": 0.3}
    ours = sample(model, (10_000, SIZE[0]), seed=1, **how, **heats)
    assert bool(ended.any()) == (ends is not None)
    assert_same_law(ours, argmax, SIZE[1])
