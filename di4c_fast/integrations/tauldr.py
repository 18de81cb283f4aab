"""Drop-ins for tauLDR and for its fork by the authors of Di4C (discretised Gaussian pixels).

    import lib.sampling.sampling as sampling
    import lib.losses.losses as losses
    from di4c_fast.integrations.tauldr import accelerate_tauldr

    with accelerate_tauldr(sampling, losses):      # or handle = ...; handle.remove()
        samples, x_hist, x0_hist = sampler.sample(model, 50, 10)

replaces `TauLeaping.sample` and `PCTauLeaping.sample` of the first module, and the draws of
`DistilChain.calc_pst` of the second, on which the fork's sampling script and its training rest.
The whole loss of its training, `DistilChain.calc_loss`, is replaced by

    accelerate_training(losses)                     # then train_distil.py, as before

Without replacing anything, for sampling and for training (the component pass included):

    student, process = as_model(network), process_of(network)
    tokens = sample_gaussian(
        student, (50, 3 * 32 * 32), process=process, steps=10, latent_dim=network.lam_raw_dim,
        teacher=as_model(teacher), teacher_steps=2,
    )
    distiller = Distiller(student, as_model(teacher), optimizer, process=process, config=config)

Beside what `di4c_fast.integrations` says of all drop-ins:

* `sample` takes steps from the exact posterior instead of tau-leaps, at the times
  linspace(1, min_t, num_steps), and no corrector steps: `num_steps` model calls, as in the
  fork's script. A student of the fork gets a fresh λ per step and sample;
* transition matrices are float64 and cached; nothing is added to probabilities, where the fork
  adds 1e-9 to each; an x_0 that cannot have led to x_t leaves x_s to q(x_t | x_s);
* with an odd number of classes "gaussian" starts from the exact stationary law, whose middle is
  half a class from the repositories'.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from ..checks import check_choice, check_shape, check_values, describe
from ..draw.api import sample
from ..heads import HeadLike, LogisticHead, as_head
from ..models.call import Wrapper, check_callable
from ..processes.gaussian import FLOOR, GaussianProcess
from ..processes.transitions import draw_by_weights, fine_uniform
from ..rng import draw_seed
from ..samplers.gaussian import sample_gaussian
from ..training import DistillConfig, distill_step
from ._handle import Handle, check_attributes
from ._training import KNOWN, five_numbers

__all__ = ["Handle", "accelerate_tauldr", "accelerate_training", "as_model", "process_of"]

_NUMBERS = ("S", "rate_sigma", "Q_sigma", "time_base", "time_exponential")
_IMAGE = ("net", "data_shape", "fix_logistic", "S")
_SAMPLERS = ("TauLeaping", "PCTauLeaping")
_LOSS = "DistilChain"
_LAWS = {"gaussian": "target", "uniform": "uniform"}
_LOSS_SETTINGS = ("min_time", "min_distil_time", "max_distil_time", "time_schedule", "use_cv")
_ROWS = 128  # of a batch, all components counted: more examples are left out


def accelerate_tauldr(*modules: ModuleType) -> Handle:
    """Replace the reverse sampling of tauLDR, or of the fork, by `di4c_fast.samplers`.

    Args:
        modules: `lib.sampling.sampling`, `lib.losses.losses` (of the fork), or both, in any
            order; whatever has the classes `TauLeaping`, `PCTauLeaping` or `DistilChain`. One
            without any of these raises a TypeError, and nothing is replaced.

    Sampling raises where the model has no Gaussian rate, or `initial_dist` is unknown.
    """
    if not modules:
        raise TypeError("accelerate_tauldr needs lib.sampling.sampling or lib.losses.losses")
    found: list[tuple[str, type]] = []
    for module in modules:
        given = [(name, getattr(module, name, None)) for name in (*_SAMPLERS, _LOSS)]
        here = [(name, owner) for name, owner in given if isinstance(owner, type)]
        if not here:
            raise TypeError(
                f"modules must have one of the classes {', '.join((*_SAMPLERS, _LOSS))}, "
                f"got {describe(module)}"
            )
        found += here
    handle = Handle()
    for name, owner in found:
        if name == _LOSS:
            handle.replace(owner, "calc_pst", _posterior_of(vars(owner)["calc_pst"]))
        else:
            handle.replace(owner, "sample", _sample)
    return handle


def accelerate_training(losses: ModuleType) -> Handle:
    """Replace `DistilChain.calc_loss` of the fork by `di4c_fast.training.distill_step`.

    Its arguments, the loss, the law of its draws and what it returns stay: a batch is cut to
    128 // N examples, N = state["distil_batch_size"] (at least one, where there an empty batch
    gives NaN); `time_schedule`, `use_cv` and the times of the loss object hold; `eval=True` gives
    its four means. Networks stay in the mode that they are in, and `Standard.step` does the rest.

    Other than there, a network's pixels are `LogisticHead`, whose 256 bins need not exist, the
    teacher runs once at x_t and once at x_min, and x_u comes from its exact posterior.

    Args:
        losses: `lib.losses.losses`.
    """
    check_attributes(losses, "losses", ("DistilChain.calc_loss",), KNOWN)
    return Handle(losses.DistilChain, "calc_loss", _calc_loss)


def process_of(network: Any, *, t_min: float = 0.01) -> GaussianProcess:
    """The process of a model with `GaussianTargetRate`."""
    check_attributes(network, "network, with a Gaussian rate,", _NUMBERS)
    return GaussianProcess(
        int(network.S),
        rate_sigma=float(network.rate_sigma),
        target_sigma=float(network.Q_sigma),
        time_base=float(network.time_base),
        time_exponential=float(network.time_exponential),
        t_min=t_min,
    )


def as_model(network: Any) -> Wrapper:
    """A model of this package as a module: (tokens (R, D), t (R,)[, latent (R, L)]) to a head.

    An image model, with `net` giving location and scale of a truncated logistic per pixel,
    becomes a `LogisticHead`, so that its 256 bins need not exist; others give their logits.
    `network.eval()` also puts its averaged weights in place.
    """
    check_callable(network, "network")
    return _Model(network)


class _Model(Wrapper):
    def forward(self, tokens: Tensor, t: Tensor, *latent: Tensor) -> HeadLike:
        network = self.model
        if not all(hasattr(network, name) for name in _IMAGE):
            return network(tokens, t, *latent)
        output = network.net(tokens.view(-1, *network.data_shape), t, *latent)
        mu, log_scale = rearrange(output, "r (two c) h w -> two r (c h w)", two=2)
        clamp: Literal["min", "left"] = "min" if network.fix_logistic else "left"
        return LogisticHead(mu, log_scale, int(network.S), eps=1e-6, clamp=clamp)


def _latent_dim(network: Any) -> int:
    """L of a student of the fork, 0 of every other model."""
    inner = getattr(network, "net", None)
    inner = getattr(inner, "module", inner)
    if not getattr(inner, "do_lam_embed", False):
        return 0
    return int(getattr(network, "lam_raw_dim", None) or 1)


@torch.no_grad()
def _sample(self: Any, model: Any, N: int, num_intermediates: int) -> tuple[Any, Any, Any]:
    """`sample` of the sampler classes: x_0, x_t and the denoiser's argmax at some steps."""
    config = self.cfg.sampler
    check_choice(config.initial_dist, "cfg.sampler.initial_dist", tuple(_LAWS))
    process = process_of(model, t_min=float(config.min_t))
    device = torch.device(model.device)
    steps, kept = int(config.num_steps), int(num_intermediates)
    saved = set(torch.linspace(0, steps - 1, kept, dtype=torch.float64).long().tolist())
    states: list[Tensor] = []
    guesses: list[Tensor] = []
    inner, calls = as_model(model), iter(range(steps))

    def recording(tokens: Tensor, t: Tensor, *latent: Tensor) -> HeadLike:
        head = inner(tokens, t, *latent)
        if next(calls) in saved:
            states.append(tokens)
            guesses.append(sample(head, temperature=0.0, want=()).token)
        return head

    tokens = sample_gaussian(
        recording,
        (N, math.prod(self.cfg.data.shape)),
        process=process,
        steps=steps,
        latent_dim=_latent_dim(model),
        initial=_LAWS[config.initial_dist],  # type: ignore[arg-type]
        device=device,
    )
    return tokens.cpu().numpy(), _stacked(states), _stacked(guesses)


