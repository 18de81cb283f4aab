"""Random cases of the fuzzer: what is random in them, and their arguments.

A case is a function of its number and kind. Sizes are small, so that there can be many of them;
what has broken something before (extreme logits, layouts, weights of 0, rows without a class,
NaN) is likely.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from di4c_fast import Head, LinearHead, LogisticHead, TensorHead
from di4c_fast.processes import GaussianProcess
from di4c_fast.reference.draw import draw_ref
from di4c_fast.reference.loss import log_softmax_ref
from di4c_fast.rng import draw_seed

from .own_head import Capped

Case = dict[str, Any]
NEG_INF = float("-inf")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SMALL_DTYPES = (torch.float32, torch.float16)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "padded": lambda x: F.pad(x, (0, 3))[..., : x.shape[-1]],
    "columns": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "positions first": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),
    "expanded": lambda x: x[:1].expand(x.shape),
}
KINDS_OF_HEADS = ("tensor", "tensor", "tensor", "linear", "positional", "logistic", "own")


class Draws:
    """What is random in a case."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def true(self, probability: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < probability

    def tokens(self, shape: tuple[int, ...], classes: int, mask_id: int | None) -> Tensor:
        tokens = torch.randint(
            classes - (mask_id is not None), shape, generator=self.generator, dtype=torch.int64
        )
        return tokens if mask_id is None else tokens + (tokens >= mask_id).long()

    def logits(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Logits with a property that has broken something before, or none."""
        x = self.normal(*shape) * self.pick(0.1, 1.5, 1.5, 8.0)
        kinds = ("offset", "low", "flat", "peak", "huge", "excluded", "dead", "bad")
        match self.pick("", "", "", "", *kinds):
            case "offset":
                x += self.pick(30.0, 1e3, *((-1e4, 1e5) if dtype != torch.float16 else ()))
            case "low":
                x[..., : 1 + shape[-1] // 3] -= self.pick(60.0, 95.0, 150.0, 1000.0)
            case "flat":
                x.zero_()
            case "peak":
                x[..., -1] += 40.0
            case "huge":
                x *= 1e3
            case "excluded":
                x[self.true(0.1, *shape)] = NEG_INF
            case "dead":
                x[self.true(0.1, *shape[:-1])] = NEG_INF
            case "bad" if x.numel():
                x.view(-1)[self.random.randrange(x.numel())] = self.pick(float("nan"), float("inf"))
        return x.to(dtype)

    def head(self, kind: str, leading: tuple[int, ...], classes: int, dtype: torch.dtype) -> Case:
        """The tensors of a head and how to make it."""
        options: Case = {}
        if kind == "tensor":
            tensors = {"logits": self.logits(*leading, classes, dtype=dtype)}
        elif kind == "logistic":
            tensors = {
                "mu": self.pick(0.5, 0.5, 5.0) * self.normal(*leading),
                "log_scale": self.pick(0.0, 1.0, 2.0) + self.normal(*leading) / 2,
            }
            options = {"eps": self.pick(1e-6, 1e-6, 0.0), "clamp": self.pick("left", "min")}
        else:
            width = self.pick(1, 3, 6)
            tensors = {
                "hidden": self.pick(0.3, 1.5) * self.normal(*leading, width),
                "weight": self.normal(classes, width),
            }
            if kind == "positional":
                tensors["bias"] = self.normal(leading[-1], classes)
            elif kind == "linear" and self.chance(0.5):
                tensors["bias"] = self.normal(classes)
            if kind != "own":
                options = {"softcap": self.pick(None, None, 3.0, 30.0)}
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        if kind in ("linear", "positional") and self.chance(0.2):
            # As under autocast: activations in half precision meet weights in single.
            tensors |= {n: t.float() for n, t in tensors.items() if n != "hidden"}
        layouts = list(LAYOUTS)[: 4 if leading[0] == 0 or self.chance(0.7) else 5]
        return {
            "kind": kind,
            "tensors": tensors,
            "options": options,
            "classes": classes,
            "layout": self.pick("contiguous", *layouts),
            "budget": self.pick(None, None, 1, 5000),
        }


def make_head(recipe: Case, tensors: dict[str, Tensor]) -> Tensor | Head:
    """The head of a recipe over its tensors, or over those in another dtype."""
    first, *rest = tensors.values()
    first = LAYOUTS[recipe["layout"]](first)
    kind = recipe["kind"]
    if kind == "tensor":
        return TensorHead(first, in_place_gradient=True) if recipe.get("in_place") else first
    if kind == "logistic":
        second = LAYOUTS[recipe["layout"]](rest[0])
        return LogisticHead(first, second, recipe["classes"], **recipe["options"])
    cls = Capped if kind == "own" else LinearHead
    head: Head = cls(first, *rest, **recipe["options"])
    head.budget_bytes = recipe["budget"]
    return head


def loss_case(kind: str, seed: int, small: bool) -> Case:
    """Arguments of `loss`, `mixture_log_prob` or `correlation`. Small cases, here and below, have
    few rows and the dtypes that Triton's interpreter gets right."""
    d = Draws(seed)
    dtype = d.pick(*(t for t in DTYPES if not small or t in SMALL_DTYPES))
    batch, positions = d.pick(0, 1, 1, 2, 2, 2, 3), d.pick(1, 2, 5, 7)
    components, classes = d.pick(1, 2, 3, 5, 5, 33), d.pick(2, 3, 8, 17, 130)
    if small:
        batch, positions = d.pick((0, 2), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2))
    elif d.chance(0.05):
        positions, classes, components = d.pick((1024, 5, 4), (40, 1030, 3), (300, 2, 2))
    rows = d.pick(1, 2, 3, components)
    mask_id = d.pick(None, 0, classes - 1, classes // 2)
    shape = (batch, positions)
    student = d.head(d.pick(*KINDS_OF_HEADS), (batch, components, positions), classes, dtype)
    student["in_place"] = d.chance(0.2)
    shared: Case = {"mask_id": mask_id}
    case: Case = {
        "dtype": dtype,
        "student": student,
        "shared": shared,
        # Leaves that ask for no gradient, by their number.
        "frozen": d.pick(-1, -1, -1, 0, 1, 2),
        "upstream": d.normal(batch),
    }
    if mask_id is not None and d.chance(0.9):
        xt = d.tokens(shape, classes, mask_id)
        shared["xt"] = torch.where(d.true(d.pick(0.0, 0.6, 0.9, 1.0), *shape), mask_id, xt)
    if d.chance(0.3):
        shared["valid"] = d.true(d.pick(0.0, 0.7), *shape)
    if d.chance(0.5):
        shared["log_weights"] = d.pick(0.5, 3.0, 30.0) * d.normal(batch, components)
        if components > 1 and d.chance(0.2):
            shared["log_weights"][:, -1] = NEG_INF
    if kind != "loss":
        sizes = d.pick(
            (batch, rows, positions), (batch, rows, positions), shape, (batch, 0, *shape[1:])
        )
        case["x"] = d.tokens(sizes, classes, mask_id)
        case["upstream"] = d.normal(*sizes[:-1])
        return _with_padding(d, case)
    m = d.pick(0, 1, 3)
    teacher = (batch, m, positions) if m else shape
    case["teacher"] = d.head(d.pick("tensor", *KINDS_OF_HEADS), teacher, classes, dtype)
    case["x0"] = d.tokens(shape, classes, mask_id)
    if case["teacher"]["kind"] == "tensor" and not m:
        if student["kind"] == "tensor" and d.chance(0.2):  # a student near its optimum
            near = student["tensors"]["logits"].mean(1, dtype=torch.float64)
            near += 0.01 * d.normal(*shape, classes)
            case["teacher"]["tensors"]["logits"] = near.to(dtype)
        elif d.chance(0.1):
            one_hot = torch.full((*shape, classes), NEG_INF, dtype=dtype)
            one_hot = one_hot.scatter(-1, case["x0"].unsqueeze(-1), 0.0)
            case["teacher"]["tensors"]["logits"] = one_hot
    if d.chance(0.7):
        _add_consistency(d, case, (batch, rows, positions), classes)
    for name in ("data", "teacher", "consistency", "component"):
        usual = float(name != "component")
        value = d.pick(usual, usual, 0.0, 0.3, 2.0)
        per_example = d.pick(value * d.true(0.7, batch).double(), torch.tensor(value))
        shared[f"{name}_weight"] = per_example if d.chance(0.3) else value
    shared["control_variate"] = d.chance(0.8)
    case["reduction"], case["terms"] = d.pick("mean", "sum", "none"), d.chance(0.6)
    return _with_padding(d, case)


def _with_padding(d: Draws, case: Case) -> Case:
    """The case with tokens that are no classes where they may be anything, or as it is."""
    valid = case["shared"].get("valid")
    if valid is None or d.chance(0.5):
        return case
    for holder in (case, case["shared"]):
        for name in holder.keys() & {"x", "x0", "xt", "xu", "consistency_x"}:
            tokens = holder[name]
            counts = valid if tokens.ndim == 2 else valid.unsqueeze(1)
            holder[name] = torch.where(counts, tokens, -100)
    return case


def _add_consistency(d: Draws, case: Case, sizes: tuple[int, int, int], classes: int) -> None:
    shared, dtype = case["shared"], case["dtype"]
    mask_id = shared["mask_id"]
    recipe = d.head(d.pick("tensor", *KINDS_OF_HEADS), sizes, classes, dtype)
    case["consistency"] = recipe
    x = d.tokens(sizes, classes, mask_id)
    shown = torch.zeros(sizes, dtype=torch.bool)
    if "xt" in shared and d.chance(0.5):
        shown = d.true(0.5, *sizes)
        shared["xu"] = torch.where(shown, x, mask_id)
    if recipe["kind"] == "tensor" and d.chance(0.3):
        # Drawn inside from a generator: the draws of the reference are what it is given.
        case["draw_seed"] = d.random.getrandbits(40)
        seed = draw_seed(torch.Generator().manual_seed(case["draw_seed"]), torch.device("cpu"))
        assert seed is not None
        work = torch.promote_types(dtype, torch.float32)
        logits = LAYOUTS[recipe["layout"]](recipe["tensors"]["logits"]).to(work)
        log_prob = log_softmax_ref(logits, mask_id)
        if bool((log_prob.exp().sum(-1) > 0.5).all()):  # else some row has no draw
            x = torch.where(shown, x, draw_ref(log_prob, seed))
        else:
            del case["draw_seed"]
    shared["consistency_x"] = x


def sample_case(seed: int, small: bool) -> tuple[Case, Case]:
    """The recipe of a head, and the other arguments of `sample`."""
    d = Draws(seed)
    kind = d.pick("tensor", "tensor", "tensor", "linear", "positional", "logistic", "own")
    # Computed logits in half precision differ from backend to backend by their rounding.
    dtypes = DTYPES if kind == "tensor" else DTYPES[:3]
    dtype = d.pick(*(t for t in dtypes if not small or t in SMALL_DTYPES))
    classes = d.pick(1, 2, 27, 129, 300, *(() if small else (1025,)))
    leading = d.pick((0,), (1,), (5,), (2, 2) if small else (20,))
    if kind != "tensor":
        leading, classes = d.pick((1, 3) if small else (2, 7), (2, 2), (0, 3)), max(classes, 2)
    recipe = d.head(kind, leading, classes, dtype)
    arguments: Case = {"seed": d.random.getrandbits(40), "step": d.pick(0, 1, 2**32 - 1)}
    arguments["want"] = d.pick("all", "all", "all", "log_prob", ("prob", "entropy"))
    arguments["check"] = d.pick(None, False, False)
    arguments["budget_bytes"] = d.pick(None, None, 1, 5000)
    arguments["confidence_dtype"] = d.pick(
        *[None] * 6, torch.float64, torch.float32, torch.bfloat16
    )
    if d.chance(0.6):
        arguments["temperature"] = d.pick(0.0, 0.7, 1.5, d.true(0.7, *leading) * 0.8)
    if d.chance(0.3):
        arguments["top_p"] = d.pick(0.1, 0.8, 0.99, 1.0)
    if d.chance(0.3):
        arguments["top_k"] = d.pick(1, 3, classes, 1000)
    if d.chance(0.3):
        other = d.normal(*leading, classes).to(dtype)
        arguments["guidance"] = (other, d.pick(0.0, 1.5, d.normal(*leading).abs().float()))
    if classes > 1 and d.chance(0.4):
        arguments["mask_id"] = d.pick(0, classes - 1)
    if d.chance(0.3):
        count = torch.Size(leading).numel()
        keys = torch.randperm(count, generator=d.generator) * 2**33 - 7
        arguments["row_keys"] = keys.view(leading)
    return recipe, arguments


def sampler_case(seed: int, small: bool) -> Case:
    """A sampler by name, its options, and the tables of a small model."""
    d = Draws(seed)
    classes, positions, batch = d.pick(3, 11, 130), d.pick(1, 6, 12), d.pick(1, 3)
    if small:
        positions, batch = d.pick(1, 2, 4), d.pick(1, 1, 2)
    warm = {"temperature": d.pick(0.0, 0.8, 1.0), "top_p": d.pick(None, 0.9)}
    warm |= {"top_k": d.pick(None, 2)}
    masked = {"mask_id": classes - 1, "vocab_size": classes}
    block = {"block_length": d.pick(None, None, *(n for n in (2, 3) if positions % n == 0))}
    rule = d.pick("low_confidence", "entropy", "topk_margin", "maskgit_plus", "random", "origin")
    confidence = {**masked, **warm, **block, "active_only": d.chance(0.5)}
    name, options = d.pick(
        ("sample_masked", {**masked, **warm, "active_only": d.chance(0.5)}),
        ("sample_analytic", masked),
        ("sample_remasked", {**masked, **warm, "rule": d.pick("cap", "conf"), "eta": 0.4}),
        ("sample_psi", {**masked, **warm, "middle_mode": "constant-0.5"}),
        ("sample_psi", {"vocab_size": classes, **warm, "middle_mode": "max-capped-0.3"}),
        ("sample_uniform_state", {**warm, "last_step": d.pick("ancestral", "greedy")}),
        ("sample_canvas", {"entropy_bound": d.pick(0.1, 5.0), "mean_entropy": d.pick(None, 2.0)}),
        ("sample_maskgit", {**masked, **warm, "resample": d.chance(0.5)}),
        ("sample_gaussian", {"last": d.pick("argmax", "draw")}),
        ("sample_confidence", {**confidence, "rule": rule}),
        ("sample_confidence", {**confidence, "rule": rule, "guidance_scale": 1.5}),
        ("sample_confidence", {**confidence, **d.pick({"threshold": 0.4}, {"factor": 1.5})}),
        ("sample_confidence", {**confidence, "shift": True, "confidence_temperature": 0.5}),
    )
    if name in ("sample_uniform_state", "sample_canvas"):
        options["vocab_size"] = classes
    if name == "sample_gaussian":
        options["process"] = GaussianProcess(
            classes, rate_sigma=1.5, target_sigma=max(3.0, classes / 8), time_base=0.05
        )
    if options.keys().isdisjoint({"threshold", "factor"}):
        blocks = positions // (options.get("block_length") or positions)
        options["steps"] = d.pick(*((blocks, 2 * blocks) if blocks > 1 else (1, 2, positions)))
    if name != "sample_gaussian" and d.chance(0.4):
        length = d.pick(1, positions) if "shift" not in options else 1
        options["prompt"] = d.tokens((batch, length), classes, classes - 1)
    options["latent_dim"] = d.pick(0, 0, 2)
    width = 4
    return {
        "name": name,
        "options": {"seed": seed, **options},
        "form": d.pick("tensor", "linear", "own"),
        "shape": (batch, positions),
        "table": d.normal(classes, width).float(),
        "weight": 2 * d.normal(classes, width).float(),
    }
