"""Antibody heavy chains with an empty CDR3, and the loops that the teacher puts in.

The frameworks are human germline segments by their names in IMGT's nomenclature: V segments up to
the cysteine that CDR3 follows (position 104), and the fourth framework of J segments from the
tryptophan on (118). They are facts of the human genome, few enough to be written down here. No
sequence of a patient or a data base is used: the loops are the teacher's own, filled in one residue
at a time in random order, which is the law that a student of it has to meet.

Shapes: S sequences, D positions, V tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from di4c_fast.heads import as_head
from di4c_fast.training.corpus import Corpus
from di4c_fast.training.pretrained import Pretrained

from ..common.rundir import RunDirectory

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
PAD, UNKNOWN, START, END, MASK = range(5)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES)
FIRST = len(WORDS) - len(RESIDUES)

V_SEGMENTS = {
    "IGHV1-2*02": (
        "QVQLVQSGAEVKKPGASVKVSCKASGYTFTGYYMHWVRQAPGQGLEWMGWINPNSGGTNYAQKF"
        "QGRVTMTRDTSISTAYMELSRLRSDDTAVYYC"
    ),
    "IGHV1-18*01": (
        "QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYGISWVRQAPGQGLEWMGWISAYNGNTNYAQKL"
        "QGRVTMTTDTSTSTAYMELRSLRSDDTAVYYC"
    ),
    "IGHV1-46*01": (
        "QVQLVQSGAEVKKPGASVKVSCKASGYTFTSYYMHWVRQAPGQGLEWMGIINPSGGSTSYAQKF"
        "QGRVTMTRDTSTSTVYMELSSLRSEDTAVYYC"
    ),
    "IGHV1-69*01": (
        "QVQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFGTANYAQKF"
        "QGRVTITADESTSTAYMELSSLRSEDTAVYYC"
    ),
    "IGHV3-7*01": (
        "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYWMSWVRQAPGKGLEWVANIKQDGSEKYYVDSV"
        "KGRFTISRDNAKNSLYLQMNSLRAEDTAVYYC"
    ),
    "IGHV3-9*01": (
        "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSGISWNSGSIGYADSV"
        "KGRFTISRDNAKNSLYLQMNSLRAEDTALYYC"
    ),
    "IGHV3-21*01": (
        "EVQLVESGGGLVKPGGSLRLSCAASGFTFSSYSMNWVRQAPGKGLEWVSSISSSSSYIYYADSV"
        "KGRFTISRDNAKNSLYLQMNSLRAEDTAVYYC"
    ),
    "IGHV3-23*01": (
        "EVQLLESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSV"
        "KGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
    ),
    "IGHV3-30*18": (
        "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYGMHWVRQAPGKGLEWVAVISYDGSNKYYADSV"
        "KGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
    ),
    "IGHV3-33*01": (
        "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYGMHWVRQAPGKGLEWVAVIWYDGSNKYYADSV"
        "KGRFTISRDNSKNTLYLQMNSLRAEDTAVYYC"
    ),
    "IGHV4-34*01": (
        "QVQLQQWGAGLLKPSETLSLTCAVYGGSFSGYYWSWIRQPPGKGLEWIGEINHSGSTNYNPSLK"
        "SRVTISVDTSKNQFSLKLSSVTAADTAVYYC"
    ),
    "IGHV4-39*01": (
        "QLQLQESGPGLVKPSETLSLTCTVSGGSISSSSYYWGWIRQPPGKGLEWIGSIYYSGSTYYNPS"
        "LKSRVTISVDTSKNQFSLKLSSVTAADTAVYYC"
    ),
    "IGHV4-59*01": (
        "QVQLQESGPGLVKPSETLSLTCTVSGGSISSYYWSWIRQPPGKGLEWIGYIYYSGSTNYNPSLK"
        "SRVTISVDTSKNQFSLKLSSVTAADTAVYYC"
    ),
    "IGHV5-51*01": (
        "EVQLVQSGAEVKKPGESLKISCKGSGYSFTSYWIGWVRQMPGKGLEWMGIIYPGDSDTRYSPSF"
        "QGQVTISADKSISTAYLQWSSLKASDTAMYYC"
    ),
}
HELD_OUT = ("IGHV1-46*01", "IGHV3-23*01", "IGHV4-59*01")  # the student is judged in these alone
TRAINED = tuple(name for name in V_SEGMENTS if name not in HELD_OUT)
# Of IGHJ4*02 (as of 1 and 5), 2*01, 3*02, 6*02, 6*03.
FOURTH = ("WGQGTLVTVSS", "WGRGTLVTVSS", "WGQGTMVTVSS", "WGQGTTVTVSS", "WGKGTTVTVSS")
SHORTEST, LONGEST = 9, 15  # residues of the loop
# Residues of V that the models see, at the places where they stand. AntiBERTy's marginals of a
# loop without the rest differ by 0.03 of 1.9 nats per residue, at a third of the work.
CONTEXT = 16


def encode(residues: str) -> list[int]:
    return [FIRST + RESIDUES.index(residue) for residue in residues]


def decode(tokens: Sequence[int]) -> str:
    """The residues of tokens; others become '_'."""
    return "".join(RESIDUES[i - FIRST] if i >= FIRST else "_" for i in tokens)


def empty_loops(count: int, segments: Sequence[str], seed: int) -> Corpus:
    """Chains of the V segments, uniform over segments, fourth frameworks and lengths of loops.

    Every chain ends in padding up to the same D; `valid` is the loop, all masks.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    longest = 2 + CONTEXT + LONGEST + len(FOURTH[0])
    tokens = torch.full((count, longest), PAD)
    positions = torch.zeros_like(tokens)
    for row in range(count):
        segment, length = V_SEGMENTS[pick(segments)], pick(range(SHORTEST, LONGEST + 1))
        chain = [*encode(segment), *[MASK] * length, *encode(pick(FOURTH)), END]
        hidden = len(segment) - CONTEXT
        size = 1 + len(chain) - hidden
        tokens[row, :size] = torch.tensor([START, *chain[hidden:]])
        positions[row, 1:size] = torch.arange(hidden, len(chain)) + 1
    context = {"attention_mask": (tokens != PAD).long(), "position_ids": positions}
    return Corpus(tokens, tokens == MASK, context)


