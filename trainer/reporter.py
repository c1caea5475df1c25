"""Turns committed steps into records, traces and what is shown; the lowest rank writes the records."""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch.distributed import Store

from holdfast.checkpoint.job import SaveResult
from holdfast.checkpoint.loading import LoadStatistics
from holdfast.checkpoint.remote import UploadResult
from holdfast.parallel.pipeline import ActionTimes
from holdfast.trainer.display import Display, Progress, duration
from holdfast.trainer.flops import step_flops, utilisation
from holdfast.trainer.metrics import RunRecords, StepMetrics, drop_after
from holdfast.trainer.run_directory import RunDirectory
from holdfast.trainer.trace import Phase, write_trace
from holdfast.trainer.training import Outcome, Training
from holdfast.trainer.world import WorldInfo

_RECENT = 20
"""Steps that the shown rate and time left are taken over."""


def introduce(store: Store, world: WorldInfo) -> None:
    """Tell the store who this worker is."""
    worker = {"rank": world.rank, "pid": os.getpid(), "node": socket.gethostname()}
    store.set(f"worker/{world.rank}", json.dumps(worker))


def workers_of(store: Store, world: WorldInfo) -> list[dict[str, Any]]:
    """Who all workers are, by rank, once they have said so."""
    keys = [f"worker/{rank}" for rank in range(world.world_size)]
    store.wait(keys)
    return [json.loads(text) for text in store.multi_get(keys)]


