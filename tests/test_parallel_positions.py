"""Positions of the same examples on several ranks, with a vocabulary on others: 2 x 2 processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from distill_support import CONFIG, MASK, PROCESS, VOCAB, UniformNoise, rng
from loss_cases import make_problem, run_loss
from parallel_support import assert_near, launch, refused
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from di4c_fast import LinearHead, correlation, mixture_log_prob
from di4c_fast.models import LatentShift
from di4c_fast.processes import MaskGITProcess
from di4c_fast.training import Distiller, DistillModule, distill_step

CUTS = {2: (0, 3, 5), 1: (0, 5)}  # positions of each rank of a group
COLUMNS = (0, 4, VOCAB)
X0 = torch.randint(MASK, (4, 5), generator=rng(2))
BACKEND = dataclasses.replace(CONFIG, backend="torch")


class Pointwise(nn.Module):
    """Positions that see nothing of each other; this rank's columns of the output layer."""

    def __init__(self, latent, seed, part=slice(0, 5), columns=(0, VOCAB), group=None):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mix = nn.Embedding(VOCAB, 8), nn.Linear(8, 8)
        self.place = nn.Parameter(torch.randn(5, 8))
        self.latent = LatentShift(8, zero_init=False) if latent else None
        out = torch.randn(VOCAB, 8)
        self.out = nn.Parameter(out[slice(*columns)].clone())
        self.double()
        self.part = part
        self.where = {"columns": columns, "vocabulary": VOCAB, "group": group} if group else {}

    def forward(self, tokens, t, latent=None):
        h = self.embed(tokens) + self.place[self.part]
        h = torch.tanh(self.mix(h if self.latent is None else self.latent(h, latent)))
        return LinearHead(h, self.out, **self.where)


def models(**options):
    return Pointwise(True, 0, **options), Pointwise(False, 1, **options)


def given(process=PROCESS):
    """What a step would draw, for all positions."""
    g = rng(5)
    latent = torch.rand(4, 3, 1, generator=g, dtype=torch.float64)
    xt = torch.where(torch.rand(4, 5, generator=g) < 0.6, MASK, X0)
    xu = torch.where(torch.rand(4, 2, 5, generator=g) < 0.7, xt.unsqueeze(1), X0.unsqueeze(1))
    own = torch.randint(MASK, (4, 2, 5), generator=g)
    found = {
        "t": torch.tensor([0.9, 0.5, 0.7, 0.8]),
        "latent": latent,
        "latent_u": latent[:, :2],
        "xt": xt,
        "xu": xu,
        "consistency_x": torch.where(xu == MASK, own, xu),
        "valid": torch.rand(4, 5, generator=g) < 0.9,
    }
    if process.component_time is not None:
        found |= {"t_min": found["latent"][..., 0].float(), "latent_min": latent}
        found["x_min"] = X0.unsqueeze(1).expand(4, 3, 5)
    return found


def cut(tensors, part):
    """The positions of this rank."""
    names = ("xt", "xu", "consistency_x", "valid", "x_min")
    return {k: v[..., part] if k in names else v for k, v in tensors.items()}


def gradients(module):
    return {f"gradient {name}": p.grad.clone() for name, p in module.named_parameters()}


def one_step(process, part=slice(0, 5), **options):
    student, teacher = models(part=part, **options.pop("models", {}))
    output = distill_step(
        student, teacher, X0[:, part], process=process, config=BACKEND, return_terms=True,
        **cut(given(process), part), **options,
    )  # fmt: skip
    output.loss.backward()
    terms = output.terms._asdict()
    return {"loss": output.loss.detach(), **terms}, gradients(student)


def whole_problem():
    problem = make_problem(6, vocabulary=VOCAB, mask_id=MASK, revealed=True, padded=True)
    g = rng(8)
    leaves = {
        "hidden": torch.randn(2, 3, 5, 4, generator=g, dtype=torch.float64),
        "weight": torch.randn(VOCAB, 4, generator=g, dtype=torch.float64),
        "log_weights": torch.randn(2, 3, generator=g, dtype=torch.float64),
    }
    return problem, leaves


def evaluated(part=slice(0, 5), columns=(0, VOCAB), group=None, position_group=None):
    problem, leaves = whole_problem()
    where = {} if group is None else {"columns": columns, "vocabulary": VOCAB, "group": group}
    leaves["hidden"] = leaves["hidden"][:, :, part]
    leaves["weight"] = leaves["weight"][slice(*columns)]
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    head = LinearHead(leaves["hidden"], leaves["weight"], **where)
    call = {k: v[..., part] if k in ("x0", "xt", "xu", "valid", "consistency_x") else v
            for k, v in problem.items()}  # fmt: skip
    for name in ("teacher", "consistency"):
        # Heads of the same columns: identity weights would be logits, so any hidden states do.
        hidden = problem[name][..., part, :4]
        call[name] = LinearHead(hidden, leaves["weight"].detach(), **where)
    call |= {"student": head, "log_weights": leaves["log_weights"]}
    options = {"position_group": position_group, "backend": "torch"}
    value, terms = run_loss(call, return_terms=True, component_weight=0.3, **options)
    x = {"xt": call["xt"], "mask_id": MASK, "valid": call["valid"]}
    rows = {
        function.__name__: function(head.detach(), call["x0"], **x, **options)
        for function in (mixture_log_prob, correlation)
    }
    value.backward()
    found = {"loss": value.detach(), **terms._asdict(), **rows}
    return found, {name: leaf.grad for name, leaf in leaves.items()}


