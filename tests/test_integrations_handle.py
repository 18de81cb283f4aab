"""Replacing attributes and putting them back, and what all drop-ins do alike."""

from __future__ import annotations

import pathlib
import re
import types

import dit_models
import pytest
import test_integrations_dream as dream_cases
import test_integrations_llada as llada_cases
import test_integrations_maskgit as maskgit_cases
import test_integrations_mdlm as mdlm_cases
import test_integrations_sdtt as sdtt_cases
import test_integrations_tauldr as tauldr_cases
import torch
from torch import nn

from di4c_fast.integrations import dream, llada, maskgit, mdlm, sdtt, tauldr
from di4c_fast.integrations._handle import Handle, check_attributes
from di4c_fast.models import with_latent_shift
from di4c_fast.processes import MaskedProcess, MaskGITProcess
from di4c_fast.training import DistillConfig, Distiller


class Parent:
    def sample(self):
        return "parent"


class Child(Parent):
    pass


def test_inherited_methods_are_uncovered_again():
    child = Child()
    with Handle(child, "sample", lambda: "replaced"):
        assert child.sample() == "replaced"
    assert child.sample() == "parent"
    assert vars(child) == {}
    with Handle(Child, "sample", lambda self: "class"):
        assert child.sample() == "class"
        assert Parent().sample() == "parent"
    assert "sample" not in vars(Child)


def test_own_attributes_come_back():
    owner = types.SimpleNamespace(a=1, b=None)
    handle = Handle()
    handle.replace(owner, "a", 2)
    handle.replace(owner, "b", 3)
    handle.replace(owner, "c", 4)
    handle.replace(owner, "a", 5)
    assert vars(owner) == {"a": 5, "b": 3, "c": 4}
    handle.remove()
    handle.remove()
    assert vars(owner) == {"a": 1, "b": None}


def test_attributes_of_modules_come_back():
    module = nn.Linear(1, 1)
    forward = module.forward
    with Handle(module, "forward", lambda x: "replaced"):
        assert module.forward(0) == "replaced"
    assert module.forward == forward


def test_leaving_by_an_error_undoes_too():
    child = Child()
    with pytest.raises(KeyError, match="inside"), Handle(child, "sample", None):
        raise KeyError("inside")
    assert child.sample() == "parent"


def test_later_replacements_must_be_undone_first():
    child = Child()
    first, second = Handle(child, "sample", "first"), Handle(child, "sample", "second")
    with pytest.raises(RuntimeError, match="sample of Child has been replaced again"):
        first.remove()
    assert child.sample == "second"
    second.remove()
    assert child.sample == "first"
    first.remove()
    assert child.sample() == "parent"


def test_what_cannot_be_replaced_leaves_nothing_to_undo():
    handle = Handle()
    for owner, name in ((object(), "sample"), (int, "real")):
        with pytest.raises(TypeError):
            handle.replace(owner, name, None)
    handle.remove()


def test_missing_attributes_are_named():
    check_attributes(Child(), "trainer", ("sample",))
    with pytest.raises(TypeError, match="trainer must have the attributes sample, vit, ae, got "):
        check_attributes(Child(), "trainer", ("sample", "vit", "ae"))
    with pytest.raises(TypeError, match=r"got Child without vit$"):
        check_attributes(Child(), "trainer", ("sample", "vit"))


# All drop-ins: the object, the attribute that is replaced, how, and a call that draws tokens


def mdlm_case():
    model = mdlm_cases.Diffusion(batch=6, length=9).eval()
    return model, "_sample", lambda: mdlm.accelerate_mdlm(model), lambda: model._sample()


def sdtt_case():
    model = sdtt_cases.SDTT(student=True).eval()
    accelerate = lambda: sdtt.accelerate_sdtt(model)  # noqa: E731
    return model, "sample", accelerate, lambda: model.sample(4, 3, 9)


def maskgit_case(accelerate=maskgit.accelerate_di4c):
    trainer = maskgit_cases.ViTTrainer(maskgit_cases.Network())
    draw = {"nb_sample": 3, "step": 3}
    return trainer, "sample", lambda: accelerate(trainer), lambda: trainer.sample(**draw)[1][-1]


def first_maskgit_case():
    return maskgit_case(maskgit.accelerate_valeoai)


def own_maskgit_case():
    trainer, *rest = maskgit_case()
    trainer.sample = trainer.sample  # an attribute of the instance
    return trainer, *rest


def tauldr_case():
    sampling, losses = tauldr_cases.modules()
    model, sampler = tauldr_cases.ImageModel(), sampling.PCTauLeaping(tauldr_cases.config())
    run = lambda: torch.from_numpy(sampler.sample(model, 9, 0)[0])  # noqa: E731
    accelerate = lambda: tauldr.accelerate_tauldr(losses, sampling)  # noqa: E731
    return sampling.PCTauLeaping, "sample", accelerate, run


