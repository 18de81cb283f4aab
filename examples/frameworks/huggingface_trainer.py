"""Hugging Face's Trainer: a subclass whose loss is the step, with its terms in the log."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
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
        self._sums: dict[str, list[Tensor]] = {}

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args)
        optimizer.register_step_post_hook(lambda *_: self.ema.update())
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x0 = inputs["x0"]
        first = self.args.process_index * len(x0)
        loss, output = model(x0, seed=self.state.global_step, first=first)
        for name, value in parts.measured(output).items():
            self._sums.setdefault(name, []).append(value.detach())
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        for name, values in self._sums.items():
            logs[name] = float(self.accelerator.reduce(torch.stack(values).mean(), "mean"))
        self._sums.clear()
        super().log(logs, *args, **options)

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # every process comes here
            save_file(self.ema.shadow, os.path.join(output_dir, AVERAGE))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = {**self.ema.state_dict(), "updates": int(resume_from_checkpoint.split("-")[-1])}
        state["shadow"] = load_file(os.path.join(resume_from_checkpoint, AVERAGE))
        self.ema.load_state_dict(state)


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
        use_cpu=not torch.cuda.is_available(),
    )
    module, tokens = parts.make(options.run_dir)
    trainer = DistillTrainer(module, arguments, train_dataset=[{"x0": row} for row in tokens])
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
