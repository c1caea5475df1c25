"""What ranks have each of its own is kept for each, or refused on all of them by name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from holdfast.checkpoint import Checkpointer, load, save
from holdfast.checkpoint.program.meeting import Meeting
from holdfast.checkpoint.program.merging import merge
from holdfast.checkpoint.program.values import TAG
from holdfast.parallel.errors import CheckpointError
from support.processes.cluster import Cluster

pytestmark = pytest.mark.mp


@contextmanager
def _group(rank: int, world_size: int, store: Store) -> Iterator[None]:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _own_state(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.manual_seed(rank)
    with torch.no_grad():
        model(torch.randn(4, 2))
    generator = torch.Generator().manual_seed(rank)
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "random": torch.full((3,), float(rank)),
        "generator": generator,
        "cursor": {"file": rank, "rest": [torch.arange(rank)]},
        "same": 7,
    }


def keep_what_is_own(rank: int, world_size: int, store: Store, *, folder: str) -> list[Any]:
    """Save what differs by rank twice, load it, and say what came back."""
    with _group(rank, world_size, store):
        with Checkpointer(folder, _own_state(rank)) as checkpointer:
            checkpointer.save(1)
            checkpointer.save(2)
        own = _own_state(rank)
        state = _own_state(7)
        state["cursor"] = {"file": None, "rest": [None]}
        found = load(folder, state)
        return [
            torch.equal(state["model"][1].running_mean, own["model"][1].running_mean),
            torch.equal(state["random"], own["random"]),
            torch.equal(state["generator"].get_state(), own["generator"].get_state()),
            found["cursor"]["file"],
            found["cursor"]["rest"][0].tolist(),
            found["same"],
        ]


def test_values_that_differ_by_rank_are_kept_for_each(cluster: Cluster, tmp_path: Path) -> None:
    found = cluster.run(f"{__name__}:keep_what_is_own", 3, folder=str(tmp_path))
    assert found == [[True, True, True, rank, list(range(rank)), 7] for rank in range(3)]
    with pytest.raises(CheckpointError, match=r"saved by 3 ranks, each with its own .* has 1"):
        load(tmp_path, {"cursor": None})


def refused(rank: int, world_size: int, store: Store, *, folder: str, case: str) -> str:
    """Save what has to be refused; the message on this rank."""
    with _group(rank, world_size, store):
        torch.manual_seed(rank if case == "weights" else 0)
        model: Any = nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=0.1 * (rank + 1 if case == "lr" else 1)
        )
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if case == "moments":
            model(torch.ones(1, 4)).sum().backward()
            model.weight.grad += rank
            optimizer.step()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
        elif case == "leaf" and rank == 1:
            state["value"] = object()
        elif case == "leaf":
            state["value"] = 1
        elif case in ("fsdp1", "fsdp1 with its parameters"):
            from torch.distributed.fsdp import FullyShardedDataParallel

            state["model"] = FullyShardedDataParallel(
                model, use_orig_params=case != "fsdp1", device_id=torch.device("cpu")
            )
        elif case == "shapes" and rank:
            state["model"] = nn.Linear(4, 5)
            state["optimizer"] = torch.optim.AdamW(state["model"].parameters(), lr=0.1)
        elif case == "steps":
            with pytest.raises(CheckpointError) as error, Checkpointer(folder, state) as one:
                one.save(rank)
            return str(error.value)
        with pytest.raises(CheckpointError) as error:
            save(folder, state)
        return str(error.value)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("weights", "weight differs between rank 0 and rank 1, and is no DTensor"),
        ("moments", "exp_avg.weight differs between rank 0 and rank 1, and is no DTensor"),
        ("lr", "optimizer.param_groups[0]['lr'] differs between rank 1"),
        ("leaf", "rank 1: value cannot be saved: a value of type object"),
        ("fsdp1", "rank 0: model is an FSDP1 module"),
        ("fsdp1 with its parameters", "rank 0: model is an FSDP1 module"),
        ("shapes", "weight is F32 [4, 4] on one rank and F32 [5, 4] on rank 1"),
        ("steps", "rank 0 saves {'step': 0}, and rank 1 {'step': 1}"),
    ],
)
def test_what_may_not_differ_by_rank_is_refused_on_all_alike(
    cluster: Cluster, tmp_path: Path, case: str, said: str
) -> None:
    folder = tmp_path / "none"
    found = cluster.run(f"{__name__}:refused", 2, folder=str(folder), case=case)
    assert found[0] == found[1]
    assert said in found[0]
    assert not folder.exists()


def diverge(rank: int, world_size: int, store: Store, *, folder: str) -> list[Any]:
    """Save equal replicas, then such as differ in one element of one rank, then equal ones."""
    with _group(rank, world_size, store):
        model = nn.Linear(600, 600)
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(1.0)
        with Checkpointer(folder, {"model": model}) as checkpointer:
            checkpointer.save(1)
            with torch.no_grad():
                model.weight[300, 301] += rank
            with pytest.raises(CheckpointError) as error:
                checkpointer.save(2)
            with torch.no_grad():
                model.weight.fill_(2.0)
            checkpointer.save(3)
        return [str(error.value), [result.step for result in checkpointer.results()]]


def test_a_replica_that_goes_its_own_way_is_found_at_every_save(
    cluster: Cluster, tmp_path: Path
) -> None:
    for message, steps in cluster.run(f"{__name__}:diverge", 2, folder=str(tmp_path)):
        assert "weight differs between rank 0 and rank 1" in message
        assert steps == [1, 3]


def led_buffers(rank: int, world_size: int, store: Store, *, folder: str) -> list[Any]:
    """The buffers of DistributedDataParallel differ after a step, and the first rank's count."""
    with _group(rank, world_size, store):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(rank)
        wrapped(torch.randn(4, 2)).sum().backward()
        save(folder, {"model": wrapped})
        again: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        load(folder, {"model": again})
        dist.barrier()
        return [m[1].running_mean.tolist() for m in (model, again)]


