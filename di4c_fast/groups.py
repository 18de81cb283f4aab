"""Process groups: a vocabulary whose columns lie on several ranks, and what these exchange.

Shapes: R rows, V classes of the whole vocabulary. Every exchange is a collective of
`torch.distributed`, of numbers per row and never of logits. A collective gives the same bits on all
ranks, so ranks that start from the same numbers decide alike.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_int, describe


class Shard(NamedTuple):
    """Columns start .. stop - 1 of a vocabulary; other ranks of the group hold the others."""

    start: int
    stop: int
    vocabulary: int  # V, of all ranks together
    group: str  # name of the process group

    @property
    def process_group(self) -> Any:
        return _resolve(self.group)

    @property
    def share(self) -> int:
        """Columns of an even share: what ranks plan with that work in step."""
        return -(-self.vocabulary // dist.get_world_size(self.process_group))

    def column(self, token: int | None) -> int | None:
        """Where a token stands among the columns of this rank; None: it is none of them."""
        inside = token is not None and self.start <= token < self.stop
        return token - self.start if inside and token is not None else None

    def owns(self, tokens: Tensor) -> Tensor:
        return (tokens >= self.start) & (tokens < self.stop)

    def local(self, tokens: Tensor) -> Tensor:
        """The columns of tokens; one more than there are where they are on another rank."""
        width = self.stop - self.start
        return torch.where(self.owns(tokens), tokens - self.start, width)

    def nearest(self, tokens: Tensor) -> Tensor:
        """The columns of tokens; some column where they are on another rank."""
        return (tokens - self.start).clamp(0, self.stop - self.start - 1)

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Sums over the ranks, in one exchange; tensors of one dtype."""
        return self._reduce(dist.ReduceOp.SUM, values)

    def from_owner(self, values: Tensor, tokens: Tensor) -> Tensor:
        """The values of the ranks that own these tokens."""
        return self.sum(torch.where(self.owns(tokens), values, 0.0))[0]

    def maximum(self, *values: Tensor) -> list[Tensor]:
        return self._reduce(dist.ReduceOp.MAX, values)

    def argmax(self, values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The largest value of all ranks and its token, the lowest of equals: (R,) each."""
        (largest,) = self.maximum(values)
        candidates = torch.where(values == largest, tokens, self.vocabulary)
        (found,) = self._reduce(dist.ReduceOp.MIN, (candidates,))
        return largest, found.clamp_max(self.vocabulary - 1)

    def sum_before(self, counts: Tensor) -> Tensor:
        """The sum over the ranks whose columns come before those of this one: int64 (R, 1)."""
        every = self.gather(torch.cat((counts, torch.full_like(counts, self.start)), dim=1))
        return torch.where(every[..., 1:] < self.start, every[..., :1], 0).sum(0)

    def gather(self, values: Tensor) -> Tensor:
        """The values of every rank, in the order of the ranks: (ranks, ...)."""
        return _gather(values, self.process_group)

    def agree(self, facts: Any, device: torch.device, *tokens: Tensor | None) -> None:
        """Check that all ranks evaluate the same over columns that make up the vocabulary.

        facts: plain ones.

        Raises:
            ValueError: they do not; on every rank. On a GPU, where a look at the result would wait
                for the device, a device-side assertion.
        """
        _compare(self.process_group, self[:3], facts, _digest(tokens, device))

    def _reduce(self, operation: Any, values: Sequence[Tensor]) -> list[Tensor]:
        """One exchange for tensors of one dtype."""
        flat = torch.cat([value.reshape(-1) for value in values])
        dist.all_reduce(flat, operation, group=self.process_group)
        parts = flat.split([value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def _resolve(name: str) -> Any:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def of_first_rank(value: Tensor, group: str) -> Tensor:
    """The tensor of the first rank of the group."""
    value = value.clone()
    dist.broadcast(value, group=_resolve(group), group_src=0)
    return value


def all_sum(value: Tensor, group: str) -> Tensor:
    """The sum over the ranks of the group; `value` is overwritten."""
    dist.all_reduce(value, group=_resolve(group))
    return value


def agree_but_for_positions(
    group: str, facts: Any, device: torch.device, *tensors: Tensor | None
) -> None:
    """Check that ranks that share the positions evaluate the same; errors as of `Shard.agree`."""
    _compare(_resolve(group), (0, 0, 0), facts, _digest(tensors, device))


def _digest(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """One number that tells the contents of tensors apart, without a look at them."""
    sums = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        if tensor is not None:
            flat = tensor.detach().flatten()
            whole = flat if flat.dtype == torch.int64 else flat.contiguous().view(torch.uint8)
            weights = torch.arange(1, whole.numel() + 1, device=device)
            sums = sums * 31 + (whole * weights).sum()
    return sums


def places_among(count: int, group: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many positions the ranks before this one have, and all together: () int64 each."""
    found = _resolve(group)
    every = _gather(torch.full((), count, dtype=torch.int64, device=device), found)
    return every[: dist.get_rank(found)].sum(), every.sum()


def group_name(group: Any, name: str) -> str | None:
    return None if group is None else _checked_group(group, name).group_name


def check_apart(shard: Shard | None, position_group: Any) -> None:
    """Ranks that share the positions have the same columns, so they share no vocabulary."""
    if shard is not None:
        groups = shard.process_group, position_group
        both = set.intersection(*(set(dist.get_process_group_ranks(group)) for group in groups))
        if len(both) > 1:
            raise ValueError(
                "position_group must have none of the other ranks that hold the vocabulary, got "
                f"{sorted(both)}"
            )


@contextlib.contextmanager
def shared_errors(head: Any, position_group: Any = None) -> Iterator[None]:
    """A wrong argument on one rank is an error on every rank, which would wait for it otherwise."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text, shard = f"{type(error).__name__}: {error}", getattr(head, "shard", None)
        if shard is not None:
            shard.agree(text, head.device)
        if position_group is None:
            raise
        if isinstance(position_group, dist.ProcessGroup) and dist.get_rank(position_group) >= 0:
            device = getattr(head, "device", torch.device("cpu"))
            agree_but_for_positions(position_group.group_name, text, device)
        raise


def make_shard(
    check: Callable[[], tuple[int, Any]],
    tensor: Any,
    found: dict[str, Any],
    group: Any,
    columns: Any,
    vocabulary: int | None,
) -> Shard | None:
    """The shard of a head that holds `columns`; None for a whole one.

    found: the next three, where they came with a DTensor.

    `check` raises for wrong tensors, and returns how many columns there are and what has to be the
    same on every rank. Without `vocabulary` the ranks tell each other their columns.
    """
    if found:
        if not (group is None and columns is None and vocabulary is None):
            raise ValueError(
                "group, columns and vocabulary must be None with a DTensor: they are those of its "
                "device_mesh"
            )
        group, columns, vocabulary = found["group"], found["columns"], found["vocabulary"]
    if columns is None:
        if group is not None or vocabulary is not None:
            raise ValueError(
                "group and vocabulary need columns = (start, stop): those that this rank holds"
            )
        check()
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "columns needs torch.distributed, which is not initialised: call init_process_group"
        )
    group = _checked_group(dist.group.WORLD if group is None else group, "group")
    device = tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")
    none = torch.zeros((), dtype=torch.int64, device=device)
    try:
        width, facts = check()
        start, stop = _checked_columns(columns, width, vocabulary)
    except (TypeError, ValueError) as error:
        _compare(group, (0, 0, 0), f"{type(error).__name__}: {error}", none)
        raise
    if vocabulary is None:
        table = _compare(group, (start, stop, -1), facts, none)
        vocabulary = int(table[:, 1].max())
    return Shard(start, stop, vocabulary, group.group_name)


def unwrap(tensor: Any, dim: int, name: str) -> tuple[Any, dict[str, Any]]:
    """The local part of a DTensor that is sharded along `dim`, and the `group`, `columns` and
    `vocabulary` of a head over it; other values as they are, with nothing."""
    if type(tensor).__name__ != "DTensor":
        return tensor, {}
    mesh, placements = tensor.device_mesh, tensor.placements
    dim %= tensor.ndim
    if mesh.ndim != 1 or not (
        placements[0].is_shard(dim) or placements[0].is_shard(dim - tensor.ndim)
    ):
        raise ValueError(
            f"{name} must be a DTensor of Shard({dim}) over a mesh of one dimension, got "
            f"{placements} over {mesh}: call .full_tensor() or .to_local()"
        )
    vocabulary = tensor.shape[dim]
    step = -(-vocabulary // mesh.size())  # shards are those of `torch.chunk`
    start = min(mesh.get_local_rank() * step, vocabulary)
    columns = (start, min(start + step, vocabulary))
    return tensor.to_local(), {
        "group": mesh.get_group(),
        "columns": columns,
        "vocabulary": vocabulary,
    }


def _gather(values: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return torch.stack(parts)


def _compare(group: Any, numbers: Sequence[int], facts: Any, sums: Tensor) -> Tensor:
    """Check what the ranks say; the numbers of all: (ranks, 5).

    numbers: start, stop and V, -1 where it is asked for.
    facts: plain ones, by name where there are several; a rank that failed has its error alone.
    """
    fact = int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:7], "little")
    # Filled in by kernels: a copy from the host would wait for the device.
    table = _gather(
        torch.stack([*(torch.full_like(sums, n) for n in (*numbers, fact)), sums]), group
    )
    starts, ends = (table[:, i].sort().values for i in (0, 1))
    follow = (starts[1:] == ends[:-1]).all() & (starts[0] == 0)
    whole = (table[:, 2] == ends[-1]) | (table[:, 2] == -1)
    same = (table[:, 2:] == table[0, 2:]).all() & follow & whole.all()
    if sums.device.type != "cpu":
        message = "the ranks of a group disagree about a sharded vocabulary or a call with it"
        torch._assert_async(same, message)
    elif not bool(same):
        _refuse(group, facts, table.tolist())
    return table


def _refuse(group: Any, facts: Any, table: list[list[int]]) -> None:
    named = {k: repr(v) for k, v in facts.items()} if isinstance(facts, dict) else {"": facts}
    every: list[Any] = [None] * len(table)
    dist.all_gather_object(every, named, group=group)
    if any(other != named for other in every):
        failed = any("" in other for other in every)
        said = []
        for rank, other in enumerate(every):
            differ = [k for k, v in other.items() if any(one.get(k) != v for one in every)]
            texts = [f"{k} {other[k]}".strip() for k in differ if not (failed and k)]
            said += [f"rank {rank}: {', '.join(texts)}"] if texts else []
        raise ValueError(f"the ranks of the group disagree: {'; '.join(said)}")
    spans = ", ".join(f"{tuple(row[:2])} of rank {rank}" for rank, row in enumerate(table))
    totals = {row[2] for row in table}
    if len(totals) > 1:
        raise ValueError(f"the ranks of the group disagree about vocabulary: {sorted(totals)}")
    end = 0
    for start, stop, *_ in sorted(table):
        if start != end:
            problem = "overlap" if start < end else "are missing"
            raise ValueError(f"columns of the vocabulary {problem} at {min(start, end)}: {spans}")
        end = stop
    if totals not in ({end}, {-1}):
        raise ValueError(f"columns of the vocabulary are missing at {end} of {totals}: {spans}")
    names = "tokens, times, latents, row_keys or step"
    raise ValueError(f"{names} differ between the ranks of the group")


def _checked_group(group: Any, name: str) -> Any:
    """A process group that this rank belongs to."""
    if not isinstance(group, dist.ProcessGroup):
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name} does not contain this rank")
        raise TypeError(f"{name} must be a process group, got {describe(group)}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{name} does not contain this rank")
    return group


def _checked_columns(columns: Any, width: int, vocabulary: int | None) -> tuple[int, int]:
    """columns = (start, stop) of a head with `width` columns."""
    pair = isinstance(columns, (tuple, list)) and len(columns) == 2
    if not pair or not all(type(end) is int for end in columns):
        raise TypeError(f"columns must be a pair of ints (start, stop), got {describe(columns)}")
    start, stop = columns
    if vocabulary is not None:
        check_int(vocabulary, "vocabulary", minimum=1)
    if not 0 <= start < stop <= (vocabulary or stop):
        raise ValueError(
            f"columns must have 0 <= start < stop <= vocabulary, got {(start, stop)} of "
            f"{vocabulary or 'any'}"
        )
    if stop - start != width:
        raise ValueError(
            f"columns {(start, stop)} are {stop - start}, the shard of this rank has {width}"
        )
    return start, stop
