"""Pretrained masked language models: teachers loaded, students trained, saved, reloaded, drawn."""

from __future__ import annotations

import dataclasses
import errno
import pathlib
import sys

import pytest
import torch
from huggingface_models import FAMILIES, MASK, POSITIONS, VOCAB, tiny, transformers
from safetensors.torch import save_file

from di4c_fast.models import MaskedLM
from di4c_fast.training import __main__ as command
from di4c_fast.training import checkpoint, sample
from di4c_fast.training.corpus import Corpus, read_corpus
from di4c_fast.training.finetune import Recipe, finetune
from di4c_fast.training.pretrained import (
    Pretrained,
    load_masked_lm,
    load_student,
    save_student,
    student_of,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqr"]
TINY = Recipe(steps=4, batch=2, components=3, draws=2)
ROWS = torch.randint(5, VOCAB, (6, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A BERT and its tokenizer, as they are saved."""
    path = tmp_path_factory.mktemp("bert")
    tiny("Bert").save_pretrained(path)
    words = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=words, do_lower_case=False).save_pretrained(path)
    return path


@pytest.fixture
def texts(tmp_path) -> pathlib.Path:
    path = tmp_path / "texts.txt"
    path.write_text("a b c d\n\nb c d e f g\nq r\n", encoding="utf-8")
    return path


def teacher_of(family: str) -> Pretrained:
    return Pretrained(MaskedLM(tiny(family).requires_grad_(False)), None, MASK)


# --- teachers and students


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_are_alike_share_the_frozen_layers(family):
    student = student_of(teacher_of(family), latent_dim=2).model
    tokens, seen = ROWS[:3].repeat_interleave(4, dim=0), torch.ones(12, 8, dtype=torch.int64)
    seen[8:, 6:] = 0
    t, latent = torch.ones(12), torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    rows = []
    layer = student.model.get_submodule(student.module)
    layer.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    for context in ({}, {"attention_mask": seen}):
        student.share = True
        shared = student(tokens, t, latent, **context).logits()
        student.share = False
        # Products of 3 rows and of 12 may be rounded differently.
        torch.testing.assert_close(shared, student(tokens, t, latent, **context).logits())
    # λ comes after the layer: the hook above sees what was computed for all rows alike.
    assert rows == [3, 12, 3, 12]
    other = torch.cat([t[:1] / 2, t[1:]])
    student.share = True
    student(tokens, other, latent)
    assert rows[-1] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_trains_what_lies_above_its_latent_and_leaves_the_teacher(family):
    teacher = teacher_of(family)
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    student = student_of(teacher)
    trained = {name for name, p in student.model.named_parameters() if p.requires_grad}
    layers = [name for name in trained if "layer.0." in name or "layers.0." in name]
    assert not layers
    assert not any("embed" in name for name in trained - {n for n in trained if "latent" in n})
    assert any("latent" in name for name in trained)
    assert any("layer.1." in name or "layers.1." in name for name in trained)
    assert all(torch.equal(value, before[n]) for n, value in teacher.model.state_dict().items())
    with pytest.raises(ValueError, match=r"layer must be in \[1, 2\), as the model has 2, got 2"):
        student_of(teacher, layer=2)


def test_special_tokens_are_never_drawn(folder):
    teacher = load_masked_lm(folder)
    assert (teacher.mask_id, teacher.vocabulary, teacher.positions) == (MASK, VOCAB, POSITIONS)
    chance = teacher.model(ROWS, torch.ones(6)).logits().softmax(-1)
    assert not chance[..., [0, 1, 2, 3]].any()
    assert chance[..., 4:].all()
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_student_is_trained_resumed_saved_and_reloaded(folder, texts, tmp_path):
    teacher = load_masked_lm(folder)
    corpus = read_corpus(texts, teacher)
    lines: list[str] = []
    whole, history = finetune(teacher, corpus, TINY, tmp_path / "a" / "run", checkpoint_every=2)
    assert [record["step"] for record in history] == [2, 4]

    class Stop(Exception):
        pass

    def stop(line: str) -> None:
        lines.append(line)
        if line.startswith("step 4"):
            raise Stop

    with pytest.raises(Stop):
        finetune(teacher, corpus, TINY, tmp_path / "b", checkpoint_every=2, report=stop)
    resumed, _ = finetune(
        teacher, corpus, TINY, tmp_path / "b", checkpoint_every=2, report=lines.append
    )
    assert "resumed at step 2" in lines[-2]
    assert "step 4 of 4, loss" in lines[-1]
    save_student(resumed, tmp_path / "student")
    loaded = load_student(tmp_path / "student")
    assert loaded.tokenizer is not None
    latent = torch.rand(6, 1)
    for other in (resumed, loaded):
        states = zip(
            whole.model.state_dict().values(), other.model.state_dict().values(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in states)
        logits = [s.model(ROWS, torch.ones(6), latent).logits() for s in (whole, other)]
        assert torch.equal(*logits)
    other_recipe = dataclasses.replace(TINY, batch=3)
    with pytest.raises(ValueError, match=r"of another run: recipe.batch is 2 there and 3 here"):
        finetune(teacher, corpus, other_recipe, tmp_path / "b", report=lines.append)


def test_only_the_positions_to_learn_are_noised(folder, tmp_path):
    file = tmp_path / "tokens.safetensors"
    valid = torch.zeros(6, 8, dtype=torch.bool)
    valid[:, 2:5] = True
    corpus = Corpus(ROWS, valid, {"position_ids": torch.arange(2, 10).expand(6, 8)})
    corpus.save(file)
    teacher = load_masked_lm(folder, tokenizer=False, mask_id=MASK)
    read = read_corpus(file, teacher)
    assert read.fingerprint == corpus.fingerprint
    seen = []
    hook = teacher.masked_lm.model.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append((arguments[0], keywords)), with_kwargs=True
    )
    finetune(teacher, read, dataclasses.replace(TINY, steps=1), tmp_path / "run", report=str)
    hook.remove()
    ((tokens, keywords),) = seen[-1:]
    assert not bool((tokens[:, [0, 1, 5, 6, 7]] == MASK).any())
    assert torch.equal(keywords["position_ids"], torch.arange(2, 10).expand_as(tokens))


# --- the commands


def test_the_commands_train_and_draw(folder, texts, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = ["--steps", "2", "--batch", "2", "--components", "3", "--draws", "2"]
    arguments = [str(folder), "--data", str(texts), "--out", out, *options]
    assert command.main(arguments) == 0
    assert "3 examples of up to 8 tokens, 12 to learn" in capsys.readouterr().out
    assert (tmp_path / "out" / "history.json").exists()
    assert sample.main([out, "--length", "5", "--count", "3", "--steps", "2"]) == 0
    drawn = capsys.readouterr().out.splitlines()
    assert [len(line.split()) for line in drawn] == [5, 5, 5]
    assert sample.main([out, "--text", "a b [MASK] d", "--count", "1"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split()[:2] == ["a", "b"]
    assert sample.main([out, "--text", "a b"]) == 2
    assert "write [MASK]" in capsys.readouterr().err
    assert command.main([*arguments, "--lr", "0.1"]) == 2
    assert "recipe.lr is 0.0003 there and 0.1 here" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(folder, texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    base = [str(folder), "--data", str(texts), "--out", str(out), "--batch", "2", "--draws", "2"]
    arguments = [*base, "--components", "2", "--steps", "4", "--checkpoint-every", "2"]
    save, calls = checkpoint.save_file, []

    def full(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    assert command.main(arguments) == 2
    assert "No space left on device; the last checkpoint is still there" in capsys.readouterr().err
    monkeypatch.undo()
    assert command.main(arguments) == 0
    assert "resumed at step 2" in capsys.readouterr().out


# --- bad input


def refused(folder, data, tmp_path, *options: str) -> list[str]:
    return [str(folder), "--data", str(data), "--out", str(tmp_path / "out"), *options]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "there is no data file"),
        ("empty.txt", b"", "has no text in it"),
        ("blank.txt", b"\n  \n", "has no text in it"),
        ("latin.txt", "é".encode("latin-1"), "is not UTF-8 text"),
        ("long.txt", b"a b\n" + b"a " * 20, "line 2 of"),
        ("torn.safetensors", b"12345678", "is not a complete safetensors file"),
    ],
)
def test_a_data_file_that_cannot_serve_is_named(folder, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert command.main(refused(folder, path, tmp_path)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert name in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": ROWS}, "must hold whole numbers 'tokens'"),
        ({"tokens": ROWS.float()}, "must hold whole numbers 'tokens'"),
        ({"tokens": ROWS[:0]}, "must hold whole numbers 'tokens'"),
        ({"tokens": ROWS + VOCAB}, "it was made with another vocabulary"),
        ({"tokens": ROWS.repeat(1, 2)}, "has rows of 16 tokens, and the model takes 12"),
        ({"tokens": ROWS, "valid": ROWS[:, :2] > 0}, "must hold 'valid' of the shape of tokens"),
        ({"tokens": ROWS, "valid": ROWS < 0}, "no token to learn in example 1"),
        ({"tokens": ROWS, "position_ids": ROWS[:2]}, "must hold 'position_ids' for its 6 examples"),
        ({"tokens": torch.full_like(ROWS, MASK)}, "has the mask token 4 among the tokens to learn"),
    ],
)
def test_tokens_that_cannot_serve_are_named(folder, tmp_path, capsys, tensors, message):
    path = tmp_path / "tokens.safetensors"
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    assert command.main(refused(folder, path, tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_serve_is_named(folder, texts, tmp_path, capsys):
    def error(model, *options: str) -> str:
        assert command.main(refused(model, texts, tmp_path, *options)) == 2
        found = capsys.readouterr().err.splitlines()
        return found[-1]

    assert "gives no masked language model" in error(tmp_path / "nothing")
    encoder = tmp_path / "encoder"
    tiny("Bert").bert.save_pretrained(encoder)
    assert "must come with its output layer" in error(encoder)
    bare = tmp_path / "bare"
    tiny("Bert").save_pretrained(bare)
    # Where there is no tokenizer, transformers makes one that knows no word.
    assert "are unknown to the tokenizer" in error(bare)
    assert "has no mask token; say which id it is" in error(bare, "--no-tokenizer")
    assert "is text, and the model has no tokenizer" in error(
        bare, "--no-tokenizer", "--mask-id", "4"
    )
    assert "mask_id must be in [0, 23), got 23" in error(folder, "--mask-id", "23")
    words = {word: i for i, word in enumerate([*WORDS, *"ABCD"])}
    tiny("Bert").save_pretrained(bare)
    transformers.BertTokenizer(vocab=words, do_lower_case=False).save_pretrained(bare)
    assert "has 27 tokens and its model 23" in error(bare)
    assert "length must be between 1 and 12, got 13" in error(folder, "--length", "13")
    assert "device tpu9 cannot be used" in error(folder, "--device", "tpu9")


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    texts, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert command.main(refused("any", texts, tmp_path)) == 2
    assert "pip install 'di4c_fast[pretrained]'" in capsys.readouterr().err


def test_a_folder_that_is_no_students_is_named(folder, tmp_path, capsys):
    assert sample.main([str(folder)]) == 2
    assert "is not a student's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": 0.0}, "lr must be in"),
        ({"ema_decay": 1.0}, "ema_decay must be in"),
        ({"teacher_step": 2.0}, "teacher_step must be in"),
    ],
)
def test_a_recipe_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)
