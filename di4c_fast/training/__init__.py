"""Distillation: the step, its configuration, the trainer, averages, checkpoints."""
