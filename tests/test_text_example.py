"""The text example: its text, its models and its blocks."""

from __future__ import annotations

import collections
import dataclasses
import math

import pytest
import torch
from example_support import TEXT as TINY

pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")
pytest.importorskip("tqdm")

from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig, distill_step
from examples.common.model import start_from
from examples.text import data
from examples.text.blocks import BlockModel, cut
from examples.text.config import Config
from examples.text.likelihood import nats
from examples.text.model import TextDenoiser, rotary_angles, rotate


@pytest.fixture(scope="module")
def text() -> data.Text:
    return data.load()


# --- the text


def test_no_passage_of_the_held_out_text_stands_in_the_training_text(text):
    def passages(topics):
        strings = [text.decode(topic.tolist()) for topic in topics]
        return {string[i : i + 60] for string in strings for i in range(len(string) - 59)}

    train_passages, held_out = passages(text.train), passages(text.held_out)
    assert len(held_out) > 10_000
    # Single sentences are repeated between sections; whole passages are not.
    assert len(held_out & train_passages) < 0.02 * len(held_out)
    share = sum(map(len, text.held_out)) / sum(map(len, text.train + text.held_out))
    assert 0.1 < share < 0.25


def test_the_alphabet_is_what_occurs_and_decodes_back(text):
    used = torch.cat(text.train + text.held_out).unique()
    assert used.tolist() == list(range(len(text.alphabet)))
    assert list(text.alphabet) == sorted(set(text.alphabet))
    assert {"e", " ", "T", "("} <= set(text.alphabet)
    whole = text.decode(torch.cat(text.train).tolist())
    assert " the " in whole
    assert "  " not in whole
    assert "----" not in whole
    assert text.decode([len(text.alphabet)]) == "_"
    assert data.load().fingerprint == text.fingerprint


def test_topics_inside_longer_topics_are_left_out():
    long = " ".join(f"sentence number {i} of the long topic." for i in range(20))
    topics = {
        "inside": long[100:300],
        "long": long,
        "other": "An  entirely\n\ndifferent   topic\n==========\nwith a rule " + "x" * 90,
    }
    kept = data.clean(topics)
    assert list(kept) == ["long", "other"]
    assert kept["other"].startswith("An entirely different topic with a rule xx")


def test_topics_are_split_whole_and_the_same_way_each_time():
    topics = {f"topic {i}": "a" * (100 + i) for i in range(40)}
    train_names, held_out = data.split(topics)
    assert sorted(train_names + held_out) == sorted(topics)
    size = sum(len(topics[name]) for name in held_out)
    total = sum(map(len, topics.values()))
    assert 0.15 * total <= size < 0.15 * total + 140
    assert data.split(dict(reversed(topics.items())))[1] == held_out


def test_windows_come_from_one_topic_each_and_from_every_place_equally_often():
    topics = (torch.arange(6), torch.arange(100, 103), torch.arange(200, 206))
    drawn = data.draw_windows(topics, 8000, 4, torch.Generator().manual_seed(0))
    assert drawn.shape == (8000, 4)
    assert (drawn.diff(dim=1) == 1).all()
    # Six windows have four tokens: three in each of the long topics, none in the short one.
    counts = collections.Counter(drawn[:, 0].tolist())
    assert set(counts) == {0, 1, 2, 200, 201, 202}
    # Five standard deviations of a binomial count.
    assert all(abs(count - 8000 / 6) < 5 * math.sqrt(8000 * 5 / 36) for count in counts.values())
    side_by_side = data.consecutive_windows(topics, 3)
    assert side_by_side[:, 0].tolist() == [0, 3, 100, 200, 203]


# --- the models


def test_places_enter_through_their_differences_only():
    torch.manual_seed(0)
    angles = rotary_angles(12, 8)
    assert angles.shape == (2, 12, 4)
    q, k = torch.randn(2, 1, 8)
    # fp32: eight products of size 1, angles of up to 12 radians, so some ten roundings of 1e-7 to
    # 1e-6. Scores of the other offsets differ by 0.5.
    scores = rotate(q.expand(12, 8), angles) @ rotate(k.expand(12, 8), angles).T
    for offset in (-7, 0, 3):
        diagonal = scores.diagonal(offset)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5)
    assert scores.diagonal(0)[0] != pytest.approx(scores.diagonal(3)[0].item(), abs=1e-3)

    # So a window of masks, the same everywhere, gets the same prediction everywhere.
    model = TextDenoiser(5, Config(length=16, width=16, layers=2))
    with torch.no_grad():
        model.head.weight.normal_()
        logits = model(torch.full((1, 16), 5), torch.ones(1))[0].unflatten(0, (8, 2))
    # The same roundings through two layers and a head of 16 products.
    assert torch.allclose(logits, logits[:1].expand_as(logits), atol=1e-4)


def test_a_character_is_read_and_predicted_at_its_own_place():
    torch.manual_seed(0)
    config = Config(length=16, width=8, layers=1)
    model = TextDenoiser(4, config)
    with torch.no_grad():  # without attention a patch sees itself only
        model.blocks[0].attention_out.weight.zero_()
    blank = torch.full((1, 16), 4)
    changed = blank.clone()
    changed[0, 7] = 1
    t = torch.ones(1)
    moved = (model(blank, t) != model(changed, t)).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [6, 7]
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(2).repeat_interleave(5).float())
    assert model(blank, t)[0, :, 0].tolist() == [0.0, 1.0] * 8


