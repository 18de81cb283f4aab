"""`python -m benchmarks.drop_ins`: DiffusionGemma's step in transformers, as it is and replaced.

Time and memory of the denoising step of the installed package without its network, and of the same
step with the drop-in, in turns; `--write` puts them into benchmarks/results/drop-ins.json. What
stands there otherwise are facts of comparisons with repositories that cannot be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from di4c_fast.integrations import diffusion_gemma

from .memory import MemoryWorker, peak_in_this_process

RECORD = Path(__file__).resolve().parent / "results" / "drop-ins.json"
ENTRY, NAMES = "DiffusionGemma of transformers", ("theirs", "ours")
PACKAGES = ("torch", "transformers")


def step_of(name: str, canvases: int, positions: int, vocabulary: int) -> Callable[[], Any]:
    """A call of `_denoising_step` with random logits in bf16 in place of the network's."""
    generation: Any = importlib.import_module(
        "transformers.models.diffusion_gemma.generation_diffusion_gemma"
    )
    model = generation.DiffusionGemmaGenerationMixin()
    model.config = SimpleNamespace(text_config=SimpleNamespace(vocab_size=vocabulary))
    embedding = SimpleNamespace(weight=torch.zeros(1, dtype=torch.bfloat16))
    model.model = SimpleNamespace(decoder=SimpleNamespace(embed_tokens=embedding))
    if name == "ours":
        diffusion_gemma.accelerate(model)
    logits = torch.randn(canvases, positions, vocabulary, dtype=torch.bfloat16).mul_(2.0)
    canvas = torch.zeros(canvases, positions, dtype=torch.int64)
    config = generation.EntropyBoundSamplerConfig(entropy_bound=0.1)
    return functools.partial(
        model._denoising_step,
        decoder_forward=lambda **_: SimpleNamespace(logits=logits),
        current_canvas=canvas,
        argmax_canvas=canvas,
        input_ids=canvas,
        decoder_position_ids=None,
        self_conditioning_logits=None,
        mask_mapping=None,
        cache=None,
        finished_denoising=torch.zeros(canvases, dtype=torch.bool),
        cur_step=1,
        sampler=generation.EntropyBoundSampler(config, positions, vocabulary, 1),
        logits_processor=lambda tokens, scores, cur_step: scores,
        diffusion_stopping_criteria=generation.StableAndConfidentStoppingCriteria(1, 0.005),
    )


def peak_of_step(name: str, *sizes: int) -> int:
    step_of(name, 1, 2, 300)()  # imports and libraries are not the step's memory
    return peak_in_this_process(step_of(name, *sizes))


def measured(sizes: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """The record of both steps, the first call of each not counted."""
    steps = {name: step_of(name, *sizes) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    del steps, step
    with contextlib.closing(MemoryWorker(timeout=600.0)) as worker:
        peaks = {name: worker.peak(peak_of_step, name, *sizes) >> 20 for name in NAMES}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    cpu = f"{torch.get_num_threads()} CPU threads with {torch.backends.cpu.get_cpu_capability()}"
    what = "draw, argmax, acceptance, renoising, stopping rule"
    return {
        "size": f"logits {sizes} bf16, {cpu}, {versions}: {what}",
        "median_s": {name: float(f"{statistics.median(s[1:]):.3g}") for name, s in seconds.items()},
        "peak_memory_growth_MiB": peaks,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drop_ins", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs=3, default=(4, 256, 262144), metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, nargs="?", const=RECORD, metavar="FILE")
    options = parser.parse_args(arguments)
    found = measured(tuple(options.sizes), options.rounds)
    print(json.dumps(found, indent=1))
    if options.write is not None:
        record = json.loads(options.write.read_text(encoding="utf-8"))
        (entry,) = (e for e in record["comparisons"] if e["repository"].startswith(ENTRY))
        entry["step_without_the_network"] = found
        text = json.dumps(record, indent=1, ensure_ascii=False)
        options.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
