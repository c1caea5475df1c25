"""Triton's compiler makes of the kernels what fixes their bits; it needs no GPU for that."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.mp

PROGRAM = """
import sys
import torch
from holdfast.parallel.optimizer.kernels import operations_of

sums, flags = torch.zeros(3, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
operations_of(torch.device("cpu")).accumulate(sums, torch.ones(3), 4, flags)
print("IMPORTED", "triton" in sys.modules)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from holdfast.parallel.optimizer.kernels import triton_packing, triton_sums

def text(kernel, types, constants, **options):
    names = kernel.arg_names
    pairs = zip(names, types.split() + ["constexpr"] * len(constants), strict=True)
    source = ASTSource(kernel, dict(pairs), constants)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print("KERNEL", kernel.__name__, len(made.asm["cubin"]), made.asm["ptx"], sep="\\n")

narrow = {"MANTISSA": 7, "EXPONENT": 8, "FIRST": True, "BLOCK": 1024}
wide = {"MANTISSA": 52, "EXPONENT": 11, "BLOCK": 1024}
text(triton_sums._accumulate, "*i64 *i16 *i64 i32 i32", narrow)
text(triton_sums._accumulate_rows, "*i64 *i64 *i64 *i64 i64 i32", wide)
text(triton_sums._add_integers, "*i64 *i64 *i64 i32", {"BLOCK": 1024})
chunk = {"CONVERTS": True, "SQUARES": True, "LANES": 1024, "LEVELS": 10, "TILES": 2}
text(triton_sums._add_chunk, "*i64 *fp64 *fp64 i32 fp32", chunk, enable_fp_fusion=False)
text(triton_packing._find_widths, "*i64 *u8 i32", {"RUN": 512})
text(triton_packing._pack_run, "*i64 *u8 *i64 *i64 *i32 *i16 *i8 i32", {"RUN": 512})
types = "*u8 *i64 *i64 *i32 *i16 *i8 *i64 *i64 *i64 i32"
text(triton_packing._unpack_run, types, {"ADDS": True, "RUN": 512})
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return made.stdout


def test_only_squares_are_computed_in_floats_and_none_is_fused(printed: str) -> None:
    parts = re.findall(r"KERNEL\n(\w+)\n[1-9]\d*\n(.*?)(?=\nKERNEL\n|\Z)", printed, re.DOTALL)
    instructions = {
        name: set(re.findall(r"\b(?:fma|mad|mul|add|sub|cvt)\.[\w.]*f(?:32|64)[\w.]*", text))
        for name, text in parts
    }
    squares = instructions.pop("_add_chunk")
    assert set().union(*instructions.values()) == set()
    assert len(instructions) == 6
    assert squares == {"cvt.rn.f64.s64", "cvt.f64.f32", "mul.rn.f64", "add.rn.f64"}


def test_sums_on_cpu_do_not_import_triton(printed: str) -> None:
    assert printed.startswith("IMPORTED False\n")
