"""The cache of a corpus's tokens: shared by processes, and made again where it is damaged."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from holdfast.parallel.errors import DataError
from holdfast.trainer.config import DataConfig
from holdfast.trainer.data import open_dataset
from holdfast.trainer.data.corpora.token_cache import TokenWriter, cache_folder, cached_tokens
from support.processes.forked_command import forked
from support.runs.text_corpora import open_text, tokens_of


def test_second_opening_reads_the_cache_and_changed_files_are_read_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("first version")
    assert tokens_of(path)[:5] == [*b"first"]
    (entry,) = [each for each in (cache / "tokens").iterdir() if each.is_dir()]
    made = ["documents.npy", "entry.json", "tokens.npy"]
    assert sorted(each.name for each in entry.iterdir()) == made
    assert np.load(entry / "tokens.npy").tolist() == [*b"first version", 256]
    with monkeypatch.context() as patched:
        patched.setattr("holdfast.trainer.data.corpora.text.encode_documents", None)
        assert tokens_of(path)[:5] == [*b"first"]
    path.write_text("other version")
    os.utime(path, ns=(0, 0))
    assert tokens_of(path)[:5] == [*b"other"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage", "shorten"])
def test_damaged_cache_entry_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some text")
    expected = tokens_of(path)
    (stored,) = (cache / "tokens").glob("*/tokens.npy")
    if damage == "truncate":
        stored.write_bytes(stored.read_bytes()[:-2])
    elif damage == "remove":
        stored.unlink()
    elif damage == "shorten":
        np.save(stored, np.load(stored)[:-1])
    else:
        stored.with_name("entry.json").write_text("{")
    assert tokens_of(path) == expected
    assert not list((cache / "tokens").glob("*partial*"))


def _npy(shape: str, dtype: str = "'<u2'") -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(18)


ENTRIES: dict[str, tuple[str, bytes | None]] = {
    "a pipe as entry": ("entry.json", None),
    "a pipe as tokens": ("tokens.npy", None),
    "a deep entry": ("entry.json", b"[" * 100_000),
    "a huge count": ("entry.json", b'{"count":9223372036854775807,"largest":1,"fingerprint":"a"}'),
    "a negative count": ("entry.json", b'{"count":-1,"largest":1,"fingerprint":"a"}'),
    "a huge shape": ("tokens.npy", _npy(f"({2**70},)")),
    "objects": ("tokens.npy", _npy("(9,)", "'|O'")),
    "half floats": ("tokens.npy", _npy("(9,)", "'<f2'")),
    "an archive": ("tokens.npy", b"PK\x03\x04" + bytes(100)),
    "a pickle": ("tokens.npy", b"\x80\x04N."),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_cache_entry_of_any_content_is_made_again_and_never_waited_for(
    cache: Path, kind: str
) -> None:
    def tokens() -> list[int]:
        found = cached_tokens("key", name="x", vocab=300, write=lambda w: w.append(np.arange(9)))
        return found.read(0, found.count).tolist()

    expected = tokens()
    name, content = ENTRIES[kind]
    path = cache / "tokens" / "key" / name
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    assert tokens() == expected == list(range(9))
    assert path.is_file()


@pytest.mark.mp
@pytest.mark.chaos
@pytest.mark.parametrize("next_key", ["key", "another"])
def test_what_a_killed_process_left_goes_with_the_next_entry(cache: Path, next_key: str) -> None:
    def die(_: TokenWriter) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        cached_tokens("key", name="x", vocab=9, write=die)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    folder = cache / "tokens"
    assert len(list(folder.iterdir())) == 2, "an unfinished entry, and its lock"
    cached_tokens(next_key, name="x", vocab=9, write=lambda w: w.append(np.arange(5)))
    assert {path.name for path in folder.iterdir()} == {"key.lock", next_key, f"{next_key}.lock"}


def test_failure_while_tokenising_leaves_nothing(cache: Path) -> None:
    def fail(writer) -> None:
        writer.append(np.arange(10))
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        cached_tokens("key", name="x", vocab=300, write=fail)
    assert [each.name for each in (cache / "tokens").iterdir()] == ["key.lock"]


def open_when_told(connection: Connection, cache: str, corpus: str, locked: bool) -> None:
    os.environ["HOLDFAST_CACHE"] = cache

    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    if not locked:
        fcntl.flock = refuse
    connection.send("ready")
    connection.recv()
    config = DataConfig(kind="text", path=[corpus])
    data = open_dataset(config, vocab=257, seq_len=64, seed=1)
    connection.send((data.fingerprint, data.sample(11).tokens.tolist()))


@pytest.mark.mp
@pytest.mark.parametrize("locked", [True, False])
def test_processes_that_open_the_same_text_at_once_get_the_same(
    tmp_path: Path, cache: Path, locked: bool
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number}.txt").write_text(f"document {number} " * 3000)
    ours, theirs = zip(*(multiprocessing.Pipe() for _ in range(3)), strict=True)
    racing = [
        forked(open_when_told, connection, str(cache), str(corpus), locked) for connection in theirs
    ]
    for each in racing:
        each.start()
    assert [connection.recv() for connection in ours] == ["ready"] * 3
    for connection in ours:
        connection.send("go")
    printed = [connection.recv() for connection in ours]
    for each in racing:
        each.join()
    assert [each.exitcode for each in racing] == [0, 0, 0]
    assert printed == [printed[0]] * 3
    assert not list((cache / "tokens").glob("*partial*"))
    assert len(list((cache / "tokens").glob("*/tokens.npy"))) == 1


def test_cache_that_cannot_be_written_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("x" * 100)
    monkeypatch.setenv("HOLDFAST_CACHE", str(tmp_path / "text.txt"))
    with pytest.raises(DataError, match="set HOLDFAST_CACHE"):
        open_text(tmp_path / "text.txt")


def test_a_cache_in_the_folder_for_temporary_files_is_used_only_if_it_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOLDFAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.parent.parent == tmp_path
    assert cache_folder() == folder
    folder.parent.chmod(0o777)
    with pytest.raises(DataError, match="set HOLDFAST_CACHE"):
        cache_folder()
    folder.parent.rmdir()
    folder.parent.symlink_to(tmp_path)
    with pytest.raises(DataError, match="set HOLDFAST_CACHE"):
        cache_folder()
