"""A decoding algorithm for the diffusion models of SGLang (LLaDA2, SDAR).

    python -m sglang.launch_server --model-path … --dllm-algorithm Di4CFast \\
        --dllm-algorithm-config di4c.yaml     # e.g. "rule: entropy_bound"

SGLang finds it by the entry point `sglang.srt.plugins` of this package, in each of its processes.
Where that is not wanted (`SGLANG_PLUGINS` lists the plugins to load), call `register()` in each.

A step draws only the masked rows of its blocks, with one pass over each for the token and what its
rule reads. The loops, schedules and caches are SGLang's own. Keys of the YAML file:

* rule: "low_confidence" (default): tokens whose probability exceeds `threshold` (0.95) stay, or the
  most probable one (SGLang's `LowConfidence`); "entropy_bound": the positions of lowest entropy,
  the sum of all but the last within `gamma` (0.15 nats; SGLang's `EBSampling`).
* temperature (0, the argmax), top_k, top_p: of the draws. The probability of low_confidence is that
  without them, the entropy that with them.
* exclude_mask: never draw the mask. False for low_confidence, True for entropy_bound, as there.
* seed (0): draws are a function of it, of the number of the block and of its step, so that the
  ranks of a tensor-parallel group agree.
* confidence_dtype: of probabilities and entropies. By default fp32; SGLang has that of the logits,
  which "bfloat16" matches bit for bit, with a softmax of whole rows.
* backend: as for `di4c_fast.sample`.

Known to work: the step of SGLang 0.5.23, with its logits, and that of its main branch of November
2026, with its output of the logits processor. Versions whose algorithms own the loop are refused.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, check_choice, check_int, check_kind, check_number, describe
from ..draw.api import sample
from ..heads import as_head
from ..processes.reveal import confident
from ..samplers.canvas import accepted
from ._handle import check_attributes

__all__ = ["Decoding", "register"]

KNOWN = "SGLang 0.5.23"
_DEFAULTS: dict[str, Any] = {
    "rule": "low_confidence",
    "threshold": 0.95,
    "gamma": 0.15,
    "temperature": 0.0,
    "top_k": None,
    "top_p": None,
    "exclude_mask": None,
    "confidence_dtype": None,
    "seed": 0,
    "backend": "auto",
}
_FIELDS = {"low_confidence": "raw_prob", "entropy_bound": "entropy"}
_DTYPES = ("float32", "float16", "bfloat16")
_COMMON = {"block_size", "capture_input_preparation"}  # keys that SGLang reads itself


def register(name: str = "Di4CFast") -> type:
    """Add the algorithm to those of SGLang in this process, under `name`, and return its class.

    Raises:
        ImportError: there is no SGLang.
        TypeError: its version lacks what the algorithm needs; the message names it.
        ValueError: SGLang has another algorithm of this name.
    """
    package = "sglang.srt.dllm.algorithm"
    registry, base = (importlib.import_module(package + end) for end in ("", ".base"))
    check_attributes(registry, package, ("algo_name_to_cls",), KNOWN)
    check_attributes(base, f"{package}.base", ("DllmAlgorithm",), KNOWN)
    parent = base.DllmAlgorithm
    needed = ("init_step_state", "max_steps", "step", "run")
    check_attributes(parent, f"{package}.base.DllmAlgorithm", needed, KNOWN)
    found = registry.algo_name_to_cls.get(name)
    if found is not None and not issubclass(found, Decoding):
        raise ValueError(f"name must be that of no other algorithm of SGLang, got {name!r}")
    if found is None:
        found = registry.algo_name_to_cls[name] = type(name, (Decoding, parent), {})
    return found


@dataclasses.dataclass
class Block:
    """What a block carries from step to step."""

    number: int
    step: int = 0


class Decoding:
    """The algorithm; `register` joins it with SGLang's `DllmAlgorithm`. B blocks of L tokens."""

    block_size: int
    mask_id: int

    def __init__(self, config: Any):
        super().__init__(config)  # type: ignore[call-arg]
        if getattr(config, "is_uniform", False) or self.mask_id < 0:
            raise ValueError(
                f"Di4CFast needs a model with a mask token, got mask_id = {self.mask_id}: "
                "models of a uniform state have SGLang's own Gemma4Renoise"
            )
        given = config.algorithm_config or {}
        check_kind(given, dict, "the algorithm's config")
        unknown = sorted(given.keys() - _DEFAULTS.keys() - _COMMON)
        if unknown:
            known = ", ".join(_DEFAULTS)
            raise ValueError(f"the algorithm's config must have keys of {known}, got {unknown}")
        options = _DEFAULTS | given
        self.rule, self.threshold, self.gamma = (options[n] for n in ("rule", "threshold", "gamma"))
        check_choice(self.rule, "rule", tuple(_FIELDS))
        check_number(self.threshold, "threshold")
        check_number(self.gamma, "gamma", minimum=0.0)
        check_int(options["seed"], "seed")
        if options["exclude_mask"] is None:
            options["exclude_mask"] = self.rule == "entropy_bound"
        check_bool(options["exclude_mask"], "exclude_mask")
        self.exclude_mask = options["exclude_mask"]
        dtype = options["confidence_dtype"]
        if dtype is not None:
            check_choice(dtype, "confidence_dtype", _DTYPES)
        names = ("temperature", "top_k", "top_p", "seed", "backend")
        self.draws: dict[str, Any] = {name: options[name] for name in names}
        self.draws["confidence_dtype"] = dtype and getattr(torch, dtype)
        sample(torch.empty(0, 2), want=(), **self.draws)  # checks them
        self.blocks = 0  # numbered so far

    def init_step_state(self, forward_batch: Any) -> list[Block]:
        self.blocks += forward_batch.batch_size
        return [Block(self.blocks - i) for i in range(forward_batch.batch_size, 0, -1)]

    def step(self, forward_batch: Any, output: Any, states: list[Block]) -> list[bool]:
        """Fill positions of `forward_batch.input_ids` (B·L,) in place.

        Args:
            output: logits (B·L, V), or what has them as `full_logits`.
            states: of `init_step_state`, or those carried since.

        Returns:
            Which blocks had no mask before the step, so that the forward pass saw their tokens.
        """
        logits = getattr(output, "full_logits", output)
        size = (forward_batch.batch_size, self.block_size)
        if not isinstance(logits, Tensor) or logits.shape[:-1].numel() != size[0] * size[1]:
            raise ValueError(
                f"step needs logits of {size[0]} blocks of {size[1]} tokens, or an output that has "
                f"them as full_logits, got {describe(logits)}; known to work: {KNOWN}"
            )
        if len(states) != size[0]:
            raise ValueError(f"states must be one for each of {size[0]} blocks, got {len(states)}")
        ids = forward_batch.input_ids.view(size)
        masked = torch.eq(ids, self.mask_id)
        prompt = getattr(forward_batch, "dllm_prompt_mask", None)
        if prompt is not None:
            masked = masked & ~prompt
        done = ~masked.any(1)
        self._fill(forward_batch.input_ids, ids, masked, logits.flatten(0, -2), states)
        for state in states:
            state.step += 1
        return done.tolist()

    def _fill(
        self, target: Tensor, ids: Tensor, masked: Tensor, logits: Tensor, states: list[Block]
    ) -> None:
        rows = masked.flatten().nonzero()[:, 0]
        # Of a block's draws, each step has numbers of its own.
        turns = [state.number * (self.block_size + 2) + state.step for state in states]
        keys = (
            torch.tensor(turns, dtype=torch.int64, device=ids.device)[rows // self.block_size]
            * self.block_size
        )
        field = _FIELDS[self.rule]
        draw = sample(
            as_head(logits, "logits").take(rows),
            mask_id=self.mask_id if self.exclude_mask else None,
            row_keys=keys + rows % self.block_size,
            want=(field,),
            **self.draws,
        )
        value = getattr(draw, field)
        sign = torch.inf if self.rule == "entropy_bound" else -torch.inf
        whole = value.new_full((ids.numel(),), sign).index_copy(0, rows, value).view_as(ids)
        if self.rule == "entropy_bound":
            kept = accepted(whole, self.gamma)
        else:
            first = torch.ones(len(ids), dtype=torch.int64, device=ids.device)
            kept = confident(whole, self.threshold, first)
        tokens = ids.flatten().index_copy(0, rows, draw.token.to(ids.dtype)).view_as(ids)
        # In place: graphs and the scheduler hold on to this tensor.
        target.copy_(torch.where(kept & masked, tokens, ids).view_as(target))
