"""Whether threads that store to one address store one value there, read from a kernel's PTX.

Triton lets several threads that hold the same value store it to the same address, which a race
detector has to report. `duplicate_stores` finds these stores and proves that the values are equal,
for one launch with fixed lengths: it executes the PTX for all threads of each block at once, with
integers (addresses, indices, lengths) as numbers and everything else as terms. Two values are equal
when their terms are, after the operands of a commutative operation are put in order: that is what
makes the lanes of a butterfly reduction agree, `op(a, b)` here and `op(b, a)` there, bit for bit
but for the payload of a NaN. Threads that read one address of shared memory in one step get one
value, which is so in a kernel without races, and that is asked next. Other loads, matrix products
and whatever else is not known here give every thread a term of its own, so that nothing is taken
for equal that may not be.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_INSTRUCTION = re.compile(r"^(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)(?:\s+(.*?))?;$")
_LABEL = re.compile(r"^(\$\w+):$")
_TYPE = re.compile(r"\.(b|u|s|f)(8|16|32|64)(?=$|\.)")
_COMMUTATIVE = frozenset({"add", "mul", "min", "max", "and", "or", "xor"})
_ELEMENTWISE_NAMES = (
    "abs add and bfe bfi brev clz copysign cos cvt cvta div ex2 fma lg2 lop3 mad max min mov "
    "mul neg not or popc prmt rcp rem rsqrt selp set setp shf shl shr sin sqrt sub tanh xor"
)
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
_MOST_STEPS = 200_000


class CannotFollow(Exception):
    """The PTX does what the execution here has no rule for; the message says what."""


@dataclass(frozen=True)
class Term:
    """A value that is not a known integer; equal terms are equal values."""

    number: int


@dataclass(frozen=True)
class Address:
    """An offset in bytes from a symbol or a pointer parameter."""

    base: str
    offset: int


Value = int | Term | Address


@dataclass(frozen=True)
class Store:
    """A store that several threads make to one address, all with one value.

    Attributes:
        line: of the PTX, from 1.
        mask: the threads whose index has none of these bits are one for each address.
    """

    line: int
    mask: int


@dataclass(frozen=True)
class _Instruction:
    line: int
    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool


def _operands(text: str | None) -> tuple[str, ...]:
    parts, depth, current = [], 0, ""
    for character in text or "":
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return tuple([*parts, current.strip()] if current.strip() else parts)


def _parse(ptx: str) -> tuple[list[_Instruction], dict[str, int]]:
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line, text in enumerate(ptx.splitlines(), 1):
        text = text.split("//")[0].strip()
        if label := _LABEL.match(text):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.match(text):
            negated, guard, opcode, operands = found.groups()
            code.append(_Instruction(line, opcode, _operands(operands), guard, bool(negated)))
    return code, labels


class _Block:
    """All threads of one block, in step."""

    def __init__(
        self,
        block: Sequence[int],
        grid: Sequence[int],
        num_threads: int,
        scalars: Mapping[str, int],
        arrays: Mapping[str, Sequence[int]],
    ) -> None:
        self.num_threads = num_threads
        self.special: dict[str, int] = {"%tid.y": 0, "%tid.z": 0}
        for axis, index, size in zip("xyz", block, grid, strict=True):
            self.special |= {f"%ctaid.{axis}": index, f"%nctaid.{axis}": size}
        self.scalars, self.arrays = scalars, arrays
        self.registers: dict[str, list[Value]] = {}
        self.terms: dict[tuple[Any, ...], Term] = {}
        self.step = 0

    def term(self, *key: Any) -> Term:
        return self.terms.setdefault(key, Term(len(self.terms)))

    def fresh(self, *key: Any) -> Term:
        return self.term("step", self.step, *key)

    def read(self, operand: str) -> list[Value]:
        """An operand's value in each thread."""
        threads = range(self.num_threads)
        if operand == "%tid.x":
            return list(threads)
        if operand.startswith("%") and "." not in operand:
            if operand not in self.registers:
                self.registers[operand] = [self.term("undefined", operand, t) for t in threads]
            return self.registers[operand]
        value: Value
        if number := re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", operand):
            value = int(number[1], 0)
        elif re.fullmatch(r"0[fd][0-9A-Fa-f]+", operand):
            value = int(operand[2:], 16)
        elif re.fullmatch(r"[A-Za-z_]\w*", operand):
            value = Address(operand, 0)
        elif operand in self.special:
            value = self.special[operand]
        else:
            raise CannotFollow(f"the operand {operand}")
        return [value] * self.num_threads

    def address(self, operand: str) -> list[Value]:
        base, _, offset = operand.strip("[] ").partition("+")
        return [
            _shift(self, value, int(offset.strip() or "0", 0)) for value in self.read(base.strip())
        ]

    def guard(self, instruction: _Instruction) -> list[Value]:
        if instruction.guard is None:
            return [1] * self.num_threads
        guards = self.read(instruction.guard)
        if not instruction.negated:
            return guards
        return [1 - g if isinstance(g, int) else self.term("not", g) for g in guards]

    def write(self, register: str, values: list[Value], guards: list[Value]) -> None:
        if all(guard == 1 for guard in guards):
            self.registers[register] = values
            return
        self.registers[register] = [
            new if guard == 1 else old if guard == 0 else self.term("selp", new, old, guard)
            for new, old, guard in zip(values, self.read(register), guards, strict=True)
        ]


