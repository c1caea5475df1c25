"""Whatever the files of a checkpoint say, reading them ends with a value or with one line."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.checkpoint import load, save
from holdfast.checkpoint.format.files import (
    INDEX,
    MANIFEST,
    Manifest,
    crc32c_of,
    decode_header,
    decode_manifest,
)
from holdfast.checkpoint.format.safetensors import decode_entries, decode_index, read_header
from holdfast.checkpoint.loading.read_plan import check_coverage
from holdfast.checkpoint.loading.readers import FolderReader, RemoteReader
from holdfast.checkpoint.stores.local import LocalStore
from holdfast.checkpoint.tools.diff import diff_checkpoints
from holdfast.checkpoint.tools.inspect import inspect_checkpoint, summarise
from holdfast.checkpoint.tools.verify import rebuild_manifest, verify_checkpoint
from holdfast.parallel.errors import CheckpointError, HoldfastError
from support.runs.mutations import COUNT, MOST_BYTES, mutated


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    state = {"model": torch.nn.Linear(30, 20), "mean": torch.ones(7, 3)}
    return folder / Path(save(folder, state, step=1)).name


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@pytest.fixture
def bounded() -> Iterator[None]:
    """No test here may take more memory than a small document needs."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES


def sealed(body: bytes) -> bytes:
    """A manifest with a right checksum, as a program of another hand might write it."""
    kept = body.rstrip().removesuffix(b"}")
    return kept + b',"crc32c":"' + f'{crc32c_of(kept):08x}"}}\n'.encode()


def manifest_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / MANIFEST).read_bytes())
    del found["crc32c"]
    return found


def one_line(error: HoldfastError) -> None:
    text = str(error)
    assert text.isprintable(), text


def tried(read: Callable[[], object]) -> bool:
    """Whether something is read; if it is refused, then in one printable line."""
    try:
        read()
    except HoldfastError as error:
        one_line(error)
        return False
    return True


@pytest.mark.usefixtures("bounded")
def test_any_manifest_is_read_or_refused(saved: Path) -> None:
    document = manifest_of(saved)
    accepted = 0
    for number in range(COUNT):
        content = sealed(mutated(document, number))

        def read(content: bytes = content) -> Manifest:
            manifest = decode_manifest(content, MANIFEST)
            summarise(manifest, "here")
            check_coverage(manifest, MANIFEST)
            return manifest

        accepted += tried(read)
    assert 0 < accepted < COUNT / 2


@pytest.mark.usefixtures("bounded")
def test_any_header_is_read_or_refused(saved: Path) -> None:
    for path in saved.glob("*.safetensors"):
        header = json.loads(read_header(path)[1][8:])
        ours = json.loads(header["__metadata__"]["holdfast"])
        for number in range(COUNT):
            content = bytes(8) + mutated(header, number)
            tried(lambda content=content: decode_entries(content, "file"))
            tried(lambda content=content: decode_header(content, "file"))
            header["__metadata__"]["holdfast"] = mutated(ours, number).decode(errors="replace")
            content = bytes(8) + json.dumps(header).encode()
            tried(lambda content=content: decode_header(content, "file"))


@pytest.mark.usefixtures("bounded")
def test_any_index_is_read_or_refused(saved: Path) -> None:
    document = json.loads((saved / INDEX).read_bytes())
    read = [
        tried(lambda number=number: decode_index(mutated(document, number), INDEX))
        for number in range(COUNT)
    ]
    assert any(read)
    assert not all(read)


def test_commands_end_with_a_line_whatever_the_manifest_says(folder: Path, saved: Path) -> None:
    document = manifest_of(saved)
    target = {"model": torch.nn.Linear(30, 20), "mean": torch.ones(7, 3)}
    for number in range(COUNT // 5):
        (folder / MANIFEST).write_bytes(sealed(mutated(document, number)))
        tried(lambda: inspect_checkpoint(folder))
        tried(
            lambda: [str(p).isprintable() or pytest.fail(str(p)) for p in verify_checkpoint(folder)]
        )
        tried(lambda: diff_checkpoints(folder, saved))
        tried(lambda: load(folder, target))


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


IRREGULAR: dict[str, Callable[[Path], None]] = {
    "a folder": Path.mkdir,
    "a pipe": _fifo,
    "a link in a circle": _circle,
    "a link to nowhere": lambda path: path.symlink_to("/nowhere"),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "empty": Path.touch,
}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_what_is_no_file_is_named_and_never_waited_for(kind: str, folder: Path) -> None:
    victim = next(path for path in folder.glob("*.safetensors"))
    victim.unlink()
    IRREGULAR[kind](victim)
    problems = verify_checkpoint(folder)
    assert [p.file for p in problems] == [victim.name] * len(problems)
    assert problems
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        rebuild_manifest(folder)


@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_manifest_that_is_no_file_is_named(kind: str, folder: Path) -> None:
    (folder / MANIFEST).unlink()
    IRREGULAR[kind](folder / MANIFEST)
    with pytest.raises(CheckpointError, match=MANIFEST):
        LocalStore(folder.parent).manifest(folder.name)


@pytest.mark.usefixtures("bounded")
def test_a_gigabyte_of_nothing_is_not_read(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 1 << 30)
    with pytest.raises(CheckpointError, match="not a whole manifest"):
        LocalStore(folder.parent).manifest(folder.name)


@pytest.mark.usefixtures("bounded")
def test_a_file_of_terabytes_in_a_checkpoint_is_named_and_not_read(folder: Path) -> None:
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    for path in files:
        os.truncate(path, 5 << 40)
    problems = verify_checkpoint(folder)
    assert {problem.file for problem in problems} == {path.name for path in files}
    reader = FolderReader(folder)
    with pytest.raises(CheckpointError, match="at most"):
        reader.read_file(files[0].name)
    reader.close()


def test_an_object_of_terabytes_is_not_fetched() -> None:
    class Huge:
        def size(self, path: str) -> int:
            return 5 << 40

    reader = RemoteReader("s3://b/step-1", Huge(), "b/step-1")
    with pytest.raises(CheckpointError, match=r"s3://b/step-1/a\.json .*at most"):
        reader.read_file("a.json")
    reader.close()
