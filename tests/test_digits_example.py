"""The digits example: exact resumption, its metrics, its files, what it says to bad input."""

from __future__ import annotations

import json
import math
import os
import pathlib

import numpy as np
import pytest
import torch
from example_support import (
    assert_help_lists_options,
    assert_interruption_changes_nothing,
    assert_option_is_named,
    options_of,
    stored,
)

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples.common import sampling
from examples.common.rundir import RunDirectory, RunError
from examples.digits import data, report, speed, train
from examples.digits.__main__ import main
from examples.digits.config import Config
from examples.digits.metrics import (
    Judge,
    frechet_distance,
    pair_distance,
    pair_joints,
)
from examples.digits.model import DigitsDenoiser, student_from_teacher

TINY = Config(
    levels=3,
    width=8,
    layers=1,
    teacher_iterations=7,
    teacher_batch=4,
    student_iterations=7,
    student_batch=2,
    components=3,
    draws=2,
    samples=40,
    steps=(1, 3),
)


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load(TINY.levels)


@pytest.fixture(scope="module")
def judge(digits: data.Digits) -> Judge:
    return Judge(digits)


def _train_both(config: Config, digits: data.Digits, path: pathlib.Path) -> None:
    run = RunDirectory(path, config)
    teacher = train.train_teacher(config, digits, run, seed=5, checkpoint_every=2)
    train.distill_student(config, digits, teacher, run, seed=5, checkpoint_every=2)


@pytest.mark.parametrize("stop_at", [1, 4, 9, 13])
def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    digits, tmp_path, monkeypatch, stop_at
):
    # Batches are drawn once per iteration: 7 of the teacher, then 7 of the student.
    assert_interruption_changes_nothing(
        lambda path: _train_both(TINY, digits, path),
        train,
        tmp_path,
        monkeypatch,
        call=stop_at,
        iterations=7,
    )


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


def test_a_failed_write_leaves_the_checkpoint_before_it(digits, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path, TINY)
    run.save("seed-0/teacher", {"x": torch.arange(3)}, {"seconds": 1.0})
    before = (tmp_path / "seed-0" / "teacher.safetensors").read_bytes()

    def broken(source, target):
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="disk gone"):
            run.save("seed-0/teacher", {"x": torch.arange(4)}, {"seconds": 2.0})
    assert (tmp_path / "seed-0" / "teacher.safetensors").read_bytes() == before
    loaded = RunDirectory(tmp_path, TINY).load("seed-0/teacher")
    assert loaded is not None
    assert loaded[0]["x"].tolist() == [0, 1, 2]
    assert loaded[1] == {"seconds": 1.0}


def test_a_run_directory_of_another_configuration_is_refused_and_left_alone(tmp_path):
    run = RunDirectory(tmp_path, TINY)
    run.save("seed-0/teacher", {"x": torch.arange(3)}, {})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = Config(**{**TINY.__dict__, "levels": 5, "steps": (1, 2)})
    with pytest.raises(RunError, match=r"levels is 3 there and 5 here.*steps is \[1, 3\] there"):
        RunDirectory(tmp_path, other)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds files \(notes.txt\) but no run.json"):
        RunDirectory(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(RunError, match="must be a directory"):
        RunDirectory(tmp_path / "notes.txt", TINY)


def test_a_missing_checkpoint_is_an_error_and_not_a_fresh_start(tmp_path):
    RunDirectory(tmp_path, TINY).save("seed-0/teacher", {"x": torch.arange(3)}, {})
    (tmp_path / "seed-0" / "teacher.safetensors").unlink()
    with pytest.raises(RunError, match=r"has lost seed-0/teacher\.safetensors"):
        RunDirectory(tmp_path, TINY)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "renamed"])
def test_a_torn_checkpoint_is_an_error(tmp_path, damage):
    run = RunDirectory(tmp_path, TINY)
    run.save("seed-0/teacher", {"x": torch.arange(300), "y": torch.zeros(4)}, {})
    file = tmp_path / "seed-0" / "teacher.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[:-7]
    elif damage == "empty":
        content = bytearray()
    elif damage == "flipped":
        content[-5] ^= 4
    else:
        content = content.replace(b'"y"', b'"z"')
    file.write_bytes(bytes(content))
    with pytest.raises(
        RunError,
        match=r"teacher\.safetensors (is damaged|is no whole).*put teacher\.safetensors back",
    ):
        RunDirectory(tmp_path, TINY).load("seed-0/teacher")


