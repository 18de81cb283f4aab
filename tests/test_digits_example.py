"""The digits example: its data, model, metrics and table of speed, and what is its systems' own."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from example_support import DIGITS, stored

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from di4c_fast.heads import LogisticHead, as_head
from examples.common import sampling
from examples.common.rundir import RunDirectory
from examples.digits import data, speed, train
from examples.digits.config import GaussianConfig, MaskGITConfig
from examples.digits.metrics import (
    ClassJudge,
    Judge,
    frechet_distance,
    pair_distance,
    pair_joints,
)
from examples.digits.model import DigitsDenoiser
from examples.digits.systems import system_of
from examples.digits.systems.maskgit import NO_LABEL

TINY = DIGITS["masked"]


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load(TINY.levels)


@pytest.fixture(scope="module")
def judge(digits: data.Digits) -> Judge:
    return Judge(digits)


def test_training_changes_weights_and_the_returned_model_holds_their_average(digits, tmp_path):
    run = RunDirectory(tmp_path, TINY)
    teacher = train.train_teacher(TINY, digits, run, seed=0)
    tensors, losses = stored(tmp_path / "seed-0" / "teacher.safetensors")
    assert len(losses) == TINY.teacher_iterations
    torch.manual_seed(0)
    fresh = DigitsDenoiser(TINY.levels, TINY.width, TINY.layers)
    for name, parameter in teacher.named_parameters():
        average = tensors[f"ema/shadow/{name}"]
        assert torch.equal(parameter, average)
        assert not torch.equal(tensors[f"module/{name}"], average), name
    assert not torch.equal(fresh.head.weight, tensors["module/head.weight"])


def test_quantised_digits_use_all_levels_and_17_levels_change_nothing():
    from sklearn.datasets import load_digits

    pixels = load_digits().data
    for levels in (2, 5, 17):
        tokens = data.load(levels).tokens
        assert tokens.shape == (1797, 64)
        assert tokens.unique().tolist() == list(range(levels))
    assert np.array_equal(data.load(17).tokens.numpy(), pixels)


def test_cross_entropy_counts_masked_positions_only_and_never_the_mask():
    logits = torch.zeros(2, 4, 3)
    logits[0, 0] = torch.tensor([2.0, 0.0, 50.0])  # the mask column must not matter
    logits[0, 1] = torch.tensor([9.0, 0.0, 0.0])  # nor what is not masked
    x0 = torch.zeros(2, 4, dtype=torch.int64)
    masked = torch.tensor([[True, False, True, False], [False] * 4])
    value = train.masked_cross_entropy(logits, x0, masked, mask_id=2)
    first = -torch.log_softmax(torch.tensor([2.0, 0.0]), 0)[0].item()
    # Example 1 has no masked position and contributes 0 to the mean over two examples.
    assert value.item() == pytest.approx((first + math.log(2)) / 2 / 2, rel=1e-6)


def test_frechet_distance_matches_its_closed_forms():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3))
    shift = np.array([1.0, -2.0, 0.5])
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + shift) == pytest.approx(5.25, rel=1e-9)
    # Scaling by 3: tr(C + 9C - 2·3C) = 4 tr C, plus the shift of the mean by 2 times itself.
    expected = 4 * np.trace(np.cov(a, rowvar=False)) + 4 * (a.mean(axis=0) ** 2).sum()
    assert frechet_distance(a, 3 * a) == pytest.approx(expected, rel=1e-9)
    # Covariances that do not commute, against the root of the product itself.
    from scipy.linalg import sqrtm

    b = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 3))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    direct = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b))
    )
    assert frechet_distance(a, b) == pytest.approx(direct, rel=1e-6)


def test_pair_distance_matches_counting_by_hand():
    rng = np.random.default_rng(1)
    a, b = rng.integers(3, size=(50, 64)), rng.integers(3, size=(70, 64))
    total = 0.0
    for i in range(64):
        for j in range(i + 1, 64):
            for u in range(3):
                for v in range(3):
                    p = ((a[:, i] == u) & (a[:, j] == v)).mean()
                    q = ((b[:, i] == u) & (b[:, j] == v)).mean()
                    total += abs(p - q) / 2
    ours = pair_distance(pair_joints(a, 3), pair_joints(b, 3))
    assert ours == pytest.approx(total / (64 * 63 / 2), rel=1e-12)


def test_both_distances_see_correlation_that_the_pixels_alone_do_not_show(digits, judge):
    tokens = digits.tokens.numpy()
    rng = np.random.default_rng(2)
    independent = np.stack([rng.permutation(column) for column in tokens.T], axis=1)
    floor, broken = judge.noise_floor(len(tokens)), judge.score(independent)
    # The marginals of `independent` are exact, so only the joints are off.
    assert broken.frechet > 10 * floor.frechet
    assert broken.pair_tv > 2 * floor.pair_tv
    assert judge.features.accuracy > 0.9


def test_the_noise_floor_falls_with_the_number_of_samples(judge):
    few, many = judge.noise_floor(100), judge.noise_floor(1600)
    # Means fall with 1/samples and frequencies with its root: 16 and 4 in the limit.
    assert few.frechet > 8 * many.frechet
    assert 3 < few.pair_tv / many.pair_tv < 5
    # The same sums in the order that the product takes, which may depend on where memory lies.
    assert judge.score(judge._real).pair_tv == pytest.approx(0.0, abs=1e-12)


def test_the_loss_comparison_runs_the_same_problem_on_both_backends():
    problem = speed.Problem(speed.Shape("tiny", 2, 3, 5, 7, 1))
    own_loss = problem.run("auto")
    own_grad = problem.student.grad
    assert own_grad is not None
    reference_loss = problem.run("reference")
    torch.testing.assert_close(own_loss, reference_loss)
    torch.testing.assert_close(own_grad, problem.student.grad)


def test_the_speed_table_says_when_memory_cannot_be_read():
    one = speed.Comparison(
        "a", (1, 2, 3, 4), {"auto": 0.5, "reference": 2.0}, dict.fromkeys(speed.BACKENDS), 0.0
    )
    text = speed.table([one])
    assert "4.0" in text
    assert "cannot be read" in text


# Systems


@pytest.mark.parametrize("system", DIGITS)
def test_samples_do_not_depend_on_the_chunks(system, monkeypatch):
    torch.manual_seed(0)
    one = system_of(DIGITS[system])
    # In float64: logits of other batch sizes differ in their last bits, which in float32 can turn
    # one draw in a million.
    student = one.student(one.teacher()).double().eval()
    whole = sampling.draw_samples(DIGITS[system], student, 1, 3, 4, one.draw).tokens
    assert whole.shape == (40, 64)
    assert int(whole.max()) < 3
    monkeypatch.setattr(sampling, "CHUNK", 7)
    parts = sampling.draw_samples(DIGITS[system], student, 1, 3, 4, one.draw).tokens
    assert torch.equal(whole, parts)


@pytest.fixture(params=DIGITS)
def trio(request):
    """A system, its teacher and its student."""
    torch.manual_seed(0)
    one = system_of(DIGITS[request.param])
    teacher = one.teacher()
    return one, teacher, one.student(teacher)


def _logits(one, model, x, *latent) -> torch.Tensor:
    """At t = 1, all with the label 4 where there are labels."""
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
    x = one.process.corrupt(x, torch.ones(2))
    different = _logits(one, student, x[:1].expand(2, -1), latent)
    assert not torch.allclose(different[0], different[1])
    for name in own:
        torch.nn.init.zeros_(student.get_parameter(name))
    assert torch.equal(_logits(one, student, x, latent), _logits(one, teacher, x))
    with pytest.raises(ValueError, match="needs latents"):
        _logits(one, student, x)
    with pytest.raises(ValueError, match="takes no latents"):
        _logits(one, teacher, x, latent)


def test_the_masked_student_learns_lambda_alone_which_begins_with_mean_0_and_fades():
    one = system_of(dataclasses.replace(TINY, latent_dim=2))
    teacher = one.teacher()
    student = one.student(teacher)
    learning = [name for name, p in student.named_parameters() if p.requires_grad]
    assert learning == [name for name, _ in student.named_parameters() if name[:7] == "latent."]
    with torch.no_grad():
        vectors = student.latent(torch.rand(4000, 2, generator=torch.Generator().manual_seed(0)))
    error = vectors.sum(1).std(0) / math.sqrt(4000)
    assert (vectors.sum(1).mean(0).abs() < 6 * error).all()
    clean, latent = torch.randint(3, (2, 64)), torch.rand(2, 2)
    assert torch.equal(_logits(one, student, clean, latent), _logits(one, teacher, clean))


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
    model = system_of(DIGITS["masked"]).teacher()
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
    config = dataclasses.replace(DIGITS["maskgit"], guidance=1.5)
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
    one = system_of(dataclasses.replace(DIGITS["maskgit"], label_dropout=0.3))
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
    judge = system_of(DIGITS["maskgit"]).judge(digits)
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
    within = system_of(DIGITS["maskgit"]).judge(digits)
    overall = Judge(digits, within.features)
    ratios = [
        judge.score(independent).frechet / judge.noise_floor(len(independent)).frechet
        for judge in (overall, within)
    ]
    assert ratios[1] > 5
    assert ratios[1] > 2 * ratios[0]


def test_maskgit_counts_all_positions_and_the_mask_token():
    one = system_of(DIGITS["maskgit"])
    x = torch.tensor([[0, 3, 1]])
    assert one.counted(x).all()
    assert one.columns == 4
    assert one.process.loss_mask_id is None
    masked = system_of(DIGITS["masked"])
    assert masked.counted(x).tolist() == [[False, True, False]]
    assert masked.columns == 3


def test_the_sampler_s_gumbel_temperature_is_not_that_of_the_teacher_s_steps():
    config = dataclasses.replace(
        DIGITS["maskgit"], gumbel_temperature=0.0, step_gumbel_temperature=7.0
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
    one = system_of(dataclasses.replace(DIGITS["maskgit"], low_t=0.2, time_power=0.4))
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
    one = system_of(DIGITS["gaussian"])
    for t in (one.times(500, torch.Generator()), one.student_times(500, torch.Generator())):
        assert one.process.t_min < float(t.min()) < 0.1
        assert 0.99 < float(t.max()) <= 1.0
    assert one.process.component_time == one.process.t_min


def test_the_gaussian_model_returns_two_numbers_per_pixel_and_knows_the_time():
    torch.manual_seed(0)
    model = system_of(DIGITS["gaussian"]).teacher()
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
