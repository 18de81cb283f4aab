"""A vocabulary spread over gloo processes gives what one process with all of it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distill_support import CONFIG, MIXED, VOCAB, Recorder, models, step
from loss_cases import make_problem, run_loss
from loss_heads import ATOL, FULL, WIDTH
from sample_cases import normal
from sharded_support import (
    CASES,
    GROUPS,
    SHARDED,
    VOCABULARY,
    WORLDS,
    assert_raises,
    case,
    columns_of,
    evaluate,
    here,
    part_of,
    results,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from di4c_fast import (
    Draw,
    LinearHead,
    TensorHead,
    backends,
    correlation,
    mixture_log_prob,
    sample,
    samplers,
)
from di4c_fast.processes import GaussianProcess, MaskedProcess, MaskGITProcess
from di4c_fast.testing import assert_close_to_reference

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# The loss -----------------------------------------------------------------------------------------

PROBLEMS: dict[str, dict[str, Any]] = {
    "plain": {"component_weight": 0.3},
    "full": FULL,
    "full, teacher of several": FULL | {"teacher_components": 2, "mask_id": 10},
    "mask of the first column": {"mask_id": 0, "revealed": True},
    "no control variate": {"control_variate": False, "weighted": True},
    "no consistency": {"draws": None, "padded": True},
    "large logits": {"scale": 300.0, "component_weight": 0.2},
}
KINDS = ("tensor", "linear", "linear, bias", "linear, bias per position", "linear, capped")


def compare(
    problem: dict[str, Any], kind: str, assert_close: Callable[..., None], **settings: Any
) -> None:
    columns = columns_of(VOCABULARY)
    whole, ours = (evaluate(problem, kind, where, **settings) for where in (None, columns))
    for name, value in ours.items():
        assert_close(name, value, part_of(name.split()[-1], whole[name], columns))


def assert_equal_to_1e9(name: str, ours: Tensor, whole: Tensor) -> None:
    # Where a loss is huge, differences of joint likelihoods lose as many digits.
    assert torch.allclose(ours, whole, **CLOSE), f"{name}: {ours} is not {whole}"


@case(*PROBLEMS)
def float64_loss_and_gradients(name: str) -> None:
    problem = make_problem(vocabulary=VOCABULARY, **PROBLEMS[name])
    compare(problem, "tensor", assert_equal_to_1e9, backend="torch")


@case(*KINDS[1:])
def float64_linear_heads(kind: str) -> None:
    problem = make_problem(1, vocabulary=VOCABULARY, **FULL)
    compare(problem, kind, assert_equal_to_1e9, backend="torch")


@case(1, 4000, 10**6)
def linear_heads_in_chunks(budget: int) -> None:
    problem = make_problem(1, vocabulary=VOCABULARY, positions=40, **FULL)
    compare(problem, "linear, bias", assert_equal_to_1e9, backend="torch", budget_bytes=budget)


@case()
def hidden_gradients_that_are_not_added_up() -> None:
    problem = make_problem(1, vocabulary=VOCABULARY, **FULL)
    columns = columns_of(VOCABULARY)
    whole, ours = (
        evaluate(problem, "linear", at, reduce_hidden_grad=at is None) for at in (None, columns)
    )
    total = ours["gradient of hidden"].clone()
    assert not torch.allclose(total, whole["gradient of hidden"])
    dist.all_reduce(total, group=GROUPS[0])
    assert torch.allclose(total, whole["gradient of hidden"], **CLOSE)


@case("plain", "full")
def drawn_targets_are_those_of_one_process(name: str) -> None:
    problem = make_problem(2, vocabulary=VOCABULARY, **PROBLEMS[name])
    del problem["consistency_x"]
    compare(problem, "tensor", assert_equal_to_1e9, backend="torch")


@case("torch", "cpu", "triton")
def float32_within_the_bound(backend: str) -> None:
    if backends.unavailable(backend, torch.device("cpu")):
        return
    for kind in ("tensor", "linear, bias") if backend != "triton" else ("linear, bias",):
        problem = make_problem(4, vocabulary=VOCABULARY, **FULL)
        columns = columns_of(VOCABULARY)
        single = {
            n: v.float() if torch.is_tensor(v) and v.is_floating_point() else v
            for n, v in problem.items()
        }
        wide = {
            n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for n, v in single.items()
        }
        ours = evaluate(single, kind, columns, torch.float32, backend=backend)
        eager = evaluate(single, kind, None, torch.float32, backend="reference")
        truth = evaluate(wide, kind, None, backend="reference")
        for name, value in ours.items():
            last = name.split()[-1]
            atol = ATOL[torch.float32]["gradient" if "gradient" in name else "loss"]
            others = (part_of(last, found[name], columns) for found in (eager, truth))
            assert_close_to_reference(value, *others, atol=atol, name=f"{kind}: {name}")


@case(mixture_log_prob, correlation)
def likelihoods(function: Callable[..., Tensor]) -> None:
    problem = make_problem(vocabulary=VOCABULARY, **FULL)
    names = ("xt", "mask_id", "valid", "log_weights")
    given = {name: problem[name] for name in names} | {"backend": "torch"}
    columns = columns_of(VOCABULARY)
    values, gradients = [], []
    for where in (None, columns):
        logits = part_of("logits", problem["student"], where).clone().requires_grad_()
        head = TensorHead(logits, **here(where))
        values.append(function(head, problem["consistency_x"], **given))
        values[-1].sum().backward()
        gradients.append(logits.grad)
    assert torch.allclose(values[0], values[1], **CLOSE)
    assert torch.allclose(part_of("logits", gradients[0], columns), gradients[1], **CLOSE)


# Positions ----------------------------------------------------------------------------------------

POSITIONED = ("student", "teacher", "consistency", "x0", "consistency_x", "xt", "xu", "valid")


def positions_of(problem: dict[str, Any], positions: slice) -> dict[str, Any]:
    """The part of a problem at some positions; logits have them last but one."""
    found = dict(problem)
    for name in POSITIONED:
        if name in problem:
            at = (..., positions, slice(None)) if name in SHARDED else (..., positions)
            found[name] = problem[name][at]
    return found


@case("plain", "full", "no control variate", "large logits")
def positions_on_several_ranks(name: str) -> None:
    problem = make_problem(vocabulary=VOCABULARY, **PROBLEMS[name])
    start, stop = columns_of(5, (2, 3))
    here = slice(5 - stop, 5 - start)  # positions come in the order of the ranks
    given = {"backend": "torch", "position_group": GROUPS[0]}
    for drawn in (False, True):
        if drawn and "consistency_x" in problem:
            del problem["consistency_x"]
        whole = evaluate(problem, "tensor", None, backend="torch")
        ours = evaluate(positions_of(problem, here), "tensor", None, **given)
        for key, value in ours.items():
            expected = whole[key]
            if key == "gradient of logits":
                expected = expected[..., here, :]
            assert_equal_to_1e9(key, value, expected)


@case(mixture_log_prob, correlation)
def likelihoods_of_positions_on_several_ranks(function: Callable[..., Tensor]) -> None:
    problem = make_problem(vocabulary=VOCABULARY, padded=True, weighted=True)
    start, stop = columns_of(5, (2, 3))
    part = positions_of(problem, slice(start, stop))
    whole, ours = (
        function(given["student"], given["x0"], valid=given["valid"], position_group=group)
        for given, group in ((problem, None), (part, GROUPS[0]))
    )
    assert torch.allclose(whole, ours, **CLOSE)


@case()
def ranks_with_other_batches_of_positions_are_refused() -> None:
    problem = make_problem(vocabulary=VOCABULARY, batch=2 + dist.get_rank(GROUPS[0]))
    assert_raises("disagree", run_loss, problem, position_group=GROUPS[0])
    problem["x0"] = problem["x0"][:1] if dist.get_rank(GROUPS[0]) else problem["x0"]
    assert_raises("x0 must have shape", run_loss, problem, position_group=GROUPS[0])
    assert_raises("position_group must be", run_loss, make_problem(), position_group="rows")


# Draws --------------------------------------------------------------------------------------------

CUTS = {"within a block": (77, 90), "at blocks": (128, 256), "one column": (1, 2)}


def assert_same_draws(logits: Tensor, cuts: tuple[int, ...], **options: Any) -> None:
    columns = columns_of(logits.shape[-1], cuts)
    shard = TensorHead(logits[..., slice(*columns)], **here(columns))
    if "guidance" in options:
        other, scale = options["guidance"]
        part = TensorHead(other[..., slice(*columns)], **here(columns))
        ours = sample(shard, **options | {"guidance": (part, scale)})
    else:
        ours = sample(shard, **options)
    whole = sample(logits, backend="torch", **options)
    for name, value, expected in zip(Draw._fields, ours, whole, strict=True):
        assert (value is None) == (expected is None), name
        if value is not None:
            assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6), name
            if value.dtype == torch.int64:
                assert value.equal(expected), f"{name}: {value} is not {expected}"


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "mixed temperatures": {"temperature": torch.tensor([0.0, 0.5, 1.0, 2.0] * 10)},
    "mask": {"mask_id": 299},
    "top k": {"top_k": 7, "temperature": 0.8},
    "top p": {"top_p": 0.9, "mask_id": 3},
    "top p of ties": {"top_p": 0.5, "top_k": 20},
    "guidance": {"guidance": (normal(40, 300, seed=9), 0.7)},
}


@case(*CUTS)
def tokens_are_those_of_one_process(cuts: str) -> None:
    for name, options in OPTIONS.items():
        logits = normal(40, 300, seed=1)
        if "ties" in name:
            logits = logits.round()
        if name == "plain":
            logits[0, :80] = float("-inf")
            logits[1, 100:] = float("-inf")
        assert_same_draws(logits, CUTS[cuts], seed=3, want="all", **options)


@case()
def equal_logits_take_the_lowest_id() -> None:
    logits = torch.zeros(3, 300)
    logits[1, :100] = -1.0
    assert_same_draws(logits, (77, 90), temperature=0.0, want="all")


@case()
def tokens_of_a_linear_head_in_groups_of_rows() -> None:
    hidden, weight = normal(150, WIDTH), normal(300, WIDTH, seed=1)
    columns = columns_of(300, (100, 170))
    head = LinearHead(hidden, weight[slice(*columns)], softcap=3.0, **here(columns))
    ours = sample(head, seed=1, budget_bytes=1)
    assert ours.token.equal(sample(LinearHead(hidden, weight, softcap=3.0), seed=1).token)


def model_of(columns: tuple[int, int] | None) -> Callable[..., TensorHead]:
    table = normal(300, 299, seed=5)  # logits that follow from the token

    def model(tokens: Tensor, t: Tensor) -> TensorHead:
        logits = torch.nn.functional.pad(table[tokens] * 0.3, (0, 1))
        return TensorHead(part_of("logits", logits, columns), **here(columns))

    return model


@case("sample_masked", "sample_maskgit", "sample_confidence", "sample_canvas")
def samplers_draw_the_same(name: str) -> None:
    columns = columns_of(300, (77, 90))
    how = {"vocab_size": 300} if name == "sample_canvas" else {"mask_id": 299}
    whole, ours = (
        getattr(samplers, name)(
            model_of(at), (3, 8), steps=4, generator=torch.Generator().manual_seed(0), **how
        )
        for at in (None, columns)
    )
    assert whole.equal(ours)


class LastRows(torch.nn.Module):
    """A model whose output layer has some of the rows of another's."""

    def __init__(self, model: Recorder, columns: tuple[int, int] | None):
        super().__init__()
        self.model, self.columns = model, columns

    def forward(self, tokens: Tensor, t: Tensor, *latent: Tensor) -> LinearHead:
        head = self.model(tokens, t, *latent)
        weight, bias = (part_of(n, getattr(head, n), self.columns) for n in ("weight", "bias"))
        return LinearHead(head.hidden, weight, bias, **here(self.columns))


