"""The training loop's inner part: accumulate, clip, step, schedule, average, save, resume.

    distiller = Distiller(student, teacher, optimizer, process=process, config=config)
    for x0 in batches:
        metrics = distiller.step(x0)
    distiller.save("run.safetensors")

Source: Di4C (arXiv 2410.08709), the training of its three systems.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..checks import check_bool, check_number, describe, without_autocast
from ..heads import HeadLike
from ..models.call import Context, check_callable
from ..processes import Process
from ..rng import check_generator
from .checkpoint import (
    PathLike,
    decode,
    differences,
    encode,
    identity,
    read_checkpoint,
    same_structure,
    write_checkpoint,
)
from .ema import EMA
from .step import DistillConfig, DistillOutput, distill_step

__all__ = ["Distiller"]

FORMAT = "di4c_fast.Distiller/1"
_LISTED = 5  # differences shown in a message


class Distiller:
    """Trains a student: one optimiser step for every `accumulate` calls of `step`.

    Args:
        student: an `nn.Module`, called as `distill_step` calls it, in the mode it is in.
        teacher: callable, as for `distill_step`. It is not part of checkpoints.
        optimizer: over parameters of the student, all or some.
        process, config: as for `distill_step`.
        ema: moving average of the student, updated after every optimiser step; None for none.
        scheduler: a `torch.optim.lr_scheduler.LRScheduler` of the optimiser, stepped after
            every optimiser step. (`ReduceLROnPlateau` wants a metric: step it yourself.)
        clip_norm: gradients are scaled to at most this norm by
            `torch.nn.utils.clip_grad_norm_`; None leaves them.
        accumulate: batches per optimiser step. The gradient is the mean of the batches'
            gradients: that of one batch of all their examples, up to rounding, if the batches
            are of one size. Otherwise every batch counts the same, whatever its size.
        skip_nonfinite: leave weights and optimiser state as they are when the norm of the
            gradient is infinite or NaN. The learning rate's schedule and the average go on as
            after any step, and `metrics["skipped"]` counts it. On a GPU that costs no sync for
            an optimiser made with `fused=True` (Adam, AdamW, SGD, Adagrad), which skips on the
            device, and one sync per optimiser step for others. False takes every step.
        generator: source of the draws, as for `distill_step`.

    Mixed precision: call `step` inside `torch.autocast`; backward and optimiser run outside it.
    bf16 needs no loss scaling; scaling for fp16 is not built in.

    Attributes:
        iterations: optimiser steps taken, those skipped included.
        examples: how many examples they and the batches since have had.
        pending: batches whose gradients wait for the next optimiser step.
        skipped: float32 tensor on the student's device, how many steps were skipped.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Callable[..., HeadLike],
        optimizer: torch.optim.Optimizer,
        *,
        process: Process,
        config: DistillConfig | None = None,
        ema: EMA | None = None,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        skip_nonfinite: bool = True,
        generator: torch.Generator | None = None,
    ):
        config = DistillConfig() if config is None else config
        check_callable(teacher, "teacher")
        for value, kind, name in (
            (student, nn.Module, "student"),
            (optimizer, torch.optim.Optimizer, "optimizer"),
            (process, Process, "process"),
            (config, DistillConfig, "config"),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {describe(value)}")
        _check_optimizer(student, optimizer)
        if ema is not None:
            if not isinstance(ema, EMA):
                raise TypeError(f"ema must be an EMA or None, got {describe(ema)}")
            if ema.module is not student:
                raise ValueError("ema must average the student, got an EMA of another module")
        _check_scheduler(scheduler, optimizer)
        if clip_norm is not None:
            check_number(clip_norm, "clip_norm")
            if clip_norm <= 0.0:
                raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int):
            raise TypeError(f"accumulate must be an int, got {describe(accumulate)}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        check_bool(skip_nonfinite, "skip_nonfinite")
        check_generator(generator)
        self.student, self.teacher, self.optimizer = student, teacher, optimizer
        self.process, self.config = process, config
        self.ema, self.scheduler = ema, scheduler
        self.clip_norm, self.accumulate = clip_norm, accumulate
        self.skip_nonfinite, self.generator = skip_nonfinite, generator
        self.iterations = self.examples = self.pending = 0
        self.skipped = torch.zeros((), device=self._parameters()[0].device)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(
        self,
        x0: Tensor,
        *,
        valid: Tensor | None = None,
        context: Context | None = None,
        t: Tensor | None = None,
        latent: Tensor | None = None,
        latent_u: Tensor | None = None,
        latent_teacher: Tensor | None = None,
        latent_min: Tensor | None = None,
        return_terms: bool = True,
    ) -> dict[str, Tensor]:
        """Loss and gradients of one batch; the optimiser steps with every `accumulate`-th.

        An empty batch counts as one whose gradient is 0: momentum and weight decay still act.

        Args:
            x0: (B, D) int64; the others as for `distill_step`. Each part of the loss goes
                backward as soon as it exists, so that one graph is alive at a time.
            return_terms: False leaves the terms out of the metrics, which saves those of
                weight 0.

        Returns:
            Detached scalars on the student's device, which nothing here waits for: "loss"; the
            five terms of `LossTerms` by name, unweighted, each the mean over the examples of
            the batch that it counts for (0 if none); and, where the optimiser stepped,
            "grad_norm" (before clipping) and "skipped" (steps skipped so far).

        Raises:
            TypeError, ValueError: as `distill_step`. Any exception, of the optimiser, the
                schedule or the average too, drops the gradients that were waiting: `pending` is
                0 then.
            RuntimeError: inside `ema.applied()`, where the student holds the average.
        """
        self._refuse_average("step")
        if self.pending == 0:
            self.student.zero_grad(set_to_none=True)
        try:
            output = distill_step(
                self.student,
                self.teacher,
                x0,
                process=self.process,
                config=self.config,
                generator=self.generator,
                latent=latent,
                latent_u=latent_u,
                latent_teacher=latent_teacher,
                latent_min=latent_min,
                t=t,
                valid=valid,
                context=context,
                return_terms=return_terms,
                backward=self._backward,
            )
            self.pending += 1
            self.examples += x0.shape[0]
            metrics = {"loss": output.loss, **self._term_means(output)}
            if self.pending == self.accumulate:
                with without_autocast(x0.device):
                    metrics |= self._optimise()
                self.pending = 0
        except BaseException:
            # A part may have gone backward already; half a batch must not be stepped with.
            self.student.zero_grad(set_to_none=True)
            self.pending = 0
            raise
        return metrics

    def _refuse_average(self, name: str) -> None:
        if self.ema is not None and self.ema._applied:
            raise RuntimeError(f"{name}() inside EMA.applied(): the student holds the average")

    def _backward(self, part: Tensor) -> None:
        # The share as upstream gradient: dividing the part would add a node to the graph.
        part.backward(part.new_full((), 1.0 / self.accumulate))

    def _term_means(self, output: DistillOutput) -> dict[str, Tensor]:
        if output.terms is None:
            return {}
        batch, low = output.low.numel(), int(output.low.sum())
        sums = {name: term.sum() for name, term in output.terms._asdict().items()}
        counts = dict.fromkeys(sums, batch)
        # Where no pass was needed, the consistency terms are 0.
        counts["consistency_correlation"] = counts["consistency_marginal"] = batch - low
        if self.process.component_time is None:
            here = output.t < self.config.low_t
            sums["component"] = output.terms.component.where(here, 0.0).sum()
            counts["component"] = low
        return {name: value / max(counts[name], 1) for name, value in sums.items()}

    def _fused(self) -> bool:
        """Whether the optimiser takes a flag that tells it on the device to skip the step."""
        groups = self.optimizer.param_groups
        supported = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if not supported or not all(group.get("fused") for group in groups):
            return False
        # SGD makes its momentum in the first step that has a gradient, from memory that a step
        # skipped on the device would leave as it was.
        return not any(
            group.get("momentum")
            and parameter.grad is not None
            and self.optimizer.state.get(parameter, {}).get("momentum_buffer") is None
            for group in groups
            for parameter in group["params"]
        )

    def _optimise(self) -> dict[str, Tensor]:
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        if self.clip_norm is None:
            norm = nn.utils.get_total_norm(gradients).to(self.skipped)
        else:
            norm = nn.utils.clip_grad_norm_(self._parameters(), self.clip_norm).to(self.skipped)
        stepped = True
        if not self.skip_nonfinite:
            self.optimizer.step()
        else:
            bad = (~norm.isfinite()).float()
            self.skipped += bad
            if self._fused():
                # What torch's GradScaler gives to fused optimisers: they skip on the device.
                self.optimizer.grad_scale, self.optimizer.found_inf = None, bad  # type: ignore[attr-defined]
                try:
                    self.optimizer.step()
                finally:
                    del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
            else:
                stepped = not bool(bad)
                if stepped:
                    self.optimizer.step()
        self.iterations += 1  # also where the schedule has ended or the average fails
        if self.scheduler is not None:
            with warnings.catch_warnings():
                if not stepped:  # torch takes a schedule that runs ahead for a mistake
                    warnings.simplefilter("ignore", UserWarning)
                self.scheduler.step()
        if self.ema is not None:
            self.ema.update()
        return {"grad_norm": norm.detach(), "skipped": self.skipped.clone()}

    def save(self, path: PathLike, *, extra: Any = None) -> None:
        """Write everything that training needs to go on exactly as if it had not stopped.

        The file is safetensors: "student/<name>" and "ema/<name>" for the weights and their
        average, "optimizer/...", "scheduler/...", "gradient/<name>" for gradients that wait in
        the middle of an accumulation, and the states of the generator and of torch's default
        generators (dropout). The rest is JSON in its metadata. It appears in one step, so that
        an interruption leaves the former file whole. On a GPU this waits for the device.

        Args:
            path: in a folder that exists; a file of that name is replaced.
            extra: anything that survives JSON, for the caller (the place in the data, say);
                `load` gives it back.

        Raises:
            FileNotFoundError: no such folder.
            TypeError: a state that holds something other than tensors and plain values.
            RuntimeError: inside `ema.applied()`, where the student holds the average.
        """
        self._refuse_average("save")
        tensors: dict[str, Tensor] = {}
        states = {name: encode(state, name, tensors) for name, state in self._states().items()}
        if self.pending:
            for name, parameter in self.student.named_parameters():
                if parameter.grad is not None:
                    tensors[f"gradient/{name}"] = parameter.grad
        values = {
            "identity": self._identity(),
            "parameters": self._optimized_names(),
            "states": states,
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "extra": extra,
        }
        write_checkpoint(path, FORMAT, tensors, values)

    def load(self, path: PathLike) -> Any:
        """Go on from a checkpoint: afterwards this object equals the one that wrote it.

        The optimiser's settings (learning rate and so on) and the schedule's are those of the
        checkpoint; the states of torch's default generators are set as well. Resuming is exact
        on the same kind of device and versions of software.

        Returns:
            The `extra` given to `save`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is torn, damaged or of something else; a student of other
                weights (names, shapes, dtypes), another optimiser, scheduler, average, process,
                recipe or generator. Nothing has been changed then.
            RuntimeError: inside `ema.applied()`.
        """
        self._refuse_average("load")
        tensors, values = read_checkpoint(path, FORMAT)
        try:
            known = (values["identity"], values["parameters"])
            counters = {name: int(values["counters"][name]) for name in _COUNTERS}
            extra = values["extra"]
            states = {name: decode(state, tensors) for name, state in values["states"].items()}
            for name in ("student", "optimizer", "scheduler", "ema", "skipped"):
                states[name]
            states["random"]["cpu"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: its record lacks {error}") from error
        _check_weights(path, states["student"], self.student.state_dict())
        found = differences(known[0], self._identity())
        if known[1] != self._optimized_names():
            found.append("the optimizer has other parameters, or in another order")
        schedule = None if self.scheduler is None else self.scheduler.state_dict()
        if not found and not same_structure(states["scheduler"], schedule):
            found.append("the scheduler consists of other parts")
        if found:
            raise ValueError(f"{path} belongs to another run: {_listing(found)}")
        if self.ema is not None:
            _check_weights(path, states["ema"]["shadow"], self.ema.shadow, "average")

        _load_optimizer(self.optimizer, states["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(states["scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(states["ema"])
        self.student.load_state_dict(self._with_versions(states["student"]))
        with torch.no_grad():
            self.skipped.copy_(states["skipped"])
        self.student.zero_grad(set_to_none=True)
        for name, parameter in self.student.named_parameters():
            gradient = tensors.get(f"gradient/{name}")
            if gradient is not None:
                # A copy: the file's tensors may be shared with other states.
                parameter.grad = gradient.to(parameter.device, copy=True)
        for name, value in counters.items():
            setattr(self, name, value)
        _restore_random(states["random"], self.generator, self.skipped.device)
        return extra

    def _states(self) -> dict[str, Any]:
        return {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "random": _random_states(self.generator, self.skipped.device),
            "skipped": self.skipped,
        }

    def _with_versions(self, weights: dict[str, Any]) -> Mapping[str, Any]:
        """The weights beside the versions that modules give their state dictionaries."""
        live = self.student.state_dict()
        live.update(weights)
        return live

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common, as plain values."""
        generator = None if self.generator is None else self.generator.device.type
        average = None
        if self.ema is not None:
            average = {"decay": self.ema.decay, "warmup": self.ema.warmup}
        return {
            "config": identity(self.config),
            "process": identity(self.process),
            "optimizer": type(self.optimizer).__name__,
            "fused": self._fused(),
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "ema": average,
            "clip_norm": self.clip_norm,
            "accumulate": self.accumulate,
            "skip_nonfinite": self.skip_nonfinite,
            "generator": generator,
        }

    def _optimized_names(self) -> list[list[str]]:
        """The parameters of every group of the optimiser, by name."""
        names = {id(p): name for name, p in self.student.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]


_COUNTERS = ("iterations", "examples", "pending")


def _check_optimizer(student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for name, module in student.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(
                f"student must have dense gradients, got {name!r}, an embedding with sparse=True"
            )
    known = {id(p) for p in student.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    foreign = sum(id(p) not in known for p in parameters)
    if foreign:
        raise ValueError(
            f"optimizer must hold parameters of the student only, got {foreign} of "
            f"{len(parameters)} that are not"
        )


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler must be an LRScheduler or None, got {describe(scheduler)}")
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("scheduler must step without a metric, got a ReduceLROnPlateau")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler must be that of optimizer, got one of another optimizer")


def _check_weights(
    path: PathLike, stored: Mapping[str, Any], wanted: Mapping[str, Any], what: str = "student"
) -> None:
    def kind(weights: Mapping[str, Any], name: str) -> str:
        value = weights.get(name)
        if not isinstance(value, Tensor):
            return "absent" if name not in weights else "no tensor"
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"

    found = [
        f"{name} is {kind(stored, name)} there and {kind(wanted, name)} here"
        for name in [*wanted, *(name for name in stored if name not in wanted)]
        if kind(stored, name) != kind(wanted, name)
    ]
    if found:
        raise ValueError(f"{path} holds another {what}: {_listing(found)}")


def _listing(lines: list[str]) -> str:
    more = len(lines) - _LISTED
    return "; ".join(lines[:_LISTED]) + (f"; and {more} more" if more > 0 else "")


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(state)
    # torch casts floating state to the dtype of its parameter; some optimisers keep it in fp32.
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state["state"].items():
        live = optimizer.state[parameters[index]]
        for key, value in entries.items():
            if isinstance(value, Tensor) and live[key].dtype != value.dtype:
                live[key] = value.to(live[key].device)


def _random_states(generator: torch.Generator | None, device: torch.device) -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if generator is not None:
        states["generator"] = generator.get_state()
    return states


def _restore_random(
    states: dict[str, Any], generator: torch.Generator | None, device: torch.device
) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if generator is not None:
        generator.set_state(states["generator"])
