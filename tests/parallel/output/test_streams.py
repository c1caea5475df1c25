"""Standard output without a reader, a character or room: no exception and no wait without end."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from holdfast.parallel.output.standard_streams import SafeStream

PRINTS = """
import sys
from holdfast.parallel.output import begin_process, outlive_readers, stream_error
begin_process()
{more}
for _ in range(3000):
    print("\\u25a0 a line of output, \\udc80")
error = stream_error()
with open({path!r}, "w") as file:
    file.write("done " + error)
"""


@pytest.mark.mp
@pytest.mark.parametrize(
    ("end", "said"),
    [
        (">&-", "done "),
        (">/dev/full", "done No space left on device"),
        ("| head -1", "done "),
        ("| sleep 5", "done "),
        ("2>&- | cat", "done "),
    ],
)
def test_output_that_is_not_taken_ends_nothing(
    tmp_path: os.PathLike[str], end: str, said: str
) -> None:
    path = os.path.join(tmp_path, "done")
    program = PRINTS.format(more="outlive_readers(0.1)", path=path)
    script = os.path.join(tmp_path, "p.py")
    with open(script, "w") as file:
        file.write(program)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    started = subprocess.Popen(
        ["bash", "-c", f"{sys.executable} {script} {end}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    try:
        end_s = time.monotonic() + 60
        while not (os.path.exists(path) and os.path.getsize(path)) and time.monotonic() < end_s:
            time.sleep(0.05)
        with open(path) as file:
            assert file.read() == said
    finally:
        started.kill()
        _, errors = started.communicate()
    assert b"Traceback" not in errors


def test_a_reader_that_falls_behind_misses_text_and_is_told() -> None:
    reader, writer = os.pipe()
    stream = SafeStream(writer)
    stream.patience_s = 0.01
    for _ in range(100):
        assert stream.write(b"x" * 4096) == 4096
    os.set_blocking(reader, False)
    os.read(reader, 1 << 20)
    stream.write(b"more")
    assert b"left out" in os.read(reader, 1 << 20)
    os.close(reader)
    assert stream.write(b"more") == 4
    assert isinstance(stream.error, BrokenPipeError)
    os.close(writer)