@case()
def a_distillation_step_is_the_same() -> None:
    columns, found = columns_of(VOCAB, (2, 3)), []
    for at in (None, columns):
        pair = models(head=True)
        config = dataclasses.replace(CONFIG, backend="torch")
        output = step(*(LastRows(model, at) for model in pair), MIXED, config)
        output.loss.backward()
        rows = part_of("weight", pair[0].out.weight.grad, columns)
        found.append((output.loss, pair[0].embed.weight.grad, rows))
    for name, whole, ours in zip(("loss", "embedding", "rows"), *found, strict=True):
        assert_equal_to_1e9(name, ours, whole)


@case()
def processes_step_the_same() -> None:
    columns = columns_of(300, (77, 90))
    xt, t, u = torch.full((2, 6), 299), torch.full((2,), 0.8), torch.full((2,), 0.3)
    for process in (MaskedProcess(299), MaskGITProcess(299)):
        whole, ours = (
            process.teacher_step(
                xt, t, u, model_of(at)(xt, t), 3, generator=torch.Generator().manual_seed(1)
            )
            for at in (None, columns)
        )
        assert whole.equal(ours)
    head = model_of(columns)(xt, t)
    assert_raises("takes no shard", GaussianProcess(300).teacher_step, xt, t, u, head, 1)


