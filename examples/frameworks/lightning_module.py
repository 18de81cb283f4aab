"""A Lightning module: the step is its training step, the average a part of its checkpoints."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from di4c_fast.training import EMA, DistillModule

from ..common.ranks import process_group
from . import parts


class Distillation(lightning.LightningModule):
    """The step draws its batch by its number: Lightning does not know where in a loader it was."""

    def __init__(self, module: DistillModule, tokens: Tensor, batch: int):
        super().__init__()
        self.module, self.tokens, self.batch = module, tokens, batch
        self.ema = EMA(module.student, 0.99)

    def on_fit_start(self) -> None:
        self.module.teacher.to(self.device)  # the module moves its student alone

    def training_step(self, *_: Any) -> Tensor:
        first = self.global_rank * self.batch
        generator = torch.Generator().manual_seed(self.global_step)
        rows = torch.randint(
            len(self.tokens), (self.trainer.world_size, self.batch), generator=generator
        )
        x0 = self.tokens[rows[self.global_rank]].to(self.device)
        loss, output = self.module(x0, seed=self.global_step, first=first)
        self.log_dict(parts.measured(output), batch_size=self.batch, sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        self.ema.update()  # before a checkpoint of this step is written

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.ema.load_state_dict(checkpoint["ema"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(arguments: argparse.Namespace) -> None:
    module, tokens = parts.make(arguments.run_dir)
    saving = ModelCheckpoint(
        arguments.run_dir / "checkpoints", every_n_train_steps=arguments.save_every, save_last=True
    )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as torchrun says
    trainer = lightning.Trainer(
        devices=here,
        num_nodes=int(os.environ.get("WORLD_SIZE", 1)) // here,
        strategy="ddp" if here > 1 else "auto",
        max_steps=arguments.steps,
        gradient_clip_val=64.0,
        callbacks=[saving],
        default_root_dir=arguments.run_dir,
        log_every_n_steps=arguments.save_every,
    )
    student = Distillation(module, tokens, arguments.batch)
    trainer.fit(student, DataLoader(range(arguments.steps)), ckpt_path="last")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parts.options("lightning", argv)
    # Lightning takes the group that is there; its own would come after the teacher is trained.
    with process_group(None):
        train(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
