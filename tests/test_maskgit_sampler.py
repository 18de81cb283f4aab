"""The MaskGIT sampler: the schedule to the letter, known answers, guidance, its law."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sampler_cases import MASK, Denoiser, Tabular, assert_same_law, constant, reveal_law
from torch import Tensor

from di4c_fast.processes.reveal import SCHEDULES, reveal_counts
from di4c_fast.samplers import sample_maskgit
from di4c_fast.testing import assert_counts_match, assert_draws_match

D, HIDDEN = 3, 3  # of `Tabular`, whose last token is the mask here
ALL_ROWS = list(itertools.product(range(4), repeat=D))


uniform_model = constant(torch.zeros(5))


def sample(model, shape, **more) -> Tensor:
    return sample_maskgit(model, shape, **{"mask_id": 4, "seed": 0, **more})


def states(model, shape, **more) -> list[Tensor]:
    """The tokens at the start and after every step."""
    history: list[Tensor] = []
    sample(model, shape, history=history, **more)
    return history


# Exactly the schedule


@pytest.mark.parametrize(("positions", "steps"), [(1, 1), (7, 3), (16, 1), (16, 8), (64, 12)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("resample", [False, True])
def test_every_step_reveals_exactly_the_schedule(positions, steps, schedule, resample):
    how = {"schedule": schedule, "resample": resample}
    history = states(uniform_model, (3, positions), steps=steps, **how)
    masked = torch.stack([(codes == 4).sum(-1) for codes in history])
    revealed = (masked[:-1] - masked[1:]).T.tolist()
    assert revealed == [reveal_counts(steps, positions, schedule)] * 3


def test_more_steps_than_positions_call_the_model_once_per_position():
    model = Denoiser()
    tokens = sample(model, (2, 3), mask_id=MASK, steps=9)
    assert len(model.inputs) == 3
    assert bool((tokens != MASK).all())


def test_rows_with_a_prompt_follow_the_schedule_of_their_unknown_positions():
    x = MASK
    prompt = torch.tensor([[0, x, 1, x, x, x], [0, 1, 2, 3, x, x], [0, 1, 2, 3, 0, 1]])
    model, history = Denoiser(), []
    sample(model, (3, 6), mask_id=x, steps=3, prompt=prompt, history=history)
    masked = torch.stack([(codes == x).sum(-1) for codes in history])
    expected = [reveal_counts(3, 4), reveal_counts(3, 2), [0, 0, 0]]
    assert (masked[:-1] - masked[1:]).T.tolist() == expected
    # The sequence without masks takes no part, the second only until it is full.
    assert [len(inputs) for inputs in model.inputs] == [2, 2, 1]


def test_the_head_computes_masked_rows_only():
    model = Denoiser()
    sample(model, (2, 14), mask_id=MASK, steps=4)
    left = 2 * (14 - torch.tensor([0, *itertools.accumulate(reveal_counts(4, 14))][:-1]))
    assert [rows.numel() for rows in model.rows] == left.tolist()
    for tokens, rows in zip(model.inputs, model.rows, strict=True):
        assert torch.equal(rows, (tokens.flatten() == MASK).nonzero()[:, 0])


def test_resampling_computes_every_row_and_changes_filled_positions():
    for resample in (True, False):
        model, history = Denoiser(), []
        sample(model, (4, 14), mask_id=MASK, steps=4, resample=resample, history=history)
        assert ([rows.numel() for rows in model.rows] == [56] * 4) == resample
        filled = (history[1] != MASK) & (history[2] != MASK)
        assert bool((history[1] != history[2])[filled].any()) == resample


def test_the_mask_token_is_drawn_only_on_request_and_then_counts_as_revealed():
    model, how = constant(torch.tensor([0.0, 0.0, math.log(2.0)])), {"mask_id": 2, "steps": 2}
    assert bool((sample(model, (4000, 2), **how) != 2).all())
    # Confidences without regard to the token.
    how |= {"schedule": [1, 1], "exclude_mask": False, "gumbel_temperature": 1e9}
    history = states(model, (4000, 2), **how)
    assert_draws_match(history[-1], torch.tensor([0.25, 0.25, 0.5]))
    # Half of the first draws are the mask, and stay: the second step leaves them alone.
    assert abs(int((history[1] == 2).all(-1).sum()) - 2000) < 200  # 6 standard deviations


def test_with_resampling_a_drawn_mask_is_masked_again():
    calls = []

    def model(tokens, t):
        calls.append(tokens)
        return torch.tensor([0.0, 0.0, 9.0 if len(calls) == 1 else -9.0]).expand(*tokens.shape, 3)

    how = {"mask_id": 2, "schedule": [3, 1], "exclude_mask": False, "resample": True}
    tokens = sample(model, (50, 4), steps=2, **how)
    # The mask is drawn with probability 0.9998 at the first step, and 6e-5 at the second.
    assert float((calls[1] == 2).float().mean()) > 0.95
    assert float((tokens == 2).float().mean()) < 0.05


def test_positions_that_drew_the_mask_compete_again():
    calls = []

    def model(tokens, t):
        calls.append(tokens)
        logits = torch.full((1, 4, 3), -9.0)
        if len(calls) == 1:  # the mask, most surely at the first two positions
            logits[..., 2] = torch.tensor([3.0, 2.0, 1.0, 0.0])
        else:  # token 0, the more surely the further behind
            logits[..., 0] = torch.tensor([-6.0, -5.0, -4.0, -3.0])
        return logits

    how = {"schedule": [2, 1, 1], "temperature": 0.0, "randomize": "none", "exclude_mask": False}
    history = states(model, (1, 4), mask_id=2, steps=3, resample=True, **how)
    assert [state[0].tolist() for state in history[1:]] == [[2] * 4, [2, 0, 0, 0], [0] * 4]


def test_a_model_without_a_column_for_the_mask_serves_without_exclusion():
    tokens = sample(uniform_model, (5, 6), mask_id=5, steps=3, exclude_mask=False, vocab_size=5)
    assert int(tokens.max()) < 5


# Known answers


def ranked_model(tokens: Tensor, t: Tensor) -> Tensor:
    """Position d prefers token d with a confidence that grows with d, but for the last."""
    positions = tokens.shape[1]
    logits = torch.zeros(*tokens.shape, positions + 1)
    for d in range(positions):
        logits[:, d, d] = 3.0 + d
    logits[:, -1] = logits[:, -1] / 10
    return logits


def test_without_noise_and_temperature_the_most_confident_argmax_comes_first():
    how = {"schedule": [1, 1, 1, 1], "temperature": 0.0, "gumbel_temperature": 0.0}
    history = states(ranked_model, (2, 4), steps=4, **how)
    expected = [[4, 4, 4, 4], [4, 4, 2, 4], [4, 1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3]]
    assert [codes[0].tolist() for codes in history] == expected
    assert [codes[1].tolist() for codes in history] == expected


def test_no_randomness_equals_a_gumbel_temperature_of_zero():
    arguments = {"steps": 4, "schedule": [1, 1, 1, 1], "seed": 1}
    none = sample(ranked_model, (300, 4), randomize="none", **arguments)
    zero = sample(ranked_model, (300, 4), gumbel_temperature=0.0, **arguments)
    assert torch.equal(none, zero)


def test_equal_confidences_reveal_the_lowest_positions_first():
    model = constant(torch.tensor([0.0, *[-torch.inf] * 4]))
    how = {"schedule": [2, 2, 1], "randomize": "none", "temperature": 0.0}
    history = states(model, (1, 5), steps=3, **how)
    assert history[1].tolist() == [[0, 0, 4, 4, 4]]
    assert history[2].tolist() == [[0, 0, 0, 0, 4]]


@pytest.mark.parametrize("randomize", ["random", "warm_up"])
def test_random_confidences_reveal_every_position_equally_often(randomize):
    how = {"schedule": [1, 1, 1, 1], "randomize": randomize, "seed": 5}
    history = states(ranked_model, (3000, 4), steps=4, **how)
    new = [((b != 4) & (a == 4)).sum(0) for a, b in itertools.pairwise(history)]
    assert_counts_match(new[0], torch.ones(4))
    assert_counts_match(new[1], torch.ones(4))
    if randomize == "random":
        assert_counts_match(new[3], torch.ones(4))
    else:  # the least confident position, if still there, comes last
        assert int(new[3][3]) > 0.45 * int(new[3].sum())


def test_the_noise_fades_out_and_never_turns_round():
    """At the last step of two, whose factor is 0, the confident position always wins."""
    history = states(ranked_model, (500, 4), steps=2, schedule=[1, 3], temperature=0.0, seed=5)
    assert len(torch.unique((history[1] != 4).long().argmax(-1))) == 4
    assert history[2].tolist() == [[0, 1, 2, 3]] * 500


@pytest.mark.parametrize("resample", [False, True])
def test_a_sequence_does_not_depend_on_the_prompts_of_others(resample):
    def model(tokens, t):
        scale = (1 + tokens.sum(-1)).view(-1, 1, 1) / 20
        return torch.linspace(0, 2, 5, dtype=torch.float64).expand(*tokens.shape, 5) * scale

    prompt = torch.full((3, 8), 4)
    prompt[0, :6] = 1
    prompt[2] = 2
    arguments = {"steps": 4, "seed": 3, "resample": resample}
    some = sample(model, (3, 8), prompt=prompt, **arguments)
    alone = sample(model, (1, 8), first_sequence=1, **arguments)
    assert torch.equal(some[1:2], alone)


def test_the_model_sees_falling_times():
    model = Denoiser()
    sample(model, (2, 14), mask_id=MASK, steps=4)
    assert [float(t[0]) for t in model.times] == [1.0, 0.75, 0.5, 0.25]


# Guidance


class LabelModel:
    """Logits by label alone; remembers its calls."""

    def __init__(self, tables: Tensor):
        self.tables, self.calls = tables, []

    def __call__(self, tokens, t, label):
        self.calls.append((tokens, t, label))
        return self.tables[label].unsqueeze(1).expand(-1, tokens.shape[1], -1)


@pytest.mark.parametrize(("schedule", "weights"), [("linear", [0, 1, 2]), ("constant", [2, 2, 2])])
def test_guided_logits_are_the_formula(schedule, weights):
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(2, 5, generator=generator)
    model = LabelModel(tables)
    label = torch.zeros(4000, dtype=torch.int64)
    how = {"context": {"label": label}, "unconditional": {"label": label + 1}, "guidance": 2.0}
    how |= {"guidance_schedule": schedule, "randomize": "random", "seed": 1}
    history = states(model, (4000, 3), steps=3, schedule=[1, 1, 1], **how)
    for step, w in enumerate(weights):
        logits = (1 + w) * tables[0] - w * tables[1]
        logits[4] = -math.inf
        new = history[step + 1][(history[step + 1] != 4) & (history[step] == 4)]
        assert_draws_match(new, logits.double().softmax(-1))
    # Weight 0 costs no unconditional half.
    assert [len(call[0]) for call in model.calls] == [4000 if w == 0 else 8000 for w in weights]


def test_one_step_is_the_first_step_without_guidance_unless_it_is_constant():
    tables = torch.tensor([[5.0, 0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0, 0.0]])
    label = torch.zeros(8, dtype=torch.int64)
    for schedule, token, rows in (("linear", 0, 8), ("constant", 1, 16)):
        model = LabelModel(tables)
        how = {"context": {"label": label}, "unconditional": {"label": label + 1}}
        how |= {"temperature": 0.0, "guidance": 3.0, "guidance_schedule": schedule}
        tokens = sample(model, (8, 4), steps=1, **how)
        assert bool((tokens == token).all())
        assert [len(call[0]) for call in model.calls] == [rows]


def test_both_halves_share_the_latent_and_the_tokens():
    seen = []

    def model(tokens, t, latent, label):
        seen.append((tokens, t, latent, label))
        return torch.zeros(*tokens.shape, 5)

    label = torch.arange(3)
    how = {"context": {"label": label}, "unconditional": {"label": label + 10}, "guidance": 1.0}
    sample(model, (3, 4), steps=2, latent_dim=2, guidance_schedule="constant", **how)
    for tokens, t, latent, labels in seen:
        assert torch.equal(tokens[:3], tokens[3:])
        assert torch.equal(latent[:3], latent[3:])
        assert labels.tolist() == [0, 1, 2, 10, 11, 12]
        assert t.shape == (6,)
    assert not torch.equal(seen[0][2], seen[1][2])


def test_another_model_gives_the_unconditional_logits_without_latent():
    calls = []

    def student(tokens, t, latent):
        return torch.tensor([2.0, 1.0, 0.0, 0.0]).expand(*tokens.shape, 4)

    def teacher(tokens, t, label):
        calls.append(label)
        return torch.tensor([2.0, 0.5, 0.0, 0.0]).expand(*tokens.shape, 4)

    how = {"guidance": 3.0, "guidance_schedule": "constant", "guidance_model": teacher}
    how |= {"unconditional": {"label": torch.arange(3)}, "temperature": 0.0, "latent_dim": 1}
    tokens = sample(student, (3, 2), mask_id=3, steps=2, **how)
    # (1 + 3)(2, 1) − 3(2, 0.5) = (2, 2.5): guidance turns the argmax round.
    assert bool((tokens == 1).all())
    assert [label.tolist() for label in calls] == [[0, 1, 2]] * 2


# The law


def exact_law(tables: Tensor, counts: list[int], gumbel_temperature: float) -> Tensor:
    """(STATES,) law of the final row; `tables` (components, STATES, D, V), one drawn per step."""
    law = {(HIDDEN,) * D: 1.0}
    for step, reveal in enumerate(counts):
        factor = gumbel_temperature * (1 - step / max(len(counts) - 1, 1))
        after: dict[tuple[int, ...], float] = {}
        for (row, chance), table in itertools.product(law.items(), tables):
            logits = table[ALL_ROWS.index(row)]
            for target, p in reveal_law(logits, row, HIDDEN, reveal, factor).items():
                after[target] = after.get(target, 0.0) + chance * p / len(tables)
        law = after
    return torch.tensor([law.get(row, 0.0) for row in ALL_ROWS], dtype=torch.float64)


@pytest.mark.parametrize(("schedule", "gumbel_temperature"), [([1, 2], 4.5), ([1, 1, 1], 1.0)])
@pytest.mark.parametrize("latent", [False, True])
def test_samples_have_the_exact_law_of_the_rule(schedule, gumbel_temperature, latent):
    """With λ, fresh at every step, that of the mixture of both components at every step."""
    model = Tabular(seed=1, latent=latent, timed=False)
    how = {
        "schedule": schedule,
        "gumbel_temperature": gumbel_temperature,
        "latent_dim": int(latent),
    }
    tokens = sample(model, (20_000, D), mask_id=HIDDEN, steps=len(schedule), seed=3, **how)
    law = exact_law(model.table[0], schedule, gumbel_temperature)
    assert_counts_match(model.counts_of(tokens), law)


def test_one_step_with_a_passed_latent_is_one_component():
    model = Tabular(seed=3, latent=True, timed=False)
    latent = torch.tensor([0.1, 0.9]).repeat_interleave(10_000).unsqueeze(1)
    how = {"mask_id": HIDDEN, "latent_dim": 1, "latent": latent, "seed": 4}
    tokens = sample(model, (20_000, D), steps=1, **how)
    for table, part in zip(model.table[0], tokens.split(10_000), strict=True):
        assert_counts_match(model.counts_of(part), exact_law(table.unsqueeze(0), [3], 4.5))


def naive_loop(model, label, other, batch, counts, guidance, generator) -> Tensor:
    """Full logits for both halves, a draw for every position, noise by −log(−log u)."""
    x = torch.full((batch, D), HIDDEN)
    n = len(counts)
    t = torch.ones(batch)
    for i, k in enumerate(counts):
        w = guidance * i / (n - 1)
        logits = (1 + w) * model(x, t, label=label) - w * model(x, t, label=other)
        logits[..., HIDDEN] = -math.inf
        p = logits.softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(batch, D)
        noise = -(-torch.rand(batch, D, generator=generator, dtype=torch.float64).log()).log()
        confidence = p.gather(-1, drawn.unsqueeze(-1))[..., 0].log() + 4.5 * noise * (
            1 - i / (n - 1)
        )
        confidence[x != HIDDEN] = -math.inf
        chosen = confidence.topk(k).indices
        x = x.scatter(1, chosen, drawn.gather(1, chosen))
    return x


def test_pair_marginals_with_guidance_are_those_of_the_naive_loop():
    model = Tabular(seed=5, labels=2, timed=False)
    batch, counts, w = 30_000, [1, 1, 1], 1.5
    label, other = torch.zeros(batch, dtype=torch.int64), torch.ones(batch, dtype=torch.int64)
    how = {"context": {"label": label}, "unconditional": {"label": other}, "guidance": w}
    ours = sample(model, (batch, D), mask_id=HIDDEN, steps=3, schedule=counts, seed=6, **how)
    theirs = naive_loop(model, label, other, batch, counts, w, torch.Generator().manual_seed(7))
    assert_same_law(ours, theirs, 4)
