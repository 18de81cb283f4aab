"""Samplers: from a denoiser to token rows (B, D).

What all of them share is in `loop.py`; each file beside it is the rule of one sampler. B sequences,
D positions, V classes, L dimensions of λ, R rows of a call. Options of all samplers that have them:

    model: callable (tokens (R, D) int64, t (R,) float32, **context) to logits (R, D, V), a tensor
        or a head, with a third argument latent (R, L) if `latent_dim` > 0. In eval mode during
        the call if it is an `nn.Module`. V must be the same at every call.
    shape: (B, D), the prompt included.
    mask_id: the mask token.
    steps: S, at least 1. Where a last step follows, there are S + 1 of them for `latent`,
        `callback` and `history`.
    t_min: the last time, in (0, 1).
    vocab_size: V, to check the model, ids and the prompt against; None accepts the model's.
    latent_dim: L of a mixture student; 0 for a model without λ.
    latent: λ to use: (B, L) for every step, or (steps, B, L). None draws a fresh one per step and
        sequence.
    prompt: (B, P) or (P,) int64, P <= D, the first P tokens of the rows, `mask_id` where a token is
        unknown. Known tokens stay.
    context: tensors (B, ...) by keyword for the model, such as class labels.
    seed: int in [0, 2^63). None: taken from `generator`, or from the default generator.
    generator: source of the seed where `seed` is None; on a GPU reading it costs a host sync.
    first_sequence: number of the first sequence. Randomness is a function of (seed, number of the
        sequence, step, position), so the same sequences come out however they are batched (up to
        the model's own rounding).
    temperature, top_k, top_p: of the draws, as in `di4c_fast.sample`. Other values than the
        defaults are no longer the model's law.
    active_only: call the model with only the sequences that have something to draw at the step.
        False keeps the batch's shape fixed.
    project_fn: called with the tokens (B, D) at the start and after every step; returns (B, D)
        int64.
    callback: called as callback(step, total, tokens) after each step, step from 1 to total.
    history: a list to which the tokens (B, D) at the start and after every step are appended.
    device: where to sample; None for the device of the prompt or start, else that of the module's
        parameters, else the CPU.

All return the tokens, (B, D) int64. Every wrong argument raises a TypeError or ValueError that
names it, what was expected and what came, before the model is called; a model or `project_fn` that
returns something wrong as soon as it does.
"""

from .analytic import sample_analytic
from .canvas import sample_canvas
from .confidence import sample_confidence
from .gaussian import sample_gaussian
from .masked import sample_masked
from .maskgit import sample_maskgit
from .psi import sample_psi
from .remask import sample_remasked
from .uniform import sample_uniform_state

__all__ = [
    "sample_analytic",
    "sample_canvas",
    "sample_confidence",
    "sample_gaussian",
    "sample_masked",
    "sample_maskgit",
    "sample_psi",
    "sample_remasked",
    "sample_uniform_state",
]
