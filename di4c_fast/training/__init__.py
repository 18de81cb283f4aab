"""Distillation: the step, its recipe, the trainer, weight averages, checkpoints."""

from .config import SCHEDULES, DistillConfig, Schedule, data_weights
from .distiller import Distiller
from .ema import EMA
from .step import DistillOutput, distill_step
from .trainer import Trainer

__all__ = [
    "EMA",
    "SCHEDULES",
    "DistillConfig",
    "DistillOutput",
    "Distiller",
    "Schedule",
    "Trainer",
    "data_weights",
    "distill_step",
]
