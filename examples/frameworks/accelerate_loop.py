"""A loop of one's own with Hugging Face accelerate: `accelerate launch` or torchrun starts it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from di4c_fast.training import EMA

from . import parts


class Progress:
    """How many steps there were, as part of checkpoints."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parts.options("accelerate", argv)
    loading = DataLoaderConfiguration(use_seedable_sampler=True)  # the same order after a restart
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=loading)
    module, tokens = parts.make(arguments.run_dir)
    module.teacher.to(accelerator.device)  # the module moves its student alone
    student = module.student
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    loader = DataLoader(
        TensorDataset(tokens), batch_size=arguments.batch, shuffle=True, drop_last=True
    )
    module, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    ema, progress = EMA(student, 0.99), Progress()
    accelerator.register_for_checkpointing(ema, progress)
    checkpoint = arguments.run_dir / "state"
    if checkpoint.exists():
        accelerator.load_state(str(checkpoint))
    while progress.steps < arguments.steps:
        epoch, done = divmod(progress.steps, len(loader))
        loader.set_epoch(epoch)
        for (x0,) in accelerator.skip_first_batches(loader, done) if done else loader:
            first = accelerator.process_index * len(x0)
            loss, output = module(x0, seed=progress.steps, first=first)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(module.parameters(), 64.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            progress.steps += 1
            if progress.steps % arguments.save_every == 0 or progress.steps == arguments.steps:
                metrics = accelerator.reduce(parts.measured(output), "mean")
                values = ", ".join(f"{name} {float(v):.3f}" for name, v in metrics.items())
                accelerator.print(f"step {progress.steps}: {values}", flush=True)
                accelerator.save_state(str(checkpoint))
            if progress.steps == arguments.steps:
                break
    # The wrapper goes before the group: one that outlives it can wait for gloo's thread for ever.
    module, optimizer, loader = accelerator.free_memory(module, optimizer, loader)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
