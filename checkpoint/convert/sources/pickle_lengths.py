"""The lengths and positions in a pickle: none is larger than the pickle itself. Pure.

Python's unpickler takes memory for what an argument tells before it reads what the argument is of.
"""

from __future__ import annotations

import pickletools
from functools import cache
from typing import Final

_LINE, _TWO_LINES, _MEMO, _MEMO_LINE, _END, _UNKNOWN = -1, -2, -3, -4, -5, -6
_COUNTED: Final = 256
"""What is added to the bytes of the length of an argument whose length is told."""


@cache
def _arguments() -> tuple[int, ...]:
    """By opcode, the bytes of its argument; or one of the numbers above."""
    found = [_UNKNOWN] * 256
    told = {
        pickletools.TAKEN_FROM_ARGUMENT1: _COUNTED + 1,
        pickletools.TAKEN_FROM_ARGUMENT4: _COUNTED + 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: _COUNTED + 4,
        pickletools.TAKEN_FROM_ARGUMENT8U: _COUNTED + 8,
        pickletools.UP_TO_NEWLINE: _LINE,
    }
    for opcode in pickletools.opcodes:
        argument = opcode.arg
        number = 0 if argument is None else told.get(argument.n, argument.n)
        if argument is not None and argument.name == "stringnl_noescape_pair":
            number = _TWO_LINES
        found[ord(opcode.code)] = number
    own = {b"r": _MEMO, b"p": _MEMO_LINE, b".": _END, b"\x95": _COUNTED + 8}
    for code, number in own.items():
        found[ord(code)] = number
    return tuple(found)


def check_lengths(content: bytes) -> None:
    """Check every length, and every number under which a value is kept, before it is unpickled.

    Raises:
        ValueError: one is larger than the pickle, or the pickle is cut off or of unknown opcodes.
    """
    arguments, size, at = _arguments(), len(content), 0
    while at < size:
        kind = arguments[content[at]]
        begin = at + 1
        if 0 <= kind < _COUNTED:
            at = begin + kind
        elif kind > _COUNTED:
            width = kind - _COUNTED
            length = int.from_bytes(content[begin : begin + width], "little")
            if begin + width + length > size:
                raise ValueError(f"byte {at:,} of {size:,} tells of {length:,} bytes that follow")
            # The content of a frame is opcodes.
            at = begin + width + (0 if content[at] == 0x95 else length)
        elif kind == _END:
            return
        elif kind == _MEMO:
            at = begin + 4
            _check_memo(int.from_bytes(content[begin:at], "little"), size)
        elif kind == _UNKNOWN:
            raise ValueError(f"byte {at:,} is no opcode")
        else:
            at = content.find(b"\n", begin) + 1
            if at and kind == _TWO_LINES:
                at = content.find(b"\n", at) + 1
            if not at:
                break
            if kind == _MEMO_LINE:
                _check_memo(int(content[begin : at - 1][:20]), size)
    raise ValueError("it is cut off")


def _check_memo(number: int, size: int) -> None:
    if not 0 <= number < size:
        raise ValueError(f"a value is kept as number {number:,}, in a pickle of {size:,} bytes")