@case()
def rows_that_cannot_be_drawn_are_refused() -> None:
    columns = columns_of(300, (77, 90))
    for value in (float("nan"), float("inf")):
        logits = normal(4, 300)
        logits[2, 299] = value
        head = TensorHead(part_of("logits", logits, columns), **here(columns))
        assert_raises("NaN or", sample, head)
        assert sample(head, check=False).token[2] == -1


@case()
def draws_of_the_default_generator_are_those_of_the_first_rank() -> None:
    torch.manual_seed(dist.get_rank(GROUPS[0]))
    columns = columns_of(300, (77, 90))
    head = TensorHead(normal(50, 300)[..., slice(*columns)], **here(columns))
    token = sample(head).token
    torch.manual_seed(0)
    assert token.equal(sample(normal(50, 300)).token)


@case()
def dtensors_say_their_columns() -> None:
    mesh = DeviceMesh.from_group(GROUPS[0], "cpu")
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(VOCABULARY, (2, 3), generator=g)
    hidden = torch.randn(2, 4, 3, WIDTH, generator=g, dtype=torch.float64)
    weight, bias, teacher = (
        torch.randn(*sizes, generator=g, dtype=torch.float64)
        for sizes in ((VOCABULARY, WIDTH), (VOCABULARY,), (2, 3, VOCABULARY))
    )
    found = []
    for sharded in (False, True):
        leaves = [hidden.clone(), weight, bias]
        if sharded:
            leaves[1:] = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in leaves[1:]]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        given = distribute_tensor(teacher, mesh, [Shard(2)]) if sharded else teacher
        value = run_loss(
            {"student": LinearHead(*leaves), "teacher": TensorHead(given), "x0": x0},
            component_weight=0.5,
        )
        value.backward()
        gradients = [leaf.grad for leaf in leaves]
        if sharded:
            gradients[1:] = [gradient.full_tensor() for gradient in gradients[1:]]
        found.append([value.detach(), *gradients])
    for whole, ours in zip(*found, strict=True):
        assert torch.allclose(whole, ours, **CLOSE)
    part = distribute_tensor(weight, mesh, [Shard(0)])
    more = distribute_tensor(torch.zeros(VOCABULARY + 1), mesh, [Shard(0)])
    assert_raises("of its device_mesh", LinearHead, hidden, part, group=GROUPS[0])
    assert_raises("bias must be a DTensor of 11 classes", LinearHead, hidden, part, more)
    assert_raises("Shard", LinearHead, hidden, distribute_tensor(weight, mesh, [Replicate()]))


