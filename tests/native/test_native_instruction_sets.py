"""Every instruction set gives the same bits; the environment variable chooses one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from holdfast import _native

# Runs every kernel on mixed lengths and alignments and prints a digest of all that came out.
PROGRAM = """
import hashlib
import numpy as np
from holdfast import _native as n

digest = hashlib.sha256()
draw = np.random.default_rng(0)
kinds = [("f32", np.float32), ("f64", np.float64), ("bf16", np.uint16)]
for count in (0, 1, 5, 16, 33, 1000, 5003):
    for shift in (0, 1, 3):
        for name, dtype in kinds:
            values = draw.standard_normal(count + shift).astype(np.float32) * 40
            if count > 5:
                values[shift + 5] = 4e30
            if count > 1000:
                values[shift + 4000] = np.nan
            halves = values.view(np.uint32) >> 16
            source = (halves if name == "bf16" else values).astype(dtype)[shift:]
            sums = draw.integers(-(2**62), 2**62, count + shift)[shift:]
            accumulate = getattr(n, "accumulate_" + name)
            flags = accumulate(sums.ctypes.data, source.ctypes.data, count, 44)
            flags |= n.add_i64(sums.ctypes.data, sums.ctypes.data, count)
            target = np.zeros(count + shift, dtype)[shift:]
            dropout = getattr(n, "dropout_scale_" + name)
            dropout(target.ctypes.data, source.ctypes.data, count, 3, 4, shift, 0.3)
            digest.update(sums.tobytes() + bytes([flags]) + target.tobytes())
            if name == "bf16":
                continue
            reduce_convert = getattr(n, "reduce_convert_" + name)
            total = reduce_convert(sums.ctypes.data, target.ctypes.data, count, 44)
            digest.update(target.tobytes() + np.float64(total).tobytes())
            squares = getattr(n, "sum_squares_" + name)(target.ctypes.data, count)
            digest.update(np.float64(squares).tobytes())
            getattr(n, "philox_uniform_" + name)(target.ctypes.data, count, 5, 6, shift)
            digest.update(target.tobytes())
            getattr(n, "philox_normal_" + name)(target.ctypes.data, count, 5, 6, shift, 0.1, 0.7)
            digest.update(target.tobytes())
        wide = (draw.standard_normal(2 * count + shift) * 9).astype(np.float32)[shift:]
        back = np.zeros(2 * count + shift, np.float32)[shift:]
        once = np.zeros(count + shift, np.float32)[shift:]
        n.swiglu_f32(wide.ctypes.data, once.ctypes.data, 1, count)
        digest.update(once.tobytes())
        args = once.ctypes.data, wide.ctypes.data, once.ctypes.data, back.ctypes.data
        n.swiglu_backward_f32(*args, 1, count)
        digest.update(once.tobytes() + back.tobytes())
        packed = np.zeros(n.packed_bound(count) + shift, np.uint8)[shift:]
        for places in range(0, 64, 7):
            values = draw.integers(-(2**63), 2**63, count + shift)[shift:] >> places
            size = n.pack_i64(values.ctypes.data, count, packed.ctypes.data)
            sums = draw.integers(-(2**63), 2**63, count + shift)[shift:]
            flags = n.unpack_add_i64(
                packed.ctypes.data, size, sums.ctypes.data, sums.ctypes.data, count
            )
            n.unpack_add_i64(packed.ctypes.data, size, 0, values.ctypes.data, count)
            digest.update(packed[:size].tobytes() + sums.tobytes() + bytes([flags]))
            digest.update(values.tobytes())
        for width in (16, 32, 64):
            whole = draw.integers(0, 2**width - 1, count + shift, dtype=f"uint{width}")[shift:]
            total = getattr(n, f"bit_sum_{width}")(whole.ctypes.data, count, 2**63 + count)
            digest.update(total.to_bytes(8, "little"))
        words = np.zeros(count + shift, np.uint32)[shift:]
        n.philox_uint32(words.ctypes.data, count, 7, 8, shift)
        crc = n.crc32c(words.ctypes.data, words.nbytes)
        digest.update(words.tobytes() + crc.to_bytes(4, "little"))
print(n.isa(), digest.hexdigest())
"""


def run(isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOLDFAST_NATIVE_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.mp
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_vector_kernels_give_the_bits_of_the_portable_ones(isa: str) -> None:
    result = run(isa)
    if "cannot run" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    portable = run("portable")
    assert portable.stdout.split()[0] == "portable", portable.stderr
    assert result.stdout.split() == [isa, portable.stdout.split()[1]], result.stderr


@pytest.mark.mp
def test_unknown_instruction_set_is_refused_at_import() -> None:
    result = run("sse9")
    assert result.returncode != 0
    assert "allowed: auto, portable, avx2, avx512" in result.stderr


@pytest.mark.mp
def test_auto_names_what_runs() -> None:
    assert run("auto").stdout.split()[0] in ("portable", "avx2", "avx512")
    assert _native.isa() in ("portable", "avx2", "avx512")
