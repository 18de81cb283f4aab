"""The systems of the digits example, each in what is its own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from example_support import DIGITS as TINY

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from di4c_fast.heads import LogisticHead, as_head
from examples.common import sampling
from examples.digits import data, train
from examples.digits.config import GaussianConfig, MaskGITConfig
from examples.digits.metrics import ClassJudge, Judge
from examples.digits.systems import system_of
from examples.digits.systems.maskgit import NO_LABEL


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load(3)


@pytest.mark.parametrize("system", TINY)
def test_samples_do_not_depend_on_the_chunks(system, monkeypatch):
    torch.manual_seed(0)
    one = system_of(TINY[system])
    # In float64: logits of other batch sizes differ in their last bits, which in float32 can turn
    # one draw in a million.
    student = one.student(one.teacher()).double().eval()
    whole = sampling.draw_samples(TINY[system], student, 1, 3, 4, one.draw).tokens
    assert whole.shape == (40, 64)
    assert int(whole.max()) < 3
    monkeypatch.setattr(sampling, "CHUNK", 7)
    parts = sampling.draw_samples(TINY[system], student, 1, 3, 4, one.draw).tokens
    assert torch.equal(whole, parts)


@pytest.fixture(params=TINY)
def trio(request):
    """A system, its teacher and its student."""
    torch.manual_seed(0)
    one = system_of(TINY[request.param])
    teacher = one.teacher()
    return one, teacher, one.student(teacher)


def _logits(one, model, x, *latent) -> torch.Tensor:
    """Of images without noise, all with the label 4 where there are labels."""
    labels = torch.full((len(x),), 4)
    names = one.context(labels, torch.Generator())
    context = dict.fromkeys(names, labels)
    with torch.no_grad():
        return as_head(model(x, torch.ones(len(x)), *latent, **context)).logits()


def test_the_student_is_the_teacher_apart_from_its_latent(trio):
    one, teacher, student = trio
    shared = dict(teacher.named_parameters())
    own = [name for name, _ in student.named_parameters() if name not in shared]
    assert own
    assert all(name.startswith("latent.") for name in own)
    x, latent = torch.randint(3, (2, 64)), torch.tensor([[0.1], [0.8]])
    different = _logits(one, student, x[:1].expand(2, -1), latent)
    assert not torch.allclose(different[0], different[1])
    for name in own:
        torch.nn.init.zeros_(student.get_parameter(name))
    assert torch.equal(_logits(one, student, x, latent), _logits(one, teacher, x))
    with pytest.raises(ValueError, match="needs latents"):
        _logits(one, student, x)
    with pytest.raises(ValueError, match="takes no latents"):
        _logits(one, teacher, x, latent)


def test_a_pixel_is_read_and_predicted_at_its_own_place(trio):
    one, teacher, _ = trio
    with torch.no_grad():  # without attention a patch sees itself only
        teacher.blocks[0].attention_out.weight.zero_()
    blank = torch.zeros(1, 64, dtype=torch.int64)
    changed = blank.clone()
    changed[0, 8 * 3 + 5] = 1  # row 3, column 5: the patch of rows 2-3, columns 4-5
    moved = (_logits(one, teacher, blank) != _logits(one, teacher, changed)).any(-1)
    assert moved.view(8, 8).nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


def test_each_pixel_has_its_own_place_in_the_head():
    model = system_of(TINY["masked"]).teacher()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(4).repeat_interleave(4).float())
    logits = model(torch.zeros(1, 64, dtype=torch.int64), torch.ones(1))
    assert logits.shape == (1, 64, 4)
    places = logits[0, :, 0].view(8, 8)
    assert torch.equal(places, torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(4, 4))


class _Recorded(torch.nn.Module):
    """A model that notes the labels it is called with."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.labels: list[list[int]] = []

    def forward(self, tokens, t, **context):
        self.labels.append(context["label"].tolist())
        return self.model(tokens, t, **context)


def test_guidance_runs_the_model_with_and_without_labels():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY["maskgit"], guidance=1.5)
    one = system_of(config)
    model = _Recorded(one.teacher())
    options = {"latent_dim": 0, "seed": 0, "first_sequence": 8}
    guided = one.draw(model, (5, 64), steps=2, **options)
    labels = [8, 9, 0, 1, 2]  # by the number of the sequence
    assert model.labels == [labels, labels + [NO_LABEL] * 5]  # the weight is 0 in the first step

    model.labels.clear()
    without = system_of(dataclasses.replace(config, guidance=0.0))
    plain = without.draw(model, (5, 64), steps=2, **options)
    assert model.labels == [labels, labels]
    assert not torch.equal(guided, plain)


def test_labels_change_what_is_predicted_and_a_share_of_them_is_hidden_in_training(digits):
    one = system_of(dataclasses.replace(TINY["maskgit"], label_dropout=0.3))
    torch.manual_seed(0)
    teacher = one.teacher()
    masks = torch.full((2, 64), 3)
    logits = teacher(masks, torch.ones(2), label=torch.tensor([4, NO_LABEL]))
    assert not torch.allclose(logits[0], logits[1])
    with pytest.raises(ValueError, match="needs labels"):
        teacher(masks, torch.ones(2))

    labels = torch.arange(10).repeat(200)
    given = one.context(labels, torch.Generator().manual_seed(0))["label"]
    hidden = given == NO_LABEL
    # 2000 draws: five standard deviations are 0.05.
    assert 0.25 < hidden.float().mean() < 0.35
    assert torch.equal(given[~hidden], labels[~hidden])