def four(rank, size):
    """Ranks 0 1 share positions a, 2 3 positions b; 0 2 and 1 3 have one part of the columns."""
    positions = [dist.new_group([i, i + 2]) for i in range(2)][rank % 2]
    vocabulary = [dist.new_group([2 * i, 2 * i + 1]) for i in range(2)][rank // 2]
    pair = [dist.new_group([2 * i, 2 * i + 1]) for i in range(2)][rank // 2]
    part = slice(*CUTS[2][rank // 2 :][:2])
    columns = COLUMNS[rank % 2 :][:2]
    both = {"part": part, "columns": columns, "group": vocabulary}
    found = {"loss": evaluated(position_group=positions, **both)}
    sharded = {"columns": columns, "group": vocabulary}
    found["step"] = one_step(PROCESS, part, position_group=positions, models=sharded)
    found["own pass"] = one_step(UniformNoise(), part, position_group=positions, models=sharded)

    # Two halves of the batch, the positions of each on two ranks.
    here = slice(*CUTS[2][rank % 2 :][:2])
    examples = slice(0, 1) if rank < 2 else slice(1, 4)
    found["trained"] = trained(here, examples, pair)
    found["drawn"] = drawn(here, pair)

    def other():
        return distill_step(*models(part=here), X0[:, here], process=PROCESS, config=BACKEND,
                            position_group=pair, generator=rng(rank % 2))  # fmt: skip

    def maskgit():
        return distill_step(*models(part=here), X0[:, here], process=MaskGITProcess(MASK),
                            config=BACKEND, position_group=pair)  # fmt: skip

    def one_rank():
        x0 = X0[:, here].float() if rank % 2 else X0[:, here]
        return distill_step(*models(part=here), x0, process=PROCESS, config=BACKEND,
                            position_group=pair)  # fmt: skip

    tries = {"other": other, "maskgit": maskgit, "one rank": one_rank}
    return found | {name: refused(work) for name, work in tries.items()}


def trained(part, examples, group):
    """Two steps of a distiller with given draws."""
    student, teacher = models(part=part)
    module = DistillModule(student, teacher, process=PROCESS, config=BACKEND)
    if group is not None:
        module = DistributedDataParallel(module)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller.of(module, optimizer, generator=rng())
    options = {k: v[examples] for k, v in cut(given(), part).items()}
    if group is not None:
        options["position_group"] = group
    metrics = [distiller.step(X0[examples, part], **options) for _ in range(2)]
    return metrics, {name: p.detach().clone() for name, p in student.named_parameters()}


def drawn(part, group):
    """Tokens that ranks draw of their own positions, batch-wise and example by example."""
    found = []
    for generator in (rng(3), [rng(i) for i in range(4)]):
        output = distill_step(
            *models(part=part),
            X0[:, part],
            process=PROCESS,
            config=BACKEND,
            position_group=group,
            generator=generator,
        )
        found.append({name: getattr(output, name) for name in ("t", "u", "latent", "xt")})
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = launch(four, 4, tmp_path_factory.mktemp("four"))
    for one in found:
        assert isinstance(one, dict), one
    return found


def test_loss_and_gradients_of_positions_and_columns_on_four_ranks(ranks):
    values, gradient = evaluated()
    for rank, one in enumerate(ranks):
        part, columns = slice(*CUTS[2][rank // 2 :][:2]), slice(*COLUMNS[rank % 2 :][:2])
        ours, own = one["loss"]
        assert_near(ours, values)
        assert_near(own, own | {"hidden": gradient["hidden"][:, :, part]})
        assert_near(own, own | {"log_weights": gradient["log_weights"]})
        other = ranks[(rank + 2) % 4]["loss"][1]["weight"]
        torch.testing.assert_close(own["weight"] + other, gradient["weight"][columns])


@pytest.mark.parametrize(("case", "process"), [("step", PROCESS), ("own pass", UniformNoise())])
def test_a_step_of_positions_and_columns_on_four_ranks(ranks, case, process):
    values, gradient = one_step(process)
    for rank, one in enumerate(ranks):
        ours, own = one[case]
        assert_near(ours, values)
        other = ranks[(rank + 2) % 4][case][1]
        for name, whole in gradient.items():
            rows = slice(*COLUMNS[rank % 2 :][:2]) if name.endswith("out") else slice(None)
            torch.testing.assert_close(own[name] + other[name], whole[rows], msg=name)


def test_a_distiller_counts_the_examples_of_a_position_group_once(ranks):
    metrics, weights = trained(slice(0, 5), slice(None), None)
    for one in ranks:
        ours, theirs = one["trained"]
        assert_near(theirs, weights)
        for mine, whole in zip(ours, metrics, strict=True):
            assert_near(mine, whole)


def test_ranks_draw_the_same_times_and_tokens_of_their_own(ranks):
    for one, other in zip(ranks[0]["drawn"], ranks[1]["drawn"], strict=True):
        for name in ("t", "u", "latent"):
            assert torch.equal(one[name], other[name])
        masks = [values["xt"] == MASK for values in (one, other)]
        assert not torch.equal(masks[0][:, :2], masks[1])


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "other": "times, latents, row_keys or step differ",
        "maskgit": "position_group needs a process of separate positions, got MaskGIT",
        "one rank": "TypeError: x0 must have dtype torch.int64, got torch.float32",
    }.items(),
)
def test_what_is_wrong_is_an_error_on_every_rank(ranks, case, message):
    for one in ranks:
        assert message in one[case]
