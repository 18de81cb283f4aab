"""The naive loop of confidence sampling: one sequence, one token at a time, at temperature 0."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from sampler_cases import MASK, D
from torch import Tensor


def naive_confidence(row: Tensor, rule: str, top_k=None, top_p=None) -> tuple[int, float]:
    """Token and confidence of one row at temperature 0, one token at a time."""
    raw = row.softmax(-1)
    kept = row.clone()
    if top_p is not None:
        total, order = 0.0, row.argsort(descending=True).tolist()
        for place, token in enumerate(order):
            if place and total > top_p:
                kept[token] = -torch.inf
            total += float(raw[token])
    if top_k is not None:
        kept[row < row.sort(descending=True).values[top_k - 1]] = -torch.inf
    p = kept.softmax(-1)
    token = int(row.argmax())
    ordered = p.sort(descending=True).values
    return token, {
        "low_confidence": float(raw[token]),
        "maskgit_plus": float(p[token]),
        "topk_margin": float(ordered[0] - ordered[1]),
        "entropy": float(torch.where(p > 0, p * p.log(), 0.0).sum()),
    }[rule]


def naive(
    model: Any,
    prompt: Tensor,
    *,
    steps: int | None = None,
    rule: str = "low_confidence",
    schedule: str = "even",
    t_min: float = 1e-3,
    block_length: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    guidance_scale: float = 0.0,
    shift: bool = False,
    exclude_mask: bool = True,
    banned: tuple[int, ...] = (),
    deferred: tuple[int, ...] = (),
    top_k: int | None = None,
    top_p: float | None = None,
    **more: Any,
) -> tuple[Tensor, list[int]]:
    """One sequence by the rules, and how many positions each step filled.

    The model has logits(x) (D, V). More: `lead`, `size` in place of D, and `other`, the model for
    what is without the prompt.
    """
    lead, size, other = more.get("lead"), more.get("size", D), more.get("other")
    start = len(prompt)
    x = torch.full((size,), MASK)
    x[:start] = prompt
    known = x != MASK
    length = block_length or size - start
    blocks = -(-(size - start) // length)
    filled = []
    for block in range(blocks):
        end = min(start + (block + 1) * length, size)
        n = int((x[:end] == MASK).sum())
        per_block = None if steps is None else steps // blocks
        for index in itertools.count():
            active = [d for d in range(end) if x[d] == MASK]
            active = active[:1] if lead and not index else active
            if not active or (per_block is not None and index == per_block and threshold is None):
                break
            logits = model.logits(x)
            if guidance_scale:
                without = (other or model).logits(torch.where(known, MASK, x))
                logits = without + (guidance_scale + 1) * (logits - without)
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            if exclude_mask:
                logits[:, MASK] = -torch.inf
            logits[:, list(banned)] = -torch.inf
            found = {}
            for d in active:
                token, confidence = naive_confidence(logits[d], rule, top_k, top_p)
                if deferred:
                    rest = logits[d].clone()
                    rest[list(deferred)] = -torch.inf
                    confidence = float(rest.softmax(-1)[token])
                found[d] = (confidence, token)
            order = sorted(active, key=lambda d: (-found[d][0], d))
            count = len(active)
            if per_block is not None and schedule == "even":
                count = n // per_block + (index < n % per_block)
            elif schedule == "ancestral" and not (lead and not index):
                times = torch.linspace(1, t_min, per_block + 1)
                if index < per_block - 1:
                    count = int(len(active) * (1 - times[index + 1] / times[index]))
            if threshold is not None:
                if per_block is not None:
                    reached = sum(
                        n // per_block + (i < n % per_block)
                        for i in range(min(index + 1, per_block))
                    )
                    count = max(1, reached - (n - len(active)))
                passing = [d for d in order if found[d][0] >= threshold]
                count = min(count, max(1, len(passing)))
            if factor is not None:
                count = 1
                while count < len(order):
                    if found[order[count]][0] < 1 - factor / (count + 2):
                        break
                    count += 1
            for d in order[:count]:
                x[d] = found[d][1]
            filled.append(count)
    return x, filled
