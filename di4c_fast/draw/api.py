"""Exact draws of tokens from rows of logits, with everything a sampler wants to know of a row."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import backends
from ..checks import check_choice, check_whole, without_autocast
from ..groups import shared_errors
from ..heads import HeadLike
from ..reference import draw as reference
from ..rng import Integer
from . import driver
from .request import Draw, prepare_request

__all__ = ["Draw", "sample"]


@torch.no_grad()
def sample(
    logits: HeadLike,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: tuple[HeadLike, float | Tensor] | None = None,
    mask_id: int | None = None,
    seed: Integer | None = None,
    step: Integer = 0,
    row_keys: Tensor | None = None,
    generator: torch.Generator | None = None,
    want: str | Iterable[str] = ("log_prob",),
    confidence_dtype: torch.dtype | None = None,
    check: bool | None = None,
    budget_bytes: int | None = None,
    backend: str = "auto",
) -> Draw:
    """Draw one token per row, exactly from the softmax of its logits, in one pass over the row.

    Equivalent PyTorch, up to the random numbers:

        c, u = logits.float(), unconditional.float()
        x = u + (scale + 1) * (c - u)                      # guidance
        x[..., mask_id] = -inf
        x = x / temperature
        x = where(kept by top_p, x, -inf); x = where(kept by top_k, x, -inf)
        p = x.softmax(-1)
        token = torch.multinomial(p, 1)                    # argmax at temperature 0
        log_prob = p.log().gather(-1, token)

    without noise for every token, and without all logits in memory where a head is given.

    Args:
        logits: (..., V), a tensor or a `Head`; fp64, fp32, bf16 or fp16, of any strides. -inf
            excludes a token; a row needs one that is not excluded.
        temperature: number, or tensor of the leading shape, at least 0. At 0 the token is the
            argmax, the lowest id among equals, and the statistics are those of temperature 1.
        top_p: in (0, 1]; keeps the most probable tokens up to and with the first that takes
            their sum beyond `top_p`; among equals the lower id first.
        top_k: at least 1; keeps the tokens that are no less probable than the k-th; all equals.
        guidance: (unconditional, scale): logits or head of the shape of `logits`, and a number
            or a tensor of the leading shape. This is (1 + w)c − w·u of MaskGIT with w = scale and
            u + (s + 1)(c − u) of LLaDA with s = scale. Tokens at -inf in `logits` stay excluded.
        mask_id: a column that is never drawn and no part of any statistic.
        seed: int, or () int64; None: drawn from `generator`.
        step: int, or () int64: the number of the draw under one seed; taken modulo 2^32.
        row_keys: int64 of the leading shape, the identity of each row; None: 0, 1, 2, ...
        generator: where the seed comes from; None: torch's default. Not advanced at temperature 0.
        want: names out of the fields of `Draw`, or "all". "log_prob", "logsumexp", "prob" and
            "max_log_prob" are free; the rest costs up to one more pass over a row in cache.
        confidence_dtype: None, or the dtype of a repository to match bit for bit: "prob",
            "raw_prob", "margin" and "entropy" are then computed and returned in this dtype by
            the operations of LLaDA and Dream (guidance, temperature, filters and a softmax of
            whole rows; the entropy as −Σ p log(p + 1e-10)). The token is still drawn in fp32, at
            a temperature applied in fp32, from the set of tokens that those filters leave.
        check: raise ValueError for NaN, +inf and rows without an allowed token. None: on the CPU
            only, where it is free; on a GPU it costs a host sync. Unchecked, such a row gets
            token -1, argmax -1 and NaN statistics.
        budget_bytes: how much memory the logits of a head may take at a time (at least 64 rows
            are computed together); None: that of the `LinearHead`, or 64 MiB on a CPU and
            128 MiB on a GPU.
        backend: "auto", the fastest that runs here; "triton", "cpu", "torch"; "reference".

    Returns:
        `Draw`: token int64, statistics fp32 (fp64 for fp64 logits), each of the leading shape;
        nothing is differentiable.

    Autocast has no effect inside.

    A token is a pure function of (seed, step, row key, its row's logits): neither the batch, nor
    the order of rows, nor chunks, nor the backend changes it, up to the rounding of sums. The
    definition is in `draw.law`, the random numbers in `rng`. The probability of a block
    of 128 tokens is resolved to 2⁻³³; within it every token has its exact share.

    Raises:
        TypeError, ValueError: an argument of a wrong kind, shape, dtype, device or value, NaN or
            +inf logits, a row without allowed token (see `check`).
        RuntimeError: a backend asked for by name cannot run here.

    >>> logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, float("-inf")]])
    >>> sample(logits, temperature=0).token
    tensor([2, 0])
    >>> draw = sample(logits, seed=1, want=("log_prob", "entropy"))
    >>> expected = logits.log_softmax(-1).gather(1, draw.token[:, None])[:, 0]
    >>> torch.testing.assert_close(draw.log_prob, expected)
    """
    with shared_errors(logits):
        check_choice(backend, "backend", backends.names())
        request = prepare_request(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            mask_id=mask_id,
            seed=seed,
            step=step,
            row_keys=row_keys,
            generator=generator,
            want=want,
            confidence_dtype=confidence_dtype,
            check=check,
            budget_bytes=budget_bytes,
        )
    with without_autocast(request.head.device):
        if backend == "reference":
            check_whole(request.head, 'backend="reference"')
            fields = reference.sample_rows(request)
        else:
            fields = driver.sample_rows(request, backend)
    driver.check_rows(request, fields["token"])
    leading = request.head.shape[:-1]
    return Draw(**{name: value.view(leading) for name, value in fields.items()})
