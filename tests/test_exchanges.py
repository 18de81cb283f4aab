"""The computed bytes of exchanges: against counts by hand; file and docs hold them."""

from __future__ import annotations

import json
import pathlib

import pytest

from tools import exchanges
from tools.exchanges import Setup

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "distributed.md"


def test_bytes_of_a_small_setup_are_those_counted_by_hand():
    setup = Setup(100, examples=1, components=2, draws=3, positions=5, vocabulary=129, width=7)
    found = exchanges.exchanges(setup, ranks=2)  # half of everything, twice in an all-reduce
    assert found["DDP: gradients"] == 400
    assert found["FSDP2: gradients, weights of three passes"] == 0.5 * (400 + 3 * 200)
    # 2 + 1 + 3 rows of 5 positions, twice; of every position 4 targets of 2 components, R_n, 2 KLs.
    assert found["vocabulary: statistics"] == 4 * (2 * 30 + 5 * (8 + 2 + 2))
    assert found["vocabulary: gradient of hidden"] == 4 * 2 * 5 * 7
    assert found["vocabulary: x^k drawn in the loss"] == 4 * 15 * 2  # two blocks of 128
    assert found["positions: joint terms"] == 8 * (4 * 2 + 4 + 3)


def test_results_and_docs_hold_what_the_formulas_give():
    assert json.loads(exchanges.RESULTS.read_text())["exchanges"] == exchanges.results()
    assert exchanges.tables() in DOCS.read_text()


def test_a_floor_is_bytes_over_the_link():
    cell = exchanges.results()["170M, V 50258"]["8 A100, NVLink"]["DDP: gradients"]
    assert cell["ms"] == pytest.approx(cell["bytes"] / 300e9 * 1e3, rel=0.05)
