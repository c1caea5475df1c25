"""The typed boundary: the stub and the compiled module name the same functions and arguments."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from holdfast import _native

STUB = Path(_native.__file__).with_name("_native.pyi")


def test_stub_names_every_function_and_argument() -> None:
    functions = [x for x in ast.parse(STUB.read_text()).body if isinstance(x, ast.FunctionDef)]
    assert {x.name for x in functions} == {x for x in dir(_native) if not x.startswith("__")}
    for function in functions:
        signature = getattr(_native, function.name).__doc__ or ""
        compiled = re.findall(r"(\w+): ", signature.splitlines()[0])
        assert [argument.arg for argument in function.args.args] == compiled
