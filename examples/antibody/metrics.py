"""How good loops are, judged by the teacher one residue at a time, and how varied.

All loops have the lengths that they were asked for, so nothing can be read off lengths. Likelihood
alone would reward a model that says little but says it well: entropy, distinct loops and the
likeness of loops stand beside it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import zlib

import numpy as np
import torch

from di4c_fast.training.pretrained import Pretrained

from ..common.report import Measure
from ..common.rundir import RunDirectory
from .config import Config
from .data import HELD_OUT, RESIDUES, chain_rule, drawn_once, empty_loops, loops_of

MEASURES = (
    Measure("nats", "nats per residue", 3, kept=4),
    Measure("pairs", "pair TV", 3, kept=4),
    Measure("residues", "residue TV", 3, kept=4),
    Measure("lone", "lone C", 3, kept=4),
    Measure("entropy", "pair entropy", 3, kept=4),
    Measure("distinct", "distinct", 3, kept=4),
    Measure("alike", "likeness", 3, kept=4),
)
SIZE = len(RESIDUES)
JUDGE_SEED, REFERENCE_SEED, CONTEXT_SEED = 1001, 1002, 1003
DRAWS = 4  # of orders, for each loop


@dataclasses.dataclass(frozen=True)
class Score:
    """What the judge says of a set of loops.

    Attributes:
        nats: per residue, minus the log-probability of the loop by the teacher's chain rule, over
            random orders; smaller is likelier.
        pairs: total variation between the law of neighbouring residues and that of loops that the
            teacher filled in one at a time.
        residues: the same for single residues, which independent residues can have right.
        lone: the share of loops with exactly one cysteine: it has no partner to bond with.
        entropy: of the law of neighbouring residues, in nats; what is sharper has less.
        distinct: different loops / loops.
        alike: the share of equal residues between two loops of one length, on average.
    """

    nats: float
    pairs: float
    residues: float
    lone: float
    entropy: float
    distinct: float
    alike: float


class Judge:
    """Scores loops in the chains that every model is asked to fill in.

    Args:
        teacher: AntiBERTy.
        config: how many chains.
        run: keeps what was drawn and judged.
    """

    def __init__(self, teacher: Pretrained, config: Config, run: RunDirectory):
        self.teacher, self.judged, self.run = teacher, config.judged, run
        self.empty = empty_loops(config.samples, HELD_OUT, CONTEXT_SEED)
        self.drawn = self._drawn(REFERENCE_SEED)
        self.reference = loops_of(self.drawn, self.empty.valid)

    def _drawn(self, seed: int) -> torch.Tensor:
        """Loops of the teacher, one residue at a time."""
        return drawn_once(self.teacher, self.empty, seed, self.run, f"loops/seed-{seed}").tokens

    def _nats(self, tokens: torch.Tensor) -> float:
        """Mean over the first chains with these loops in them; what was judged is kept."""
        name = f"scores/{zlib.crc32(tokens.numpy().tobytes()):08x}"
        stored = self.run.load(name)
        if stored is None:
            chains = dataclasses.replace(self.empty.take(slice(len(tokens))), tokens=tokens)
            nats = chain_rule(self.teacher.model, chains, JUDGE_SEED, draws=DRAWS)
            stored = {"nats": nats}, {}
            self.run.save(name, *stored)
        return float(stored[0]["nats"].mean())

    def score(self, samples: np.ndarray) -> Score:
        """samples: (S, D) tokens of the chains."""
        tokens = torch.from_numpy(np.asarray(samples)).long()
        nats = self._nats(tokens[: self.judged])
        return scored(nats, loops_of(tokens, self.empty.valid), self.reference)

    def floor(self) -> tuple[Score, torch.Tensor]:
        """What the teacher's own loops score, one at a time with other numbers, and these.

        Their likelihood is the mean over all loops of both sets.
        """
        tokens = self._drawn(REFERENCE_SEED + 1)
        score = scored(0.0, loops_of(tokens, self.empty.valid), self.reference)
        nats = [self._nats(loops) for loops in (self.drawn, tokens)]
        return dataclasses.replace(score, nats=sum(nats) / len(nats)), tokens


def scored(nats: float, loops: list[str], reference: list[str]) -> Score:
    pairs, other = _pairs(loops), _pairs(reference)
    kept = pairs[pairs > 0]
    return Score(
        nats,
        _distance(pairs, other),
        _distance(pairs.sum(0), other.sum(0)),
        sum(loop.count("C") == 1 for loop in loops) / len(loops),
        float(-(kept * np.log(kept)).sum()),
        len(set(loops)) / len(loops),
        _alike(loops),
    )


def _pairs(loops: list[str]) -> np.ndarray:
    """(20, 20): how often one residue follows another."""
    counts = np.zeros((SIZE, SIZE))
    for loop in loops:
        for one, two in itertools.pairwise(loop):
            counts[RESIDUES.index(one), RESIDUES.index(two)] += 1
    return counts / counts.sum()


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(0.5 * np.abs(one - other).sum())


def _alike(loops: list[str]) -> float:
    groups = collections.defaultdict(list)
    for loop in loops:
        groups[len(loop)].append([RESIDUES.index(residue) for residue in loop])
    equal = total = 0.0
    for group in groups.values():
        rows = np.array(group)
        same = (rows[:, None] == rows[None]).mean(-1)
        equal += float(same.sum() - len(rows))
        total += len(rows) * (len(rows) - 1)
    return equal / max(total, 1.0)