@torch.no_grad()
def one_at_a_time(model: Any, corpus: Corpus, seed: int, *, chunk: int = 64) -> Tensor:
    """(S, D) tokens: loops filled in one residue at a time, each in a random order of its own."""
    generator = torch.Generator().manual_seed(seed)
    filled = []
    with tqdm(total=len(corpus), desc="one at a time", unit="loop", leave=False) as bar:
        for first in range(0, len(corpus), chunk):
            part = corpus.take(slice(first, first + chunk))
            tokens, lengths = part.tokens.masked_fill(part.valid, MASK), part.valid.sum(1)
            order = _order(part.valid, generator)
            for turn in range(int(lengths.max())):
                rows = (lengths > turn).nonzero()[:, 0]
                places = order[rows, turn]
                chance = _log_prob(model, part.take(rows), tokens[rows])
                chance = chance[torch.arange(len(rows)), places].exp()
                tokens[rows, places] = torch.multinomial(chance, 1, generator=generator)[:, 0]
            filled.append(tokens)
            bar.update(len(part))
    return torch.cat(filled)


@torch.no_grad()
def chain_rule(model: Any, corpus: Corpus, seed: int, *, draws: int, chunk: int = 64) -> Tensor:
    """(S,) nats per residue: -log of the loops' probability, over the orders to fill them in.

    The chain rule of one order has a term for every residue given those before it. Its mean over
    all orders is the mean, over how many residues j are known and which, of what the model gives to
    each of the others. `draws` values of j are taken of each loop, one of each equal part of its
    length, so that a draw speaks of all orders that begin with these j.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for first in range(0, len(corpus), chunk):
        part = corpus.take(slice(first, first + chunk))
        lengths = part.valid.sum(1)
        nats = torch.zeros(len(part), dtype=torch.float64)
        for draw in range(draws):
            u = torch.rand(len(part), generator=generator)
            known = ((draw + u) / draws * lengths).long().clamp(max=lengths - 1)
            rank = _order(part.valid, generator).argsort(1)
            hidden = part.valid & (rank >= known[:, None])
            log_prob = _log_prob(model, part, part.tokens.masked_fill(hidden, MASK))
            of_tokens = log_prob.gather(-1, part.tokens[..., None])[..., 0].double()
            nats -= of_tokens.where(hidden, 0.0).sum(1) / hidden.sum(1)
        found.append(nats / draws)
    return torch.cat(found)


def _order(valid: Tensor, generator: torch.Generator) -> Tensor:
    """(S, D): the places of each loop in a random order, then all other places."""
    return torch.rand(valid.shape, generator=generator).masked_fill(~valid, 2.0).argsort(1)


def _log_prob(model: Any, corpus: Corpus, tokens: Tensor) -> Tensor:
    """(S, D, V) of residues alone."""
    logits = as_head(model(tokens, torch.ones(len(tokens)), **corpus.context)).logits().float()
    return logits.index_fill(-1, torch.arange(FIRST), -torch.inf).log_softmax(-1)


def loops_of(tokens: Tensor, valid: Tensor) -> list[str]:
    """The loop of each sequence."""
    return [decode(row[where].tolist()) for row, where in zip(tokens, valid, strict=True)]


def drawn_once(
    teacher: Pretrained, empty: Corpus, seed: int, run: RunDirectory, name: str
) -> Corpus:
    """The chains with loops that the teacher draws one at a time, kept under a name of the run."""
    stored = run.load(name)
    if stored is None:
        tokens = one_at_a_time(teacher.model, empty, seed)
        run.save(name, {"tokens": tokens.to(torch.uint8)}, {})
    else:
        tokens = stored[0]["tokens"].long()
    return dataclasses.replace(empty, tokens=tokens)