def llada_case(module=llada_cases.llada_module, take=lambda tokens: tokens):
    module, model = module(), llada_cases.FakeLLaDA(8)
    sizes = {"steps": 4, "gen_length": 8, "block_length": 8, "temperature": 1.0}
    rest = {"remasking": "random", "mask_id": llada_cases.MASK}
    run = lambda: take(module.generate(model, llada_cases.prompt_of(), **sizes, **rest))  # noqa: E731
    return module, "generate", lambda: llada.accelerate(module, exclude_mask=True), run


def fast_dllm_case():
    return llada_case(llada_cases.fast_dllm_module, lambda tokens_and_calls: tokens_and_calls[0])


def dream_case():
    model = dream_cases.FakeDream(7)
    config = dream_cases.Config(alg="entropy", temperature=1.0, top_p=0.95, alg_temp=0.5)
    run = lambda: model.diffusion_generate(dream_cases.prompt_of(), config)  # noqa: E731
    return model, "_sample", lambda: dream.accelerate(model), run


DROP_INS = [
    mdlm_case, sdtt_case, maskgit_case, first_maskgit_case, own_maskgit_case, tauldr_case,
    llada_case, fast_dllm_case, dream_case,
]  # fmt: skip


@pytest.mark.parametrize("case", DROP_INS)
def test_drop_ins_draw_from_the_default_generator_and_are_undone(case):
    owner, name, accelerate, run = case()
    before, own = getattr(owner, name), name in vars(owner)
    handle = accelerate()
    assert type(handle) is Handle
    assert getattr(owner, name) != before
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(first, run())
    assert first.dtype == torch.int64
    assert not torch.equal(first, second)
    handle.remove()
    handle.remove()
    assert (getattr(owner, name), name in vars(owner)) == (before, own)
    with accelerate():
        assert getattr(owner, name) != before
    assert (getattr(owner, name), name in vars(owner)) == (before, own)


def test_the_imports_and_calls_of_the_documentation_exist():
    page = pathlib.Path(__file__).parent.parent / "docs" / "drop-ins.md"
    text, scope = page.read_text(encoding="utf-8"), {}
    for statement in re.findall(r"`(from di4c_fast[^`]+)`", text):
        exec(statement, scope)
    calls = re.findall(r"`(mdlm|sdtt|maskgit|tauldr|llada|dream)\.(\w+)\(", text)
    assert len(calls) >= 12
    for module, name in calls:
        assert hasattr(scope[module], name), f"{module}.{name}"


# Their models in training


def sdtt_models():
    model = sdtt_cases.SDTT(student=True)
    teacher = sdtt.as_model(model, dit_models.DIT(seed=1).eval())
    return sdtt.as_model(model), teacher, MaskedProcess(dit_models.MASK), (7,), {}


def mdlm_models():
    student = with_latent_shift(mdlm.as_model(mdlm_cases.Diffusion()), "model.vocab_embed")
    teacher = mdlm.as_model(mdlm_cases.Diffusion())
    return student, teacher, MaskedProcess(dit_models.MASK), (7,), {}


def maskgit_models():
    networks = [maskgit_cases.Network(seed) for seed in (0, 1)]
    models = [maskgit.as_model(maskgit_cases.ViTTrainer(network)) for network in networks]
    context = {"labels": torch.tensor([0, 1]), "drop": torch.tensor([True, False])}
    process = MaskGITProcess(maskgit_cases.CODES, exclude_mask=False)
    return *models, process, (maskgit_cases.POSITIONS,), context


def tauldr_models():
    network = tauldr_cases.ImageModel(latent=True)
    teacher = tauldr.as_model(tauldr_cases.ImageModel())
    return tauldr.as_model(network), teacher, tauldr.process_of(network), (tauldr_cases.D,), {}


@pytest.mark.parametrize("make", [sdtt_models, mdlm_models, maskgit_models, tauldr_models])
def test_models_are_distilled_with_the_draws_in_eval_mode(make):
    student, teacher, process, shape, context = make()
    modes = []
    student.train().register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    distiller = Distiller(
        student, teacher, torch.optim.SGD(student.parameters(), lr=0.1), process=process,
        config=DistillConfig(components=2, teacher_step=0.2, low_t=0.0),
    )  # fmt: skip
    before = {name: value.clone() for name, value in student.state_dict().items()}
    metrics = distiller.step(torch.zeros(2, *shape, dtype=torch.int64), context=context)
    assert bool(metrics["loss"].isfinite())
    assert modes[:2] == [True, False]  # x_t, then x_u
    assert all(name.startswith(("model.", "latent.")) for name in before)
    assert any(not torch.equal(v, before[name]) for name, v in student.state_dict().items())
