"""What a cubin says about the machine code of a kernel, read from its ELF file."""

from __future__ import annotations

import struct

# Attributes in the section `.nv.info`, each of a function: its symbol's number and a value.
_REGISTERS, _FRAME = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE
_SIZED = 4  # EIFMT_SVAL: as many bytes follow as the entry says; of other formats none do


def resources(cubin: bytes, name: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of local memory in a thread's frame, where spills lie.

    As `cuobjdump -res-usage` prints them (REG and STACK), without a process of its own.

    Raises:
        ValueError: it is no ELF file of 64 bits, or says nothing of a kernel of that name.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError(f"the binary of {name} is no cubin: it begins with {cubin[:5]!r}")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of a section: name, type, flags, address, offset, size, link, info, alignment, entry's size.
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + size * i) for i in range(count)]

    def content(section: int) -> bytes:
        offset, length = headers[section][4:6]
        return cubin[offset : offset + length]

    def text(section: int, at: int) -> str:
        return content(section)[at:].partition(b"\0")[0].decode()

    found = {text(names, header[0]): number for number, header in enumerate(headers)}
    if ".symtab" in found and ".nv.info" in found:
        symbols, strings = content(found[".symtab"]), headers[found[".symtab"]][6]
        mine = [text(strings, first) for first, *_ in struct.iter_unpack("<I20x", symbols)]
        values = {
            attribute: value
            for attribute, symbol, value in _of_functions(content(found[".nv.info"]))
            if mine[symbol] == name
        }
        if _REGISTERS in values:
            return values[_REGISTERS], values.get(_FRAME, 0)
    raise ValueError(f"the cubin says nothing of the registers of a kernel {name}")


def _of_functions(info: bytes) -> list[tuple[int, int, int]]:
    """(attribute, number of the symbol, value), of entries that have two words."""
    entries, at = [], 0
    while at + 4 <= len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            if length == 8:
                entries.append((attribute, *struct.unpack_from("<II", info, at)))
            at += length
    return entries