def _shift(block: _Block, value: Value, offset: int) -> Value:
    if isinstance(value, Address):
        return Address(value.base, value.offset + offset)
    if isinstance(value, int):
        return value + offset
    return value if offset == 0 else block.term("shift", value, offset)


def _signed(value: int, width: int) -> int:
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


def _integers(opcode: str, values: Sequence[int]) -> int | None:
    """The result of an integer operation, or `None` when it is not one that is known here."""
    name, *flags = opcode.split(".")
    types = _TYPE.findall(opcode)
    if name in ("and", "or", "xor", "not", "mov") and flags[-1] == "pred":
        width, kind = 1, "b"
    elif not types:
        return None
    else:
        kind, width = types[-1][0], int(types[-1][1])
    if kind == "f":
        return None
    mask = (1 << width) - 1
    known = [_signed(v, width) if kind == "s" else v & mask for v in values]
    if name == "setp":
        if len(flags) != 2 or flags[0] not in _COMPARISONS:
            return None
        return int(_COMPARISONS[flags[0]](known[0], known[1]))
    if name == "selp":
        return known[0] if values[2] else known[1]
    if name == "cvt":
        # From the last type to the one before it.
        to_kind, to_width = types[0][0], int(types[0][1])
        return None if to_kind == "f" or len(types) != 2 else known[0] & ((1 << to_width) - 1)
    if name in ("mul", "mad"):
        product = known[0] * known[1]
        if "hi" in flags:
            return None if name == "mad" else (product >> width) & mask
        wide = (1 << (2 * width)) - 1 if "wide" in flags else mask
        return (product + (values[2] if name == "mad" else 0)) & wide
    if name in ("div", "rem"):
        if known[1] == 0:
            return None
        quotient = abs(known[0]) // abs(known[1])
        quotient = -quotient if (known[0] < 0) != (known[1] < 0) else quotient
        return (quotient if name == "div" else known[0] - quotient * known[1]) & mask
    if name in ("shl", "shr"):
        count = values[1] & 0xFFFFFFFF
        return (known[0] << count if name == "shl" else known[0] >> min(count, width)) & mask
    simple: dict[str, Callable[..., int]] = {
        "add": operator.add, "sub": operator.sub, "min": min, "max": max, "and": operator.and_,
        "or": operator.or_, "xor": operator.xor, "not": operator.invert, "neg": operator.neg,
        "mov": int, "cvta": int,
    }  # fmt: skip
    return simple[name](*known) & mask if name in simple else None


def _elementwise(block: _Block, opcode: str, values: tuple[Value, ...]) -> Value:
    """One thread's result of an operation that depends on nothing but its operands."""
    name = opcode.split(".")[0]
    if all(isinstance(value, int) for value in values):
        result = _integers(opcode, [value for value in values if isinstance(value, int)])
        if result is not None:
            return result
    if name in ("mov", "cvta") and len(values) == 1:
        return values[0]
    if name == "add" and any(isinstance(value, Address) for value in values):
        base, offset = sorted(values, key=lambda value: isinstance(value, int))
        if isinstance(base, Address) and isinstance(offset, int):
            width = int(_TYPE.findall(opcode)[-1][1])
            return Address(base.base, base.offset + _signed(offset, width))
    if name == "mad" and "wide" in opcode and isinstance(values[2], Address):
        product = _elementwise(block, opcode.replace("mad", "mul"), values[:2])
        if isinstance(product, int):
            return Address(values[2].base, values[2].offset + _signed(product, 64))
    if opcode in ("and.pred", "or.pred"):
        decisive = 0 if name == "and" else 1
        if decisive in values:
            return decisive
        rest = [value for value in values if not isinstance(value, int)]
        if len(rest) == 1:
            return rest[0]
    if name == "selp":
        if isinstance(values[2], int):
            return values[0] if values[2] else values[1]
        if values[0] == values[1]:
            return values[0]
    if name in _COMMUTATIVE or name in ("fma", "mad"):
        pair = sorted(values[:2], key=lambda value: (type(value).__name__, repr(value)))
        values = (*pair, *values[2:])
    return block.term(opcode, *values)


