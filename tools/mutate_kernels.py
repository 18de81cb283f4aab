"""Break the kernels on purpose, one way at a time, and show which tests notice.

    python -m tools.mutate_kernels [number ...]

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
        "kernels/triton/tiles.py",
        "+ b * (stride_b // ALIGN)\n        + d * (stride_d // ALIGN)",
        "+ b * (stride_d // ALIGN)\n        + d * (stride_b // ALIGN)",
        "test_loss_conformance.py",
        "triton and (settings or every_head)",
    ),
    Mutation(
        "dropped rescale",
        "kernels/triton/row_statistics.py",
        "total * ratio + 1.0",
        "total + 1.0",
        "test_tuning.py",
        "tile_sizes",
    ),
    Mutation(
        "missing tail mask",
        "kernels/triton/tiles.py",
        "        keep = keep & (cols < V)[None, :]\n    tile = tl.load",
        "        keep = keep\n    tile = tl.load",
        "test_loss_conformance.py",
        "triton and (settings or every_head)",
    ),
    Mutation(
        "mask column counted",
        "kernels/triton/tiles.py",
        'return tl.where((cols == mask_id)[None, :], float("-inf"), tile.to(tl.float32))',
        "return tile.to(tl.float32)",
        "test_loss_conformance.py",
        "triton and (settings or every_head)",
    ),
    Mutation(
        "shift left in the logsumexp of a row without a class",
        "kernels/triton/row_statistics.py",
        "shift = tl.where(sums == 0.0, 0.0, top)",
        "shift = top",
        "test_loss_conformance.py",
        "triton and minus_infinity",
    ),
    Mutation(
        "coinciding targets not gathered",
        "kernels/triton/target_gradient.py",
        "tl.where((tokens == token)[:, None], kappa[None, :], 0.0)",
        "tl.where((j == other)[:, None], kappa[None, :], 0.0)",
        "test_loss_conformance.py",
        "triton and sizes",
    ),
    Mutation(
        "targets left incomplete",
        "kernels/triton/target_gradient.py",
        "    if visit.slots == 0 or targets == 0:",
        "    if True:",
        "test_loss_conformance.py",
        "triton and (settings or every_head)",
    ),
    Mutation(
        "zeros not written",
        "kernels/triton/mixture_backward.py",
        "cols[None, :], zero, mask=keep)",
        "cols[None, :], zero, mask=keep & (V < 0))",
        "test_loss.py",
        "triton",
    ),
    Mutation(
        "marginal factor ignored",
        "kernels/triton/mixture_backward.py",
        "q = pull * row_tile(q_row, cols, V, TAIL)",
        "q = row_tile(q_row, cols, V, TAIL)",
        "test_loss_conformance.py",
        "triton and (settings or every_head)",
    ),
    Mutation(
        "component term without its factor",
        "kernels/triton/mixture_backward.py",
        "grad -= component * qt",
        "grad -= qt",
        "test_loss_conformance.py",
        "triton and every_head",
    ),
    Mutation(
        "split one block short",
        "kernels/triton/mixture_forward.py",
        "    stop = tl.minimum(start + split, V)",
        "    stop = tl.minimum(start + split - BLOCK_V, V)",
        "test_tuning.py",
        "tile_sizes",
    ),
    Mutation(
        "rescale dropped in the loop over components",
        "kernels/triton/tiles.py",
        "total = total * tl.exp(peak - top) + tl.sum",
        "total = total + tl.sum",
        "test_loss_conformance.py",
        "triton and sizes",
    ),
    Mutation(
        "mean not divided",
        "kernels/triton/marginal.py",
        "scale = 1.0 / C",
        "scale = 1.0",
        "test_loss_conformance.py",
        "triton and (settings or every_head)",
    ),
    Mutation(
        "shown tokens not one-hot",
        "kernels/triton/marginal.py",
        "prob = tl.where((inside & (shown != mask_id))[:, None], one_hot, prob)",
        "prob = prob",
        "test_loss_conformance.py",
        "triton and every_head",
    ),
    Mutation(
        "second distribution overwrites the first",
        "kernels/triton/marginal.py",
        "            if ADD:",
        "            if False:",
        "test_loss_conformance.py",
        "triton and several_chunks",
    ),
    Mutation(
        "positions without any class counted",
        "kernels/triton/mixture_forward.py",
        "tl.where(dead == 1, 0.0, tl.sum(kl_t, axis=0))",
        "tl.sum(kl_t, axis=0)",
        "test_loss_conformance.py",
        "triton and dead_positions",
    ),
    Mutation(
        "NaN of a teacher dropped",
        "kernels/triton/mixture_forward.py",
        "return tl.where(q == 0.0, 0.0, q * (log_q - log_p))",
        "return tl.where(q > 0.0, q * (log_q - log_p), 0.0)",
        "test_loss_conformance.py",
        "triton and nan",
    ),
    Mutation(
        "q of the consistency draws left out",
        "kernels/triton/mixture_forward.py",
        "q += consistency_weight * qu",
        "q += 0.0 * qu",
        "test_loss_conformance.py",
        "triton and (settings or every_head)",
    ),
    Mutation(
        "row draw: blocks not scaled to the maximum of the row",
        "kernels/triton/row_draw.py",
        "mass = total * share",
        "mass = total",
        "test_draw_conformance.py",
        "triton and every_length",
    ),
    Mutation(
        "row draw: reservoir without the running sum",
        "kernels/triton/row_draw.py",
        "number * tl.cumsum(mass, axis=1) < mass",
        "number * tl.sum(mass, axis=1)[:, None] < mass",
        "test_draw_conformance.py",
        "triton and torch_backend",
    ),
    Mutation(
        "row draw: race without its exponentials",
        "kernels/triton/row_draw.py",
        "- log_exponential(number)",
        "- number",
        "test_draw_conformance.py",
        "triton and torch_backend",
    ),
    Mutation(
        "row draw: ties to the highest id",
        "kernels/triton/row_draw.py",
        "best = tl.min(tl.where(x == tl.max(x, axis=1)[:, None], v, 2147483647), axis=1)",
        "best = tl.max(tl.where(x == tl.max(x, axis=1)[:, None], v, -1), axis=1)",
        "test_draw_conformance.py",
        "triton and ties",
    ),
    Mutation(
        "row draw: temperature of another row",
        "kernels/triton/block_sums.py",
        "t = tl.load(temperature_ptr + row, mask=wanted, other=1.0)",
        "t = tl.load(temperature_ptr + row // 2, mask=wanted, other=1.0)",
        "test_draw_conformance.py",
        "triton and every_option",
    ),
    Mutation(
        "block sums: entropy of the unscaled logits",
        "kernels/triton/block_sums.py",
        "weighted = tl.sum(weight * tl.maximum(log_weight, -1.0e5), axis=2)",
        "weighted = tl.sum(weight * tl.maximum(gap, -1.0e5), axis=2)",
        "test_draw_conformance.py",
        "triton and every_option",
    ),
    Mutation(
        "block sums: guidance without its 1",
        "kernels/triton/block_sums.py",
        "strength = tl.load(guidance_ptr + row, mask=wanted, other=0.0) + 1.0",
        "strength = tl.load(guidance_ptr + row, mask=wanted, other=0.0)",
        "test_draw_conformance.py",
        "triton and every_option",
    ),
    Mutation(
        "parts of a later launch read from the first",
        "kernels/triton/row_draw.py",
        "place = parts_ptr + local[:, None].to(tl.int64) * G + g",
        "place = parts_ptr + row[:, None].to(tl.int64) * G + g",
        "test_draw_conformance.py",
        "tiles_and_scratch",
    ),
    Mutation(
        "slope of the wrong tail",
        "kernels/triton/logistic.py",
        "by_left = part * by_left + (1.0 - part) * not_above",
        "by_left = part * by_left - (1.0 - part) * not_above",
        "test_loss_conformance.py",
        "triton and every_head",
    ),
    Mutation(
        "bins beyond the last with a gradient",
        "kernels/triton/logistic.py",
        "sum_mu += grad * inverse * (by_left - by_right)",
        "sum_mu += (grad + 1.0) * inverse * (by_left - by_right)",
        "test_loss_conformance.py",
        "triton and every_head",
    ),
    Mutation(
        "weight gradient of the last chunk only",
        "di4c_fast/heads/linear.py",
        "total.addmm_(left.t(), right.to(total.dtype))",
        "total.copy_(left.t() @ right.to(total.dtype))",
        "test_loss_conformance.py",
        "torch and several_chunks",
    ),
    Mutation(
        "kept logits overwritten",
        "di4c_fast/passes/torch.py",
        "logits.clone() if shared and logits.dtype == dtype else",
        "logits if shared and logits.dtype == dtype else",
        "test_loss_conformance.py",
        "torch and every_head",
    ),
    Mutation(
        "rows of q that are not kept taken from those that are",
        "di4c_fast/passes/base.py",
        "return part if visit.slots and part.shape[0] == visit.slots else None",
        "return rows[: visit.slots] if visit.slots and rows.shape[0] >= visit.slots else None",
        "test_loss_conformance.py",
        "several_chunks",
    ),
    Mutation(
        "joint sums over positions that do not count",
        "di4c_fast/loss/joint.py",
        "summand = torch.where(counted.unsqueeze(-1), summand, 0.0)",
        "summand = summand + 0.0",
        "test_loss_conformance.py",
        "minus_infinity or dead",
    ),
    Mutation(
        "wrong sign of kappa",
        "di4c_fast/loss/joint.py",
        "difference = -weights[b]",
        "difference = weights[b]",
        "test_loss_conformance.py",
        "torch and settings",
    ),
    Mutation(
        "upstream gradient of the rows ignored",
        "di4c_fast/loss/driver.py",
        "kappa = saved.joint.difference[part] * alpha[b].unsqueeze(-1)",
        "kappa = saved.joint.difference[part]",
        "test_loss_conformance.py",
        "torch and settings",
    ),
    Mutation(
        "row draw: last column of a partial block left out",
        "kernels/triton/block_sums.py",
        "        keep = keep & (cols < V)\n",
        "        keep = keep & (cols < V - 1)\n",
        "test_draw_conformance.py",
        "triton and every_length",
    ),
    Mutation(
        "row draw: margin within the block of the maximum only",
        "kernels/triton/row_draw.py",
        "(tl.maximum(within, outside) - shift)",
        "(within - shift)",
        "test_draw_conformance.py",
        "triton and every_option",
    ),
    Mutation(
        "row draw: entropy without the distance of a block to the maximum",
        "kernels/triton/row_draw.py",
        "(weighted + total * log_share)",
        "weighted",
        "test_draw_conformance.py",
        "triton and every_option",
    ),
    Mutation(
        "row draw: mask column beyond the first tile counted",
        "kernels/triton/block_sums.py",
        "& ((mask_id < begin) | (mask_id >= begin + columns))",
        "& ((begin > 0) | (mask_id < begin) | (mask_id >= begin + columns))",
        "test_draw_conformance.py",
        "triton and (ties or every_option)",
    ),
    Mutation(
        "row draw: raw probability at the drawing temperature",
        "kernels/triton/row_draw.py",
        "    raw = raw_prob and options.tempered",
        "    raw = False",
        "test_draw_conformance.py",
        "triton and every_option",
    ),
    Mutation(
        "row draw: excluded tokens return with guidance",
        "kernels/triton/block_sums.py",
        'tl.where(x == float("-inf"), x, u + strength * (x - u))',
        "u + strength * (tl.maximum(x, -1e30) - u)",
        "test_draw_conformance.py",
        "triton and every_option",
    ),
    Mutation(
        "row draw: step left out of the counter",
        "kernels/triton/random.py",
        "last = (step & 0xFFFFFFFF).to(tl.uint32) + zero",
        "last = zero",
        "test_draw_conformance.py",
        "triton and (torch_backend or steps)",
    ),
    Mutation(
        "groups of a head drawn from the first",
        "di4c_fast/draw/driver.py",
        "self.head.load(torch.arange(begin, end, device=device), out, self.passes)",
        "self.head.load(torch.arange(0, end - begin, device=device), out, self.passes)",
        "test_draw_conformance.py",
        "torch and linear_heads",
    ),
]


def failures(mutation: Mutation) -> list[str]:
    """The name of the first test that fails in a mutated copy."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("di4c_fast", "kernels", "tests", "tools"):
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
        command += ["--show-capture=no", "-p", "no:cacheprovider", "--maxfail=1"]
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
