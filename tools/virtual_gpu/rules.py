"""The rules by which instructions are executed, by opcode.

A rule is for all opcodes that its regular expression matches whole: a modifier that is not in the
expression is an instruction without a rule, never one that is passed over.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .block import Step, unsupported
from .ptx import Instruction, Program

Rule = Callable[[Instruction, re.Match[str], Program], Step]

_RULES: dict[str, list[tuple[re.Pattern[str], Rule]]] = {}


def rule(pattern: str) -> Callable[[Rule], Rule]:
    """Registers a rule; what is before the pattern's first dot names the instructions."""

    def register(made: Rule) -> Rule:
        for name in re.split(r"[^\w|()]", pattern)[0].strip("()").split("|"):
            _RULES.setdefault(name, []).append((re.compile(pattern), made))
        return made

    return register


def compiled(instruction: Instruction, program: Program) -> Step:
    """What executes the instruction.

    Raises:
        UnsupportedError: there is no rule for it.
    """
    for pattern, made in _RULES.get(instruction.opcode.partition(".")[0], []):
        if found := pattern.fullmatch(instruction.opcode):
            return made(instruction, found, program)
    raise unsupported(instruction)
