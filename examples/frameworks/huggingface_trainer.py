"""Hugging Face's Trainer: a subclass whose loss is the step, with its terms in the log."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from di4c_fast.training import EMA, DistillModule

from . import parts

AVERAGE = "average.safetensors"


class Step(nn.Module):
    """The module without its recipe: the Trainer takes an attribute `config` for one of its own."""

    def __init__(self, module: DistillModule):
        super().__init__()
        self.module = module

    def forward(self, x0: Tensor, **options: Any):
        return self.module(x0, **options)


class DistillTrainer(Trainer):
    """Trains a `DistillModule`; logs the means of loss and terms since the last log."""

    def __init__(self, module: DistillModule, *args: Any, **options: Any):
        super().__init__(Step(module), *args, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        module.teacher.to(self.args.device)
        self.ema = EMA(module.student, 0.99)
        self.add_callback(Average(self.ema))
        self._sums: dict[str, list[Tensor]] = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x0 = inputs["x0"]
        first = self.args.process_index * len(x0)
        loss, output = model(x0, seed=self.state.global_step, first=first)
        for name, value in parts.measured(output).items():
            self._sums.setdefault(name, []).append(value.detach())
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        for name, values in self._sums.items():
            logs[name] = sum(map(float, values)) / len(values)
        self._sums.clear()
        super().log(logs, *args, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        shadow = load_file(os.path.join(resume_from_checkpoint, AVERAGE))
        for name, value in shadow.items():
            self.ema.shadow[name].copy_(value)


class Average(TrainerCallback):
    """Keeps the average of the student beside it, and writes it with every checkpoint."""

    def __init__(self, ema: EMA):
        self.ema = ema

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.ema.update()

    def on_save(self, args, state, control, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            save_file(self.ema.shadow, os.path.join(folder, AVERAGE))


def main(argv: Sequence[str] | None = None) -> int:
    options = parts.options("huggingface", argv)
    folder = options.run_dir / "checkpoints"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=64.0,
        logging_steps=options.save_every,
        save_steps=options.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
    )
    module, tokens = parts.make(options.run_dir)
    trainer = DistillTrainer(module, arguments, train_dataset=[{"x0": row} for row in tokens])
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
