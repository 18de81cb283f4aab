"""Students from teachers: a latent token for transformers, a shift for any submodule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead, TensorHead, as_head
from di4c_fast.models.wrappers import with_latent_shift, with_latent_token
from di4c_fast.processes import MaskedProcess
from di4c_fast.samplers import sample_masked
from di4c_fast.training import EMA, DistillConfig, Distiller, distill_step

V, M, D, C = 9, 8, 6, 8
TOKENS = torch.randint(M, (4, D), generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.2, 0.5, 0.7, 1.0])


def latents(dim: int = 1, seed: int = 0, rows: int = 4) -> Tensor:
    return torch.rand(rows, dim, generator=torch.Generator().manual_seed(seed))


class TimeModel(nn.Module):
    """A denoiser with a time embedding, as those of images have."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(V, C)
        self.time = nn.Sequential(nn.Linear(1, 2 * C), nn.SiLU(), nn.Linear(2 * C, C), nn.SiLU())
        self.norm = nn.BatchNorm1d(C)
        self.out = nn.Linear(C, V)
        self.unused = nn.Linear(C, C)
        self.pair = nn.Identity()

    def forward(self, tokens, t, label=None):
        shift = self.time(t.to(self.out.weight.dtype)[:, None])[:, None]
        if label is not None:
            shift = shift + label[:, None, None]
        h = torch.tanh(self.embed(tokens) + shift)
        return self.out(h + h.mean(1, keepdim=True))


# A shift of what a submodule returns


@pytest.mark.parametrize("module", ["time", "time.0", "embed"])
@pytest.mark.parametrize("dim", [1, 3])
def test_a_shifted_student_starts_exactly_at_its_teacher_and_leaves_it(module, dim):
    teacher = TimeModel().eval()
    student = with_latent_shift(teacher, module, latent_dim=dim)
    label = torch.arange(4.0)
    expected = teacher(TOKENS, T, label=label)
    for seed in range(2):
        assert torch.equal(student(TOKENS, T, latents(dim, seed), label=label), expected)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        student(TOKENS, T, latents(dim)).logsumexp(-1).square().mean().backward()
        optimizer.step()
    one, other = (student(TOKENS, T, latents(dim, seed)) for seed in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(teacher(TOKENS, T, label=label), expected)


@pytest.mark.parametrize(
    ("module", "width"), [("time", C), ("time.0", 2 * C), ("embed", C), ("out", V), ("norm", None)]
)
def test_the_width_is_read_off_the_submodule(module, width):
    if width is None:
        with pytest.raises(ValueError, match="width is needed: that of 'norm', a BatchNorm1d"):
            with_latent_shift(TimeModel(), module)
        width = 5
        student = with_latent_shift(TimeModel(), module, width=width)
    else:
        student = with_latent_shift(TimeModel(), module)
    assert student.latent.embedding.width == width
    model = TimeModel()
    model.second_name = model.get_submodule(module)
    assert with_latent_shift(model, "second_name", width=width).module == "second_name"


def test_a_copy_learns_even_of_a_frozen_teacher():
    teacher = TimeModel().requires_grad_(False)
    student = with_latent_shift(teacher, "time")
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())
    partly = TimeModel()
    partly.embed.requires_grad_(False)
    embed = with_latent_shift(partly, "time").model.embed
    assert not any(p.requires_grad for p in embed.parameters())
    shared = with_latent_shift(teacher, "time", copy=False)
    assert shared.model is teacher
    assert not any(p.requires_grad for p in teacher.parameters())


def shifted_student():
    teacher = TimeModel().eval()
    student = with_latent_shift(teacher, "time", zero_init=False, scale=10.0, frequencies=8)
    assert student.latent.embedding.scale == 10.0
    assert student.latent.embedding.hidden.in_features == 8
    return teacher, student, TOKENS, "module='time'"


def student_with_a_token():
    from di4c_fast.integrations.huggingface import MaskedLM

    teacher, tokens = family_models("Bert")
    student = with_latent_token(MaskedLM(teacher, linear_head=False), zero_init=False)
    assert with_latent_token(teacher, copy=False).model is teacher
    return teacher, student, tokens, "linear_head=False, mask_key=False"


@pytest.mark.parametrize("make", [shifted_student, student_with_a_token])
def test_a_student_is_a_module_like_any_other_and_can_use_its_latent_at_once(make):
    teacher, student, tokens, text = make()
    assert student.model is not teacher
    names = set(student.state_dict())
    assert {f"model.{name}" for name in teacher.state_dict()} < names
    assert all(name.startswith(("model.", "latent.")) for name in names)
    assert len(list(student.parameters())) == len(list(teacher.parameters())) + 4
    assert text in repr(student)
    assert not student.training
    assert all(module.training for module in student.train().modules())
    other = copy.deepcopy(student.eval().double())

    def logits(student, seed: int = 0) -> Tensor:
        return as_head(student(tokens, T, latents(seed=seed))).logits()

    before = logits(student)
    assert float((before - logits(student, 1)).abs().max()) > 1e-3
    assert before.dtype == torch.float64
    with torch.no_grad():
        other.latent.embedding.project.bias.add_(1.0)
    assert torch.equal(logits(student), before)
    assert not torch.equal(logits(other), before)
    other.load_state_dict(student.state_dict())
    assert torch.equal(logits(other), before)
    for module in (*student.modules(), *teacher.modules()):
        assert not module._forward_hooks