def nodes_of(workers: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """The node of each rank: equal numbers for workers on one machine."""
    names = list(dict.fromkeys(worker["node"] for worker in workers))
    return tuple(names.index(worker["node"]) for worker in workers)


class Reporter:
    """What one rank reports of its run. Local."""

    def __init__(
        self,
        training: Training,
        world: WorldInfo,
        run: RunDirectory,
        workers: Sequence[dict[str, Any]],
        first: int = 0,
    ) -> None:
        """Args:
        first: the steps that are done already; what the records hold of later ones is dropped.
        """
        self._training, self._world, self._run = training, world, run
        self._config = training.config
        self._losses: list[float] = []
        self._eval_loss: float | None = None
        self._step_times: list[float] = []
        self._last_s = perf_counter()
        self._began_s = self._last_s
        self._records: RunRecords | None = None
        self._display: Display | None = None
        if world.rank == 0:
            tensorboard = run.tensorboard if self._config.log.tensorboard else None
            if run.metrics.exists():
                drop_after(run.metrics, first)
            self._records = RunRecords(run.metrics, run.events, tensorboard)
            for worker in workers:
                self._records.event("worker_started", **worker)
            self._display = Display(run.root.name, training.plan, every=self._config.log.every)
            self._display.start()

    def step(
        self,
        step: int,
        outcome: Outcome,
        lr: float,
        phases: Sequence[Phase],
        times: ActionTimes,
        eval_loss: float | None,
    ) -> None:
        """Report one committed step, counted from 0."""
        config = self._config
        if step + 1 in config.log.trace_steps:
            at = self._training.plan.mesh.coordinates(self._world.rank)
            label = f"rank {self._world.rank} (stage {at.pipeline}, replica {at.data}, tensor {at.tensor})"
            write_trace(self._run.trace, self._world.rank, label, step + 1, phases, times)
        now = perf_counter()
        step_s, self._last_s = now - self._last_s, now
        if self._records is None or self._display is None:
            return
        self._losses.append(outcome.loss)
        self._step_times.append(step_s)
        self._eval_loss = eval_loss if eval_loss is not None else self._eval_loss
        rate = self._training.step_tokens / step_s
        metrics = StepMetrics(
            step=step + 1,
            loss=outcome.loss,
            loss_hex=outcome.loss.hex(),
            grad_norm=outcome.grad_norm,
            grad_norm_hex=outcome.grad_norm.hex(),
            lr=lr,
            tokens=(step + 1) * self._training.step_tokens,
            step_s=step_s,
            tokens_per_s=rate,
            world=self._world.world_size,
            generation=self._training.plan.generation,
        )
        memory_gib = self._peak_memory_gib()
        extra = {"memory/max_active(GiB)": memory_gib}
        mfu = self._utilisation(step_s)
        if mfu is not None:
            extra["mfu(%)"] = 100 * mfu
        if eval_loss is not None:
            extra["validation_metrics/loss"] = eval_loss
            self._records.event(
                "evaluated", step=step + 1, loss=eval_loss, loss_hex=eval_loss.hex()
            )
        self._records.step(metrics, extra)
        recent = statistics.median(self._step_times[-_RECENT:])
        self._display.show(
            Progress(
                step=step + 1,
                steps=config.train.steps,
                loss=outcome.loss,
                grad_norm=outcome.grad_norm,
                lr=lr,
                tokens_per_s=self._training.step_tokens / recent,
                left_s=(config.train.steps - step - 1) * recent,
                memory_gib=memory_gib,
                eval_loss=eval_loss,
                mfu=mfu,
            )
        )

    def skipped(self, step: int, outcome: Outcome) -> None:
        """Record a step that was not applied."""
        if self._records is not None:
            self._records.event(
                "step_skipped",
                step=step + 1,
                nonfinite_ranks=outcome.nonfinite_ranks,
                out_of_range_ranks=outcome.out_of_range_ranks,
            )

    def resumed(self, step: int, loaded: LoadStatistics | None, notes: Sequence[str]) -> None:
        """Record and show where the run goes on from."""
        if self._records is None or self._display is None:
            return
        for note in notes:
            self._display.note(note)
            self._records.event("resume_note", message=note)
        if loaded is None:
            return
        self._records.event(
            "resumed",
            step=step,
            seconds=loaded.seconds,
            read_bytes=loaded.node_bytes,
            samples=step * self._config.train.global_batch,
        )
        self._display.note(
            f"resumed after step {step}: {loaded.node_bytes / 2**20:,.0f} MiB read in "
            f"{loaded.seconds:.2f} s"
        )

    def checkpoint_skipped(self, step: int) -> None:
        """Record that the save before was still under way (checkpoint.policy)."""
        if self._records is not None and self._display is not None:
            self._records.event("checkpoint_skipped", step=step)
            self._display.note(
                f"checkpoint of step {step} left out: the one before is being written"
            )

    def checkpoints(self, ended: Sequence[SaveResult | UploadResult]) -> None:
        """Record and show saves and uploads that have ended."""
        if self._records is None or self._display is None:
            return
        for result in ended:
            fields = checkpoint_fields(result)
            if result.error:
                self._records.event("checkpoint_failed", error=result.error, **fields)
                self._display.note(f"checkpoint of step {result.step} failed: {result.error}")
            else:
                self._records.event("checkpoint_committed", **fields)
                self._display.note(describe_save(result))

    def finished(self, digest: str) -> None:
        """Record and show that the run reached its last step."""
        if self._records is None or self._display is None:
            return
        total_s = perf_counter() - self._began_s
        steps = self._config.train.steps
        self._records.event("run_finished", steps=steps, total_s=total_s, parameter_digest=digest)
        losses = self._losses or [float("nan")]
        median_s = statistics.median(self._step_times) if self._step_times else float("nan")
        summary = [
            ("steps", f"{steps} in {duration(total_s)}"),
            ("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}"),
            ("speed", f"{self._training.step_tokens / median_s:,.0f} tokens/s (median step)"),
            ("parameters", f"sha256 {digest[:16]}"),
            ("run", str(self._run.root)),
        ]
        if self._eval_loss is not None:
            summary.insert(2, ("held-out loss", f"{self._eval_loss:.4f}"))
        self._display.finish(summary)

    def close(self) -> None:
        if self._display is not None:
            self._display.stop()
        if self._records is not None:
            self._records.close()

    def _utilisation(self, step_s: float) -> float | None:
        device = self._training.device
        if device.type != "cuda":
            return None
        flops = step_flops(self._training.plan.layers, self._training.step_micro_batches)
        name = torch.cuda.get_device_name(device)
        return utilisation(flops, step_s, self._world.world_size, name)

    def _peak_memory_gib(self) -> float:
        """Peak of torch's allocator on a GPU, of resident memory on CPU; of this rank."""
        device = self._training.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def checkpoint_fields(result: SaveResult | UploadResult) -> dict[str, Any]:
    """The fields of a checkpoint's event."""
    if isinstance(result, UploadResult):
        return {
            "step": result.step,
            "tier": "remote",
            "bytes": result.bytes,
            "stall_s": 0.0,
            "total_s": result.total_s,
            "path": result.url,
        }
    rank, phase = result.slowest
    return {
        "step": result.step,
        "tier": result.tier,
        "bytes": result.bytes,
        "stall_s": max((times["stall_s"] for times in result.times.values()), default=0.0),
        "total_s": result.total_s,
        "commit_s": result.commit_s,
        "path": str(result.path or ""),
        "imbalance": result.imbalance,
        "slowest_rank": rank,
        "slowest_phase": phase,
        "ranks": {str(r): dict(times) for r, times in result.times.items()},
    }


def describe_save(result: SaveResult | UploadResult) -> str:
    """One line about a save that was committed."""
    size = f"{result.bytes / 2**20:,.0f} MiB in {result.total_s:.2f} s"
    if isinstance(result, UploadResult):
        return f"checkpoint of step {result.step} uploaded: {size}"
    rank, phase = result.slowest
    stall = max((times["stall_s"] for times in result.times.values()), default=0.0)
    return (
        f"checkpoint of step {result.step} ({result.tier}): {size}, stall {1000 * stall:.1f} ms, slowest "
        f"rank {rank} ({phase})"
    )
