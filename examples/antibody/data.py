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
def one_at_a_time(
    model: Any, corpus: Corpus, seed: int, *, given: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Loops filled in one residue at a time, each in a random order of its own.

    Args:
        given: (S, D) tokens to fill in, in place of draws.

    Returns:
        The tokens (S, D), and (S,) their log-probability by the chain rule of that order, in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    all_tokens, all_nats = [], []
    with tqdm(total=len(corpus), desc="one at a time", unit="loop", leave=False) as bar:
        for first in range(0, len(corpus), chunk):
            part = corpus.take(slice(first, first + chunk))
            known = None if given is None else given[first : first + chunk]
            tokens, nats = _fill(model, part, known, generator)
            all_tokens.append(tokens)
            all_nats.append(nats)
            bar.update(len(part))
    return torch.cat(all_tokens), torch.cat(all_nats)


def _fill(
    model: Any, corpus: Corpus, given: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    tokens = corpus.tokens.masked_fill(corpus.valid, MASK)
    nats = torch.zeros(len(tokens), dtype=torch.float64)
    order = torch.rand(tokens.shape, generator=generator).masked_fill(~corpus.valid, 2.0).argsort(1)
    lengths = corpus.valid.sum(1)
    for turn in range(int(lengths.max())):
        rows = (lengths > turn).nonzero()[:, 0]
        places = order[rows, turn]
        context = {name: value[rows] for name, value in corpus.context.items()}
        head = as_head(model(tokens[rows], torch.ones(len(rows)), **context))
        logits = head.take(torch.arange(len(rows)) * tokens.shape[1] + places).logits().float()
        logits[:, :FIRST] = -torch.inf
        log_prob = logits.log_softmax(-1)
        if given is None:
            drawn = torch.multinomial(log_prob.exp(), 1, generator=generator)[:, 0]
        else:
            drawn = given[rows, places]
        nats[rows] += log_prob.gather(1, drawn[:, None])[:, 0].double()
        tokens[rows, places] = drawn
    return tokens, nats


def loops_of(tokens: Tensor, valid: Tensor) -> list[str]:
    """The loop of each sequence."""
    return [decode(row[where].tolist()) for row, where in zip(tokens, valid, strict=True)]


def drawn_once(
    teacher: Pretrained, empty: Corpus, seed: int, run: RunDirectory, name: str
) -> Corpus:
    """The chains with loops that the teacher draws one at a time, kept under a name of the run."""
    stored = run.load(name)
    if stored is None:
        tokens, _ = one_at_a_time(teacher.model, empty, seed)
        run.save(name, {"tokens": tokens.to(torch.uint8)}, {})
    else:
        tokens = stored[0]["tokens"].long()
    return dataclasses.replace(empty, tokens=tokens)