def test_a_shifted_student_is_distilled_saved_and_resumed(tmp_path):
    def build(seed):
        student = with_latent_shift(teacher, "time")
        optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
        return Distiller(
            student, teacher, optimizer, process=MaskedProcess(M), ema=EMA(student, 0.9),
            config=DistillConfig(components=3, teacher_step=0.3),
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    teacher = TimeModel()
    whole, resumed = build(0), build(1)
    for _ in range(2):
        whole.step(TOKENS)
    whole.save(tmp_path / "a")
    resumed.load(tmp_path / "a")
    for distiller in (whole, resumed):
        distiller.step(TOKENS)
    states = [distiller.student.state_dict() for distiller in (whole, resumed)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    tokens = sample_masked(whole.student, (2, D), mask_id=M, steps=3, latent_dim=1, seed=0)
    assert tokens.shape == (2, D)


def test_a_module_that_fails_leaves_no_hook():
    student = with_latent_shift(TimeModel(), "time")
    with pytest.raises(TypeError, match="unexpected keyword argument 'odd'"):
        student(TOKENS, T, latents(), odd=1)
    assert not student.model.time._forward_hooks


@wrong(
    [
        ({"model": "model"}, TypeError, "model must be an nn.Module, got str 'model'"),
        ({"module": 3}, TypeError, "module must be the name of a submodule, got int 3"),
        (
            {"module": "tim"},
            "module must name a submodule of the model, such as ['embed', 'time', ... got 'tim'",
        ),
        ({"module": ""}, "module must name a submodule of the model"),
        (
            {"model": nn.Linear(2, 2)},
            "module must name a submodule of the model, which has none, got 'time'",
        ),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"latent_dim": 0}, "dim must be at least 1, got 0"),
        ({"frequencies": 7}, "frequencies must be even, got 7"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"copy": None}, TypeError, "copy must be True or False, got NoneType"),
    ]
)
def test_a_shift_names_what_is_wrong(wrong: Wrong):
    with wrong.raises():
        with_latent_shift(**{"model": TimeModel(), "module": "time", **wrong.what})


def test_a_shifted_call_names_what_is_wrong():
    student = with_latent_shift(TimeModel(), "time", latent_dim=2)
    with pytest.raises(ValueError, match=r"latent must have shape \(R, L\) = \(4, 2\), got \(4, 1"):
        student(TOKENS, T, latents())
    with pytest.raises(TypeError, match="latent must be floating point"):
        student(TOKENS, T, torch.zeros(4, 2).long())
    with pytest.raises(ValueError, match=r"x must have shape .* with C = 5, got \(4, 8\)"):
        with_latent_shift(TimeModel(), "time", width=5)(TOKENS, T, latents())
    with pytest.raises(RuntimeError, match="did not call its module 'unused'"):
        with_latent_shift(TimeModel(), "unused")(TOKENS, T, latents())
    student = with_latent_shift(TimeModel(), "pair", width=C)
    student.model.time.append(student.model.pair)
    student.model.pair.forward = lambda x: (x, x)
    with pytest.raises(TypeError, match="the output of module 'pair' must be a Tensor, got tuple"):
        student(TOKENS, T, latents())


# A token in the input of a transformer


def family_models(family: str, **options) -> tuple[nn.Module, Tensor]:
    """A tiny model, and tokens with masks in them."""
    huggingface_models = pytest.importorskip("huggingface_models")
    tokens = torch.randint(5, huggingface_models.VOCAB, (4, 7))
    tokens[:, ::2] = huggingface_models.MASK
    return huggingface_models.tiny(family, **options), tokens


