"""Break the kernels on purpose, one way at a time, and show which tests notice.

    python tests/mutate_kernels.py [number ...]

Every mutation is made in a copy of the checkout in a temporary folder. Prints the tests that fail;
exits with 1 if a mutation passes unnoticed. Not collected by pytest: it takes several minutes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    before: str
    after: str
    tests: str  # the file that is expected to notice
    select: str = ""  # pytest -k


MUTATIONS = [
    Mutation(
        "wrong stride",
        "kernels/triton/_tl.py",
        "+ b * (stride_b // ALIGN)\n        + d * (stride_d // ALIGN)",
        "+ b * (stride_d // ALIGN)\n        + d * (stride_b // ALIGN)",
        "test_row_statistics.py",
        "not draw",
    ),
    Mutation(
        "dropped rescale",
        "kernels/triton/row_statistics.py",
        "total * ratio + 1.0",
        "total + 1.0",
        "test_row_statistics.py",
        "not draw",
    ),
    Mutation(
        "missing tail mask",
        "kernels/triton/_tl.py",
        "            keep = keep & (cols < V)[None, :]\n        tile = tl.load",
        "            keep = keep\n        tile = tl.load",
        "test_row_statistics.py",
        "not draw",
    ),
    Mutation(
        "mask column counted",
        "kernels/triton/_tl.py",
        'tile = tl.where((cols == mask_id)[None, :], float("-inf"), tile)',
        "tile = tile",
        "test_row_statistics.py",
        "mask_column",
    ),
    Mutation(
        "wrong sign of kappa",
        "kernels/triton/_tl.py",
        "alpha * (local - joint)",
        "alpha * (joint - local)",
        "test_mixture_backward.py",
    ),
    Mutation(
        "coinciding targets not gathered",
        "kernels/triton/target_gradient.py",
        "(tokens == token)[:, None]",
        "(j == other)[:, None]",
        "test_mixture_backward.py",
    ),
    Mutation(
        "zeros not written",
        "kernels/triton/mixture_backward.py",
        "elif slot < slots:",
        "elif slot < 0:",
        "test_mixture_backward.py",
    ),
    Mutation(
        "upstream gradient ignored",
        "kernels/triton/mixture_backward.py",
        "tl.load(upstream_ptr + b) * scale",
        "scale",
        "test_mixture_backward.py",
    ),
    Mutation(
        "component term without its weight",
        "kernels/triton/target_gradient.py",
        "component_weight * tl.exp(a)",
        "component_weight",
        "test_mixture_backward.py",
    ),
    Mutation(
        "split one block short",
        "kernels/triton/mixture_forward.py",
        "stop = tl.minimum(start + split, V)",
        "stop = tl.minimum(start + split - BLOCK_V, V)",
        "test_mixture_forward.py",
    ),
    Mutation(
        "rescale dropped in the loop over components",
        "kernels/triton/mixture_forward.py",
        "total = total * tl.exp(peak - top)",
        "total = total",
        "test_mixture_forward.py",
        "forward_sums",
    ),
    Mutation(
        "mean not divided",
        "kernels/triton/_tl.py",
        "return total / components",
        "return total",
        "test_mixture_forward.py",
        "marginal",
    ),
    Mutation(
        "joint sums over positions that do not count",
        "kernels/triton/joint.py",
        "picked = tl.where(counted[:, None], picked, 0.0)",
        "picked = tl.where(visited[:, None], picked, 0.0)",
        "test_mixture_forward.py",
        "joint",
    ),
    Mutation(
        "positions without any class counted",
        "kernels/triton/mixture_forward.py",
        'dead = tl.where(tl.min(lse, axis=0) == float("inf"), 0.0, 1.0)',
        "dead = 1.0",
        "test_fused.py",
        "positions_without_any_class",
    ),
    Mutation(
        "draw does not rescale",
        "kernels/triton/draw.py",
        "            total = total * tl.exp(peak - top)\n",
        "",
        "test_row_statistics.py",
        "draw",
    ),
    Mutation(
        "row draw: blocks not scaled to the maximum of the row",
        "kernels/triton/row_draw.py",
        "mass = total * share",
        "mass = total",
        "test_row_draw.py",
        "several_programs",
    ),
    Mutation(
        "row draw: last column of a partial block left out",
        "kernels/triton/row_draw.py",
        "keep = wanted[:, None] & (v < V)",
        "keep = wanted[:, None] & (v < V - 1)",
        "test_row_draw.py",
        "maximum_in_every_block",
    ),
    Mutation(
        "row draw: highest id wins ties",
        "kernels/triton/row_draw.py",
        "best = tl.min(tl.where(x == tl.max(x, axis=1)[:, None], v, 2147483647), axis=1)",
        "best = tl.max(tl.where(x == tl.max(x, axis=1)[:, None], v, -1), axis=1)",
        "test_row_draw.py",
        "lowest_id",
    ),
    Mutation(
        "row draw: margin within the block of the maximum only",
        "kernels/triton/row_draw.py",
        "(tl.maximum(within, outside) - shift)",
        "(within - shift)",
        "test_row_draw.py",
        "lowest_id",
    ),
    Mutation(
        "row draw: entropy without the distance of a block to the maximum",
        "kernels/triton/row_draw.py",
        "share * (weighted + total * log_share)",
        "share * weighted",
        "test_row_draw.py",
        "several_programs",
    ),
    Mutation(
        "row draw: mask column beyond the first tile counted",
        "kernels/triton/block_sums.py",
        "& ((mask_id < begin) | (mask_id >= begin + columns))",
        "& ((mask_id < begin) | (mask_id > begin))",
        "test_row_draw.py",
        "mask_column",
    ),
    Mutation(
        "row draw: raw probability at the drawing temperature",
        "kernels/triton/row_draw.py",
        "raw_prob = tl.exp(picked - shift) / sum_raw",
        "raw_prob = tl.exp((picked - shift) / temperature) / sum_raw",
        "test_row_draw.py",
        "temperatures",
    ),
    Mutation(
        "row draw: excluded tokens return with guidance",
        "kernels/triton/block_sums.py",
        'x = tl.where(x == float("-inf"), x, u + gain[:, None] * (x - u))',
        "x = u + gain[:, None] * (x - u)",
        "test_row_draw.py",
        "guidance",
    ),
    Mutation(
        "row draw: step left out of the counter",
        "kernels/triton/_tl.py",
        "last = (step & 0xFFFFFFFF).to(tl.uint32) + zero",
        "last = zero",
        "test_row_draw.py",
        "several_programs",
    ),
    Mutation(
        "row draw: chunks of a linear head drawn from the first",
        "di4c_fast/fused_sample.py",
        "hidden[begin:end], weight.to(hidden.dtype)",
        "hidden[: end - begin], weight.to(hidden.dtype)",
        "test_fused_sample.py",
        "chunk_by_chunk",
    ),
    Mutation(
        "slope of the wrong tail",
        "kernels/triton/_tl.py",
        "slope_mu = part * slope_mu + (1.0 - part) * upper_mu",
        "slope_mu = part * slope_mu - (1.0 - part) * upper_mu",
        "test_logistic.py",
    ),
    Mutation(
        "weight gradient of the last chunk only",
        "di4c_fast/fused_heads.py",
        "total.addmm_(left.t(), right)",
        "total.copy_(left.t() @ right)",
        "test_fused.py",
        "chunk_by_chunk or whatever_the_budget",
    ),
    Mutation(
        "kept logits overwritten",
        "di4c_fast/fused_passes.py",
        "    grad = scratch[:slots]\n",
        "    grad = scratch[:slots] if kept is None else kept\n",
        "test_fused.py",
        "kept_logits",
    ),
    Mutation(
        "rows of q_u that are not kept taken from those that are",
        "di4c_fast/fused_plan.py",
        "    return part if part.shape[0] == visit.slots else None",
        "    return kept[: visit.slots] if kept.shape[0] >= visit.slots else None",
        "test_fused.py",
        "distributions",
    ),
]


def failures(mutation: Mutation) -> list[str]:
    """The names of tests that fail in a mutated copy (at most three)."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("di4c_fast", "kernels", "tests"):
            shutil.copytree(
                ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        path = Path(folder, mutation.file)
        source = path.read_text(encoding="utf-8")
        if mutation.before not in source:
            raise ValueError(f"{mutation.name}: {mutation.file} no longer has what is to be broken")
        path.write_text(source.replace(mutation.before, mutation.after), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", f"tests/{mutation.tests}", "-q", "--tb=no"]
        command += ["--show-capture=no", "-p", "no:cacheprovider", "--maxfail=3"]
        if mutation.select:
            command += ["-k", mutation.select]
        run = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=dict(os.environ)
        )
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return [line.split("::", 1)[-1].split(" - ")[0] for line in lines]


def main() -> int:
    chosen = [int(argument) for argument in sys.argv[1:]] or range(len(MUTATIONS))
    unnoticed = 0
    for number in chosen:
        mutation = MUTATIONS[number]
        found = failures(mutation)
        unnoticed += not found
        caught = ", ".join(found) or "NOT NOTICED"
        print(f"{number:2} {mutation.name} ({mutation.file}): {caught}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
