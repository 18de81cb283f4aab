"""Guidance, top-p, top-k and literal confidences on rows of logits, in Dream's order and meaning.

Two versions of the filters. `filter_literal_` sorts whole rows, in the dtype it is given, as the
repositories do, ties in the order of ids. `filter_scaled_` finds the same set in fp32 or fp64
from the largest few logits where they suffice, which is many times faster than a sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..groups import Shard

NEG_INF = float("-inf")
FIRST_LOOK = 128  # candidates of the first look at a row
_LOOK_GROWTH = 8  # and how many times more for the next


def guide(
    conditional: Tensor, unconditional: Tensor, scale: float | Tensor, dtype: torch.dtype
) -> Tensor:
    """Classifier-free guidance u + (scale + 1)·(c − u), in `dtype`.

    Tokens at -inf in the conditional logits c stay excluded. The form (1 + w)c − w·u of MaskGIT
    is the same function, with another rounding.
    """
    c, u = conditional.to(dtype), unconditional.to(dtype)
    if isinstance(scale, Tensor):
        scale = scale.to(dtype).unsqueeze(-1)
    return torch.where(c == NEG_INF, c, u + (scale + 1) * (c - u))


def row_peak(logits: Tensor, mask_id: int | None) -> Tensor:
    """The largest logit of every row but for the column of the mask, (r, V) -> (r, 1)."""
    if mask_id is None:
        return logits.amax(-1, keepdim=True)
    sides = [side for side in (logits[:, :mask_id], logits[:, mask_id + 1 :]) if side.shape[1]]
    if not sides:  # the only column of a shard
        return torch.full_like(logits, NEG_INF)
    peaks = [side.amax(-1, keepdim=True) for side in sides]
    return peaks[0] if len(peaks) == 1 else torch.maximum(*peaks)


def filter_literal_(logits: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Set to -inf, in place, what top-p and then top-k remove. (R, V) of any floating dtype."""
    if top_p is not None:
        ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        remove = ordered.softmax(-1).cumsum(-1) > top_p
        remove[:, 1:] = remove[:, :-1].clone()
        remove[:, 0] = False
        logits.masked_fill_(torch.zeros_like(remove).scatter_(1, ids, remove), NEG_INF)
    if top_k is not None:
        _keep_top_k_(logits, top_k)
    return logits


def filter_scaled_(
    logits: Tensor,
    top_p: float | None,
    top_k: int | None,
    look: int = FIRST_LOOK,
    shard: Shard | None = None,
) -> int:
    """`filter_literal_` for fp32 and fp64 logits (R, V) whose largest entry per row is 0.

    Top-p keeps a token if the more probable ones, and the equally probable ones of lower id,
    have at most the probability `top_p` together. On a CPU the `look` largest logits are sorted
    first, and more only for rows where they do not reach `top_p`. With `shard` the logits are
    columns of one rank, and what is kept is what would be of the whole rows.

    Returns:
        A good `look` for more rows of the same model. It changes the speed, never the result.
    """
    if top_p is not None:
        look = _keep_top_p_(logits, top_p, look, shard)
    if top_k is not None:
        _keep_top_k_(logits, top_k, shard)
    return look


def _largest(logits: Tensor, count: int, shard: Shard | None) -> Tensor:
    """The `count` largest logits of every row of all ranks, in descending order."""
    own = logits.topk(min(count, logits.shape[-1]), dim=-1).values
    if shard is None:
        return own
    own = torch.nn.functional.pad(own, (0, count - own.shape[1]), value=NEG_INF)
    return torch.cat(shard.gather(own).unbind(), dim=-1).topk(count, dim=-1).values


def _keep_top_k_(logits: Tensor, top_k: int, shard: Shard | None = None) -> None:
    smallest = _largest(logits, top_k, shard)[:, -1:]
    logits.masked_fill_(logits < smallest, NEG_INF)


def _keep_top_p_(logits: Tensor, top_p: float, look: int, shard: Shard | None) -> int:
    rows, vocabulary = logits.shape
    total = logits.exp().sum(-1, keepdim=True)
    on_host = logits.device.type == "cpu"  # where asking how many rows are left costs no sync
    if shard is not None:
        (total,), vocabulary = shard.sum(total), shard.vocabulary
        on_host = True  # a sync costs less than an exchange of whole rows
    look = min(look, vocabulary) if on_host else vocabulary
    smallest = logits.new_empty(rows, 1)  # the last logit that is kept
    kept = torch.empty(rows, 1, dtype=torch.int64, device=logits.device)
    ties = torch.empty_like(kept)  # how many of those equal to it are kept
    left: slice | Tensor = slice(None)  # rows whose candidates did not reach top_p yet
    while True:
        ordered = _largest(logits[left], look, shard)
        reached = (ordered.exp() / total[left]).cumsum(-1)
        kept[left] = counts = 1 + (reached[:, :-1] <= top_p).sum(-1, keepdim=True)
        smallest[left] = last = ordered.gather(1, counts - 1)
        ties[left] = counts - (ordered > last).sum(-1, keepdim=True)
        short = reached[:, -1] <= top_p
        if look == vocabulary or not bool(short.any()):
            break
        left = short.nonzero()[:, 0] if isinstance(left, slice) else left[short]
        look = min(look * _LOOK_GROWTH, vocabulary)
    equal = logits == smallest
    if shard is not None:  # ties of lower ids first
        ties -= shard.sum_before(equal.sum(-1, keepdim=True))
    logits.masked_fill_(logits < smallest, NEG_INF)
    if not on_host or bool((equal.sum(-1, keepdim=True) > ties).any()):
        logits.masked_fill_(equal & (equal.cumsum(-1) > ties), NEG_INF)
    return max(FIRST_LOOK, int(kept.amax()) * 5 // 4) if on_host and rows else look
