"""Why few steps gain or lose: the likelihood of held-out characters that are filled in at once.

A part of the characters of a window is hidden and the model fills all of them in one step. The
teacher's law is a product over them. The student's law has two parts that can be told apart: the
product of its marginals, which at best is the teacher's, and what the mixture adds to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from di4c_fast import correlation, mixture_log_prob
from di4c_fast.models import draw_latents
from di4c_fast.processes import MaskedProcess

from ..common.rundir import RunDirectory
from .blocks import BlockModel, cut
from .config import Config
from .data import Text, consecutive_windows

HIDDEN = (0.25, 0.5, 0.75, 1.0)
WINDOWS, LATENTS, CHUNK = 32, 64, 4


@dataclasses.dataclass(frozen=True)
class OneStep:
    """Bits per hidden character of held-out text, all filled in at once; smaller is better.

    Attributes:
        teacher: the product that the teacher is.
        marginals: the student's marginals as a product, so without what λ ties together.
        student: the mixture over λ, within the blocks that its loss compares.
    """

    teacher: float
    marginals: float
    student: float


Likelihoods = dict[float, OneStep]  # by share of hidden characters


def to_json(likelihoods: Likelihoods) -> dict[str, dict[str, float]]:
    return {
        str(share): {name: round(value, 4) for name, value in dataclasses.asdict(one).items()}
        for share, one in likelihoods.items()
    }


def table(likelihoods: list[Likelihoods]) -> str:
    """Mean over the seeds: what teacher and student give to characters filled in at once."""
    lines = [
        "bits per hidden character of held-out text, all filled in at once",
        f"  hidden{'teacher':>10}{'student':>9}   its marginals alone",
    ]
    for share in likelihoods[0]:
        teacher, student, marginals = (
            sum(getattr(one[share], name) for one in likelihoods) / len(likelihoods)
            for name in ("teacher", "student", "marginals")
        )
        lines.append(f"{share:>8.0%}{teacher:>10.3f}{student:>9.3f}{marginals:>22.3f}")
    return "\n".join(lines)


def one_step(
    config: Config,
    text: Text,
    models: Mapping[str, Callable[..., Tensor]],
    run: RunDirectory,
    seed: int,
) -> Likelihoods:
    """By share of hidden characters; what the run directory holds is not computed again."""
    file = f"seed-{seed}/one-step"
    stored = run.load(file)
    if stored is None:
        windows = torch.from_numpy(consecutive_windows(text.held_out, config.length))
        some = torch.linspace(0, len(windows) - 1, WINDOWS).long()
        process = MaskedProcess(len(text.alphabet))
        generator = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        with tqdm(total=len(HIDDEN) * WINDOWS, desc="one step", unit="seq") as bar:
            for share in HIDDEN:
                sums = torch.zeros(4, dtype=torch.float64)
                for x0 in windows[some].split(CHUNK):
                    t = torch.full((len(x0),), share)
                    xt = process.corrupt(x0, t, generator=generator)
                    sums += nats(config, models, x0, xt, t, process.mask_id, generator)
                    bar.update(len(x0))
                rows.append(sums[:3] / sums[3] / math.log(2.0))
        run.save(file, {"bits": torch.stack(rows)}, {"hidden": HIDDEN})
        stored = run.load(file)
        assert stored is not None
    bits = stored[0]["bits"].tolist()
    return {share: OneStep(*row) for share, row in zip(HIDDEN, bits, strict=True)}


@torch.no_grad()
def nats(
    config: Config,
    models: Mapping[str, Callable[..., Tensor]],
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    mask_id: int,
    generator: torch.Generator,
) -> Tensor:
    """(4,) float64: nats of teacher, marginals and student over hidden characters, their number."""
    rows, blocks = len(x0), config.length // config.block
    hidden, truth = cut(xt, blocks, 0), cut(x0, blocks, 0)
    times = t.repeat_interleave(blocks)
    teacher = BlockModel(models["teacher"], rows, blocks)(hidden, times)
    latent = draw_latents(
        len(truth), LATENTS, config.latent_dim // blocks, stratified=True, generator=generator
    )
    student = BlockModel(models["student"], rows, blocks)(
        hidden.repeat_interleave(LATENTS, dim=0),
        times.repeat_interleave(LATENTS),
        latent.flatten(0, 1),
    ).unflatten(0, (len(truth), LATENTS))
    product = -mixture_log_prob(teacher.unsqueeze(1), truth, xt=hidden, mask_id=mask_id)
    mixture = -mixture_log_prob(student, truth, xt=hidden, mask_id=mask_id)
    # cor = -log(mixture) + log(product of the marginals)
    marginals = mixture - correlation(student, truth, xt=hidden, mask_id=mask_id)
    count = (xt == mask_id).sum()
    return torch.stack([product.sum(), marginals.sum(), mixture.sum(), count]).double()