def test_batches_hold_images_with_their_own_labels(digits):
    x0, labels = train.draw_batch(digits, 6, torch.Generator().manual_seed(0))
    for image, label in zip(x0, labels, strict=True):
        found = (digits.tokens == image).all(-1).nonzero().squeeze(-1)
        assert int(label) in digits.labels[found].tolist()


def test_distances_within_classes_are_the_mean_of_those_of_each_class(digits):
    judge = system_of(TINY["maskgit"]).judge(digits)
    assert isinstance(judge, ClassJudge)
    tokens = torch.randint(3, (60, 64), generator=torch.Generator().manual_seed(0)).numpy()
    frechet, pair_tv = [], []
    for label in range(10):
        mine = digits.labels == label
        some = data.Digits(digits.tokens[mine], digits.labels[mine], 3)
        one = Judge(some, judge.features).score(tokens[label::10])
        frechet.append(one.frechet)
        pair_tv.append(one.pair_tv)
    score = judge.score(tokens)
    assert score.frechet == pytest.approx(sum(frechet) / 10)
    assert score.pair_tv == pytest.approx(sum(pair_tv) / 10)


def test_distances_within_classes_see_better_that_pixels_are_independent_given_the_label(digits):
    rng = np.random.default_rng(0)
    rows = [digits.tokens[digits.labels == label].numpy() for label in range(10)]
    classes = []
    for images in rows:
        drawn = images[rng.integers(len(images), size=(170, 64)), np.arange(64)]
        classes.append(drawn)  # every pixel from an image of its own, of the same class
    independent = np.stack(classes, axis=1).reshape(-1, 64)  # labels 0, 1, ..., 9, 0, ...
    within = system_of(TINY["maskgit"]).judge(digits)
    overall = Judge(digits, within.features)
    ratios = [
        judge.score(independent).frechet / judge.noise_floor(len(independent)).frechet
        for judge in (overall, within)
    ]
    assert ratios[1] > 5
    assert ratios[1] > 2 * ratios[0]


def test_maskgit_counts_all_positions_and_the_mask_token():
    one = system_of(TINY["maskgit"])
    x = torch.tensor([[0, 3, 1]])
    assert one.counted(x).all()
    assert one.columns == 4
    assert one.process.loss_mask_id is None
    masked = system_of(TINY["masked"])
    assert masked.counted(x).tolist() == [[False, True, False]]
    assert masked.columns == 3


def test_the_sampler_s_gumbel_temperature_is_not_that_of_the_teacher_s_steps():
    config = dataclasses.replace(
        TINY["maskgit"], gumbel_temperature=0.0, step_gumbel_temperature=7.0
    )
    assert system_of(config).process.gumbel_temperature == 7.0
    torch.manual_seed(0)
    teacher = system_of(config).teacher()
    options = {"steps": 4, "latent_dim": 0, "seed": 0, "first_sequence": 0}
    drawn = system_of(config).draw(teacher, (3, 64), **options)
    for field, same in (("step_gumbel_temperature", True), ("gumbel_temperature", False)):
        other = system_of(dataclasses.replace(config, **{field: 30.0}))
        assert torch.equal(other.draw(teacher, (3, 64), **options), drawn) is same, field


def test_student_times_of_maskgit_keep_their_share_below_low_t():
    one = system_of(dataclasses.replace(TINY["maskgit"], low_t=0.2, time_power=0.4))
    t = one.student_times(2000, torch.Generator().manual_seed(0))
    assert float((t < 0.2).float().mean()) == pytest.approx(0.2, abs=1e-3)  # stratified
    assert float(((t > 0.6) & (t <= 1)).float().mean()) > 0.5  # u^0.4 favours noise


def test_gaussian_noise_mixes_fully_with_the_default_recipe():
    process = system_of(GaussianConfig()).process
    law = process.transitions.batched(0.0, torch.tensor([1.0], dtype=torch.float64))[0]
    distance = 0.5 * (law - process.transitions.target.to(law)).abs().sum(-1)
    assert float(distance.max()) < 0.01
    first = process.transitions.batched(0.0, torch.tensor([process.t_min], dtype=torch.float64))[0]
    assert float(first.diagonal().min()) > 0.5  # and hardly anything has moved at the last call


def test_gaussian_times_reach_from_the_last_call_of_the_sampler_to_noise():
    one = system_of(TINY["gaussian"])
    for t in (one.times(500, torch.Generator()), one.student_times(500, torch.Generator())):
        assert one.process.t_min < float(t.min()) < 0.1
        assert 0.99 < float(t.max()) <= 1.0
    assert one.process.component_time == one.process.t_min


def test_the_gaussian_model_returns_two_numbers_per_pixel_and_knows_the_time():
    torch.manual_seed(0)
    model = system_of(TINY["gaussian"]).teacher()
    head = model(torch.zeros(2, 64, dtype=torch.int64), torch.tensor([0.1, 0.9]))
    assert isinstance(head, LogisticHead)
    assert head.shape == (2, 64, 3)
    assert not torch.allclose(head.mu[0], head.mu[1])
    assert float(head.mu.detach().abs().max()) < 1.0


def test_the_paper_s_weights_are_in_the_recipes():
    maskgit = system_of(MaskGITConfig()).recipe()
    assert (maskgit.component_weight, maskgit.low_t, maskgit.low_t_probability) == (20, 0.05, 0.05)
    gaussian = system_of(GaussianConfig()).recipe()
    assert (gaussian.component_weight, gaussian.component_spread) == (1.0, 0.01)
