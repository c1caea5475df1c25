"""The place of a process among the workers of a run, as launchers describe it."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.parallel.errors import ConfigError
from holdfast.trainer.external_launcher import run_external_worker
from holdfast.trainer.run import RunRequest
from holdfast.trainer.worlds import LAUNCHERS, world_from_environment
from holdfast.trainer.worlds.launcher import first_host
from holdfast.trainer.worlds.world import WorldInfo
from support.runs.small_runs import make_config

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "5",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "SLURM_PROCID": "9",
}
SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[003-006],cpu1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-1",
}
PMI = {
    "PMI_RANK": "5",
    "PMI_SIZE": "6",
    "MPI_LOCALRANKID": "2",
    "MPI_LOCALNRANKS": "3",
    "MASTER_ADDR": "first",
}
FLUX = '''
"""Flux: tasks of `flux run`."""

from holdfast.trainer.worlds.world import WorldInfo
from holdfast.trainer.worlds.launcher import Environment, Launcher


def read(found: Environment) -> WorldInfo:
    rank, size = found.number("FLUX_TASK_RANK"), found.number("FLUX_JOB_SIZE")
    return WorldInfo(rank, size, 0, 1, rank, found.text("MASTER_ADDR"), 29500, rank == 0)


FLUX = Launcher("Flux", ("FLUX_TASK_RANK",), read)
'''


def test_without_a_launcher_there_is_no_world() -> None:
    assert world_from_environment({}) is None
    assert world_from_environment({"RANK": "3", "SLURM_PROCID": "0"}) is None


def test_torchrun_is_read_first_and_its_agent_hosts_the_store() -> None:
    world = world_from_environment(TORCHRUN | SLURM | OPEN_MPI)
    assert world == WorldInfo(3, 8, 1, 8, 0, "a", 5, store_is_server=False)


def test_a_step_of_slurm_meets_at_its_first_host_on_a_port_of_its_job() -> None:
    world = world_from_environment(SLURM | OPEN_MPI)
    assert world == WorldInfo(0, 4, 0, 2, 0, "gpu003", 23456, True, job="slurm-123456-0")


def test_open_mpi_and_pmi_are_read() -> None:
    world = world_from_environment(OPEN_MPI)
    assert world is not None
    assert (world.rank, world.world_size, world.local_rank) == (1, 2, 1)
    assert (world.store_host, world.store_is_server) == ("127.0.0.1", False)
    assert world.job == "mpi-prterun-1"
    assert 20000 <= world.store_port < 30000
    assert world_from_environment(OPEN_MPI) == world, "every rank of a job finds the same port"
    world = world_from_environment(PMI)
    assert world is not None
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (5, 6, 2, 3)
    assert world.store_host == "first"


def test_a_job_of_mpi_over_several_machines_must_name_the_first() -> None:
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        world_from_environment({k: v for k, v in PMI.items() if k != "MASTER_ADDR"})


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (TORCHRUN | {"RANK": "x"}, ["torchrun (RANK, WORLD_SIZE)", "RANK = 'x'"]),
        (TORCHRUN | {"RANK": "-1"}, ["torchrun (RANK, WORLD_SIZE)", "rank is -1"]),
        (TORCHRUN | {"RANK": TORCHRUN["WORLD_SIZE"]}, ["its rank is", "unset the variables"]),
        ({"RANK": "1", "WORLD_SIZE": "4"}, ["MASTER_ADDR is not set", "left over"]),
        (SLURM | {"SLURM_LOCALID": ""}, ["Slurm (SLURM_PROCID, ", "SLURM_LOCALID = ''"]),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "x2"}, ["SLURM_STEP_TASKS_PER_NODE = 'x2'"]),
        ({"PMI_RANK": "0"}, ["PMI (PMI_RANK)", "PMI_SIZE is not set"]),
    ],
)
def test_errors_name_the_launcher_that_was_found_and_the_variable(
    environment: dict[str, str], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        world_from_environment(environment)
    assert all(part in str(caught.value) for part in said), caught.value


@pytest.mark.parametrize("rank", [0, 1])
def test_variables_that_are_left_over_are_named_by_every_rank(
    capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    world = world_from_environment(
        {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    )
    assert world is not None
    assert run_external_worker(RunRequest(Path("run.toml"), make_config()), world) == 2
    assert "unset RANK and WORLD_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536", "99999999999"])
def test_a_port_beyond_the_range_is_named(port: str) -> None:
    with pytest.raises(ConfigError, match=f"MASTER_PORT = {port} is no port"):
        world_from_environment({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port})


def test_a_worker_alone_meets_nobody() -> None:
    left_over = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "gone.invalid"}
    world = world_from_environment(left_over)
    assert world is not None
    alone = world.with_own_store()
    assert (alone.store_host, alone.store_port, alone.store_is_server) == ("127.0.0.1", 0, True)


def test_a_new_launcher_is_one_file_and_one_line_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flux_launcher.py").write_text(FLUX)
    monkeypatch.syspath_prepend(tmp_path)
    from flux_launcher import FLUX as launcher  # pyrefly: ignore

    known = (*LAUNCHERS, launcher)
    environment = {"FLUX_TASK_RANK": "2", "FLUX_JOB_SIZE": "3", "MASTER_ADDR": "head"}
    world = world_from_environment(environment, known)
    assert world == WorldInfo(2, 3, 0, 1, 2, "head", 29500, store_is_server=False)
    assert world_from_environment(environment) is None
    for others in (TORCHRUN, SLURM, OPEN_MPI, PMI):
        assert world_from_environment(others, known) == world_from_environment(others)


def test_hosts_are_read_from_the_compressed_list() -> None:
    assert first_host("node7") == "node7"
    assert first_host("gpu[003-006,9],cpu1") == "gpu003"
    assert first_host("") == ""
