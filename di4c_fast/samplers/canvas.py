"""Sampling on a canvas of uniform random tokens, of which every step accepts the surest.

Every step draws all positions. Those of lowest entropy keep what was drawn, as many as can be
nearly independent; the others get new uniform tokens. The draw, the argmax and the entropy of a row
come from one pass over it.

Source: EB-Sampler (arXiv 2505.24857); DiffusionGemma in transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import check_number, check_within
from .arguments import Model, Options, Unpack, check_counts, check_flags, sampler
from .loop import Answer, Step
from .uniform import uniform_run

__all__ = ["accepted", "sample_canvas"]


def accepted(entropy: Tensor, bound: float) -> Tensor:
    """(B, D) bool: the k positions of lowest entropy, the sum of all but the last within `bound`.

    >>> accepted(torch.tensor([[0.3, 0.0, 0.9, 0.2]]), 0.4)
    tensor([[ True,  True, False,  True]])
    """
    lowest, order = entropy.sort(dim=-1)
    chosen = lowest.cumsum(-1) - lowest <= bound
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


@sampler(Options)
def sample_canvas(
    model: Model,
    shape: tuple[int, int],
    *,
    vocab_size: int,
    steps: int,
    entropy_bound: float = 0.1,
    first_temperature: float = 0.8,
    last_temperature: float = 0.4,
    stable_steps: int = 1,
    mean_entropy: float | None = 0.005,
    prompt: Tensor | None = None,
    start: Tensor | None = None,
    active_only: bool = True,
    **options: Unpack[Options],
) -> Tensor:
    """Draw token rows on a canvas of random tokens by the entropy bound of DiffusionGemma.

    Equivalent PyTorch for one step with n steps left of S, of tokens (B, D):

        heat = last_temperature + (first_temperature - last_temperature) * n / S
        p = (model(tokens, n / S) / heat).softmax(-1)
        h = Categorical(p).entropy()
        low, order = h.sort(-1)
        keep = zeros_like(h).bool().scatter(-1, order, low.cumsum(-1) - low <= entropy_bound)
        tokens = where(keep, torch.multinomial(p, 1), torch.randint(V, (B, D)))

    A sequence ends with the argmax of its last step, which is its first one where the argmax has
    been the same as in the `stable_steps` before and the mean of h is below `mean_entropy`.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        vocab_size: V.
        entropy_bound: in nats, at least 0; 0 accepts one position of every step.
        first_temperature, last_temperature: in [1e-30, 1e30]; `t_max` and `t_min` of transformers.
        stable_steps: at least 0; `stability_threshold` of transformers.
        mean_entropy: in nats; `confidence_threshold` of transformers. None: every sequence takes
            all steps.
        prompt: (B, P) or (P,) int64, all known.
        start: (B, D) int64, tokens to start from in place of uniform ones.

    The model is given n / S as its time. It may return a `LinearHead` (with the `softcap` of
    Gemma's logits): then the (B·D, V) logits of a step never exist. Rows of the prompt and of
    sequences that have ended never go through the head. The hooks hear of every step, whether or
    not the model ran. Host syncs: before the loop one to read a prompt; inside one a step, to see
    which sequences have ended, none with mean_entropy=None.
    """
    check_flags(active_only=active_only)
    check_counts([("steps", steps, 1), ("stable_steps", stable_steps, 0)])
    check_number(entropy_bound, "entropy_bound", minimum=0.0)
    check_within(first_temperature, "first_temperature", "[1e-30, 1e30]")
    check_within(last_temperature, "last_temperature", "[1e-30, 1e30]")
    if mean_entropy is not None:
        check_number(mean_entropy, "mean_entropy", minimum=0.0)

    run = uniform_run(model, shape, options, vocab_size, steps, prompt, start)
    known = 0 if prompt is None else prompt.shape[-1]
    place = torch.arange(run.batch * run.positions, device=run.device).view_as(run.tokens)
    free, everyone = place[:, known:], torch.arange(run.batch, device=run.device)
    ended = torch.zeros_like(everyone, dtype=torch.bool)
    still = torch.zeros_like(everyone)  # for how many steps the argmax has been
    before = torch.full_like(free, -1)  # this

    def rule() -> Iterator[Step]:
        want = ("argmax", "entropy")
        for i in range(steps):
            left = (steps - i) / steps
            heat = last_temperature + (first_temperature - last_temperature) * left
            some = everyone if mean_entropy is None else (~ended).nonzero()[:, 0]
            called = everyone if len(some) and not active_only else some
            rows = free[called].flatten()
            yield Step(i, left, rows, called, fill=fill, want=want, temperature=heat)

    def fill(step: Step, answer: Answer) -> Tensor:
        some, draw = step.sequences, answer.draw
        assert some is not None
        assert draw.argmax is not None
        assert draw.entropy is not None
        token, argmax, entropy = (
            values.view(len(some), -1) for values in (draw.token, draw.argmax, draw.entropy)
        )
        noise = (run.uniform(step, 1) * vocab_size).long().view_as(token)
        token = torch.where(accepted(entropy, entropy_bound), token, noise)
        still[some] = torch.where((argmax == before[some]).all(1), still[some] + 1, 0)
        before[some] = argmax
        done = torch.full_like(ended[some], step.number == steps - 1)
        if mean_entropy is not None:
            done |= (still[some] >= stable_steps) & (entropy.mean(1) < mean_entropy)
        token = torch.where(done.unsqueeze(1), argmax, token)
        token = torch.where(ended[some].unsqueeze(1), run.tokens[some, known:], token)
        ended[some] |= done
        return run.put(step, token.flatten())

    return run.loop(rule())
