"""Wrong arguments of the samplers.

Every case starts from a right call of two rows of five tokens, V = 11, mask 10, two steps.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sampler_cases import FUNCTIONS, MASK, PROCESS, SAMPLERS, VOCAB
from wrong_arguments import Wrong, wrong

from di4c_fast.processes import MaskedProcess
from di4c_fast.samplers import analytic, uniform

T, V = TypeError, ValueError
LABEL = torch.zeros(2, dtype=torch.int64)
LATENT = torch.zeros(2, 1)
ids = lambda *values: torch.tensor(values)  # noqa: E731
tokens = lambda *shape: torch.zeros(*shape, dtype=torch.int64)  # noqa: E731


def once(x):
    """An id that is none at the start, and none of it later."""
    return torch.where(x.eq(MASK).all(), ids(11, *[MASK] * 4), x.clamp(max=MASK))


# Of every sampler that takes the arguments; the model is not called.
SHARED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"shape": (2,)}, T, "shape must be (B, D), got tuple (2,)"),
    ({"shape": 3}, T, "shape must be (B, D)"),
    ({"shape": "ab"}, T, "shape must be (B, D)"),
    ({"shape": (1, 2, 3)}, T, "shape must be (B, D)"),
    ({"shape": (2, 0)}, V, "shape[1] must be at least 1, got 0"),
    ({"shape": (2, 1.5)}, T, "shape[1] must be an int, got float 1.5"),
    ({"steps": 0}, V, "steps must be at least 1, got 0"),
    ({"steps": 2.0}, T, "steps must be an int, got float 2.0"),
    ({"steps": True}, T, "steps must be an int, got bool True"),
    ({"mask_id": -1}, V, "mask_id must be at least 0, got -1"),
    ({"mask_id": None}, T, "mask_id must be an int, got NoneType None"),
    ({"mask_id": 12, "vocab_size": 11}, V, "mask_id must hold ids in [0, 11), as vocab_size = 11"),
    ({"vocab_size": 1}, V, "vocab_size must be at least 2, got 1"),
    ({"vocab_size": 2.0}, T, "vocab_size must be an int, got float 2.0"),
    ({"latent_dim": -1}, V, "latent_dim must be at least 0, got -1"),
    ({"latent": LATENT}, V, "latent_dim, the last size of latent, must be at least 1, got 0"),
    ({"latent": LATENT.long(), "latent_dim": 1}, T, "latent must be floating point"),
    ({"latent": torch.zeros(3, 1), "latent_dim": 1}, V,
     "latent must have shape (B, L) = (2, 1) or (steps, B, L) = (..., 2, 1), got (3, 1)"),
    ({"latent": LATENT.to("meta"), "latent_dim": 1}, V, "latent must be on the device of the sam"),
    ({"prompt": tokens(2, 6)}, V, "with B = 2 and P <= D = 5, got (2, 6)"),
    ({"prompt": tokens(3, 2)}, V, "prompt must have shape (B, P) or (P,)"),
    ({"prompt": torch.zeros(2, 2)}, T, "prompt must have dtype torch.int64"),
    ({"prompt": [1, 2]}, T, "prompt must be a Tensor, got list"),
    ({"prompt": ids(0, -1)}, V, "prompt must hold ids of at least 0, got -1"),
    ({"prompt": ids(0, 12), "vocab_size": 11}, V, "prompt must hold ids in [0, 11), ... got 12"),
    ({"t_min": 0.0}, V, "t_min must be in (0, 1), got 0.0"),
    ({"t_min": 1.0}, V, "t_min must be in (0, 1), got 1.0"),
    ({"t_min": math.nan}, V, "t_min must be finite"),
    ({"t_min": "a"}, T, "t_min must be a number"),
    ({"temperature": -1.0}, V, "temperature must be finite and at least 0, got -1.0"),
    ({"temperature": math.nan}, V, "temperature must be finite"),
    ({"temperature": "a"}, T, "temperature must be a number, got str 'a'"),
    ({"temperature": torch.ones(2)}, T, "temperature must be a number, got Tensor"),
    ({"prompt": torch.tensor(1)}, V, "prompt must have shape (B, P) or (P,)"),
    ({"top_k": 0}, V, "top_k must be at least 1, got 0"),
    ({"top_k": 1.5}, T, "top_k must be an int, got float 1.5"),
    ({"top_p": 0.0}, V, "top_p must be in (0, 1], got 0.0"),
    ({"top_p": 1.5}, V, "top_p must be in (0, 1], got 1.5"),
    ({"active_only": "a"}, T, "active_only must be True or False, got str 'a'"),
    ({"active_only": 0}, T, "active_only must be True or False, got int 0"),
    ({"exclude_mask": None}, T, "exclude_mask must be True or False"),
    ({"seed": -1}, V, "seed must be in [0, 2^63), got -1"),
    ({"seed": 1.5}, T, "seed must be an int, got float 1.5"),
    ({"seed": 1, "generator": torch.Generator()}, V, "seed and generator exclude each other"),
    ({"generator": 1}, T, "generator must be a torch.Generator or None"),
    ({"first_sequence": -1}, V, "first_sequence must be at least 0, got -1"),
    ({"first_sequence": 2**62}, V, "first_sequence must be at most ..., got 4611686018427387904"),
    ({"device": "nowhere"}, V, "device must be one that torch can use here, got 'nowhere': ..."),
    ({"device": 3.5}, V, "device must be one that torch can use here, got 3.5"),
    ({"device": "meta"}, V, "device must be one that torch can use here, got 'meta': ..."),
    ({"callback": "bar"}, T, "callback must be callable"),
    ({"history": True}, T, "history must be a list to fill or None"),
    ({"history": ()}, T, "history must be a list to fill or None"),
    ({"context": {"a": torch.zeros(3)}}, V, "context['a'] must have B = 2"),
    ({"context": [torch.zeros(2)]}, T, "context must be a mapping of tensors"),
    ({"project_fn": 3}, T, "project_fn must be callable"),
    ({"project_fn": lambda x: x[:, :2]}, V, "project_fn must have shape (B, D) = (2, 5), got"),
    ({"project_fn": lambda x: x.float()}, T, "output of project_fn must have dtype"),
    ({"project_fn": lambda x: x - 20}, V, "output of project_fn must hold token ids ... got -10"),
    ({"project_fn": lambda x: x + 1, "vocab_size": 11}, V, "token ids in [0, 11), got 11"),
    ({"model": None}, T, "model must be callable, got NoneType"),
    ({"model": 3}, T, "model must be callable, got int"),
    ({"guidance_strength": 1.0}, T, "sample_... has no argument 'guidance_strength'"),
]  # fmt: skip

# The same for what the first call of the model tells.
BY_MODEL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mask_id": 11}, V, "mask_id must hold ids in [0, 11), as V of model = 11, got 11"),
    ({"vocab_size": 12}, V, "model must return logits over V = 12 classes, got shape"),
    ({"prompt": ids(0, 12)}, V, "prompt must hold ids in [0, 11), ... got 12"),
    ({"project_fn": lambda x: torch.where(x == MASK, x, 11)}, V, "token ids in [0, 11), got"),
    ({"project_fn": once}, V, "output of project_fn must hold token ids in [0, 11), got 11"),
    ({"model": lambda x, t: torch.zeros(2, 5)}, V, "model must return logits of shape"),
    ({"model": lambda x, t: torch.zeros(1, 4, 11)}, V, "shape (R, D, V) ... got (1, 4, 11)"),
    ({"model": lambda x, t: x}, T, "the output of model must be floating point"),
    ({"model": lambda x, t: None}, T, "the output of model must be a Tensor of logits"),
    ({"model": lambda x: None}, T, "model must take (tokens, t), got"),
    ({"model": lambda x, t: torch.zeros(*x.shape, 1), "mask_id": 0}, V, "excludes the only class"),
]  # fmt: skip

OWN: dict[str, list[tuple[dict[str, Any], type[Exception], str]]] = {
    "masked": [],
    "analytic": [
        ({"noise": "cosine"}, V, "noise must be one of 'log_linear', 'geometric'"),
        ({"noise": 3}, T, "noise must be callable, got int"),
        ({"noise": lambda t: None}, T, "noise must return a number, got NoneType None"),
        ({"noise": lambda t: 1.0}, V, "noise must be finite, not negative and increasing"),
        ({"noise": lambda t: math.inf}, V, "noise must be finite"),
        ({"condition": "time"}, V, "condition must be one of 't', 'sigma'"),
        ({"denoise": 1}, T, "denoise must be True or False"),
    ],
    "remasked": [
        ({"rule": "dfm"}, V, "rule must be one of 'cap', 'rescale', 'loop', 'conf', got 'dfm'"),
        ({"eta": 1.5}, V, "eta must be in [0, 1], got 1.5"),
        ({"eta": "a"}, T, "eta must be a number"),
        ({"rule": "loop", "eta": 0.2}, V, "eta must be in [0, 0.111111], got 0.2"),
        ({"t_on": 1.0}, V, "t_on must be in (0, 1), got 1.0"),
        ({"t_off": 0.6}, V, "t_off must be in [0, 0.55), got 0.6"),
        ({"alpha_on": 1.0}, V, "alpha_on must be in (0, 1), got 1.0"),
    ],
    "psi": [
        ({"mask_id": None}, T, "vocab_size must be an int, got NoneType None"),
        ({"signal": "linear"}, V, "signal must be one of 'log_linear', 'cosine'"),
        ({"signal": lambda t: t}, V, "signal must be in [0, 1] and decreasing in t"),
        ({"condition": "time"}, V, "condition must be one of 't', 'sigma', 'alpha'"),
        ({"last_step": "argmax"}, V, "last_step must be one of 'ancestral', 'greedy'"),
        ({"time_profile": "cosine"}, V, "time_profile must be 'linear' or ..., got 'cosine'"),
        ({"time_profile": "linear-constant-linear-x"}, V, "with a number, got 'x' there"),
        ({"time_profile": "linear-constant-linear-1.5"}, V, "number of time_profile must be in (0"),
        ({"time_profile": "linear-constant-linear-0.5-inv", "signal": lambda t: 1 - t}, V,
         "time_profile with '-inv' needs a signal by name, got a function"),
        ({"high_mode": "pure"}, V, "high_mode must be one of pure-posterior, ..., got 'pure'"),
        ({"middle_mode": "constant-1.5"}, V, "number of middle_mode must be in [0, 1], got 1.5"),
        ({"low_mode": "max-capped-"}, V, "low_mode must be one of ..., with a number, got ''"),
        ({"high_mode": 1}, V, "high_mode must be one of pure-posterior, ..., got 1"),
        ({"high_frac": -0.1}, V, "high_frac must be in [0, 1], got -0.1"),
        ({"high_frac": 0.5, "middle_frac": 0.6}, V, "middle_frac must be in [0, 0.5], got 0.6"),
    ],
    "uniform": [
        ({"vocab_size": None}, T, "vocab_size must be an int, got NoneType"),
        ({"signal": "linear"}, V, "signal must be one of 'log_linear', 'cosine'"),
        ({"signal": 1}, T, "signal must be callable, got int"),
        ({"signal": lambda t: t}, V, "signal must be in [0, 1] and decreasing in t"),
        ({"signal": lambda t: 2 - t}, V, "signal must be in [0, 1] and decreasing in t"),
        ({"signal": lambda t: 1 - t, "condition": "sigma"}, V, "positive at t = 1"),
        ({"condition": "time"}, V, "condition must be one of 't', 'sigma', 'alpha'"),
        ({"last_step": "argmax"}, V, "last_step must be one of 'ancestral', 'greedy'"),
        ({"start": tokens(2, 2)}, V, "start must have shape (B, D)"),
        ({"start": torch.zeros(2, 5)}, T, "start must have dtype torch.int64"),
        ({"start": tokens(2, 5) + 11}, V, "start must hold token ids in [0, 11)"),
        ({"start": 3}, T, "start must be a Tensor"),
    ],
    "canvas": [
        ({"vocab_size": None}, T, "vocab_size must be an int, got NoneType"),
        ({"entropy_bound": -0.1}, V, "entropy_bound must be finite and at least 0, got -0.1"),
        ({"first_temperature": 0.0}, V, "first_temperature must be in [1e-30, 1e30], got 0.0"),
        ({"last_temperature": "a"}, T, "last_temperature must be a number, got str 'a'"),
        ({"stable_steps": 1.0}, T, "stable_steps must be an int, got float 1.0"),
        ({"stable_steps": -1}, V, "stable_steps must be at least 0, got -1"),
        ({"mean_entropy": math.nan}, V, "mean_entropy must be finite and at least 0, got nan"),
        ({"start": tokens(2, 2)}, V, "start must have shape (B, D)"),
    ],
    "gaussian": [
        ({"process": MaskedProcess(3)}, T, "process must be a GaussianProcess"),
        ({"teacher": 3}, T, "teacher must be callable"),
        ({"teacher_steps": 1}, V, "teacher_steps = 1 needs a teacher, got None"),
        ({"teacher_steps": 3}, V, "teacher_steps must be at most steps = 2, got 3"),
        ({"teacher_steps": -1}, V, "teacher_steps must be at least 0, got -1"),
        ({"teacher": lambda x, t: torch.zeros(2, 5, 12), "teacher_steps": 2}, V,
         "teacher must return logits over V = 11 classes"),
        ({"model": lambda x, t: torch.zeros(2, 5, 12)}, V, "model must return logits over V = 11"),
        ({"last_latents": 0}, V, "last_latents must be at least 1"),
        ({"last_latents": 2}, V, "last_latents = 2 needs latent_dim >= 1, got 0"),
        ({"last_latents": 2, "latent_dim": 1, "latent": LATENT}, V, "= 2 needs fresh λ"),
        ({"last_latents": 2, "latent_dim": 1, "teacher": print, "teacher_steps": 1}, V,
         "needs the student in the last step, got teacher_steps = 1"),
        ({"last_latents": 2, "latent_dim": 1, "last": "draw"}, V, "needs last = 'argmax', got 'd"),
        ({"last": "mean"}, V, "last must be one of 'argmax', 'draw', got 'mean'"),
        ({"initial": "normal"}, V, "initial must be one of 'target', 'uniform'"),
        ({"initial": torch.zeros(2, 5)}, T, "initial must have dtype torch.int64"),
        ({"initial": tokens(1, 5)}, V, "initial must have shape (B, D)"),
        ({"initial": tokens(2, 5) + 11}, V, "initial must hold token ids in [0, 11)"),
        ({"initial": tokens(2, 5).to("meta"), "device": "cpu"}, V,
         "initial must be on the device of the samples"),
    ],
    "maskgit": [
        ({"schedule": "cubic"}, V, "schedule must be one of 'arccos'"),
        ({"schedule": 3}, T, "schedule must be a name or a sequence of counts"),
        ({"schedule": [1, 2, 3]}, V, "schedule must hold steps = 2 counts, got 3"),
        ({"schedule": [1, 2.0]}, T, "schedule[1] must be an int"),
        ({"schedule": [-1, 2]}, V, "schedule[0] must be at least 0, got -1"),
        ({"schedule": [1, 3]}, V, "schedule must hold counts that reveal ... 5 of them, got 4 in"),
        ({"schedule": [1, 1], "prompt": ids(0, 1)}, V, "schedule must ... 3 of them, got 2 in all"),
        ({"schedule_style": "jax"}, V, "schedule_style must be one of 'di4c'"),
        ({"guidance": "high"}, T, "guidance must be a number"),
        ({"guidance": math.nan}, V, "guidance must be finite"),
        ({"guidance": 1.0}, V, "guidance needs unconditional"),
        ({"guidance_schedule": "cosine"}, V, "guidance_schedule must be one of"),
        ({"guidance_model": 3}, T, "guidance_model must be callable"),
        ({"guidance": 1.0, "guidance_model": lambda x, t: torch.zeros(2, 5, 4)}, V,
         "guidance_model must return logits over V = 11"),
        ({"unconditional": [LABEL]}, T, "unconditional must be a mapping"),
        ({"unconditional": {"a": LABEL[:1]}}, V, "unconditional['a'] must have B = 2"),
        ({"context": {"a": LABEL}, "unconditional": {"b": LABEL}}, V,
         "unconditional must have the keywords, shapes and dtypes of context, {'a': ..., got {'b'"),
        ({"context": {"a": LABEL}, "unconditional": {"a": LABEL.float()}}, V,
         "of context, {'a': ((2,), torch.int64)}, got {'a': ((2,), torch.float32)}"),
        ({"context": {"a": LABEL}, "unconditional": {"a": LABEL.view(2, 1)}}, V,
         "of context, {'a': ((2,), torch.int64)}, got {'a': ((2, 1), torch.int64)}"),
        ({"randomize": "quadratic"}, V, "randomize must be one of 'linear'"),
        ({"gumbel_temperature": -1.0}, V, "gumbel_temperature must be finite and at"),
        ({"gumbel_temperature": None}, T, "gumbel_temperature must be a number"),
        ({"resample": 1}, T, "resample must be True or False"),
        # Ids between V and a mask outside the vocabulary are no tokens.
        ({"mask_id": 13, "exclude_mask": False, "prompt": ids(13, 12)}, V,
         "prompt must hold ids in [0, 11), as V of model = 11, got 12"),
        ({"mask_id": 13, "exclude_mask": False, "prompt": ids(13, 12), "vocab_size": 11}, V,
         "prompt must hold ids in [0, 11), as vocab_size = 11, got 12"),
    ],
    "confidence": [
        ({"steps": None}, V, "steps must be an int, or threshold or factor given"),
        ({"steps": 3, "block_length": 3}, V, "multiple of the number of blocks, 2, got 3"),
        ({"block_length": 0}, V, "block_length must be at least 1, got 0"),
        ({"block_length": 2.5}, T, "block_length must be an int"),
        ({"block_length": 6}, V, "block_length must be at most D = 5, got 6"),
        ({"rule": "confidence"}, V, "rule must be one of 'low_confidence', 'random'"),
        ({"schedule": "cosine"}, V, "schedule must be one of 'even', 'ancestral'"),
        ({"threshold": "a", "steps": None}, T, "threshold must be a number"),
        ({"threshold": -1, "steps": None}, V, "threshold must be in [0, 1] with rule='low"),
        ({"threshold": 90, "rule": "topk_margin"}, V, "threshold must be in [0, 1] ... got 90"),
        ({"threshold": 0.5, "steps": 6, "block_length": 3}, V, "steps caps a threshold"),
        ({"factor": -1.0, "steps": None}, V, "factor must be finite and at least 0"),
        ({"factor": 1.0}, V, "steps must be None with a factor, got 2"),
        ({"factor": 1.0, "threshold": 0.5}, V, "threshold and factor exclude each other"),
        ({"threshold": 0.5, "rule": "random"}, V, "threshold needs confidences, got rule='random'"),
        ({"factor": 0.5, "rule": "origin"}, V, "factor needs confidences, got rule='origin'"),
        ({"confidence_temperature": -1.0}, V, "confidence_temperature must be finite"),
        ({"confidence_temperature": 1.0, "rule": "origin"}, V, "needs a rule but origin"),
        ({"guidance_scale": -0.5}, V, "guidance_scale must be finite and at least 0"),
        ({"shift": 1}, T, "shift must be True or False"),
        ({"exclude_mask": False, "rule": "origin"}, V, "exclude_mask=False needs a rule"),
        ({"banned_ids": 3}, T, "banned_ids must be a sequence of ints"),
        ({"banned_ids": [1, -2]}, V, "banned_ids[1] must be at least 0, got -2"),
        ({"banned_ids": [11]}, V, "banned_ids must hold ids in [0, 11), as V of model = 11, got"),
        ({"deferred_ids": "ab"}, T, "deferred_ids must be a sequence of ints"),
        ({"deferred_ids": [10]}, V, "deferred_ids must not hold the mask, 10"),
        ({"deferred_ids": [11], "vocab_size": 11}, V, "deferred_ids must hold ids in [0, 11)"),
        ({"deferred_ids": [1], "rule": "entropy"}, V, "deferred_ids needs rule="),
        ({"eos_id": -1}, V, "eos_id must be at least 0, got -1"),
        ({"eos_id": 10}, V, "eos_id must not hold the mask, 10"),
        ({"eos_id": 11}, V, "eos_id must hold ids in [0, 11), as V of model = 11, got 11"),
        ({"confidence_dtype": torch.int64}, V, "confidence_dtype must be None or one of"),
    ],
}  # fmt: skip


CASES = [
    ((name, changes), kind, message)
    for name in FUNCTIONS
    for table in (SHARED, BY_MODEL, OWN[name])
    for changes, kind, message in table
    if table is OWN[name] or SAMPLERS[name].takes(*set(changes) - {"guidance_strength"})
    if table is OWN[name] or name != "psi" or changes != {"mask_id": None}  # a uniform state
]


@wrong(CASES)
def test_wrong_arguments_are_named_before_any_work(wrong: Wrong):
    called = []

    def model(tokens, t, *latent, **context):
        called.append(tokens)
        return torch.zeros(*tokens.shape, VOCAB)

    name, changes = wrong.what
    sampler = SAMPLERS[name]
    minimal = {"mask_id": MASK, "steps": 2, "process": PROCESS}
    right = {key: value for key, value in minimal.items() if sampler.takes(key)}
    right |= {"vocab_size": VOCAB} if name in ("uniform", "canvas") else {}
    arguments = {"model": model, "shape": (2, 5), **right, **changes}
    with wrong.raises():
        sampler.function(arguments.pop("model"), arguments.pop("shape"), **arguments)
    late = any(changes is case[0] for case in BY_MODEL)
    assert not called or late or "V of model" in wrong.message or "logits" in wrong.message


@wrong(
    [
        (lambda: analytic.log_linear_noise(0.0), V, "eps must be in (0, 1), got 0.0"),
        (lambda: analytic.geometric_noise(0.0, 1.0), V, "sigma_min must be in (0, 1.0), got 0.0"),
        (lambda: analytic.geometric_noise(2.0, 1.0), V, "sigma_min must be in (0, 1.0), got 2.0"),
        (lambda: uniform.log_linear_signal(1.0), V, "eps must be in (0, 1), got 1.0"),
        (lambda: uniform.cosine_signal(1.0), V, "eps must be in (0, 1), got 1.0"),
    ]
)
def test_schedules_out_of_range_are_named(wrong: Wrong):
    with wrong.raises():
        wrong.what()


def test_models_that_return_probabilities_are_warned_of():
    uniform = lambda tokens, t: torch.full((*tokens.shape, VOCAB), 1 / VOCAB)  # noqa: E731
    with pytest.warns(UserWarning, match=r"the output of model must hold logits, got rows that"):
        SAMPLERS["masked"](uniform, (2, 5))
