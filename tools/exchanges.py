"""Bytes that ranks exchange per step, and the floors that links set: computed, not measured.

    python -m tools.exchanges --write    # benchmarks/results/exchanges.json

Bytes are those that one rank sends, from counts of collectives: a ring all-reduce of S bytes over R
ranks sends 2 S (R - 1) / R, an all-gather or a reduce-scatter S (R - 1) / R. The floor of a step is
its bytes over the bandwidth of the slowest link in the ring, without latency and without overlap.

Shapes: B examples of a rank, N components, K draws, M of the teacher, D positions, V classes, C
hidden width.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "exchanges.json"


@dataclasses.dataclass(frozen=True)
class Setup:
    """A student in training; weights in bf16, its gradients and the statistics in fp32."""

    parameters: int
    examples: int
    components: int
    draws: int
    positions: int
    vocabulary: int
    width: int
    teacher: int = 1

    @property
    def targets(self) -> int:
        return self.draws + 1


@dataclasses.dataclass(frozen=True)
class Link:
    """Ranks in a ring, and what one of them sends per second over its slowest link."""

    ranks: int
    bytes_per_second: float


SETUPS = {
    # The masked language model of the paper, and one of 8 billion parameters.
    "170M, V 50258": Setup(170_000_000, 1, 16, 16, 1024, 50258, 768),
    "8B, V 126464": Setup(8_000_000_000, 1, 16, 16, 4096, 126464, 4096),
}
# Data sheets: NVLink 3 has 600 GB/s and NVLink 4 900 GB/s, both directions together; a node has
# eight network ports of 200 Gbit/s (A100) or 400 Gbit/s (H200), one for each GPU.
LINKS = {
    "8 A100, NVLink": Link(8, 300e9),
    "8 H200, NVLink": Link(8, 450e9),
    "2 x 8 A100": Link(16, 25e9),
    "2 x 8 H200": Link(16, 50e9),
}


def exchanges(setup: Setup, ranks: int) -> dict[str, float]:
    """Bytes that a rank sends in one step, by what is sharded."""
    s, share = setup, (ranks - 1) / ranks
    reduced = 2 * share  # of an all-reduce
    gradients, weights = 4 * s.parameters, 2 * s.parameters
    rows = s.examples * s.positions * (s.components + s.teacher + s.draws)
    found = s.examples * s.positions * ((s.targets + 1) * s.components + 2)
    blocks = s.examples * s.positions * s.draws * -(-s.vocabulary // 128)
    hidden = s.examples * s.components * s.positions * s.width
    joint = s.examples * (s.targets * s.components + s.targets + 3)
    return {
        "DDP: gradients": reduced * gradients,
        "FSDP2: gradients, weights of three passes": share * (gradients + 3 * weights),
        "vocabulary: statistics": reduced * 4 * (2 * rows + found),
        "vocabulary: gradient of hidden": reduced * 4 * hidden,
        "vocabulary: x^k drawn in the loss": reduced * 4 * blocks,
        "positions: joint terms": reduced * 8 * joint,
    }


def results() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Bytes and the floor in ms, by setup, link and exchange."""
    return {
        name: {
            label: {
                what: {"bytes": round(size), "ms": _short(size / link.bytes_per_second * 1e3)}
                for what, size in exchanges(setup, link.ranks).items()
            }
            for label, link in LINKS.items()
        }
        for name, setup in SETUPS.items()
    }


def tables() -> str:
    """The same in Markdown, a table for each setup."""
    lines = []
    for name, by_link in results().items():
        lines += ["", f"| {name} | " + " | ".join(by_link) + " |", "|---|" + "---|" * len(by_link)]
        for what in next(iter(by_link.values())):
            cells = (by_link[label][what] for label in by_link)
            texts = (f"{_bytes(c['bytes'])}, {c['ms']:g} ms" for c in cells)
            lines.append(f"| {what} | " + " | ".join(texts) + " |")
    return "\n".join(lines[1:]) + "\n"


def _short(number: float) -> float:
    return float(f"{number:.2g}")


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(arguments)
    print(tables(), end="")
    if options.write:
        record = {"computed": "from counts, not measured", "links": {}, "exchanges": results()}
        record["links"] = {name: dataclasses.asdict(link) for name, link in LINKS.items()}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
