"""The job of benchmarks/recovery.py that trains with torchft.

As `python benchmarks/recovery_torchft.py NUMBER COMMITS LIGHTHOUSE` it is one replica of it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from recovery_jobs import (
    HANG_TIMEOUT_S,
    HEARTBEAT_MS,
    HEARTBEAT_TIMEOUT_MS,
    MICRO_BATCH,
    MICRO_BATCHES,
    MODEL,
    RANKS,
    SEQ_LEN,
    UNDISTURBED_STEPS,
    Contestant,
    Observer,
    environment,
)

TORCHFT_JOIN_TIMEOUT_MS = 1000
"""With the 100 ms that holdfast uses, torchft's replicas, which ask for a quorum in every step,
leave the slower of them out again and again."""


@contextlib.contextmanager
def torchft(folder: Path) -> Iterator[Contestant]:
    os.environ.setdefault("RUST_LOG", "warn")
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=1,
        join_timeout_ms=TORCHFT_JOIN_TIMEOUT_MS,
        quorum_tick_ms=10,
        heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS,
    )
    address = f"http://127.0.0.1:{server.address().rsplit(':', 1)[1]}"
    output = (folder / "output.txt").open("wb")
    replicas: dict[int, subprocess.Popen[bytes]] = {}
    starts = dict.fromkeys(range(RANKS), 0)

    def start(number: int) -> None:
        starts[number] += 1
        log = folder / f"commits-{number}-{starts[number]}"
        command = [sys.executable, __file__, str(number), str(log), address]
        replicas[number] = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment()
        )

    def replace() -> None:
        for number, process in replicas.items():
            if process.poll() is not None:
                start(number)

    def members() -> int:
        """Of the newest step that anybody has committed."""
        newest = (0, 0)
        for log in folder.glob("commits-*"):
            lines = log.read_bytes().split(b"\n")[:-1]
            if lines:
                step, count = lines[-1].split()
                newest = max(newest, (int(step), int(count)))
        return newest[1]

    def workers() -> list[int]:
        if members() != RANKS:
            return []
        return [replicas[number].pid for number in range(1, RANKS)]

    for number in range(RANKS):
        start(number)
    try:
        observer = Observer(
            lambda: list(folder.glob("commits-*")), lambda line: int(line.split()[0])
        )
        observer.wait_for(UNDISTURBED_STEPS)
        try:
            yield Contestant(observer, workers, replace)
        finally:
            observer.close()
    finally:
        for process in replicas.values():
            process.kill()
            process.wait()
        server.shutdown()
        output.close()


def replica(number: int, commits: Path, lighthouse: str) -> None:
    """One torchft replica: trains for ever, and writes a line `step members` for each commit."""
    import torch
    from torch.distributed import TCPStore
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=MODEL["vocab"],
            hidden_size=MODEL["hidden"],
            intermediate_size=MODEL["intermediate"],
            num_hidden_layers=MODEL["layers"],
            num_attention_heads=MODEL["heads"],
            num_key_value_heads=MODEL["kv_heads"],
            attn_implementation="eager",
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def state() -> dict[str, object]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def load(found: dict) -> None:
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=HANG_TIMEOUT_S)),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=1,
        timeout=timedelta(seconds=HANG_TIMEOUT_S),
        quorum_timeout=timedelta(seconds=10),
        connect_timeout=timedelta(seconds=5),
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica-{number}",
        hostname="127.0.0.1",
        heartbeat_interval=timedelta(milliseconds=HEARTBEAT_MS),
    )
    generator = torch.Generator().manual_seed(number)
    with commits.open("w", buffering=1) as log:
        while True:
            optimizer.zero_grad()
            manager.start_quorum()
            for _ in range(MICRO_BATCHES // RANKS):
                tokens = torch.randint(
                    0, MODEL["vocab"], (MICRO_BATCH, SEQ_LEN), generator=generator
                )
                model(input_ids=tokens, labels=tokens).loss.backward()
            flat = torch.cat([p.grad.view(-1) for p in model.parameters() if p.grad is not None])
            manager.allreduce(flat).wait()
            start = 0
            for parameter in model.parameters():
                if parameter.grad is not None:
                    stop = start + parameter.numel()
                    parameter.grad.copy_(flat[start:stop].view_as(parameter))
                    start = stop
            if manager.should_commit():
                optimizer.step()
                log.write(f"{manager.current_step()} {manager.num_participants()}\n")


if __name__ == "__main__":
    replica(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
