"""What a user would write without this library, in plain PyTorch, dense.

Shapes as in `di4c_fast`: student (B, N, D, V), teacher (B, D, V), consistency (B, K, D, V). The
losses compute the same numbers as `di4c_fast.loss`, draw the consistency tokens themselves where
none are given, and are differentiated by autograd. Half-precision logits are cast to fp32 first,
as the logarithms need it. No baseline does work that is known to be needless besides its being
dense: the teacher runs without a graph, and its logits for identical copies are averaged once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands in for -inf, so that 0 * log 0 stays finite without a mask.
NEGATIVE = -1e6


def log_probs(logits: Tensor, tokens: Tensor | None, mask_id: int | None) -> Tensor:
    """log-softmax; with a mask the SUBS parameterisation: no mask column, known tokens certain.

    tokens: the leading shape of `logits`, or one that broadcasts to it.
    """
    if tokens is None or mask_id is None:
        return logits.float().log_softmax(-1)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    log_prob = logits.float().masked_fill(columns == mask_id, NEGATIVE).log_softmax(-1)
    revealed = (tokens != mask_id).unsqueeze(-1)
    certain = torch.where(columns == tokens.unsqueeze(-1), 0.0, NEGATIVE)
    return torch.where(revealed, certain, log_prob)


def draw_tokens(log_prob: Tensor) -> Tensor:
    """One token per row of (..., V), with `torch.multinomial`."""
    rows = log_prob.exp().flatten(0, -2)
    return torch.multinomial(rows, 1).view(log_prob.shape[:-1])


def dense_loss(
    student: Tensor,
    teacher: Tensor,
    x0: Tensor,
    *,
    consistency: Tensor,
    consistency_x: Tensor | None = None,
    xt: Tensor | None = None,
    xu: Tensor | None = None,
    mask_id: int | None = None,
    data_weight: float = 1.0,
    one_gather: bool = False,
) -> Tensor:
    """The loss, mean over the batch.

    Args:
        xt, xu, mask_id: all three, or none for processes without a mask.
        one_gather: gather all targets at once instead of one row of tokens after the other.
    """
    components = student.shape[1]
    log_prob = log_probs(student, None if xt is None else xt.unsqueeze(1), mask_id)
    with torch.no_grad():
        log_teacher = log_probs(teacher, xt, mask_id)
        log_consistency = log_probs(consistency, xu, mask_id)
        if consistency_x is None:
            consistency_x = draw_tokens(log_consistency)
        target = log_consistency.exp().mean(1)
        log_target = log_consistency.logsumexp(1) - math.log(consistency.shape[1])
    marginal = log_prob.logsumexp(1) - math.log(components)

    def correlation(tokens: Tensor) -> Tensor:  # (B, D) -> (B,)
        index = tokens[:, None, :, None].expand(-1, components, -1, -1)
        picked = log_prob.gather(-1, index).squeeze(-1)  # (B, N, D)
        joint = picked.sum(-1).logsumexp(1) - math.log(components)
        return (picked.logsumexp(1) - math.log(components)).sum(-1) - joint

    def correlations(rows: Tensor) -> Tensor:  # (B, J, D) -> (B, J)
        if not one_gather:
            return torch.stack([correlation(tokens) for tokens in rows.unbind(1)], dim=1)
        index = rows.transpose(1, 2).unsqueeze(1).expand(-1, components, -1, -1)
        picked = log_prob.gather(-1, index)  # (B, N, D, J)
        joint = picked.sum(2).logsumexp(1) - math.log(components)
        return (picked.logsumexp(1) - math.log(components)).sum(1) - joint

    rows = correlations(torch.cat([x0.unsqueeze(1), consistency_x], dim=1))
    teacher_term = (log_teacher.exp() * (log_teacher - marginal)).sum((1, 2))
    consistency_term = (target * (log_target - marginal)).sum((1, 2))
    per_example = data_weight * rows[:, 0] + teacher_term + rows[:, 1:].mean(1) + consistency_term
    return per_example.mean()


vectorised_loss = functools.partial(dense_loss, one_gather=True)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """-log likelihood of the targets, summed, from hidden states (R, C) through a linear head."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


# Draws of one token per row ---------------------------------------------------------------------


def multinomial_draw(logits: Tensor) -> Tensor:
    """softmax, then `torch.multinomial`: tokens (R,)."""
    return torch.multinomial(logits.float().softmax(-1), 1).squeeze(-1)