def test_a_damaged_record_is_an_error(tmp_path):
    RunDirectory(tmp_path, TINY)
    (tmp_path / "run.json").write_text('{"format": 1, "con')
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        RunDirectory(tmp_path, TINY)


def test_a_loss_that_is_not_finite_stops_with_advice(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train, "masked_cross_entropy", lambda logits, *rest: logits.sum() * math.nan
    )
    with pytest.raises(RunError, match=r"loss of the teacher became nan.*--teacher-lr"):
        train.train_teacher(TINY, digits, RunDirectory(tmp_path, TINY), seed=0)


def test_quantised_digits_use_all_levels_and_17_levels_change_nothing():
    from sklearn.datasets import load_digits

    pixels = load_digits().data
    for levels in (2, 5, 17):
        tokens = data.load(levels).tokens
        assert tokens.shape == (1797, 64)
        assert tokens.unique().tolist() == list(range(levels))
    assert np.array_equal(data.load(17).tokens.numpy(), pixels)


def test_each_pixel_is_predicted_by_its_own_place_in_its_patch():
    model = DigitsDenoiser(levels=2, width=8, layers=1)
    assert model.order[:4].tolist() == [0, 1, 8, 9]
    assert model.order[4:8].tolist() == [2, 3, 10, 11]
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.arange(4).repeat_interleave(3).float())
    logits = model(torch.zeros(1, 64, dtype=torch.int64), torch.ones(1))
    assert logits.shape == (1, 64, 3)
    places = logits[0, :, 0].view(8, 8)
    assert torch.equal(places, torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(4, 4))


def test_a_pixel_is_read_at_its_own_place():
    torch.manual_seed(0)
    model = DigitsDenoiser(levels=2, width=8, layers=1)
    with torch.no_grad():  # without attention a patch sees itself only
        model.blocks[0].attention_out.weight.zero_()
    blank = torch.zeros(1, 64, dtype=torch.int64)
    changed = blank.clone()
    changed[0, 8 * 3 + 5] = 1  # row 3, column 5: the patch of rows 2-3, columns 4-5
    t = torch.ones(1)
    moved = (model(blank, t) != model(changed, t)).any(-1).view(8, 8).nonzero().tolist()
    assert moved == [[2, 4], [2, 5], [3, 4], [3, 5]]


def test_the_student_is_the_teacher_apart_from_its_latent():
    torch.manual_seed(0)
    teacher = DigitsDenoiser(TINY.levels, TINY.width, TINY.layers)
    student = student_from_teacher(teacher, TINY.levels, TINY.width, TINY.layers, 2, 1000.0)
    tokens = torch.randint(4, (5, 64))
    t, latent = torch.ones(5), torch.rand(5, 2)
    with torch.no_grad():
        different = student(tokens, t, latent)
        assert student.latent is not None
        student.latent.project.weight.zero_()
        student.latent.project.bias.zero_()
        same = student(tokens, t, latent)
        expected = teacher(tokens, t)
    assert torch.equal(same, expected)
    assert not torch.allclose(different, expected)
    with pytest.raises(ValueError, match="needs latents"):
        student(tokens, t)
    with pytest.raises(ValueError, match="takes no latents"):
        teacher(tokens, t, latent)


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
    assert judge.score(np.asarray(judge._real)).pair_tv == 0.0


def test_samples_do_not_depend_on_the_chunks(monkeypatch):
    torch.manual_seed(0)
    model = DigitsDenoiser(TINY.levels, TINY.width, TINY.layers, 1)
    whole = sampling.draw_samples(TINY.sizes, model, 1, steps=3, seed=4).tokens
    monkeypatch.setattr(sampling, "CHUNK", 7)
    parts = sampling.draw_samples(TINY.sizes, model, 1, steps=3, seed=4).tokens
    assert whole.shape == (40, 64)
    assert int(whole.max()) < TINY.mask_id
    assert torch.equal(whole, parts)


