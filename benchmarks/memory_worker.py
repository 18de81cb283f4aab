"""The child process in which peaks of memory are measured; see `memory.MemoryWorker`."""

from __future__ import annotations

import functools
import json
import sys
import time
from typing import Any

import torch

from .cases import Case, check_name, make_case
from .memory import peak_in_this_process, reset_high_water_mark
from .registry import make_group


def _serve(threads: int) -> None:
    """Answer requests from the standard input until it ends."""
    torch.set_num_threads(threads)
    warmed: set[tuple[str, str, str]] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = _answer(request["case"], request["variant"], warmed)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _answer(
    spec: dict[str, Any], variant: str, warmed: set[tuple[str, str, str]]
) -> dict[str, Any]:
    case = Case.from_spec(spec)
    group = make_group(case)
    check_name(variant, "variant", [known.name for known in group.variants()])
    resettable = reset_high_water_mark()
    shape = case.shape if case.shape != "scaling" else "language"
    if (shape, case.dtype, variant) not in warmed:
        # Imports, thread pools and workspaces are not the variant's memory.
        tiny = make_group(make_case(shape, "tiny", case.dtype, case.device))
        tiny.call(variant, tiny.make_inputs(0))
        warmed.add((shape, case.dtype, variant))
    inputs = group.make_inputs(0)
    call = functools.partial(group.call, variant, inputs)
    started = time.monotonic()
    peak = peak_in_this_process(call)
    if resettable and time.monotonic() - started < 1.0:
        # The first call of this size also sets up what later calls reuse.
        peak = min(peak, peak_in_this_process(call))
    return {"peak": peak, "resettable": resettable}


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