def test_buffers_that_the_first_rank_hands_out_are_the_first_ranks(
    cluster: Cluster, tmp_path: Path
) -> None:
    (first, loaded), (second, other) = cluster.run(
        f"{__name__}:led_buffers", 2, folder=str(tmp_path)
    )
    assert first != second
    assert loaded == other == first


def stages(rank: int, world_size: int, store: Store, *, folder: str) -> None:
    """Each rank has a stage of its own, with its own optimizer of the same key."""
    with _group(rank, world_size, store):
        model = nn.Module()
        model.add_module(f"stage{rank}", nn.Linear(2, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, rank + 1.0)
        optimizer.step()
        save(folder, {"model": model, "optimizer": optimizer})


def test_stages_with_parameters_of_their_own_are_loaded_by_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.run(f"{__name__}:stages", 2, folder=str(tmp_path))
    model = nn.Module()
    for rank in range(2):
        model.add_module(f"stage{rank}", nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    load(tmp_path, {"model": model, "optimizer": optimizer})
    assert optimizer.param_groups[0]["lr"] == 0.5
    for name, parameter in model.named_parameters():
        moment = optimizer.state[parameter]["exp_avg"]
        assert torch.allclose(moment, torch.full_like(moment, 0.1 * (int(name[5]) + 1)))


def late(rank: int, world_size: int, store: Store, *, folder: str) -> str:
    """The first rank saves alone."""
    with _group(rank, world_size, store):
        checkpointer = Checkpointer(folder, {"a": 1}, timeout_s=1.0)
        message = ""
        if rank == 0:
            with pytest.raises(CheckpointError) as error:
                checkpointer.save(1)
            message = str(error.value)
        dist.barrier()
        checkpointer.close()
        return message


def test_a_rank_that_does_not_come_is_named(cluster: Cluster, tmp_path: Path) -> None:
    found = cluster.run(f"{__name__}:late", 2, folder=str(tmp_path))
    assert found[0].startswith("no word in time from rank 1")


def _optimizer(groups: list[dict[str, Any]], state: dict[str, Any]) -> dict[str, Any]:
    return {"o": {TAG: "optimizer", "groups": groups, "state": state, "other": []}}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (_optimizer([{"lr": True, "params": ["a"]}], {"a": 1}), r"\['lr'\] differs"),
        (_optimizer([{"lr": 1, "x": 2, "params": ["a"]}], {"a": 1}), r"\['x'\] differs"),
        (_optimizer([{"lr": 1, "params": ["a"]}], {}), r"state\[a\] differs"),
        (_optimizer([{"lr": 1, "params": ["a"]}], {"a": 1.0}), r"state\[a\] differs"),
        (_optimizer([{"lr": 2, "params": []}], {}), None),
        ({"p": 1}, "the state's keys differ"),
    ],
)
def test_optimizers_whose_parameters_differ_agree_on_what_they_share(
    second: dict[str, Any], said: str | None
) -> None:
    first = _optimizer([{"lr": 1, "params": ["a"]}], {"a": 1})
    if said is None:
        merged, own = merge([first, second], [{}, {}])
        assert merged["o"]["groups"] == [{"lr": 1, "params": ["a"]}, {"lr": 2, "params": []}]
        assert own == set()
        return
    with pytest.raises(CheckpointError, match=said):
        merge([first, second], [{}, {}])


@pytest.mark.parametrize("during", [False, True], ids=["before", "during"])
def test_a_store_that_is_gone_is_told_in_one_line_with_its_place(during: bool) -> None:
    server = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    port = server[0].port
    store = PrefixStore("here", TCPStore("127.0.0.1", port, wait_for_workers=False))
    threading.Timer(0.2 if during else 0.0, server.clear).start()
    while server and not during:
        time.sleep(0.01)
    with pytest.raises(CheckpointError) as told:
        Meeting(1, 2, store, 30.0).exchange("save", 1)
    assert f"rank 1 has lost the rendezvous store at 127.0.0.1:{port} " in str(told.value)
    assert "exchange 'save'" in str(told.value)
    assert "start the program again" in str(told.value)
    assert "\n" not in str(told.value)


def test_an_error_of_all_ranks_leaves_one_rank_after_the_other() -> None:
    """Messages of ranks that write to one file would be mixed word by word."""
    for rank in range(3):
        began = time.monotonic()
        with pytest.raises(CheckpointError), Meeting(rank, 3, HashStore(), 1.0).in_turn():
            raise CheckpointError("all have it")
        assert time.monotonic() - began > 0.09 * rank, "it is not after the rank before it"
