"""A stand-in for what of diffusers 0.42 its schedulers here use: configuration and base classes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import pathlib
import sys
import types
from typing import Any

import pytest
import torch

FILE = "scheduler_config.json"


def register_to_config(init):
    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        bound = inspect.signature(init).bind(self, *args, **kwargs)
        bound.apply_defaults()
        values = {name: value for name, value in bound.arguments.items() if name != "self"}
        self.config = types.SimpleNamespace(**values, _class_name=type(self).__name__)
        init(self, *args, **kwargs)

    return wrapped


class ConfigMixin:
    config: Any

    @classmethod
    def from_config(cls, config: Any):
        known = inspect.signature(cls.__init__).parameters
        given = config if isinstance(config, dict) else vars(config)
        return cls(**{name: value for name, value in given.items() if name in known})


class SchedulerMixin:
    def save_pretrained(self, folder):
        (pathlib.Path(folder) / FILE).write_text(json.dumps(vars(self.config)))

    @classmethod
    def from_pretrained(cls, folder):
        return cls.from_config(json.loads((pathlib.Path(folder) / FILE).read_text()))


class AmusedScheduler(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(self, mask_token_id: int, masking_schedule: str = "cosine"):
        self.temperatures = self.timesteps = None

    def set_timesteps(self, num_inference_steps, temperature=(2, 0), device=None):
        ends = temperature if isinstance(temperature, (tuple, list)) else (temperature, 0.01)
        self.timesteps = torch.arange(num_inference_steps, device=device).flip(0)
        self.temperatures = torch.linspace(*ends, num_inference_steps, device=device)


class BlockRefinementScheduler(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self, block_length=32, num_inference_steps=32, threshold=0.95, editing_threshold=None
    ):
        self._transfer_schedule = None

    def set_timesteps(self, num_inference_steps, device=None, block_length=None):
        whole = block_length or self.config.block_length
        counts = torch.full((num_inference_steps,), whole // num_inference_steps)
        counts[: whole % num_inference_steps] += 1
        self._transfer_schedule = counts

    def step(self, model_output, timestep, sample, *, return_dict=True, **options):
        output = BlockRefinementSchedulerOutput(prev_sample=sample)
        return output if return_dict else (sample,)


@dataclasses.dataclass
class AmusedSchedulerOutput:
    prev_sample: Any
    pred_original_sample: Any = None


@dataclasses.dataclass
class BlockRefinementSchedulerOutput:
    prev_sample: Any
    transfer_index: Any = None
    editing_transfer_index: Any = None
    sampled_tokens: Any = None
    sampled_probs: Any = None
    pred_logits: Any = None


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the place of diffusers."""
    names = {
        "diffusers": (
            "ConfigMixin", "SchedulerMixin", "AmusedScheduler", "BlockRefinementScheduler"
        ),
        "diffusers.configuration_utils": ("register_to_config",),
        "diffusers.schedulers": (),
        "diffusers.schedulers.scheduling_amused": ("AmusedSchedulerOutput",),
        "diffusers.schedulers.scheduling_block_refinement": ("BlockRefinementSchedulerOutput",),
    }  # fmt: skip
    for name, attributes in names.items():
        module = types.ModuleType(name)
        vars(module).update({attribute: globals()[attribute] for attribute in attributes})
        monkeypatch.setitem(sys.modules, name, module)
