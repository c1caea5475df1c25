"""RUN/elastic.json: where a run that is under way can be joined, and which ranks it has given out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from holdfast.elastic.lighthouse import lighthouse_url
from holdfast.elastic.quorum_client import MembershipSettings
from holdfast.parallel.comm import own_address_towards
from holdfast.parallel.errors import ConfigError
from holdfast.trainer.run import RunDirectory

_CONNECT_S = 3.0


class LiveRun(msgspec.Struct, frozen=True):
    """What a node that joins a run must know."""

    lighthouse: str
    """Its URL."""
    token: str
    """Names this start of the run there."""
    world_size: int
    """Ranks that it was started with."""
    next_rank: int
    """The lowest that nobody has had."""

    @staticmethod
    def begun(membership: MembershipSettings, lighthouse: str) -> LiveRun:
        """A run that starts now."""
        ranks = membership.world_size
        return LiveRun(lighthouse, membership.run, ranks, ranks)


@contextlib.contextmanager
def live_run(run: RunDirectory) -> Iterator[Callable[[LiveRun], None]]:
    """While a run is under way: what makes it known to those who may join. Its file ends with it."""
    _path(run).unlink(missing_ok=True)
    try:
        yield lambda live: _write(_path(run), live)
    finally:
        _path(run).unlink(missing_ok=True)


def take_ranks(run: RunDirectory, count: int) -> tuple[LiveRun, tuple[int, ...]]:
    """Ranks for a node that joins; nobody else gets the same ones.

    Raises:
        ConfigError: the run is not under way, or cannot be reached from here.
    """
    with _locked(run):
        live = _read(run)
        _check_reachable(run, live)
        ranks = tuple(range(live.next_rank, live.next_rank + count))
        _write(_path(run), msgspec.structs.replace(live, next_rank=live.next_rank + count))
    return live, ranks


def is_under_way(run: RunDirectory, token: str) -> bool:
    """Whether that start of the run has not ended."""
    try:
        return _read(run).token == token
    except ConfigError:
        return False


def own_address(lighthouse: str) -> str:
    """The address of this machine as a Lighthouse sees it.

    Raises:
        ConfigError: there is no way to it from here.
    """
    at = urlsplit(lighthouse_url(lighthouse))
    try:
        return own_address_towards(at.hostname or "", at.port or 80)
    except OSError as error:
        raise ConfigError(
            f"elastic.lighthouse = {lighthouse!r} cannot be reached from this machine: {error}; give "
            "HOST:PORT of a Lighthouse that all nodes reach"
        ) from error


def _path(run: RunDirectory) -> Path:
    return run.root / "elastic.json"


def _read(run: RunDirectory) -> LiveRun:
    try:
        return msgspec.json.decode(_path(run).read_bytes(), type=LiveRun)
    except FileNotFoundError:
        raise ConfigError(
            f"{run.root} is not an elastic run that is under way; start it with elastic.enabled = true, "
            "and join while it runs"
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{_path(run)} cannot be read: {error}") from error


def _write(path: Path, live: LiveRun) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(msgspec.json.encode(live))
    partial.replace(path)


@contextlib.contextmanager
def _locked(run: RunDirectory) -> Iterator[None]:
    try:
        with (run.root / ".join-lock").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except FileNotFoundError:
        raise ConfigError(f"{run.root} does not exist; name the folder of a run") from None
    except OSError as error:
        raise ConfigError(f"{run.root} cannot be written: {error}") from error


def _check_reachable(run: RunDirectory, live: LiveRun) -> None:
    at = urlsplit(live.lighthouse)
    try:
        socket.create_connection((at.hostname or "", at.port or 80), _CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"the Lighthouse of {run.root} at {live.lighthouse} cannot be reached: {error}; join from its "
            "machine, or start the run with elastic.lighthouse = an address that all nodes reach"
        ) from error
