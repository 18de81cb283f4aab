"""Process groups: a vocabulary whose columns lie on several ranks, and what these exchange.

Shapes: R rows, V classes of the whole vocabulary. Every exchange is a collective of
`torch.distributed`, of numbers per row and never of logits. A collective gives the same bits on all
ranks, so ranks that start from the same numbers decide alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import describe

_layouts: weakref.WeakKeyDictionary[Any, dict[Any, Shard]] = weakref.WeakKeyDictionary()


class Shard(NamedTuple):
    """Columns start .. stop - 1 of a vocabulary; other ranks of the group hold the others."""

    start: int
    stop: int
    vocabulary: int  # V, of all ranks together
    widest: int  # columns of the rank that has most
    ranks: tuple[int, ...]  # of the group, in the order of their columns
    group: str  # its name

    @property
    def process_group(self) -> Any:
        return torch._C._distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]

    def column(self, token: int | None) -> int | None:
        """Where a token stands among the columns of this rank; None: it is none of them."""
        inside = token is not None and self.start <= token < self.stop
        return token - self.start if inside and token is not None else None

    def owns(self, tokens: Tensor) -> Tensor:
        return (tokens >= self.start) & (tokens < self.stop)

    def local(self, tokens: Tensor, other: int = 0) -> Tensor:
        """The columns of tokens; `other` where they are on another rank."""
        return torch.where(self.owns(tokens), tokens - self.start, other)

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Sums over the ranks, in one exchange; tensors of one dtype."""
        return self._reduce(dist.ReduceOp.SUM, values)

    def maximum(self, *values: Tensor) -> list[Tensor]:
        return self._reduce(dist.ReduceOp.MAX, values)

    def argmax(self, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value of all ranks and its token, the lowest of equals: (R,) each."""
        (largest,) = self.maximum(values)
        candidates = torch.where(values == largest, tokens, self.vocabulary)
        (found,) = self._reduce(dist.ReduceOp.MIN, (candidates,))
        return largest, found.clamp_max(self.vocabulary - 1)

    def first(self, value: Tensor) -> Tensor:
        """The tensor of the first rank of the group."""
        value = value.clone()
        dist.broadcast(value, group=self.process_group, group_src=0)
        return value

    def sum_before(self, values: Tensor) -> Tensor:
        """The sum over the ranks whose columns come before those of this one."""
        rank = dist.get_rank(self.process_group)
        return self.gather(values)[: self.ranks.index(rank)].sum(0)

    def gather(self, values: Tensor) -> Tensor:
        """(R, k) of every rank, in the order of their columns: (ranks, R, k)."""
        group = self.process_group
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.stack([parts[rank] for rank in self.ranks])

    def agree(self, facts: Any, device: torch.device, *tokens: Tensor | None) -> None:
        """Check that all ranks evaluate the same: plain facts, and tensors of integers.

        Raises:
            ValueError: they do not; on every rank. On a GPU, where a look at the result would wait
                for the device, a device-side assertion.
        """
        text = repr(facts)
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        sums = torch.zeros((), dtype=torch.int64, device=device)
        for tensor in tokens:
            if tensor is not None:
                weights = torch.arange(1, tensor.numel() + 1, device=device)
                sums = sums * 31 + (tensor.flatten() * weights).sum()
        pair = torch.stack((torch.full_like(sums, number), sums))
        (largest,) = self.maximum(torch.cat((pair, -pair)))
        same = largest[:2] == -largest[2:]
        if device.type != "cpu":
            torch._assert_async(same.all(), "ranks of the group disagree about a call of di4c_fast")
        elif not bool(same.all()):
            texts = _gathered(text, self.process_group)
            if len(set(texts)) == 1:
                raise ValueError("tokens, row_keys or step differ between the ranks of the group")
            listed = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
            raise ValueError(f"the ranks of the group disagree: {listed}")

    def _reduce(self, operation: Any, values: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([value.reshape(-1) for value in values])
        dist.all_reduce(flat, operation, group=self.process_group)
        parts = flat.split([value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


@contextlib.contextmanager
def shared_errors(head: Any) -> Iterator[None]:
    """A wrong argument on one rank is an error on every rank, which would wait for it otherwise."""
    try:
        yield
    except (TypeError, ValueError) as error:
        shard = getattr(head, "shard", None)
        if shard is not None:
            shard.agree(f"{type(error).__name__}: {error}", head.device)
        raise


def make_shard(
    check: Callable[[], Any], width: Callable[[], int], group: Any, columns: Any
) -> Shard | None:
    """The shard of a head that holds `columns`, agreed upon by all ranks; None for a whole one.

    `check` raises for wrong tensors, and returns what has to be the same on every rank. The ranks
    talk to each other once for every new layout.
    """
    if columns is None:
        if group is not None:
            raise ValueError("group needs columns = (start, stop): those that this rank holds")
        check()
        return None
    group = _checked_group(group)
    facts, failure = None, None
    try:
        facts = check()
        _check_columns(columns, width())
    except (TypeError, ValueError) as error:
        failure = error
    key = (facts, None if failure else tuple(columns))
    known = _layouts.setdefault(group, {})
    if failure is None and key in known:
        return known[key]
    text = failure and f"{type(failure).__name__}: {failure}"
    everything = _gathered((*key, text), group)
    for rank, (_, _, problem) in enumerate(everything):
        if problem is not None:
            if failure is not None:
                raise failure
            raise ValueError(f"rank {rank} of the group: {problem}")
    _check_layout(everything)
    spans = [span for _, span, _ in everything]
    order = tuple(sorted(range(len(spans)), key=lambda rank: spans[rank]))
    widest = max(stop - start for start, stop in spans)
    start, stop = columns
    shard = Shard(start, stop, spans[order[-1]][1], widest, order, group.group_name)
    known[key] = shard
    return shard


def _gathered(value: Any, group: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _checked_group(group: Any) -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "columns needs torch.distributed, which is not initialised: call init_process_group"
        )
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group does not contain this rank")
        raise TypeError(f"group must be a process group, got {describe(group)}")
    if dist.get_rank(group) < 0:
        raise ValueError("group does not contain this rank")
    return group


def _check_columns(columns: Any, width: int) -> None:
    """columns = (start, stop) of a head with `width` columns."""
    pair = isinstance(columns, (tuple, list)) and len(columns) == 2
    if not pair or not all(type(end) is int for end in columns):
        raise TypeError(f"columns must be a pair of ints (start, stop), got {describe(columns)}")
    start, stop = columns
    if not 0 <= start < stop:
        raise ValueError(f"columns must have 0 <= start < stop, got {(start, stop)}")
    if stop - start != width:
        raise ValueError(
            f"columns {(start, stop)} are {stop - start}, the shard of this rank has {width}"
        )


def _check_layout(everything: Sequence[tuple[Any, Any, Any]]) -> None:
    """All ranks agree, and their columns follow upon each other from 0 on."""
    every = [facts for facts, _, _ in everything]
    if any(facts != every[0] for facts in every):
        listed = "; ".join(f"rank {rank}: {facts}" for rank, facts in enumerate(every))
        raise ValueError(f"the shards of a head must be alike on all ranks of the group: {listed}")
    end = 0
    for (start, stop), rank in sorted((e[1], rank) for rank, e in enumerate(everything)):
        if start != end:
            kind = "overlap: column" if start < end else "are missing: column"
            raise ValueError(
                f"columns {kind} {min(start, end)}; rank {rank} of the group holds "
                f"{(start, stop)}, the ones before end at {end}"
            )
        end = stop
