"""The machine code of a compiled kernel for NVIDIA: its instructions, loops and shortest ways.

A *way* is a path through the code. Instructions that every warp executes are counted along ways,
so that code which a launch jumps over is not counted.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

PIPES = {  # the first pattern that an opcode begins with
    "integer product": r"IMAD|IDP|HFMA2|HADD2|HMUL2",
    "fp32": r"FFMA|FADD|FMUL",
    "special": r"MUFU|I2F|F2I|F2F|POPC|FLO|BREV|FRND",
    "load and store": r"LDG|STG|LDS|STS|LDSM|STSM|LDL|STL|SHFL|ATOM|RED",
    "control": r"BRA|BSSY|BSYNC|BAR|DEPBAR|LDGDEPBAR|EXIT|NOP|WARPSYNC|YIELD|LDC|S2|CS2R|R2UR|VOTE"
    r"|U[A-Z]",
}
OTHER = "other integer and logic"
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str
    conditional: bool

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def ends_way(self) -> bool:
        """Nothing follows but its target."""
        free = "P" not in self.operands.split("`")[0]
        return self.name in ("BRA", "EXIT") and not self.conditional and free

    @property
    def pipe(self) -> str:
        return next((p for p, text in PIPES.items() if re.match(text, self.opcode)), OTHER)


@dataclasses.dataclass(frozen=True)
class Loop:
    head: int
    jump: int  # the instruction that goes back to `head`

    def __contains__(self, index: int) -> bool:
        return self.head <= index <= self.jump


@dataclasses.dataclass(frozen=True)
class Code:
    instructions: list[Instruction]
    jumps: dict[int, int]  # from instruction to instruction

    def loops_over_columns(self) -> list[Loop]:
        """The loops that hold an exponential, innermost ones, in their order: one over whole
        tiles, then one over the tail."""
        back = [Loop(to, at) for at, to in self.jumps.items() if to < at]
        hot = [
            loop for loop in back if any(i.opcode.startswith("MUFU.EX2") for i in self._part(loop))
        ]
        inner = [a for a in hot if not any(b is not a and b.head in a and b.jump in a for b in hot)]
        longest = max((loop.jump - loop.head for loop in inner), default=0)
        inner = [loop for loop in inner if loop.jump - loop.head >= 0.5 * longest]
        return sorted(inner, key=lambda loop: loop.head)

    def looped(self) -> list[Instruction]:
        """The instructions of all loops that load from device memory."""
        back = [Loop(to, at) for at, to in self.jumps.items() if to < at]
        loops = [loop for loop in back if any(i.name == "LDG" for i in self._part(loop))]
        return [x for i, x in enumerate(self.instructions) if any(i in loop for loop in loops)]

    def turn(self, loop: Loop) -> list[Instruction]:
        """The shortest way once around a loop."""
        return [*self._way(loop.head, {loop.jump}, frozenset()), self.instructions[loop.jump]]

    def around(self, loops: Iterable[Loop]) -> list[Instruction]:
        """The shortest way from the entry through the first of the loops to the exit that is
        farthest (others leave early), without the instructions of the loops."""
        loops = list(loops)
        free = frozenset(i for loop in loops for i in range(loop.head, loop.jump + 1))
        exits = {i for i, x in enumerate(self.instructions) if x.name == "EXIT"}
        if loops:
            middle = loops[0].head
        else:  # the ways of a branch have met by the last exponential
            middle = max(
                (i for i, x in enumerate(self.instructions) if x.opcode.startswith("MUFU.EX2")),
                default=0,
            )
        return self._way(0, {middle}, free) + self._way(middle, exits, free)

    def _part(self, loop: Loop) -> list[Instruction]:
        return self.instructions[loop.head : loop.jump + 1]

    def _way(self, begin: int, ends: set[int], free: frozenset[int]) -> list[Instruction]:
        """The shortest way to the end that is farthest; instructions of `free` are left out."""
        cost, before, queue = {begin: 0}, {begin: begin}, [(0, begin)]
        while queue:
            reached, at = heapq.heappop(queue)
            if reached > cost[at] or at in ends:
                continue
            following = [] if self.instructions[at].ends_way else [at + 1]
            following += [self.jumps[at]] if at in self.jumps else []
            for to in following:
                new = reached + (at not in free)
                if to < len(self.instructions) and new < cost.get(to, 1 << 30):
                    cost[to], before[to] = new, at
                    heapq.heappush(queue, (new, to))
        at = max((end for end in ends if end in cost), key=cost.__getitem__, default=begin)
        way = []
        while at != begin:
            at = before[at]
            if at not in free:
                way.append(self.instructions[at])
        return way[::-1]


def disassemble(cubin: bytes) -> Code:
    """The code of a cubin, read by the `nvdisasm` that the Triton wheel contains."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [str(program), "-c", file.name], capture_output=True, text=True, check=True
        )
    return parse(run.stdout)


def parse(text: str) -> Code:
    """The code that a listing of `nvdisasm -c` shows."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _LINE.match(line):
            instructions.append(Instruction(found[2], found[3], bool(found[1])))
    jumps = {}
    for index, instruction in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", instruction.operands)
        if target and target[0] in labels and instruction.name in ("BRA", "CALL"):
            jumps[index] = labels[target[0]]
    return Code(instructions, jumps)


def by_pipe(instructions: Iterable[Instruction]) -> collections.Counter[str]:
    return collections.Counter(instruction.pipe for instruction in instructions)


def loads_by_width(instructions: Iterable[Instruction]) -> dict[int, int]:
    """How many loads from device memory move how many bits per thread."""
    count: collections.Counter[int] = collections.Counter()
    for instruction in instructions:
        if instruction.name in ("LDG", "LDGSTS"):
            width = re.search(r"\.[US]?(128|64|8|16)(?=\.|$)", instruction.opcode)
            count[int(width[1]) if width else 32] += 1
    return dict(sorted(count.items()))
