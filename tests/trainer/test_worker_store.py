"""The workers of a job meet in a store that only holders of the job's secret use."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.parallel.links import HostedStore, listen, meeting, new_secret
from holdfast.trainer.worker import connect
from holdfast.trainer.worlds import local_world


def test_a_worker_that_has_another_secret_is_told_how_to_make_one_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(meeting, "_RETRY_S", 0.0)
    listening = listen("127.0.0.1")
    world = replace(local_world(1, 2, listening.getsockname()[1], new_secret()), job="7")
    with contextlib.closing(HostedStore(listening, world.store_key)):
        store = connect(world)
        store.set("key", "value")
        assert connect(world).get("key") == b"value"
        with pytest.raises(
            ConfigError, match=r"is not rank 0 of this job: .* export HOLDFAST_SECRET="
        ):
            connect(replace(world, secret=new_secret()))
