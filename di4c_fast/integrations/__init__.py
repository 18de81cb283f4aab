"""Drop-ins for other repositories, one module each, imported when first used.

They replace samplers, and the loss of the three trainers of Di4C's authors (`accelerate_training`
of sdtt, maskgit and tauldr); other training loops stay as they are and can give way to
`di4c_fast.training.Distiller`, which takes the models that `as_model` gives.

What all share: nothing of the repositories is imported, objects are used by the names of their
attributes. Arguments, defaults, results and the law of the tokens are the repository's. Other than
there, only the rows that a step fills go through the output layer, only the sequences that have any
through the network (all if MDLM's or SDTT's is compiled), and a step that fills nothing calls none;
draws are exact, where fp32 noise on a grid of 2^-24 makes very unlikely tokens rarer than the
network says; all randomness, λ included, comes from one seed drawn from torch's default generator.
What replaces something returns a `Handle`: `remove()` undoes it, as does leaving a `with` block.
Objects are read at every call; one that lacks an attribute raises a TypeError at once, and what the
samplers raise comes when sampling.

`as_model` gives a module (tokens (R, D), t (R,)[, latent], **context) for `di4c_fast.samplers` and
`Distiller`, in the mode of the network. `denoiser` gives a callable for the samplers. Where the
logits are those of a plain linear output layer (`model.get_output_embeddings()` in models of
Hugging Face), both return `LinearHead(hidden, weight, bias)`, computed a few rows at a time.
"""

import importlib as _importlib

__all__ = [
    "diffusers",
    "diffusion_gemma",
    "dream",
    "huggingface",
    "llada",
    "maskgit",
    "mdlm",
    "sdtt",
    "sglang",
    "tauldr",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
