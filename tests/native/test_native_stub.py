"""The typed boundary: the stub and the compiled module name the same functions, methods and
arguments.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from holdfast import _native

STUB = Path(_native.__file__).with_name("_native.pyi")


def _compiled_arguments(function: Any) -> list[str]:
    signature = (function.__doc__ or "").splitlines()[0]
    return re.findall(r"(\w+): ", signature)


def _arguments(function: ast.FunctionDef) -> list[str]:
    named = [*function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in named if argument.arg != "self"]


def test_stub_names_every_function_and_argument() -> None:
    body = ast.parse(STUB.read_text()).body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    names = {node.name for node in (*functions, *classes)}
    assert names == {name for name in dir(_native) if not name.startswith("__")}
    for function in functions:
        assert _arguments(function) == _compiled_arguments(getattr(_native, function.name))


def test_stub_names_every_method_and_argument() -> None:
    [engine] = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)]
    methods = {node.name: node for node in engine.body if isinstance(node, ast.FunctionDef)}
    compiled = {name for name in vars(_native.FileEngine) if not name.startswith("__")}
    assert {name for name in methods if not name.startswith("__")} == compiled
    for name, method in methods.items():
        is_property = any(
            isinstance(d, ast.Name) and d.id == "property" for d in method.decorator_list
        )
        if not is_property and name != "__exit__":
            assert _arguments(method) == _compiled_arguments(getattr(_native.FileEngine, name)), (
                name
            )
