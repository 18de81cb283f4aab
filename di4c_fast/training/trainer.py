"""Optimiser steps: accumulate, clip, step, schedule, average, save, resume, for any loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..checks import check_bool, check_int, check_kind, check_within, without_autocast
from ..rng import check_generator
from . import checkpoint, parallel
from .checkpoint import Hold, PathLike, decode, differences, encode, outline
from .ema import EMA

__all__ = ["Trainer"]

Metrics = dict[str, Tensor]
Backward = Callable[..., None]
_LISTED = 5  # differences shown in a message
_COUNTERS = ("iterations", "examples", "pending")


class Trainer:
    """Trains a module: one optimiser step for every `accumulate` calls of `take`.

    `Distiller` is this with the loss of Di4C; `take` serves a loss of one's own.

    Args:
        module: an `nn.Module`.
        optimizer: over parameters of the module, all or some.
        ema: moving average of the module, updated after every optimiser step; None for none.
            Inside `ema.applied()`, where the module holds the average, `take`, `save` and `load`
            raise a RuntimeError.
        scheduler: a `torch.optim.lr_scheduler.LRScheduler` of the optimiser, stepped after
            every optimiser step. (`ReduceLROnPlateau` wants a metric: step it yourself.)
        clip_norm: gradients are scaled to at most this norm by
            `torch.nn.utils.clip_grad_norm_`; None leaves them.
        accumulate: batches per optimiser step. The gradient is the mean of the batches'
            gradients, whatever their sizes; with batches of one size it is that of one batch of
            all their examples, up to rounding.
        skip_nonfinite: leave weights and optimiser state as they are when the norm of the
            gradient is infinite or NaN. The learning rate's schedule and the average go on as
            after any step, and `metrics["skipped"]` counts it. On a GPU that costs no sync for
            an optimiser made with `fused=True` (Adam, AdamW, SGD, Adagrad), which skips on the
            device, and one sync per optimiser step for others. False takes every step.
        generator: source of the draws that the loss makes; checkpoints keep its state.
        scaler: a `torch.amp.GradScaler`, which scales the loss, unscales the gradient before it is
            measured and clipped, leaves out steps whose gradient is not finite (so that
            `skip_nonfinite` must be True) and adapts its scale; checkpoints keep that.

    Mixed precision: call inside `torch.autocast`; backward and optimiser run outside it. bf16 has
    the range of fp32, so that nothing has to be scaled; fp16 wants a `scaler`.

    Attributes:
        iterations: optimiser steps taken, those skipped included.
        examples: how many examples they and the batches since have had.
        pending: batches whose gradients wait for the next optimiser step.
        skipped: float32 tensor on the module's device, how many steps were skipped.
        wrapper: None, or what exchanges the module's gradients with other processes
            (DistributedDataParallel of a module whose forward is the loss). Set before the first
            step, as `Distiller.of` does: gradients are exchanged with the last batch of an
            accumulation, and all processes call `save` and `load` together.
    """

    format = "di4c_fast.Trainer/1"
    role = "module"  # what messages and checkpoints call it
    wrapper: nn.Module | None = None
    _hold: Hold | None = None

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ema: EMA | None = None,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        skip_nonfinite: bool = True,
        generator: torch.Generator | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        check_kind(module, nn.Module, self.role)
        check_kind(optimizer, torch.optim.Optimizer, "optimizer")
        if ema is not None:
            check_kind(ema, EMA, "ema")
            if ema.module is not module:
                raise ValueError(f"ema must average the {self.role}, got an EMA of another module")
        if scheduler is not None:
            check_kind(scheduler, LRScheduler, "scheduler")
            if isinstance(scheduler, ReduceLROnPlateau):
                raise ValueError("scheduler must step without a metric, got a ReduceLROnPlateau")
            if scheduler.optimizer is not optimizer:
                raise ValueError("scheduler must be that of optimizer, got that of another one")
        if clip_norm is not None:
            check_within(clip_norm, "clip_norm", "(0, inf)")
        check_int(accumulate, "accumulate", minimum=1)
        check_bool(skip_nonfinite, "skip_nonfinite")
        check_generator(generator)
        if scaler is not None:
            check_kind(scaler, torch.amp.GradScaler, "scaler")
            if not skip_nonfinite:
                raise ValueError("skip_nonfinite must be True with a scaler, which skips by itself")
        self.scaler = scaler
        self.module, self.optimizer = module, optimizer
        self.ema, self.scheduler = ema, scheduler
        self.clip_norm, self.accumulate = clip_norm, accumulate
        self.skip_nonfinite, self.generator = skip_nonfinite, generator
        self.iterations = self.examples = self.pending = 0
        for name, part in module.named_modules():
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
                raise ValueError(
                    f"{self.role} must have dense gradients, got {name!r}, an embedding with "
                    "sparse=True"
                )
        parameters = self._parameters()
        foreign = len(set(parameters) - set(module.parameters()))
        if foreign:
            raise ValueError(
                f"optimizer must hold parameters of the {self.role} only, got {foreign} of "
                f"{len(parameters)} that are not"
            )
        self.skipped = torch.zeros((), device=parameters[0].device)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def take(self, batch: Callable[[Backward], tuple[Metrics, int]]) -> Metrics:
        """Gradients of one batch; the optimiser steps with every `accumulate`-th.

        Args:
            batch: called with a function that takes a part of the loss, a scalar with a graph,
                backward; it hands over every part and returns what it measured and how many
                examples there were.

        Returns:
            What `batch` returned and, where the optimiser stepped, "grad_norm" (before clipping)
            and "skipped" (steps skipped so far), scalars on the device, without a sync.

        Any exception, of the loss, the optimiser, the schedule or the average, drops the gradients
        that were waiting: `pending` is 0 then.
        """
        self._refuse_average("step")
        if self.pending == 0:
            self.module.zero_grad(set_to_none=True)
        try:
            last = self.pending + 1 == self.accumulate
            with parallel.exchanging(self.module if self.wrapper is None else self.wrapper, last):
                metrics, examples = batch(self._backward)
            self.pending += 1
            self.examples += examples
            if self.pending == self.accumulate:
                with without_autocast(self.skipped.device):
                    metrics |= self._optimise()
                self.pending = 0
        except BaseException:
            # A part may have gone backward already; half a batch must not be stepped with.
            self.module.zero_grad(set_to_none=True)
            self.pending = 0
            raise
        return metrics

    def _refuse_average(self, name: str) -> None:
        if self.ema is not None and self.ema.is_applied:
            raise RuntimeError(f"{name}() inside EMA.applied(): the {self.role} holds the average")

    def _backward(self, part: Tensor, factor: float = 1.0) -> None:
        # The share as upstream gradient: dividing the part would add a node to the graph.
        share = part.new_full((), factor / self.accumulate)
        part.backward(share if self.scaler is None else self.scaler.scale(share))

    def _fused(self) -> bool:
        """Whether the optimiser takes a flag that tells it on the device to skip the step."""
        groups = self.optimizer.param_groups
        supported = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        if not supported or not all(group.get("fused") for group in groups):
            return False
        if any(parallel.is_sharded(parameter) for parameter in self._parameters()):
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

    def _optimise(self) -> Metrics:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        norm: Any = nn.utils.get_total_norm(gradients)
        if parallel.is_sharded(norm):
            norm = norm.full_tensor()
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters(), self.clip_norm, norm)
        norm = norm.detach().to(self.skipped)
        bad = (~norm.isfinite()).float() * self.skip_nonfinite
        self.skipped += bad
        optimizer: Any = self.optimizer
        if self.scaler is not None:
            try:
                self.scaler.step(optimizer)
            finally:
                self.scaler.update()
            return self._after(norm, stepped=False)
        fused = self.skip_nonfinite and self._fused()
        stepped = fused or not (self.skip_nonfinite and bool(bad))
        if fused:  # What torch's GradScaler gives to fused optimisers: they skip on the device.
            optimizer.grad_scale, optimizer.found_inf = None, bad
        try:
            if stepped:
                optimizer.step()
        finally:
            if fused:
                del optimizer.grad_scale, optimizer.found_inf
        return self._after(norm, stepped)

    def _after(self, norm: Tensor, stepped: bool) -> Metrics:
        """Counters, schedule and average; `stepped` is False where the step may be left out."""
        self.iterations += 1  # also where the schedule has ended or the average fails
        if self.scheduler is not None:
            with warnings.catch_warnings():
                if not stepped:  # torch takes a schedule that runs ahead for a mistake
                    warnings.simplefilter("ignore", UserWarning)
                self.scheduler.step()
        if self.ema is not None:
            self.ema.update()
        return {"grad_norm": norm, "skipped": self.skipped.clone()}

    def save(self, path: PathLike, *, extra: Any = None) -> None:
        """Write everything that training needs to go on exactly as if it had not stopped.

        The file is safetensors: "student/<name>" and "ema/<name>" for the weights and their
        average, "optimizer/...", "scheduler/...", "gradient/<name>" for gradients that wait in
        the middle of an accumulation, and the states of the generator and of torch's default
        generators (dropout). The rest is JSON in its metadata. It appears in one step, so that
        an interruption leaves the former file whole. On a GPU this waits for the device.

        As long as this object lives, no other process can save under that path: a file beside
        it, `<path>.lock`, names the process that does.

        Processes that train together all call this, between optimiser steps, and all raise what
        fails in one. Rank 0 writes the file, in which the default generators of all are; where
        `fully_shard` has cut the weights it is a folder, of which each writes its part.

        Args:
            path: in a folder that exists; a file of that name is replaced.
            extra: anything that survives JSON, for the caller (the place in the data, say);
                `load` gives it back.

        Raises:
            FileNotFoundError: no such folder.
            TypeError: a state that holds something other than tensors and plain values.
            RuntimeError: another run saves there; gradients wait that were not exchanged.
        """
        self._refuse_average("save")
        several = self.wrapper is not None and parallel.is_distributed()
        if self.pending and several:
            raise RuntimeError(
                "save() of several processes between optimiser steps only, got "
                f"{self.pending} batches whose gradients wait and have not been exchanged"
            )
        values, tensors = {**self._record(), "extra": extra}, dict[str, Tensor]()
        states = values["states"]
        if several:
            states["random"], states["ranks"] = parallel.ranks_states(states["random"], "generator")
        values["states"] = self._encoded(states, tensors)
        if self.pending:
            encode({k: p.grad for k, p in self.module.named_parameters()}, "gradient", tensors)

        write = parallel.write_checkpoint if several else checkpoint.hold_and_write
        self._hold = write(path, self.format, tensors, values)

    def load(self, path: PathLike) -> Any:
        """Go on from a checkpoint: afterwards this object equals the one that wrote it.

        The optimiser's settings (learning rate and so on) and the schedule's are those of the
        checkpoint; the states of torch's default generators are set as well. Resuming is exact
        on the same kind of device and versions of software. Returns the `extra` given to `save`.

        Any number of processes reads what any number has written, all of them the same path;
        their default generators come back where they are as many.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is torn, damaged or of something else; other weights (names,
                shapes, dtypes), another optimiser, scheduler, average, process, recipe or
                generator; a state that does not fit. Nothing has been changed then.
        """
        self._refuse_average("load")
        fresh = not self.optimizer.state
        try:
            return self._load(path)
        except BaseException:
            if fresh:
                self.optimizer.state.clear()
            raise

    @staticmethod
    def _encoded(states: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
        return {name: encode(state, name, tensors) for name, state in states.items()}

    def _own_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by its name there."""
        if not self.optimizer.state:  # then its moments are made, to be filled
            from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

            self.module.zero_grad(set_to_none=True)
            self.pending = 0
            get_optimizer_state_dict(self.module, self.optimizer)
        own: dict[str, Tensor] = {}
        self._encoded(self._states(), own)
        return own

    def _load(self, path: PathLike) -> Any:
        if self.wrapper is None:
            tensors, values = checkpoint.read_checkpoint(path, self.format)
        else:
            read = parallel.read_checkpoint
            tensors, values = read(path, self.format, self.module, self._own_tensors)
        prefix = "gradient/"
        gradients = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        try:
            states = {name: decode(state, tensors) for name, state in values["states"].items()}
            self._own_random(states)
            counters, extra = values["counters"], values["extra"]
            found = self._misfits({**values, "states": states}, gradients)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is damaged: its record lacks {error}") from error
        found = found or [
            f"{name} is {outline(value)} there and not so here"
            for name, value in tensors.items()
            if value.is_meta
        ]
        if found:
            more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            raise ValueError(f"{path} belongs to another run: {'; '.join(found[:_LISTED])}{more}")

        live = self.module.state_dict()  # with the versions that modules give their states
        live.update(states[self.role])
        for name, part in self._parts().items():
            part.load_state_dict(live if name == self.role else states[name])
        # torch casts floating state to the dtype of its parameter; some optimisers keep fp32.
        parameters = self._parameters()
        for index, entries in states["optimizer"]["state"].items():
            moments = self.optimizer.state[parameters[index]]
            for key, value in entries.items():
                if isinstance(value, Tensor) and moments[key].dtype != value.dtype:
                    moments[key] = value.to(moments[key].device)
        self.skipped.copy_(states["skipped"])
        for name, parameter in self.module.named_parameters():
            grad = gradients.get(name)
            # A copy: the file's tensors may be shared with other states.
            parameter.grad = None if grad is None else grad.to(parameter.device, copy=True)
        for name in _COUNTERS:
            setattr(self, name, counters[name])
        for name, generator in self._generators().items():
            if name in states["random"]:
                generator.set_state(states["random"][name])
        return extra

    def _own_random(self, states: dict[str, Any]) -> None:
        """What this process goes on with: its own default generators where others wrote."""
        rank, size = (0, 1) if self.wrapper is None else parallel.rank_and_size()
        ranks = states.pop("ranks", {})
        if min(map(len, ranks.values()), default=1) == size:
            states["random"] |= {name: every[rank].clone() for name, every in ranks.items()}
        else:
            own = self._random_states()
            states["random"] |= {name: own[name] for name in own if name != "generator"}

    def _misfits(self, there: Mapping[str, Any], gradients: Mapping[str, Tensor]) -> list[str]:
        """What keeps this object from going on with a checkpoint; nothing is changed.

        torch's own loaders check after the fact, and neither dtypes nor the sizes of moments.
        """
        here, states = self._record(), there["states"]
        counters = {name: there["counters"][name] for name in _COUNTERS}
        parameters = dict(self.module.named_parameters()) if counters["pending"] else {}
        waiting = {name: parameters[name] for name in gradients if name in parameters}
        # A run may move to a GPU; it then begins with the state of that GPU's generator.
        random = {"cpu", "generator", *states["random"]} & here["states"]["random"].keys()

        def form(record: Mapping[str, Any], gradient: Mapping[str, Tensor]) -> dict[str, Any]:
            state, groups = record["states"], record["parameters"]
            return {
                **record["identity"],
                self.role: outline(state[self.role]),
                "parameters": {str(i): dict(enumerate(names)) for i, names in enumerate(groups)},
                "schedule": outline(state["scheduler"]),
                "average": outline(state["ema"] and state["ema"]["shadow"]),
                "scaler": outline(state.get("scaler")),
                "gradient": outline(gradient),
                "skipped": outline(state["skipped"]),
                "random": outline({name: state["random"].get(name) for name in sorted(random)}),
                "groups": outline(state["optimizer"]["param_groups"]),
            }

        found = differences(form(there, gradients), form(here, waiting))
        if states["ema"] is not None:
            counters["ema.updates"] = states["ema"]["updates"]
        for name, count in counters.items():
            limit = self.accumulate if name == "pending" else math.inf
            if type(count) is not int or not 0 <= count < limit:
                found.append(f"{name} is {count!r}, which is no count here")
        return found or self._odd_moments(states["optimizer"]["state"])

    def _odd_moments(self, state: Mapping[int, Mapping[str, Any]]) -> list[str]:
        """Optimiser state that does not fit its parameter, where the optimiser is torch's."""
        if not type(self.optimizer).__module__.startswith("torch.optim"):
            return []  # others may keep state of any shape
        found, parameters = [], self._parameters()
        groups = self.optimizer.state_dict()["param_groups"]
        group_of = {index: i for i, group in enumerate(groups) for index in group["params"]}
        keys: dict[int, Any] = {}  # of the first parameter that has state, by group
        for index, entries in state.items():
            shape = tuple(parameters[index].shape)
            odd = [key for key, value in entries.items() if not _fits(value, shape)]
            odd += entries.keys() ^ keys.setdefault(group_of[index], entries.keys())
            found += [
                f"the optimizer's {key} {index} is {outline(entries.get(key))}, which does not "
                f"fit a parameter of {shape} or its group"
                for key in odd
            ]
        return found

    def _record(self) -> dict[str, Any]:
        """What checkpoints hold, besides the gradients that wait and the caller's `extra`."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        groups = self.optimizer.param_groups
        return {
            "identity": self._identity(),
            "parameters": [[names[id(p)] for p in group["params"]] for group in groups],
            "states": self._states(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }

    def _parts(self) -> dict[str, Any]:
        names = ("optimizer", "scheduler", "ema", "scaler")
        parts = {name: getattr(self, name) for name in names}
        return {self.role: self.module, **{k: v for k, v in parts.items() if v is not None}}

    def _states(self) -> dict[str, Any]:
        return {
            **dict.fromkeys((self.role, "optimizer", "scheduler", "ema")),
            **{name: part.state_dict() for name, part in self._parts().items()},
            "random": self._random_states(),
            "skipped": self.skipped,
        }

    def _random_states(self) -> dict[str, Tensor]:
        return {name: one.get_state() for name, one in self._generators().items()}

    def _generators(self) -> dict[str, torch.Generator]:
        device, found = self.skipped.device, {"cpu": torch.default_generator}
        if device.type == "cuda":  # a tensor's device, which has an index
            found["cuda"] = torch.cuda.default_generators[device.index]
        if self.generator is not None:
            found["generator"] = self.generator
        return found

    def _identity(self) -> dict[str, Any]:
        """What two runs must have in common, as plain values."""
        ema = self.ema
        return {
            "optimizer": type(self.optimizer).__name__,
            "fused": self._fused(),
            "scheduler": None if self.scheduler is None else type(self.scheduler).__name__,
            "ema": None if ema is None else {"decay": ema.decay, "warmup": ema.warmup},
            **{name: getattr(self, name) for name in ("clip_norm", "accumulate", "skip_nonfinite")},
            "generator": None if self.generator is None else self.generator.device.type,
        }


def _fits(value: Any, shape: tuple[int, ...]) -> bool:
    """A moment has one number, or one for each number of its parameter, or for each row."""
    if not isinstance(value, Tensor) or value.numel() == 1:
        return True
    sizes = tuple(value.shape)
    return len(sizes) == len(shape) and all(s in (1, n) for s, n in zip(sizes, shape, strict=True))