# What is wrong ------------------------------------------------------------------------------------


def shard_of(columns: Any, dtype: torch.dtype = torch.float32, width: int | None = None) -> Any:
    size = columns[1] - columns[0] if width is None else width
    return TensorHead(torch.zeros(2, 3, 4, size, dtype=dtype), **here(columns))


@case()
def wrong_columns_are_refused_on_every_rank() -> None:
    rank, world = dist.get_rank(GROUPS[0]), dist.get_world_size(GROUPS[0])
    ones = torch.ones(2, 1), torch.ones(1, 1)
    assert_raises("overlap", shard_of, (rank, rank + 2))
    assert_raises("missing", shard_of, (3 * rank, 3 * rank + 2))
    assert_raises("missing", shard_of, (rank + 1, rank + 2))
    assert_raises(
        "ranks of the group disagree",
        shard_of,
        (rank, rank + 1),
        (torch.float32, torch.float64)[rank % 2],
    )
    assert_raises(
        "this rank has 3|rank 1: ValueError",
        shard_of,
        (rank, rank + 1),
        width=3 if rank == 1 else 1,
    )
    assert_raises(
        "pair of ints|rank 0: TypeError",
        TensorHead,
        torch.zeros(2, 1),
        **here((rank, rank + 1) if rank else 5),
    )
    assert_raises("disagree", LinearHead, *ones, softcap=1.0 + rank, **here((rank, rank + 1)))
    assert_raises("need columns", TensorHead, torch.zeros(2, 3), group=dist.group.WORLD)
    assert_raises("<= vocabulary", TensorHead, torch.zeros(2, 3), **here((1, 4)), vocabulary=3)
    alone = GROUPS[1]
    if rank < world - 1:
        assert_raises(
            "does not contain", TensorHead, torch.zeros(2, 1), group=alone, columns=(0, 1)
        )
    else:
        TensorHead(torch.zeros(2, 1), group=alone, columns=(0, 1))


