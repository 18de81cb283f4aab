"""Row draws, dense and literal: the truth that the other backends of `sample` are held to.

Computed in fp64 for fp64 logits, in fp32 otherwise. Every row holds several tensors of V numbers
and one random number per token, so this is for tests and small problems.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..draw.law import SAMPLE_BLOCK
from ..draw.request import SampleRequest
from ..rng import BLOCKS, TOKENS, Integer, uniform

NEG_INF = float("-inf")


def draw_ref(
    log_prob: Tensor, seed: Integer, *, step: Integer = 0, row_keys: Tensor | None = None
) -> Tensor:
    """One token per row of log-probabilities, by the sequential algorithm of a draw.

    Args:
        log_prob: (..., V), normalised or not; -inf for excluded tokens.
        seed, step: int, or () int64.
        row_keys: int64 of the leading shape, the identity of each row; None: 0, 1, 2, ...

    Returns:
        int64 of the leading shape; 0 for a row that is -inf throughout.
    """
    vocabulary = log_prob.shape[-1]
    dtype = torch.promote_types(log_prob.dtype, torch.float32)
    rows = log_prob.detach().reshape(-1, vocabulary).to(dtype)
    if row_keys is None:
        row_keys = torch.arange(rows.shape[0], device=rows.device)
    row_keys = row_keys.reshape(-1)
    blocks = list(range(0, vocabulary, SAMPLE_BLOCK))
    block_u = uniform(seed, step, row_keys, len(blocks), stream=BLOCKS, dtype=dtype)
    token_u = uniform(seed, step, row_keys, vocabulary, stream=TOKENS, dtype=dtype)

    peak = rows.amax(-1, keepdim=True)
    weights = (rows - peak.masked_fill(peak == NEG_INF, 0.0)).exp()
    race = rows - torch.log(-torch.log1p(-token_u))
    total = torch.zeros_like(peak[:, 0])
    token = torch.zeros_like(row_keys)
    for index, begin in enumerate(blocks):
        mass = weights[:, begin : begin + SAMPLE_BLOCK].sum(-1)
        total = total + mass
        winner = begin + race[:, begin : begin + SAMPLE_BLOCK].argmax(-1)
        token = torch.where(block_u[:, index] * total < mass, winner, token)
    return token.view(log_prob.shape[:-1])


def transformed_logits_ref(
    logits: Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance_scale: float | Tensor = 0.0,
    mask_id: int | None = None,
    temperature: float | Tensor = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Tensor:
    """The logits whose softmax is the drawn distribution, (R, V), in the dtype of `logits`.

    guidance -> mask_id -> temperature -> top-p -> top-k; per-row scales and temperatures are (R,).
    """
    if unconditional is not None:
        scale = _column(guidance_scale, logits.dtype)
        guided = unconditional + (scale + 1) * (logits - unconditional)
        logits = torch.where(logits == NEG_INF, logits, guided)
    if mask_id is not None:
        excluded = torch.arange(logits.shape[-1], device=logits.device) == mask_id
        logits = logits.masked_fill(excluded, NEG_INF)
    temperature = _column(temperature, logits.dtype)
    if isinstance(temperature, Tensor):
        logits = logits / torch.where(temperature == 0, 1, temperature)
    elif temperature != 0:
        logits = logits / temperature
    if top_p is not None:
        ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
        reached = ordered.softmax(-1).cumsum(-1)
        # A token stays while those before it have not yet passed top_p.
        before = torch.cat([torch.zeros_like(reached[:, :1]), reached[:, :-1]], -1)
        logits = logits.masked_fill((before > top_p).gather(1, ids.argsort(-1)), NEG_INF)
    if top_k is not None:
        smallest = logits.sort(-1, descending=True).values[:, min(top_k, logits.shape[-1]) - 1]
        logits = logits.masked_fill(logits < smallest.unsqueeze(-1), NEG_INF)
    return logits


def _column(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return value.to(dtype).unsqueeze(-1) if isinstance(value, Tensor) else value


def sample_rows(request: SampleRequest) -> dict[str, Tensor]:
    """The reference backend of `sample`: the token and the wanted fields, each (R,)."""
    work = request.confidence_dtype or request.dtype
    shape = (request.rows, request.vocabulary)
    given = request.head.logits().detach().reshape(shape)
    uncond = None
    if request.unconditional is not None:
        uncond = request.unconditional.logits().detach().reshape(shape)

    def transformed(logits: Tensor, dtype: torch.dtype, drawn: bool) -> Tensor:
        return transformed_logits_ref(
            logits.to(dtype),
            mask_id=request.mask_id,
            temperature=request.temperature if drawn else 1.0,
            top_p=request.top_p if drawn else None,
            top_k=request.top_k if drawn else None,
        )

    guided = given
    if uncond is not None:
        guided = transformed_logits_ref(
            given.to(work), unconditional=uncond.to(work), guidance_scale=request.guidance_scale
        )
    literal = transformed(guided, work, drawn=True)
    logits = literal
    if request.confidence_dtype is not None:
        # Only the set of tokens that the filters leave comes from the other dtype.
        unfiltered = transformed_logits_ref(
            guided.to(request.dtype), mask_id=request.mask_id, temperature=request.temperature
        )
        logits = unfiltered.masked_fill(literal == NEG_INF, NEG_INF)

    log_prob = logits.log_softmax(-1)
    argmax = (logits == logits.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
    token = argmax
    if not request.options().greedy:
        token = draw_ref(log_prob, request.seed, step=request.step, row_keys=request.row_keys)
        if isinstance(request.temperature, Tensor):
            token = torch.where(request.temperature == 0, argmax, token)
    prob = literal.softmax(-1)
    result = {"token": token, "argmax": argmax}
    result["log_prob"] = _pick(log_prob, token)
    result["logsumexp"] = logsumexp = logits.logsumexp(-1)
    result["max_log_prob"] = log_prob.amax(-1)
    if request.confidence_dtype is None:
        result["entropy"] = -torch.where(prob > 0, prob * log_prob, 0.0).sum(-1)
    else:
        result["entropy"] = -(prob * torch.log(prob + 1e-10)).sum(-1)
    largest = prob.sort(-1, descending=True).values
    result["margin"] = largest[:, 0] - largest[:, 1] if prob.shape[1] > 1 else largest[:, 0]
    result["prob"] = _pick(prob, token)
    result["raw_prob"] = _pick(transformed(guided, work, drawn=False).softmax(-1), token)
    bad = ~logsumexp.isfinite()  # NaN, +inf, or no token at all
    return {
        name: result[name].masked_fill(bad, -1 if name in ("token", "argmax") else float("nan"))
        for name in ("token", *request.want)
    }


def _pick(values: Tensor, token: Tensor) -> Tensor:
    return values.gather(1, token.unsqueeze(-1))[:, 0]