FAMILIES = ("Bert", "Roberta", "ModernBert", "DistilBert")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dim", [1, 2])
def test_a_token_nobody_attends_to_leaves_the_teacher_as_it_is(family, dim):
    teacher, tokens = family_models(family)
    student = with_latent_token(teacher, latent_dim=dim, zero_init=False, mask_key=True)
    attention = torch.ones_like(tokens)
    attention[1, 4:] = 0
    for context in ({}, {"attention_mask": attention}):
        head = student(tokens, T, latents(dim), **context)
        assert isinstance(head, LinearHead)
        seen = attention.bool() if context else torch.ones_like(tokens).bool()
        expected = teacher(tokens, **context).logits
        # Matrices of other sizes: rounding in another order.
        torch.testing.assert_close(head.logits()[seen], expected[seen], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_zero_token_has_no_influence_of_its_latent_until_it_learns(family):
    teacher, tokens = family_models(family)
    student = with_latent_token(teacher)
    first, second = (student(tokens, T, latents(seed=s)).logits() for s in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, teacher(tokens).logits)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        student(tokens, T, latents()).logits().logsumexp(-1).mean().backward()
        optimizer.step()
    first, second = (student(tokens, T, latents(seed=s)).logits() for s in range(2))
    assert float((first - second).detach().abs().max()) > 1e-5
    student.mask_key = True
    first, second = (student(tokens, T, latents(seed=s)).logits() for s in range(2))
    assert torch.equal(first, second)


def test_context_of_the_tokens_is_lengthened():
    teacher, tokens = family_models("Bert")
    student = with_latent_token(teacher, zero_init=False, mask_key=True)
    context = {
        "token_type_ids": torch.arange(7).expand(4, -1) // 4,
        "position_ids": torch.arange(7).flip(0).expand(4, -1),
    }
    expected = teacher(tokens, **context).logits
    assert not torch.allclose(expected, teacher(tokens).logits, atol=1e-2)
    torch.testing.assert_close(
        student(tokens, T, latents(), **context).logits(), expected, rtol=1e-4, atol=1e-5
    )


def test_the_models_own_logits_come_back_where_the_head_is_not_linear():
    teacher, tokens = family_models("Bert")
    options = {"zero_init": False}
    torch.manual_seed(0)
    linear = with_latent_token(teacher, **options)
    torch.manual_seed(0)
    plain = with_latent_token(teacher, linear_head=False, **options)
    head = plain(tokens, T, latents())
    assert isinstance(head, TensorHead)
    torch.testing.assert_close(
        head.logits(), linear(tokens, T, latents()).logits(), rtol=1e-5, atol=1e-6
    )
    # Known to be linear once, but no longer.
    linear.model.get_output_embeddings = lambda: None
    torch.testing.assert_close(linear(tokens, T, latents()).logits(), head.logits())


@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert"])
def test_a_student_of_a_masked_language_model_is_distilled_and_sampled(family):
    huggingface_models = pytest.importorskip("huggingface_models")
    from di4c_fast.integrations.huggingface import MaskedLM

    model, _ = family_models(family)
    teacher = MaskedLM(model)
    student = with_latent_token(teacher)
    mask = huggingface_models.MASK
    out = distill_step(
        student, teacher, torch.randint(5, huggingface_models.VOCAB, (3, 7)),
        process=MaskedProcess(mask), config=DistillConfig(components=2, teacher_step=0.5),
        generator=torch.Generator().manual_seed(0), t=torch.tensor([0.9, 0.5, 0.01]),
        context={"attention_mask": torch.ones(3, 7, dtype=torch.int64)},
    )  # fmt: skip
    out.loss.backward()
    gradient = student.latent.embedding.project.weight.grad
    assert float(gradient.abs().max()) > 0
    tokens = sample_masked(student, (2, 6), mask_id=mask, steps=3, latent_dim=1, seed=0)
    assert not bool((tokens == mask).any())


class NoEmbeddings(nn.Linear):
    def get_input_embeddings(self):
        return nn.Conv1d(1, 1, 1)


@wrong(
    [
        ({"model": "bert"}, TypeError, "model must be an nn.Module, got str 'bert'"),
        (
            {"model": TimeModel()},
            "model must have get_input_embeddings() and take inputs_embeds... got TimeModel; ",
        ),
        (
            {"model": NoEmbeddings(2, 2)},
            "the input embeddings of model must be an nn.Embedding, got Conv1d",
        ),
        ({"latent_dim": 0}, "dim must be at least 1, got 0"),
        ({"mask_key": 1}, TypeError, "mask_key must be True or False, got int 1"),
        ({"copy": 1}, TypeError, "copy must be True or False, got int 1"),
        ({"frequencies": 2}, "frequencies must be at least 4, got 2"),
    ]
)
def test_a_token_names_what_is_wrong(wrong: Wrong):
    model = None if "model" in wrong.what else family_models("Bert")[0]
    with wrong.raises():
        with_latent_token(**{"model": model, **wrong.what})


def test_a_call_with_a_token_names_what_is_wrong():
    teacher, tokens = family_models("Roberta")
    student = with_latent_token(teacher, latent_dim=2)
    with pytest.raises(ValueError, match=r"latent must have shape \(R, L\) = \(4, 2\), got \(4, 1"):
        student(tokens, T, latents())
    student(tokens.repeat(1, 2)[:, :10], T, latents(2))
    with pytest.raises(
        ValueError, match="tokens must have at most 10 positions, 12 of the model's position"
    ):
        student(tokens.repeat(1, 2)[:, :11], T, latents(2))


def test_a_model_that_treats_given_embeddings_otherwise_is_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.EsmConfig(
        vocab_size=9, mask_token_id=3, pad_token_id=1, token_dropout=True, **sizes
    )
    model = transformers.EsmForMaskedLM(config).eval()
    with pytest.raises(ValueError, match="token_dropout=True"):
        with_latent_token(model)
    model.config.token_dropout = False
    with_latent_token(model)