@case()
def disagreements_are_errors_on_every_rank() -> None:
    rank = dist.get_rank(GROUPS[0])
    columns = columns_of(VOCABULARY)
    problem = make_problem(vocabulary=VOCABULARY)
    heads = {
        n: TensorHead(part_of(n, problem[n], columns), **here(columns))
        for n in ("student", "teacher", "consistency")
    }
    assert_raises("disagree", run_loss, problem | heads, control_variate=rank == 0)
    wrong = {"x0": problem["x0"] + (VOCABULARY if rank == 1 else 0)}
    assert_raises("x0 must hold token ids", run_loss, problem | heads | wrong)
    other = {"x0": (problem["x0"] + rank) % VOCABULARY}
    assert_raises("differ between the ranks", run_loss, problem | heads | other)
    narrow = {
        n: TensorHead(h.logits(), **here(columns), vocabulary=VOCABULARY + (rank == 0))
        for n, h in heads.items()
    }
    assert_raises("disagree about vocabulary", run_loss, problem | narrow)
    hidden = {"x0": problem["x0"][:, : 5 - rank]}
    assert_raises("x0 must have shape", run_loss, problem | heads | hidden)
    for name, head in heads.items():
        logits = head.logits().to((torch.float32, torch.float64)[rank % 2])
        split = TensorHead(logits, **here(columns), vocabulary=VOCABULARY)
        assert_raises(f"{name}: tensors .*float32", run_loss, problem | heads | {name: split})
        assert_raises("rank 0: tensors .*float32.* rank 1: tensors .*float64", sample, split)
    assert_raises("reduction must be", run_loss, problem | heads, reduction="mean" if rank else 3)
    other = {"position_group": GROUPS[0]}
    assert_raises("none of the other ranks that hold", run_loss, problem | heads, **other)
    whole = {"teacher": problem["teacher"]}
    assert_raises("teacher must", run_loss, problem | heads | whole)
    assert_raises("takes no shard", run_loss, problem | heads, backend="reference")
    assert_raises("disagree", sample, heads["student"], temperature=1.0 + rank)
    assert_raises(
        "confidence_dtype needs whole rows",
        sample,
        heads["student"],
        confidence_dtype=torch.float64,
    )
    compare(problem, "tensor", assert_equal_to_1e9, backend="torch")  # all ranks are in step


def test_without_process_groups_no_columns() -> None:
    with pytest.raises(ValueError, match="not initialised: call init_process_group"):
        LinearHead(torch.zeros(2, 3), torch.zeros(4, 3), columns=(0, 4))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_shards(name: str, world: int) -> None:
    for rank, said in enumerate(results(__name__)[world]):
        assert name in said, f"rank {rank} did not come to it: see the first case that failed"
        assert said[name] is None, f"rank {rank}: {said[name]}"