def test_the_student_is_the_teacher_apart_from_its_latent():
    torch.manual_seed(0)
    teacher = TextDenoiser(6, TINY)
    student = start_from(teacher, TextDenoiser(6, TINY, TINY.latent_dim))
    assert TINY.latent_dim == 4
    tokens, t = torch.randint(7, (5, TINY.length)), torch.ones(5)
    latent = torch.rand(5, TINY.latent_dim)
    with torch.no_grad():
        different = student(tokens, t, latent)
        assert student.latent is not None
        for parameter in student.latent.parameters():
            parameter.zero_()
        same, expected = student(tokens, t, latent), teacher(tokens, t)
    assert torch.equal(same, expected)
    assert not torch.allclose(different, expected)
    with pytest.raises(ValueError, match="needs latents"):
        student(tokens, t)
    with pytest.raises(ValueError, match="takes no latents"):
        teacher(tokens, t, latent)


def test_a_number_of_the_latent_belongs_to_its_stretch_and_means_the_same_in_each():
    torch.manual_seed(0)
    model = TextDenoiser(4, TINY, TINY.latent_dim)
    with torch.no_grad():  # without attention a patch sees itself only
        model.blocks[0].attention_out.weight.zero_()
    masks, t = torch.full((1, 16), 4), torch.ones(1)
    latent = torch.tensor([[0.1, 0.9, 0.5, 0.1]])
    changed = torch.tensor([[0.1, 0.2, 0.5, 0.1]])
    logits = model(masks, t, latent)
    moved = (logits != model(masks, t, changed)).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [4, 5, 6, 7]
    # Equal rows of one matrix product may differ in their last bit: vectors of 8 numbers of size 1.
    torch.testing.assert_close(logits[:, :4], logits[:, 12:], rtol=0, atol=1e-5)


def test_blocks_of_a_row_reach_the_model_as_rows_and_come_back_in_place():
    rows, blocks, count, length, shift = 2, 2, 3, 8, 3
    x0 = torch.arange(rows * length).view(rows, length)
    seen = []

    def model(tokens, t, latent):
        seen.append((tokens, t, latent))
        return tokens.unsqueeze(-1) + 100 * torch.arange(2)

    parts = cut(x0, blocks, shift)
    assert parts.tolist() == [[3, 4, 5, 6], [7, 0, 1, 2], [11, 12, 13, 14], [15, 8, 9, 10]]
    t = torch.tensor([0.2, 0.2, 0.7, 0.7])
    # Component n of block e has λ = 10 e + n; as distill_step does, the components are adjacent.
    latent = 10.0 * torch.arange(4).view(4, 1, 1) + torch.arange(3).view(1, 3, 1)
    logits = BlockModel(model, rows, blocks)(
        parts.repeat_interleave(count, dim=0),
        t.repeat_interleave(count),
        latent.flatten(0, 1),
        shift=torch.full((4 * count,), shift),
    )
    tokens, times, lam = seen[0]
    assert torch.equal(tokens, x0.repeat_interleave(count, dim=0))
    assert torch.equal(times, torch.tensor([0.2] * 3 + [0.7] * 3))
    assert lam.tolist() == [[0, 10], [1, 11], [2, 12], [20, 30], [21, 31], [22, 32]]
    assert torch.equal(logits[..., 0], parts.repeat_interleave(count, dim=0))
    assert torch.equal(logits[..., 1], logits[..., 0] + 100)


def test_the_loss_of_blocks_is_that_of_rows_when_a_row_is_one_block():
    torch.manual_seed(0)
    teacher = TextDenoiser(6, TINY)
    student = start_from(teacher, TextDenoiser(6, TINY, TINY.latent_dim))
    x0 = torch.randint(6, (3, TINY.length))
    recipe = DistillConfig(
        components=2, teacher_step=0.2, low_t=0.0, low_t_probability=0.0, latent_dim=4
    )

    def step(shift, wrap):
        return distill_step(
            BlockModel(student, 3, 1) if wrap else student,
            BlockModel(teacher, 3, 1) if wrap else teacher,
            x0,
            process=MaskedProcess(6),
            config=recipe,
            generator=torch.Generator().manual_seed(1),
            context={"shift": torch.full((3,), shift)} if wrap else None,
        )

    torch.testing.assert_close(step(0, True).loss, step(0, False).loss)
    assert step(5, True).loss != step(0, False).loss


def test_the_one_step_likelihood_tells_marginals_and_mixture_apart():
    config = dataclasses.replace(TINY, stretch=8)  # one λ per block of 8, two blocks
    mask_id, rows = 2, 3

    def student(tokens, t, latent):  # a block is all 0 or all 1, one half of λ each
        chosen = (latent >= 0.5).long().repeat_interleave(8, dim=1)
        return 30.0 * torch.nn.functional.one_hot(chosen, 3).float()

    def teacher(tokens, t):
        return torch.zeros(*tokens.shape, 3)

    x0 = torch.cat([torch.zeros(rows, 8), torch.ones(rows, 8)], dim=1).long()
    xt = x0.clone()
    xt[:, 2:14] = mask_id  # six hidden characters in each block
    models = {"teacher": teacher, "student": student}
    found = nats(config, models, x0, xt, torch.ones(rows), mask_id, torch.Generator())
    log2 = math.log(2.0)
    # Independent coins: 12 per row. The mixture: one coin for each of the two blocks.
    expected = [rows * 12 * log2, rows * 12 * log2, rows * 2 * log2, rows * 12]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
