"""A model called on a few rows at a time: the memory of a few rows, the gradient of one call."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..heads import Head, TensorHead
from ..heads.base import BuiltInHead


def call_in_pieces(
    call: Callable[..., Head],
    tensors: Sequence[Tensor | None],
    at_once: int | None,
    *,
    nested: bool = False,
) -> Head:
    """The head (R, ...) of `call(*tensors)`, of at most `at_once` rows in a call.

    With a graph, only the heads' own tensors are kept: the backward pass calls the model once
    more on one piece after another, with the random state and the autocast of the first call, so
    that activations of one piece are alive at a time. What does not belong to the rows (an output
    weight) is that of the first piece. A head of one's own becomes its logits.

    Args:
        tensors: (R, ...) each, None where absent.
        at_once: None for all.
        nested: build the graph of each piece but the first only within `Tensor.backward`, go
            backward through it there, and free it. Such a graph cannot be used with `inputs` or
            `torch.autograd.grad`. Ignored where weights have hooks, which expect the gradient of
            all pieces, or come from an older graph, which allows one backward pass. False: a
            graph for any use, data parallelism included.
    """
    rows = next(len(tensor) for tensor in tensors if tensor is not None)
    if at_once is None or rows <= at_once:
        return call(*tensors)
    run: Callable[..., Any] = functools.partial(_built_in, call)
    count = -(-rows // at_once)  # as even as they can be, since the largest decides
    ends = [i * rows // count for i in range(count + 1)]
    pieces = ([t if t is None else t[i:j] for t in tensors] for i, j in itertools.pairwise(ends))
    if not torch.is_grad_enabled():
        return _joined([run(*piece) for piece in pieces])
    start = torch.ones((), requires_grad=True).clone().grad_fn
    heads: list[Any] = [checkpoint(run, *next(pieces), use_reentrant=False)]
    asking = [tensor for tensor in _row_tensors(heads[0]) if tensor.requires_grad]
    if nested and asking and _allows_several_passes(asking, tensors, start):
        # Weights are not arguments, so a reentrant checkpoint needs one that requires a gradient.
        # It depends on every output: `autograd.grad` of a single weight then raises, too.
        nothing = torch.stack([tensor[:0].sum() for tensor in asking]).sum()
        run = functools.partial(_nested, run, heads[0], nothing)
    else:
        run = functools.partial(checkpoint, run, use_reentrant=False)
    heads += [run(*piece) for piece in pieces]
    return _joined(heads)


def _built_in(call: Callable[..., Head], *tensors: Any) -> BuiltInHead:
    head = call(*tensors)
    return head if isinstance(head, BuiltInHead) else TensorHead(head.logits())


def _allows_several_passes(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], start: Any
) -> bool:
    """Whether the graph of `outputs` ends at `inputs` and at weights without hooks, and no part of
    it was there before the node `start`."""
    seen = {tensor.grad_fn for tensor in inputs if tensor is not None}
    given = {id(tensor) for tensor in inputs}
    todo = [tensor.grad_fn for tensor in outputs]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        weight = None if node.next_functions else getattr(node, "variable", None)
        if weight is None:
            refused = node._sequence_nr() < start._sequence_nr()
        else:
            hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
            refused = bool(hooks) and id(weight) not in given
        if refused:
            return False
    return True


def _nested(run: Callable[..., Any], like: BuiltInHead, asking: Tensor, *piece: Any) -> Head:
    """`run(*piece)`, whose tensors that do not belong to the rows are those of `like`.

    The backward pass runs it again and goes backward through it there and then.
    """

    def row_tensors(_: Tensor, *piece: Any) -> tuple[Tensor, ...]:
        return tuple(_row_tensors(run(*piece)))

    found = list(checkpoint(row_tensors, asking, *piece, use_reentrant=True))
    return like.map_rows(lambda _: found.pop(0))


def _row_tensors(head: BuiltInHead) -> list[Tensor]:
    """The tensors of a head that belong to its rows."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    head.map_rows(collect)
    return found


def _joined(heads: Sequence[BuiltInHead]) -> Head:
    """Heads of one kind as one, along their first dimension."""
    columns = [torch.cat(column) for column in zip(*map(_row_tensors, heads), strict=True)]
    return heads[0].map_rows(lambda _: columns.pop(0))
