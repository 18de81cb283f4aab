"""Schedulers for diffusers: masked ancestral sampling, confidence (LLaDA2), MaskGIT (aMUSEd).

    from di4c_fast.integrations.diffusers import ConfidenceScheduler

    pipe.scheduler = ConfidenceScheduler.from_config(pipe.scheduler.config)  # a LLaDA2Pipeline

They have the interface, the names and the configuration files of diffusers' own schedulers. A step
draws the rows of masked positions alone (ancestral sampling: of those that it fills), with one pass
over each; `model_output` may also be a head. B sequences of D tokens, V classes.

| class | in place of | law |
|---|---|---|
| MaskedAncestralScheduler | (diffusers has none) | that of `sample_masked` |
| ConfidenceScheduler | BlockRefinementScheduler | the same |
| MaskGITScheduler | AmusedScheduler | the same |

Randomness is a function of a seed from the `generator` of each step. Known to work with diffusers
0.42.1.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import AmusedScheduler, BlockRefinementScheduler, ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_amused import AmusedSchedulerOutput
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_int, check_int64, check_number, check_shape
from ..draw.api import sample as draw_rows
from ..draw.request import Draw
from ..heads import HeadLike, as_head
from ..processes import MaskedProcess
from ..processes.reveal import SCHEDULES, confident, gumbel, masked_share, most_confident
from ..samplers.remask import fill_chance
from ..samplers.schedules import time_grid

__all__ = ["ConfidenceScheduler", "MaskGITScheduler", "MaskedAncestralScheduler"]


def _draw(
    model_output: HeadLike, tokens: Tensor, where: Tensor, **how: Any
) -> tuple[Tensor, Draw, Tensor]:
    """The tokens with the draws at the positions `where`, the draw and its rows."""
    head = as_head(model_output, "model_output")
    check_shape(head, "model_output", "B, D, V", (*tokens.shape, head.vocabulary))
    rows = where.flatten().nonzero()[:, 0]
    draw = draw_rows(head.take(rows), **how)
    return _put(tokens, rows, draw.token), draw, rows


def _put(whole: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    return whole.flatten().index_copy(0, rows, values.to(whole.dtype)).view_as(whole)


def _index(timesteps: Tensor | None, timestep: Any) -> int:
    if timesteps is None:
        raise ValueError("timesteps must be set before a step: call set_timesteps")
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1:
            raise ValueError(f"timestep must be one number, got shape {tuple(timestep.shape)}")
        timestep = timestep.reshape(()).to(timesteps.device)
    else:
        check_number(timestep, "timestep")
    found = torch.eq(timesteps, timestep).nonzero()
    if not len(found):
        raise ValueError(f"timestep must be one of the scheduler's timesteps, got {timestep}")
    return int(found[0])


class MaskedAncestralScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling of masked diffusion (MDLM, Di4C's masked language), see `sample_masked`.

    Args:
        mask_token_id: the mask token. It is never drawn.
        t_min: the last time, in (0, 1).
        temperature, top_k, top_p: of the draws, as in `di4c_fast.sample`.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        mask_token_id: int,
        t_min: float = 1e-5,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        check_int(mask_token_id, "mask_token_id", minimum=0)
        self.num_inference_steps: int | None = None
        self.timesteps: Tensor | None = None
        self._times: list[float] = []

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Times linspace(1, t_min, S + 1), which the model is given: S steps and a last argmax."""
        times = time_grid(num_inference_steps, self.config.t_min)
        self.num_inference_steps, self._times = num_inference_steps, times.tolist()
        self.timesteps = times.float().to(device)

    def step(
        self,
        model_output: HeadLike,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> AmusedSchedulerOutput | tuple[Tensor]:
        """Fill masked positions from one time to the next; at the last time all, by the argmax.

        Args:
            model_output: logits (B, D, V), or a head, at `sample` and `timestep`.
            timestep: one of `timesteps`.
            sample: (B, D) int64, masked where unknown.
            generator: of the positions and the tokens.

        Returns:
            `prev_sample`, (B, D) int64; a tuple of it without `return_dict`.
        """
        check_int64(sample, "sample")
        i, config = _index(self.timesteps, timestep), self.config
        where, heat = torch.eq(sample, config.mask_token_id), 0.0
        if i + 1 < len(self._times):
            t, s = self._times[i : i + 2]
            u = rng.generator_uniform(sample.shape, generator=generator, device=sample.device)
            where, heat = where & (u < fill_chance(1.0 - t, 1.0 - s, 0.0)), config.temperature
        how = {"temperature": heat, "top_k": config.top_k, "top_p": config.top_p, "want": ()}
        how |= {"mask_id": config.mask_token_id, "generator": generator}
        tokens, *_ = _draw(model_output, sample, where, **how)
        return AmusedSchedulerOutput(prev_sample=tokens) if return_dict else (tokens,)

    def add_noise(
        self, original_samples: Tensor, timesteps: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """`MaskedProcess.corrupt`: tokens (B, D) masked with probability t, times (B,)."""
        process = MaskedProcess(self.config.mask_token_id)
        return process.corrupt(original_samples, timesteps, generator=generator)


class ConfidenceScheduler(BlockRefinementScheduler):
    """diffusers' BlockRefinementScheduler, whose steps draw masked rows alone.

    Steps with an `editing_threshold`, or without `mask_token_id`, are its own. Differences: top-p
    comes before top-k, and positions that are not masked have the token that is there as
    `sampled_tokens`, and 1 as `sampled_probs`.
    """

    def step(
        self,
        model_output: HeadLike,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> BlockRefinementSchedulerOutput | tuple[Any, ...]:
        """Draw at all masked positions and keep what is above the threshold, or enough of the most
        confident; arguments and results as in diffusers."""
        if editing_threshold is None:
            editing_threshold = self.config.editing_threshold
        if mask_token_id is None or (editing_threshold is not None and editing_threshold > 0.0):
            options |= {"mask_token_id": mask_token_id, "temperature": temperature}
            options |= {"top_p": top_p, "top_k": top_k, "sampling_method": sampling_method}
            options |= {"threshold": threshold, "editing_threshold": editing_threshold}
            options |= {"generator": generator, "return_dict": return_dict}
            return super().step(model_output, timestep, sample, **options)
        if self._transfer_schedule is None:
            raise ValueError("timesteps must be set before a step: call set_timesteps")
        check_int64(sample, "sample")
        check_int(mask_token_id, "mask_token_id", minimum=0)
        limit = self.config.threshold if threshold is None else threshold
        check_number(limit, "threshold")
        unknown = sorted(options.keys() - inspect.signature(super().step).parameters)
        if unknown:
            raise TypeError(f"step takes the arguments of diffusers, got {', '.join(unknown)}")
        check_choice(sampling_method, "sampling_method", ("auto", "greedy", "multinomial"))
        masked = torch.eq(sample, mask_token_id)
        how: dict[str, Any] = {"temperature": 0.0, "generator": generator, "want": ("prob",)}
        if temperature and sampling_method != "greedy":
            how |= {"temperature": temperature, "top_k": top_k or None, "top_p": top_p}
        tokens, draw, rows = _draw(model_output, sample, masked, **how)
        assert draw.prob is not None
        probs = _put(torch.ones_like(sample, dtype=torch.float32), rows, draw.prob)
        wanted = self._transfer_schedule[min(int(timestep), len(self._transfer_schedule) - 1)]
        counts = torch.minimum(masked.sum(1), wanted.to(sample.device))
        kept = confident(probs.masked_fill(~masked, -torch.inf), limit, counts) & masked
        results = {
            "prev_sample": torch.where(kept, tokens, sample),
            "transfer_index": kept,
            "editing_transfer_index": torch.zeros_like(kept),
            "sampled_tokens": tokens,
            "sampled_probs": probs,
            "pred_logits": model_output,
        }
        if return_dict:
            return BlockRefinementSchedulerOutput(**results)
        return tuple(results.values())


class MaskGITScheduler(AmusedScheduler):
    """diffusers' AmusedScheduler, whose steps draw masked rows alone.

    `masking_schedule` may also be "arccos", "square" or "root".
    """

    def step(
        self,
        model_output: HeadLike,
        timestep: int | Tensor,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> AmusedSchedulerOutput | tuple[Tensor, Tensor]:
        """Draw at all masked positions, mask the least confident again; as in diffusers.

        Args:
            model_output: logits (B, D, V), or a head, with `sample` (B, D); or logits
                (B, V, H, W) with `sample` (B, H, W).
        """
        check_int64(sample, "sample")
        i, shape = _index(self.timesteps, timestep), sample.shape
        check_choice(self.config.masking_schedule, "masking_schedule", SCHEDULES)
        if sample.ndim == 3 and isinstance(model_output, Tensor) and model_output.ndim == 4:
            sample, model_output = sample.flatten(1), model_output.flatten(2).transpose(1, 2)
        masked = torch.eq(sample, self.config.mask_token_id)
        seed = rng.draw_seed(generator, sample.device)
        drawn, draw, rows = _draw(model_output, sample, masked, seed=seed, want=("log_prob",))
        tokens = drawn
        if int(timestep) > 0:
            assert draw.log_prob is not None
            assert self.timesteps is not None
            ratio = torch.tensor((i + 1) / len(self.timesteps), dtype=torch.float32)
            share = starting_mask_ratio * masked_share(ratio, self.config.masking_schedule)
            unknown = masked.sum(1)
            again = torch.minimum(unknown - 1, (sample.shape[1] * share).floor().long())
            keys = torch.arange(len(sample), device=sample.device)
            noise = gumbel(seed, 0, keys, sample.shape[1]) * float(self.temperatures[i])
            sure = _put(torch.full_like(noise, -torch.inf), rows, draw.log_prob) + noise
            kept = most_confident(sure, (unknown - again.clamp(min=1)).clamp(min=0))
            tokens = torch.where(masked & ~kept, self.config.mask_token_id, drawn)
        tokens, drawn = tokens.view(shape), drawn.view(shape)
        if return_dict:
            return AmusedSchedulerOutput(prev_sample=tokens, pred_original_sample=drawn)
        return tokens, drawn
