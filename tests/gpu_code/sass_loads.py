"""How far ahead of its use a kernel loads: read from the SASS of nvdisasm.

Instructions issue in order, so a warp stops at the first one that names a register of a pending load. For every 16-byte
load from global memory this walks all paths to the nearest instruction that reads one of its four registers. A load in
a loop is followed inside the innermost loop only: what leaves the loop no longer wants what was loaded ahead.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

WIDE_LOAD = re.compile(r"\bLDG\.E\S*\.128\b")
STORES = re.compile(r"^(?:ST|RED|ATOM|BRA|EXIT|BAR|SYNCS|HGMMA|UTMA|UBLK)")


@dataclass
class Instruction:
    opcode: str  # with its suffixes, without its predicate
    predicated: bool
    writes: set[int]
    reads: set[int]
    successors: list[int] = field(default_factory=list)


def _registers(operand: str) -> set[int]:
    return {int(n) + (1 if wide else 0) * i for n, wide in re.findall(r"\bR(\d+)(\.64)?", operand) for i in (0, 1)}


def _parse(text: str) -> Instruction:
    found = re.match(r"(@!?U?P\w+ )?(\S+)\s*(.*)$", text)
    assert found, text
    predicate, opcode, rest = found.groups()
    operands = rest.split(", ")
    if STORES.match(opcode) or not re.match(r"R\d+\b", operands[0]):
        return Instruction(opcode, bool(predicate), set(), _registers(rest))
    width = 4 if ".128" in opcode else 2 if re.search(r"\.64|\.WIDE", opcode) else 1
    first = int(re.findall(r"\d+", operands[0])[0])
    reads = _registers(", ".join(operands[1:]))
    return Instruction(opcode, bool(predicate), set(range(first, first + width)), reads)


def parse_body(body: str) -> list[Instruction]:
    """The instructions of one kernel (what follows its `.text.` label), with the successors of each."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    targets: list[tuple[int, str]] = []  # of branches
    meets: dict[str, str] = {}  # where the threads of a convergence barrier meet again
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            number, instruction = len(instructions), _parse(found[1])
            instructions.append(instruction)
            target = re.search(r"`\((\.L_x_\d+)\)", found[1])
            barrier = re.search(r"\b(B\d+)\b", found[1])
            if instruction.opcode.startswith("BSSY") and barrier and target:
                meets[barrier[1]] = target[1]
            elif instruction.opcode.startswith("BSYNC") and barrier:
                targets.append((number, meets[barrier[1]]))
            elif instruction.opcode.startswith("BRA") and target:
                targets.append((number, target[1]))
    for number, instruction in enumerate(instructions):
        leaves = re.match(r"BRA|EXIT|BSYNC|RET", instruction.opcode) and not instruction.predicated
        if not leaves and number + 1 < len(instructions):
            instruction.successors.append(number + 1)
    for number, name in targets:
        instructions[number].successors.append(labels[name])
    return instructions


def innermost_loop(instructions: list[Instruction], place: int) -> range:
    """From the target of the shortest jump back over `place` to that jump; everything if none jumps back over it."""
    jumps = [
        range(target, source + 1)
        for source, instruction in enumerate(instructions)
        for target in instruction.successors
        if target <= place <= source
    ]
    return min(jumps, key=len, default=range(len(instructions)))


def first_use(instructions: list[Instruction], load: int) -> tuple[int, int] | None:
    """(instructions from the load to the nearest use of its registers, 16-byte loads pending there: this and those to
    other registers on the way); None if no path uses it."""
    start, loop = frozenset(instructions[load].writes), innermost_loop(instructions, load)
    queue = deque((s, 1, start, frozenset([min(start)])) for s in instructions[load].successors if s in loop)
    seen = {(place, alive) for place, _, alive, _ in queue}
    while queue:
        place, distance, alive, pending = queue.popleft()
        instruction = instructions[place]
        if instruction.reads & alive:
            return distance, len(pending)
        if not instruction.predicated:
            alive = alive - instruction.writes
        if not alive:
            continue
        if WIDE_LOAD.search(instruction.opcode):
            pending = pending | {min(instruction.writes)}
        for successor in instruction.successors:
            if successor in loop and (successor, alive) not in seen:
                seen.add((successor, alive))
                queue.append((successor, distance + 1, alive, pending))
    return None


def loads_ahead(body: str) -> tuple[int, int]:
    """(the shortest distance from a 16-byte global load to its use, the most such loads pending at a use); zeros for a
    kernel without any. Where there are loads in loops, the distance is theirs: nothing can hide the first loads."""
    if not WIDE_LOAD.search(body):
        return 0, 0
    instructions = parse_body(body)
    loads = [i for i, instruction in enumerate(instructions) if WIDE_LOAD.search(instruction.opcode)]
    uses = {load: use for load in loads if (use := first_use(instructions, load))}
    looped = [d for load, (d, _) in uses.items() if len(innermost_loop(instructions, load)) < len(instructions)]
    return min(looped or [d for d, _ in uses.values()], default=0), max((n for _, n in uses.values()), default=0)