def _shuffle(block: _Block, instruction: _Instruction) -> list[Value] | None:
    """`shfl.sync` over whole warps; `None` when it is of another kind."""
    mode = instruction.opcode.split(".")[2]
    source, lane, clamp, members = (block.read(operand) for operand in instruction.operands[1:])
    known = clamp[0] == 31 and members[0] in (-1, 0xFFFFFFFF) and isinstance(lane[0], int)
    if mode not in ("bfly", "idx") or not known or any(value != lane[0] for value in lane):
        return None
    other = int(str(lane[0])) & 31
    return [
        source[t ^ other if mode == "bfly" else t & ~31 | other] for t in range(block.num_threads)
    ]


def _load(block: _Block, instruction: _Instruction) -> list[Value] | None:
    """A load of a parameter, of an array with fixed contents, or from shared memory."""
    opcode, operands = instruction.opcode, instruction.operands
    if operands[0].startswith("{") and "," in operands[0]:
        return None
    if opcode.startswith("ld.param"):
        name = operands[1].strip("[]")
        value: Value = Address(name, 0)
        if name in block.scalars:
            value = block.scalars[name]
        return [value] * block.num_threads
    values: list[Value] = []
    if opcode.startswith("ld.shared"):
        # In a kernel without races nothing is written between two threads' reads of an address in
        # one step: only a barrier, which both have passed, could order the write before or after.
        # That there are no other races is what the verifier is asked next (`keep_one_thread`).
        return [
            block.fresh("shared", address) if isinstance(address, Address) else block.fresh(0, t)
            for t, address in enumerate(block.address(operands[1]))
        ]
    if not opcode.startswith("ld.global"):
        return None
    for address in block.address(operands[1]):
        array = block.arrays.get(address.base) if isinstance(address, Address) else None
        if array is None or not isinstance(address, Address) or "32" not in opcode:
            return None
        index = address.offset // 4
        # Guarded loads compute addresses outside the array and do not read them.
        inside = 0 <= index < len(array)
        values.append(array[index] & 0xFFFFFFFF if inside else block.fresh("outside", index))
    return values