def test_the_loss_comparison_runs_the_same_problem_on_both_backends():
    problem = speed.Problem(speed.Shape("tiny", 2, 3, 5, 7, 1))
    torch_loss = problem.run("torch")
    torch_grad = problem.student.grad
    assert torch_grad is not None
    reference_loss = problem.run("reference")
    torch.testing.assert_close(torch_loss, reference_loss)
    torch.testing.assert_close(torch_grad, problem.student.grad)


def test_the_speed_table_says_when_memory_cannot_be_read():
    one = speed.Comparison(
        "a", (1, 2, 3, 4), {"torch": 0.5, "reference": 2.0}, dict.fromkeys(speed.BACKENDS), 0.0
    )
    text = report.speed_table([one])
    assert "4.0" in text
    assert "cannot be read" in text


def _arguments(run: pathlib.Path) -> list[str]:
    return options_of(TINY, run, "--no-speed")


def test_the_command_runs_reports_and_does_not_repeat_finished_work(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    try:
        run, reported = tmp_path / "run", tmp_path / "report"
        arguments = [*_arguments(run), "--seeds", "3", "4", "--report", str(reported)]
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert "seed 3" in printed
        assert "noise floor" in printed
        results = json.loads((reported / "results.json").read_text())
        assert results["config"] == TINY.to_json()
        assert set(results["seeds"]) == {"3", "4"}
        assert set(results["seeds"]["3"]["student"]) == {"1", "3"}
        assert (reported / "digits.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert not list(tmp_path.rglob("*.tmp"))

        def unexpected(*args, **kwargs):
            raise AssertionError("finished work was repeated")

        monkeypatch.setattr(sampling, "sample_masked", unexpected)
        monkeypatch.setattr(train, "draw_batch", unexpected)
        assert main(arguments) == 0
        assert json.loads((run / "results.json").read_text()) == results

        monkeypatch.undo()
        before = (run / "results.json").read_bytes()
        assert main([*arguments, "--levels", "2"]) == 2
        assert "levels is 3 there and 2 here" in capsys.readouterr().err
        assert (run / "results.json").read_bytes() == before
    finally:
        torch.set_num_threads(threads)


def test_ctrl_c_says_how_to_continue(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "draw_batch", interrupted)
    threads = torch.get_num_threads()
    try:
        assert main(_arguments(tmp_path / "run")) == 130
    finally:
        torch.set_num_threads(threads)
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--levels", "1"], "argument --levels: must be between 2 and 17, got 1"),
        (["--levels", "many"], "argument --levels: invalid int value: 'many'"),
        (["--components", "0"], "argument --components: must be between 1 and 1024, got 0"),
        (["--student-iterations", "-5"], "argument --student-iterations: must be at least 1"),
        (["--teacher-lr", "nan"], "argument --teacher-lr: must be between 1e-08 and 1, got nan"),
        (["--data-weight", "inf"], "argument --data-weight: must be at least 0, got inf"),
        (["--teacher-step", "2"], "argument --teacher-step: must be between 0.0001 and 1"),
        (["--width", "10"], "argument --width: must be a multiple of 4"),
        (["--steps", "4", "2"], "argument --steps: must increase, got 4 2"),
        (["--steps", "0"], "argument --steps: must be between 1 and 4096, got 0"),
        (["--samples", "8"], "argument --samples: must be at least 32, got 8"),
        (["--seeds", "-1"], "argument --seeds: must be different numbers"),
        (["--seeds", "1", "1"], "argument --seeds: must be different numbers"),
        (["--threads", "0"], "argument --threads: must be at least 1, got 0"),
        (["--checkpoint-every", "0"], "argument --checkpoint-every: must be at least 1, got 0"),
        (["--epochs", "3"], "unrecognized arguments: --epochs"),
    ],
)
def test_a_wrong_option_is_named(options, message, capsys, tmp_path):
    assert_option_is_named(main, options, message, capsys, tmp_path / "run")


def test_help_lists_every_option(capsys):
    assert_help_lists_options(main, TINY, capsys)