def gumbel_draw(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """argmax of exp(logits) / -log u, computed in `dtype`."""
    wide = logits.to(dtype)
    noise = -torch.rand_like(wide).clamp_min(torch.finfo(dtype).tiny).log()
    return ((wide - wide.amax(-1, keepdim=True)).exp() / noise).argmax(-1)


def canvas_step(
    logits: Tensor, canvas: Tensor, temperature: float, bound: float, mean_entropy: float
) -> tuple[Tensor, ...]:
    """A step of DiffusionGemma's sampler: canvas (B, D), ended (B,), token, argmax, entropy (B·D,).

    As the loop of transformers does, the sampler and the stopping rule each compute the entropy.

    Args:
        logits: (B·D, V).
        canvas: (B, D), the argmax of the step before.
    """
    logits = logits.float() / temperature
    token = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
    argmax = logits.argmax(-1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    lowest, order = entropy.view_as(canvas).sort(-1)
    chosen = lowest.cumsum(-1) - lowest <= bound
    chosen = torch.zeros_like(chosen).scatter(-1, order, chosen)
    noise = torch.randint_like(canvas, logits.shape[-1])
    again = torch.distributions.Categorical(logits=logits).entropy().view_as(canvas)
    ended = (argmax.view_as(canvas) == canvas).all(1) & (again.mean(1) < mean_entropy)
    return torch.where(chosen, token.view_as(canvas), noise), ended, token, argmax, entropy


# Samplers and steps -----------------------------------------------------------------------------

Model = Callable[..., Tensor]


def ancestral_step(logits: Tensor, tokens: Tensor, t: Tensor, s: Tensor, mask_id: int) -> Tensor:
    """One step of masked diffusion from t to s (R,), for rows (R, D) with logits (R, D, V)."""
    t, s = t[:, None, None], s[:, None, None]
    q = _without_mask(logits, mask_id).softmax(-1) * (t - s)
    q[..., mask_id] = s.squeeze(-1)
    noise = -(torch.rand_like(q) + 1e-10).log() + 1e-10
    return torch.where(tokens == mask_id, (q / noise).argmax(-1), tokens)


def ancestral_call(model: Model, tokens: Tensor, t: Tensor, s: Tensor, mask_id: int) -> Tensor:
    """A call of the model and the step."""
    return ancestral_step(model(tokens, t), tokens, t, s, mask_id)


@torch.no_grad()
def ancestral_sample(
    model: Model,
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int,
    t_min: float = 1e-5,
    device: torch.device | str = "cpu",
    call: Callable[..., Tensor] = ancestral_call,
) -> Tensor:
    """The usual loop of masked diffusion: full logits, softmax and noise for each token.

    Args:
        model: (tokens (B, D), t (B,)) -> logits (B, D, V).
        call: `ancestral_call`, or what torch.compile makes of it.
    """
    tokens = torch.full(shape, mask_id, dtype=torch.int64, device=device)
    times = torch.linspace(1.0, t_min, steps + 1, device=device)[:, None].expand(-1, shape[0])
    for t, s in itertools.pairwise(times):
        tokens = call(model, tokens, t, s, mask_id)
    if bool((tokens == mask_id).any()):
        logits = _without_mask(model(tokens, times[-1]), mask_id)
        tokens = torch.where(tokens == mask_id, logits.argmax(-1), tokens)
    return tokens


def _without_mask(logits: Tensor, mask_id: int) -> Tensor:
    logits = logits.float()
    logits[..., mask_id] = float("-inf")
    return logits


def reveal_step(
    logits: Tensor,
    tokens: Tensor,
    t: Tensor,
    u: Tensor,
    mask_id: int,
    temperature: float = 4.5,
    steps: int = 8,
) -> Tensor:
    """One step of MaskGIT from t to u (R,): tokens of all positions, the most confident stay."""
    log_prob = logits.float().log_softmax(-1)
    drawn = draw_tokens(log_prob)
    noise = -(-torch.rand(drawn.shape, device=drawn.device).clamp_min(1e-20).log()).log()
    factor = temperature * (1 - (1 - t) * steps / (steps - 1)).clamp_min(0)
    confidence = log_prob.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) + factor[:, None] * noise
    masked = tokens == mask_id
    confidence = confidence.masked_fill(~masked, float("-inf"))
    left = torch.ceil(tokens.shape[1] * torch.acos(1 - u) * 2 / math.pi).long()
    rank = confidence.argsort(-1, descending=True).argsort(-1)
    chosen = rank < (masked.sum(1) - left)[:, None]
    return torch.where(chosen & masked, drawn, tokens)


def posterior_step(
    logits: Tensor,
    tokens: Tensor,
    t: Tensor,
    u: Tensor,
    transitions: Callable[[Tensor | float, Tensor], Tensor],
) -> Tensor:
    """One step of Gaussian pixels from t to u (R,), all the same: the mean of the posterior.

    transitions: (s, t (1,)) -> Q(s to t), (1, V, V).
    """
    to_t, to_u, onward = (
        transitions(a, b)[0].float() for a, b in ((0.0, t[:1]), (0.0, u[:1]), (u[:1], t[:1]))
    )
    weights = logits.float().softmax(-1) / (to_t.T[tokens] + 1e-9)
    weights = (weights @ to_u + 1e-30) * onward.T[tokens]
    return torch.multinomial(weights.flatten(0, 1), 1).view(tokens.shape)


def confidence_step(logits: Tensor, tokens: Tensor, *, count: int, mask_id: int) -> Tensor:
    """Fill the `count` masked positions of each row whose best token is the most probable.

    Half-precision logits stay as they are.
    """
    logits[..., mask_id] = float("-inf")
    drawn = logits.argmax(-1)
    prob = logits.softmax(-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    confidence = torch.where(tokens == mask_id, prob.float(), float("-inf"))
    chosen = confidence.topk(count, dim=-1).indices
    return tokens.scatter(-1, chosen, drawn.gather(-1, chosen))


def confidence_call(model: Model, tokens: Tensor, **options: Any) -> Tensor:
    """A call of the model and the step; the logits have no name, so that they are gone after it."""
    t = (tokens == options["mask_id"]).float().mean(1)
    return confidence_step(model(tokens, t), tokens, **options)


@torch.no_grad()
def confidence_sample(
    model: Model,
    tokens: Tensor,
    *,
    counts: Sequence[int],
    mask_id: int,
    history: list[Tensor] | None = None,
    call: Callable[..., Tensor] = confidence_call,
) -> Tensor:
    """The usual loop of a masked language model, in one block.

    Args:
        model: (tokens (B, D), t (B,)) -> logits (B, D, V).
        tokens: (B, D), masked but for the prompt.
        counts: how many positions of each row every step fills.
        history: where the tokens at the start and after every step are appended.
        call: `confidence_call`, or what torch.compile makes of it.
    """
    history = [] if history is None else history
    history.append(tokens)
    for count in counts:
        tokens = call(model, tokens, count=count, mask_id=mask_id)
        history.append(tokens)
    return tokens


def distill_step(
    student: Model,
    teacher: Model,
    x0: Tensor,
    *,
    t: Tensor,
    u: Tensor,
    mask_id: int,
    components: int,
    data_weight: float,
    xt: Tensor,
    advance: Callable[..., Tensor] | None = None,
    loss: Callable[..., Tensor] | None = None,
    **given: Tensor,
) -> Tensor:
    """One distillation step as the formulas read: every model sees N copies, all logits exist.

    Args:
        student: (tokens (R, D), t (R,), latent (R, 1)) -> logits (R, D, V).
        teacher: (tokens (R, D), t (R,)) -> logits (R, D, V).
        t, u: (B,).
        xt: (B, D).
        advance: the teacher's step (logits, tokens, t, u), all by rows, to tokens; then no mask
            is known to the loss. None: that of masked diffusion.
        loss: `dense_loss` (None), or what torch.compile makes of it.
        given: latent (R, 1), latent_u (B·K, 1), xu, consistency_x (B, K, D), which are drawn
            otherwise, with K = N.
    """
    batch = len(x0)
    rows = batch * components
    copies = xt.repeat_interleave(components, 0)
    t_rows, u_rows = t.repeat_interleave(components), u.repeat_interleave(components)
    latent, latent_u = (
        given[name] if name in given else torch.rand(rows, 1, device=x0.device)
        for name in ("latent", "latent_u")
    )
    xu = given.get("xu")
    sizes = (batch, components)
    with torch.no_grad():
        teacher_logits = teacher(copies, t_rows)
        if xu is None:
            step = advance or functools.partial(ancestral_step, mask_id=mask_id)
            xu = step(teacher_logits, copies, t_rows, u_rows).unflatten(0, sizes)
        copies_of_u = u.repeat_interleave(xu.shape[1])
        consistency = student(xu.flatten(0, 1), copies_of_u, latent_u).unflatten(0, xu.shape[:2])
    prediction = student(copies, t_rows, latent).unflatten(0, sizes)
    return (loss or dense_loss)(
        prediction,
        teacher_logits.unflatten(0, sizes)[:, 0],
        x0,
        consistency=consistency,
        consistency_x=given.get("consistency_x"),
        data_weight=data_weight,
        **({"xt": xt, "xu": xu, "mask_id": mask_id} if advance is None else {}),
    )