def _execute(block: _Block, instruction: _Instruction, guards: list[Value] | None = None) -> None:
    """Any instruction but stores and branches, in the threads that `guards` or its own say."""
    opcode, operands = instruction.opcode, instruction.operands
    name = opcode.split(".")[0]
    if not operands or not operands[0].lstrip("{ ").startswith("%"):
        return
    targets = re.findall(r"%\w+", operands[0])
    if guards is None:
        guards = block.guard(instruction)
    values: list[Value] | None = None
    if name == "ld":
        values = _load(block, instruction)
    elif name == "shfl" and len(targets) == 1:
        values = _shuffle(block, instruction)
    elif name == "redux":
        values = [block.fresh("warp", t // 32) for t in range(block.num_threads)]
    elif name in _ELEMENTWISE and "|" not in operands[0]:
        sources: list[list[Value]] = []
        for operand in operands[1:]:
            packed = re.findall(r"%\w+", operand) if operand.startswith("{") else [operand]
            sources += [block.read(one) for one in packed]
        rows = list(zip(*sources, strict=True))
        if len(targets) > 1 or len(sources) != len(operands) - 1:
            for i, target in enumerate(targets):
                block.write(target, [block.term(opcode, "part", i, *row) for row in rows], guards)
            return
        values = [_elementwise(block, opcode, row) for row in rows]
    if values is None or len(targets) != 1:
        for i, target in enumerate(targets):
            unknown: list[Value] = [block.fresh(i, t) for t in range(block.num_threads)]
            block.write(target, unknown, guards)
        return
    block.write(targets[0], values, guards)


def _run(
    block: _Block,
    code: Sequence[_Instruction],
    labels: Mapping[str, int],
    see_store: Callable[[_Block, _Instruction], None],
) -> None:
    position = 0
    while position < len(code):
        instruction = code[position]
        position += 1
        block.step += 1
        if block.step > _MOST_STEPS:
            raise CannotFollow(f"more than {_MOST_STEPS} instructions")
        name = instruction.opcode.split(".")[0]
        if name in ("bra", "ret", "exit", "brx", "call"):
            guards = block.guard(instruction)
            target = labels.get(instruction.operands[0]) if name == "bra" else len(code)
            if target is None or name in ("brx", "call"):
                raise CannotFollow(f"the branch in line {instruction.line}")
            if any(guard != guards[0] or not isinstance(guard, int) for guard in guards):
                skipped = code[position:target]
                if not skipped or any(
                    other.guard or other.opcode.split(".")[0] not in _ELEMENTWISE
                    for other in skipped
                ):
                    raise CannotFollow(f"the branch in line {instruction.line}")
                # Arithmetic that some threads skip: it takes effect in the others.
                rest: list[Value] = [
                    1 - guard if isinstance(guard, int) else block.term("not", guard)
                    for guard in guards
                ]
                for other in skipped:
                    _execute(block, other, rest)
                position = target
            elif guards[0] == 1:
                position = target
        elif name == "st":
            see_store(block, instruction)
        else:
            _execute(block, instruction)


def duplicate_stores(
    ptx: str,
    grid: Sequence[int],
    num_threads: int,
    scalars: Mapping[str, int],
    arrays: Mapping[str, Sequence[int]],
) -> dict[int, Store | str]:
    """The stores that several threads of a block make to one address.

    Args:
        ptx: of one kernel.
        grid: blocks of the launch along x, y and z.
        num_threads: of a block, along x.
        scalars: value of each integer parameter, by its name in the PTX.
        arrays: contents of int32 arrays, by the name of their pointer in the PTX.

    Returns:
        By PTX line: a `Store` where all of them store one value, otherwise why that was not shown.
        Stores to an address of their own are left out.

    Raises:
        CannotFollow: control flow that is not the same for all threads, or not known.
    """
    code, labels = _parse(ptx)
    found: dict[int, Store | str] = {}

    def see_store(block: _Block, instruction: _Instruction) -> None:
        line = instruction.line
        guards = block.guard(instruction)
        addresses = block.address(instruction.operands[0])
        packed = instruction.operands[1].strip("{} ").split(",")
        values = list(zip(*(block.read(operand.strip()) for operand in packed), strict=True))
        groups: dict[Value, list[int]] = {}
        for thread, (address, guard) in enumerate(zip(addresses, guards, strict=True)):
            if guard != 0:
                groups.setdefault(address, []).append(thread)
        if all(len(threads) == 1 for threads in groups.values()):
            return
        known = [address for address in groups if isinstance(address, Address)]
        width = len(packed) * int(_TYPE.findall(instruction.opcode)[-1][1]) // 8
        if len(known) < len(groups) or len({address.base for address in known}) > 1:
            found[line] = "the addresses are not known"
            return
        offsets = sorted(address.offset for address in known)
        if any(b - a < width for a, b in itertools.pairwise(offsets)):
            found[line] = "stores overlap in part"
            return
        if any(values[t] != values[ts[0]] for ts in groups.values() for t in ts):
            found[line] = "the values were not shown to be equal"
            return
        # A guard that is no number must be one and the same for the threads of an address.
        if any(guards[t] != guards[ts[0]] for ts in groups.values() for t in ts):
            found[line] = "the threads that store are not known"
            return
        mask = 0
        for threads in groups.values():
            for thread in threads:
                mask |= thread ^ threads[0]
        kept = {t for threads in groups.values() for t in threads if t & mask == 0}
        if kept != {threads[0] for threads in groups.values()}:
            found[line] = "no bits of the thread index tell one thread of each address"
        elif isinstance(found.get(line, Store(line, mask)), Store):
            before = found.get(line, Store(line, mask))
            same = before == Store(line, mask)
            found[line] = before if same else "the threads that store differ from time to time"

    for block in itertools.product(*map(range, grid)):
        _run(_Block(block, grid, num_threads, scalars, arrays), code, labels, see_store)
    return found


def keep_one_thread(ptx: str, stores: Sequence[Store]) -> str:
    """PTX in which each of these stores is made by one thread for each address."""
    lines = ptx.splitlines()
    for number, store in enumerate(stores):
        found = _INSTRUCTION.match(lines[store.line - 1].split("//")[0].strip())
        if found is None or not found[3].startswith("st."):
            raise ValueError(f"line {store.line} of the PTX is {lines[store.line - 1]!r}, no store")
        negated, guard, opcode, operands = found.groups()
        index, one = f"%one_index{number}", f"%one_thread{number}"
        steps = [
            f".reg .b32 {index}; .reg .pred {one};",
            f"mov.u32 {index}, %tid.x; and.b32 {index}, {index}, {store.mask};",
            f"setp.eq.u32 {one}, {index}, 0;",
        ]
        if guard is not None:
            both = f"not.pred {one}, {one}; or.pred {one}, {one}, {guard}; not.pred {one}, {one};"
            steps.append(both if negated else f"and.pred {one}, {one}, {guard};")
        # On one line, so that the lines after it keep their numbers.
        lines[store.line - 1] = " ".join([*steps, f"@{one} {opcode} {operands};"])
    return "\n".join(lines) + "\n"
