"""The count of instructions: ways through machine code, and the hot loops of the kernels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import triton

from tools import count, machine_code

# An early exit, a loop over columns with a branch around two instructions, an exit.
LISTING = """
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/               @P0 EXIT ;
.L_x_0:
        /*0020*/                   LDG.E.64 R2, desc[UR4][R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   FADD R4, R4, R2 ;
        /*0050*/                   FADD R4, R4, R3 ;
.L_x_1:
        /*0060*/                   MUFU.EX2 R5, R4 ;
        /*0070*/                   IMAD R6, R6, R7, R8 ;
        /*0080*/              @!P2 BRA `(.L_x_0) ;
        /*0090*/                   STG.E [R2.64], R5 ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_a_turn_takes_the_shortest_way_around_the_loop():
    code = machine_code.parse(LISTING)
    (loop,) = code.loops_over_columns()
    names = [instruction.name for instruction in code.turn(loop)]
    assert names == ["LDG", "BRA", "MUFU", "IMAD", "BRA"]
    assert machine_code.loads_by_width(code.turn(loop)) == {64: 1}
    assert machine_code.by_pipe(code.turn(loop)) == {
        "load and store": 1,
        "control": 2,
        "special": 1,
        "integer product": 1,
    }


def test_around_the_loop_goes_to_the_last_exit():
    code = machine_code.parse(LISTING)
    names = [instruction.name for instruction in code.around(code.loops_over_columns())]
    assert names == ["S2R", "EXIT", "STG"]


def test_instructions_of_a_loop_that_loads():
    looped = machine_code.parse(LISTING).looped()
    assert [x.name for x in looped] == ["LDG", "BRA", "FADD", "FADD", "MUFU", "IMAD", "BRA"]


def counted(**facts: object) -> count.Count:
    values = {
        "kernel": "k", "tile": "1 × 1", "warps": 2, "registers": 32, "spills": 0, "per_logit": 1.0,
        "pipes": {}, "loads": {}, "turns": 1.0, "around": 0, "programs": 132.0,
        "resident_warps": 2, "flight": 0, "moved": 0.0, "total": {},
    }  # fmt: skip
    return count.Count(**{**values, **facts})  # type: ignore[arg-type]


def test_the_times_are_those_of_instructions_and_bytes():
    machine = count.Machine("sm_90", 132, 1.0, 1.0, 4.0)
    times = counted(total={"fp32": 4000.0, "special": 1000.0}, moved=1e9).times(machine)
    assert times["memory"] == pytest.approx(1.0)  # 1 GB at 1 TB/s
    # Two warps, one program per multiprocessor, 5000 instructions, four per clock.
    assert times["issue"] == pytest.approx(2 * 5000 / 4 * 1e-6)
    assert times["special"] == pytest.approx(2 * 1000 / 0.5 * 1e-6)


def test_programs_beyond_a_round_count_as_a_round():
    machine = count.Machine("sm_90", 132, 1.0, 1.0, 4.0)
    one, more = (counted(total={"fp32": 8.0}, programs=n).times(machine) for n in (132.0, 133.0))
    assert more["issue"] == pytest.approx(2 * one["issue"])


BOUNDS = {
    "language": {
        "row_statistics": 9.0,
        "block_sums": 11.5,
        "row_draw": 1.5,
        "marginal": 11.5,
        "mixture_forward": 18.0,
        "mixture_backward": 17.0,
    },
    "pixel": {
        "row_statistics": 20.0,
        "row_draw": 155.0,
        "marginal": 18.0,
        "mixture_forward": 34.0,
        "mixture_backward": 49.0,
    },
}


@pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="counts are those of one compiler"
)
@pytest.mark.parametrize("shape", BOUNDS)
def test_hot_loops_stay_within_their_instructions(shape):
    """On sm_90; a change that adds instructions has to raise a bound."""
    code = (
        "import json; from tools import count\n"
        f"rows = count.counts(count.SHAPES[{shape!r}], 'sm_90')\n"
        "print(json.dumps([[row.kernel, row.per_logit, row.spills] for row in rows]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout.splitlines()[-1])
    bounds = BOUNDS[shape]
    assert {row[0] for row in rows} - set(count.PER_POSITION) == set(bounds)
    for kernel, per_logit, spills in rows:
        assert spills == 0, kernel
        assert per_logit <= bounds.get(kernel, 0.0), kernel


def test_every_kernel_is_in_the_table():
    sources = (count.ROOT / "kernels" / "triton").glob("*.py")
    kernels = {
        name
        for source in sources
        for name in re.findall(r"def _(\w+)_kernel\(", source.read_text())
    }
    found = json.loads(count.RESULTS.read_text())["counts"]
    assert list(found) == ["sm_80", "sm_90", "sm_100"]
    for by_shape in found.values():
        assert {row["kernel"] for rows in by_shape.values() for row in rows} == kernels


def test_settings_name_kernel_and_field():
    assert count.settings_of(["mixture_forward.warps=2"]) == {"mixture_forward": {"warps": 2}}
    with pytest.raises(SystemExit, match=r"kernel\.field=number"):
        count.settings_of(["warps=2"])
