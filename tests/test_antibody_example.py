"""The antibody example on a tiny model of the same vocabulary."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")

import transformers

from di4c_fast.training.pretrained import load_masked_lm, student_of
from examples.antibody import __main__ as command
from examples.antibody import data, likelihood, metrics, teacher
from examples.antibody.config import Config
from examples.common.rundir import RunError

OPTIONS = ["--loops", "8", "--student-iterations", "2", "--student-batch", "2", "--layer", "1"]
OPTIONS += ["--components", "2", "--draws", "2", "--samples", "16", "--judged", "8"]
OPTIONS += ["--steps", "1", "3", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """A BERT of AntiBERTy's vocabulary, as `teacher.load` leaves it."""
    folder = tmp_path_factory.mktemp("antiberty")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=25, intermediate_size=16, max_position_embeddings=160, **sizes
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate(data.WORDS)}
    transformers.BertTokenizer(vocab=words, do_lower_case=False).save_pretrained(folder)
    return folder


def test_chains_have_an_empty_loop_at_its_place_in_the_whole_chain():
    chains = data.empty_loops(40, data.TRAINED, 0)
    lengths = chains.valid.sum(1)
    assert lengths.min() >= data.SHORTEST
    assert lengths.max() <= data.LONGEST
    assert len(set(lengths.tolist())) > 4
    for tokens, valid, places in zip(
        chains.tokens, chains.valid, chains.context["position_ids"], strict=True
    ):
        text = data.decode(tokens.tolist())
        before, after = text.split("_" * int(valid.sum()))[:2]
        segments = [s for s in data.V_SEGMENTS.values() if s.endswith(before.strip("_"))]
        assert segments
        assert after.strip("_") in data.FOURTH
        # A token stands where it stands in the whole chain, behind the start token.
        assert int(places[1]) + data.CONTEXT in {len(s) + 1 for s in segments}
        inside = places[1 : int((tokens != data.PAD).sum())]
        assert torch.equal(inside.diff(), torch.ones_like(inside[1:]))
    assert torch.equal(chains.context["attention_mask"] == 0, chains.tokens == data.PAD)


def test_one_at_a_time_fills_the_loop_and_nothing_else(model):
    chains = data.empty_loops(5, data.HELD_OUT, 1)
    tokens = data.one_at_a_time(load_masked_lm(model).model, chains, 3, chunk=2)
    assert torch.equal(tokens[~chains.valid], chains.tokens[~chains.valid])
    assert (tokens[chains.valid] >= data.FIRST).all()


def test_the_chain_rule_averages_over_the_orders(model):
    lm = load_masked_lm(model).model
    with torch.no_grad():  # so that the orders matter
        for parameter in lm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    chain = data.empty_loops(1, data.HELD_OUT, 2)
    places = chain.valid[0].nonzero()[:3, 0].tolist()
    tokens = chain.tokens.masked_fill(chain.valid, data.FIRST + 2)
    valid = torch.zeros_like(chain.valid)
    valid[0, places] = True

    def term(order: tuple[int, ...], turn: int) -> float:
        hidden = tokens.clone()
        hidden[0, list(order[turn:])] = data.MASK
        logits = lm(hidden, torch.ones(1), **chain.context).logits()[0, order[turn], data.FIRST :]
        return float(logits.log_softmax(0)[2])

    orders = list(itertools.permutations(places))
    expected = -sum(term(order, turn) for order in orders for turn in range(3)) / len(orders) / 3
    many = type(chain)(
        *(value.repeat(200, 1) for value in (tokens, valid)),
        {name: value.repeat(200, 1) for name, value in chain.context.items()},
    )
    found = data.chain_rule(lm, many, 0, draws=3)
    error = float(found.std()) / len(found) ** 0.5
    assert float(found.std()) > 1e-3
    assert float(found.mean()) == pytest.approx(expected, abs=5 * error)


def test_measures_of_loops():
    chains = data.empty_loops(2, data.HELD_OUT, 0)
    assert data.loops_of(chains.tokens, chains.valid)[0] == "_" * int(chains.valid[0].sum())
    same, other = ["ACDC", "ACDC"], ["WCYW", "ACDC"]
    score = metrics.scored(1.0, same, other)
    assert (score.lone, score.distinct, score.alike) == (0.0, 0.5, 1.0)
    # Of six pairs of the reference, AC, CD and DC come once each, and never in "WCYW".
    assert score.pairs == pytest.approx(0.5)
    assert score.entropy == pytest.approx(np.log(3.0))
    score = metrics.scored(1.0, other, other)
    assert (score.pairs, score.residues, score.lone, score.distinct) == (0.0, 0.0, 0.5, 1.0)
    assert score.alike == 0.25


def test_a_student_equal_to_its_teacher_has_the_teachers_likelihood(model):
    lm = load_masked_lm(model)
    student = student_of(lm, layer=1)
    torch.nn.init.zeros_(student.model.latent.embedding.project.weight)
    chains = data.empty_loops(6, data.HELD_OUT, 0)
    tokens = data.one_at_a_time(lm.model, chains, 0)
    loops = type(chains)(tokens, chains.valid, chains.context)
    for one in likelihood.one_step(lm.model, student.model, 1, loops, 0).values():
        assert one.student == pytest.approx(one.teacher, abs=1e-4)
        assert one.marginals == pytest.approx(one.teacher, abs=1e-4)
        assert one.student_entropy == pytest.approx(one.teacher_entropy, abs=1e-4)


def test_the_command_runs_and_resumes(model, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    arguments = ["--run-dir", str(run), "--teacher", str(model), *OPTIONS]
    monkeypatch.setattr(likelihood, "LATENTS", 2)
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "the teacher's loops, one residue at a time" in out
    assert "nats per hidden residue" in out
    results = json.loads((run / "results.json").read_text())
    assert set(results["seeds"]["0"]) == {"teacher", "student", "one_step", "training"}
    assert set(results["seeds"]["0"]["student"]) == {"1", "3"}
    assert (run / "antibody.png").read_bytes()[:4] == b"\x89PNG"
    loops = [line for line in (run / "samples.txt").read_text().splitlines() if line[:1] == " "]
    assert all(set(loop.strip()) <= set(data.RESIDUES) for loop in loops)
    # Again: all is there, nothing is drawn or judged anew.
    monkeypatch.setattr(data, "one_at_a_time", None)
    monkeypatch.setattr(metrics, "chain_rule", None)
    monkeypatch.setattr(command, "draw_picture", lambda *args: None)
    assert command.main(arguments) == 0
    again = json.loads((run / "results.json").read_text())
    for values in (results, again):
        values.pop("cpu_milliseconds_per_loop")
    assert again == results
    assert command.main([*arguments, "--bf16"]) == 2
    assert "precision is fp32 there and bf16 here" in capsys.readouterr().err


def test_offline_the_missing_wheel_is_named(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RunError, match=r"antiberty==0\.0\.6 could not be downloaded: ERROR: No"):
        teacher.load(tmp_path / "absent")
    arguments = ["--run-dir", str(tmp_path / "run"), "--teacher", str(tmp_path / "absent")]
    assert command.main([*arguments, *OPTIONS]) == 2
    assert "connect to the network and repeat the command" in capsys.readouterr().err


def test_a_recipe_names_what_is_wrong():
    with pytest.raises(ValueError, match="layer must be between 1 and 7, got 8"):
        Config(layer=8)