def _calc_loss(
    self: Any, minibatch: Tensor, state: Any, writer: Any = None, eval: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """`calc_loss` of `DistilChain`: the loss, or with `eval` the means of four terms."""
    check_attributes(self, "the loss, a DistilChain,", _LOSS_SETTINGS, KNOWN)
    model, teacher, rows = state["model"], state["teacher"], int(state["distil_batch_size"])
    x0 = minibatch.flatten(1).to(teacher.device).long()
    kept = max(_ROWS // rows, 1)
    if len(x0) > kept:
        x0 = x0[torch.randperm(len(x0), device=x0.device)[:kept]]
    chance = torch.rand(2, len(x0), device=x0.device)
    length = self.min_distil_time * (self.max_distil_time / self.min_distil_time) ** chance[0]
    first = self.min_time + length
    t = (first + chance[1] * (1.0 - first)).clamp(max=1.0)
    schedule = self.time_schedule
    config = DistillConfig(
        components=rows,
        data_weight=0.0 if schedule == "zero" else 1.0,
        data_schedule={None: "constant", "sigmoid": "sigmoid"}.get(schedule, "linear"),  # type: ignore[arg-type]
        component_spread=self.max_distil_time,
        control_variate=bool(self.use_cv),
        latent_dim=int(model.lam_raw_dim),
    )
    output = distill_step(
        as_model(model).forward,  # functions keep the mode of their network
        as_model(teacher).forward,
        x0,
        process=process_of(teacher, t_min=self.min_time),
        config=config,
        t=t,
        u=t - length,
        return_terms=bool(eval),
    )
    if not eval:
        return output.loss
    distil, data, _, both, correlation = five_numbers(output, config)
    return data, distil, both, correlation


def _stacked(rows: list[Tensor]) -> Any:
    return (torch.stack(rows) if rows else torch.empty(0, dtype=torch.int64)).cpu().numpy()


def _posterior_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """`calc_pst` with its draws replaced; whatever it computes besides stays as it was."""

    @functools.wraps(original)
    def calc_pst(self: Any, *arguments: Any, **more: Any) -> Any:
        given = inspect.signature(original).bind(self, *arguments, **more)
        given.apply_defaults()
        call = given.arguments
        if not call["sample"]:
            return original(self, *arguments, **more)
        names = ("x_t", "p0t", "ts", "ss", "x_0", "sample_zero")
        return _draw_posterior(process_of(call["model"]), *(call[name] for name in names))

    return calc_pst


@torch.no_grad()
def _draw_posterior(
    process: GaussianProcess,
    x_t: Tensor,
    p0t: Tensor,
    ts: Tensor,
    ss: Tensor,
    x_0: Tensor | None,
    sample_zero: bool,
) -> Any:
    """x_s (B, D) and its probabilities (B·D, V), given x_0 or x_0 drawn from p0t (B, D, V)."""
    head = as_head(p0t, "p0t")
    batch, positions, classes = head.shape
    if classes != process.num_classes:
        raise ValueError(f"p0t must have V = {process.num_classes} classes, got {classes}")
    x_t = x_t.long()
    check_shape(x_t, "x_t", "B, D", (batch, positions))
    if x_0 is None:
        x_0 = sample(p0t.log(), want=()).token
    if sample_zero:
        return x_0
    x_0 = x_0.long().view(batch, positions)
    check_values((ss >= 0) & (ss <= ts), "ss must hold times with 0 <= ss <= ts", ss)
    transitions = process.transitions
    example = torch.arange(batch, device=x_t.device).unsqueeze(-1) * classes
    to_s = transitions.batched(0.0, ss).float().flatten(0, 1)
    from_s = transitions.batched(ss, ts, columns=True).float().flatten(0, 1)
    weights = (to_s[example + x_0] + FLOOR).mul_(from_s[example + x_t]).flatten(0, 1)
    keys = torch.arange(batch * positions, device=x_t.device)
    uniforms = fine_uniform(draw_seed(None, x_t.device), 0, keys, 1)
    x_s = draw_by_weights(weights, uniforms).view(batch, positions)
    return x_s, weights / weights.sum(-1, keepdim=True)
