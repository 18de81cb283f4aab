"""Distillation: the step, also as a module, its recipe, the trainer, weight averages, checkpoints.

Wrong arguments raise a TypeError or ValueError that names them, what was expected and what came.

Source: Di4C (arXiv 2410.08709), the losses and the training recipes of its three systems.
"""

from .config import SCHEDULES, DistillConfig, DistillOutput, Schedule, data_weights
from .distiller import Distiller
from .ema import EMA
from .module import DistillModule
from .step import distill_step
from .trainer import Trainer

__all__ = [
    "EMA",
    "SCHEDULES",
    "DistillConfig",
    "DistillModule",
    "DistillOutput",
    "Distiller",
    "Schedule",
    "Trainer",
    "data_weights",
    "distill_step",
]
