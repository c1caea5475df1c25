"""The join file RUN/elastic.json: how to join a run, and which ranks have been given out."""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from holdfast.elastic import MembershipSettings, lighthouse_url
from holdfast.parallel.comm import own_address_towards
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.files import await_lock, machine_identity, open_lock
from holdfast.parallel.output import DiskWord, Waiting, WholeFiles, tell, write_whole
from holdfast.parallel.reading import PathText, decode_json, read_regular
from holdfast.trainer.run import RunDirectory

_CONNECT_S = 3.0
_LOCK_S = 60.0
"""Seconds to wait for others that join at the same time; each takes a few."""
_MOST_BYTES = 1 << 16
_MOST_RANKS = 1 << 20


class JoinInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of a join file."""

    lighthouse: PathText
    """The URL of the Lighthouse."""
    token: Annotated[str, Meta(pattern=r"^[\w.-]{1,1000}$")]
    """The name of this start of the run at the Lighthouse."""
    world_size: Annotated[int, Meta(ge=1, le=_MOST_RANKS)]
    """The number of ranks that the run was started with."""
    next_rank: Annotated[int, Meta(ge=1, le=_MOST_RANKS)]
    """The lowest rank that was never given out."""
    machine: PathText = ""
    """The identity of the machine on which the run was started."""

    @staticmethod
    def begun(membership: MembershipSettings, lighthouse: str) -> JoinInfo:
        """The content for a run that starts now."""
        ranks = membership.world_size
        return JoinInfo(lighthouse, membership.run, ranks, ranks, machine_identity())


@contextlib.contextmanager
def published_join_file(run: RunDirectory) -> Iterator[Callable[[JoinInfo], None]]:
    """Yield the function that writes the join file, later if the disk refuses.

    It may start a thread. The file is removed at the end of the block.
    """
    files = WholeFiles(run.root, DiskWord(lambda line: tell(f"holdfast: {line}")))
    _remove(run)

    def announce(info: JoinInfo) -> None:
        files.put(run.join_file, msgspec.json.encode(info))
        if files.wait:
            again = partial(files.flush, math.inf)
            threading.Thread(target=again, name="holdfast-join-file", daemon=True).start()

    try:
        yield announce
    finally:
        files.forget()
        _remove(run)


def _remove(run: RunDirectory) -> None:
    with contextlib.suppress(OSError):
        run.join_file.unlink()


def take_ranks(run: RunDirectory, count: int) -> tuple[JoinInfo, tuple[int, ...]]:
    """Reserve `count` ranks for a joining node; no other call returns the same ones.

    Raises:
        ConfigError: the run is not under way, or cannot be reached from here.
    """
    _read(run)  # no lock is left in a folder that is not a run's
    with _locked(run):
        info = _read(run)
        _check_reachable(run, info)
        ranks = tuple(range(info.next_rank, info.next_rank + count))
        info_after = msgspec.structs.replace(info, next_rank=info.next_rank + count)
        write_whole(run.join_file, msgspec.json.encode(info_after))
    return info, ranks


def is_under_way(run: RunDirectory, token: str) -> bool:
    """Whether that start of the run has not ended."""
    try:
        return _read(run).token == token
    except ConfigError:
        return False


def own_address(lighthouse: str) -> str:
    """The address of this machine as a Lighthouse sees it.

    Raises:
        ConfigError: the Lighthouse cannot be reached from here.
    """
    at = urlsplit(lighthouse_url(lighthouse))
    try:
        return own_address_towards(at.hostname or "", at.port or 80)
    except OSError as error:
        raise ConfigError(
            f"elastic.lighthouse = {lighthouse!r} cannot be reached from this machine: {error}; "
            "give HOST:PORT of a Lighthouse that all nodes reach"
        ) from error


def _read(run: RunDirectory) -> JoinInfo:
    try:
        return decode_json(read_regular(run.join_file, _MOST_BYTES), JoinInfo)
    except FileNotFoundError:
        if not run.root.exists():
            raise ConfigError(f"{run.root} does not exist; name the folder of a run") from None
        raise ConfigError(
            f"{run.root} is not an elastic run that is under way; start it with elastic.enabled = "
            "true, and join while it runs"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run.join_file} cannot be read: {error}") from error


@contextlib.contextmanager
def _locked(run: RunDirectory) -> Iterator[None]:
    path = run.root / ".join-lock"
    try:
        descriptor = open_lock(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        waiting = Waiting(f"another process that joins {run.root}", _LOCK_S)
        if not await_lock(descriptor, waiting.left_s):
            raise ConfigError(
                f"{path} has been locked for {_LOCK_S:g} s by another process that joins; end it, "
                "and try again"
            )
        yield
    finally:
        os.close(descriptor)


def _check_reachable(run: RunDirectory, info: JoinInfo) -> None:
    at = urlsplit(info.lighthouse)
    try:
        socket.create_connection((at.hostname or "", at.port or 80), _CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"the Lighthouse of {run.root} at {info.lighthouse} cannot be reached: {error}; join "
            "from its "
            "machine, or start the run with elastic.lighthouse = an address that all nodes reach"
        ) from error
