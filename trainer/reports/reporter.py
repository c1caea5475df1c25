"""Turns committed steps into records, traces and what is shown; the lowest rank writes the records."""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from torch.distributed import Store

from holdfast.checkpoint.loading import LoadStatistics
from holdfast.checkpoint.saving import SaveResult
from holdfast.checkpoint.tiers import UploadResult
from holdfast.parallel.pipeline import ActionTimes
from holdfast.trainer.reports.console import Display, ProgressLine, duration
from holdfast.trainer.reports.flops import step_flops, utilisation
from holdfast.trainer.reports.metrics import (
    RunRecords,
    StepMetrics,
    append_event,
    drop_after,
    last_step,
)
from holdfast.trainer.reports.offload_metrics import OffloadMetrics, described, offload_metrics
from holdfast.trainer.reports.stragglers import Straggler
from holdfast.trainer.reports.trace import PhaseSpan, write_trace
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.step import Outcome, Training
from holdfast.trainer.world import WorldInfo

_KEPT = 8
"""Steps whose records every rank keeps, to complete what a lost writer has left."""
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
        *,
        shown: bool = True,
    ) -> None:
        """Args:
        first: the steps that are done already; what the records hold of later ones is dropped.
        shown: False where another process shows the records.
        """
        self._training, self._world, self._run = training, world, run
        self._config = training.config
        self._losses: list[float] = []
        self._eval_loss: float | None = None
        self._step_times: list[float] = []
        self._last_s = perf_counter()
        self._began_s = self._last_s
        self._recent: deque[tuple[StepMetrics, dict[str, float]]] = deque(maxlen=_KEPT)
        self._written = self._reported = first
        """The last step in the records, and the last that this rank has reported."""
        self._offload_failed = False
        self._records: RunRecords | None = None
        self._display: Display | None = None
        if self.writes:
            if run.metrics.exists():
                drop_after(run.metrics, first)
            self._open()
            self._written = last_step(run.metrics)
            for worker in workers:
                self.event("worker_started", **worker)
            if shown:
                self._display = Display(run.root.name, training.plan, every=self._config.log.every)
                self._display.start()

    @property
    def writes(self) -> bool:
        """Whether this rank writes the records: the lowest does."""
        return self._world.rank == self._training.plan.stage_replicas.ranks[0]

    def _open(self) -> None:
        tensorboard = self._run.tensorboard if self._config.log.tensorboard else None
        self._records = RunRecords(self._run.metrics, self._run.events, tensorboard)

    def change(self, training: Training, world: WorldInfo) -> None:
        """Go on under another plan. A rank that becomes the lowest completes what the one before left."""
        self._training, self._world = training, world
        if self.writes and self._records is None:
            self._open()
            self._written = last_step(self._run.metrics)
            for metrics, extra in tuple(self._recent):
                self._write(metrics, extra)
        elif not self.writes and self._records is not None:
            self._records.close()
            self._records = None

    def hand_over(self, training: Training) -> None:
        """Close the records if, under the next plan, another rank writes them."""
        if self._records is not None and self._world.rank != training.plan.stage_replicas.ranks[0]:
            self._records.close()
            self._records = None

    def roll_back(self, step: int) -> None:
        """Forget the steps after `step`: the run repeats them."""
        self._recent.clear()
        self._written, self._reported = min(self._written, step), step
        if self.writes and self._records is not None:
            self._records.close()
            drop_after(self._run.metrics, step)
            self._open()

    def event(self, event: str, **fields: Any) -> None:
        """Record an event, on the rank that writes the records."""
        if self._records is not None:
            self._records.event(event, **fields)

    def _write(self, metrics: StepMetrics, extra: dict[str, float]) -> None:
        if self._records is not None and metrics.step > self._written:
            self._records.step(metrics, extra)
            self._written = metrics.step

    def step(
        self,
        step: int,
        outcome: Outcome,
        lr: float,
        phases: Sequence[PhaseSpan],
        times: ActionTimes | None,
        eval_loss: float | None,
    ) -> None:
        """Report one committed step, counted from 0; once only.

        Args:
            times: of the program; None where a recovery finished the step.
        """
        config = self._config
        if step < self._reported:
            return
        self._reported = step + 1
        if times is not None and step + 1 in config.log.trace_steps:
            at = self._training.plan.stage_replicas.find(self._world.rank)
            place = f"stage {at.pipeline}, replica {at.data}, tensor {at.shard}" if at else "spare"
            label = f"rank {self._world.rank} ({place})"
            write_trace(self._run.trace, self._world.rank, label, step + 1, phases, times)
        now = perf_counter()
        step_s, self._last_s = now - self._last_s, now
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
            world=self._training.plan.stage_replicas.size,
            generation=self._training.plan.generation,
            offload=self._offloaded(step + 1, step_s),
        )
        memory_gib = self._peak_memory_gib()
        extra = {"memory/max_active(GiB)": memory_gib}
        mfu = self._utilisation(step_s)
        if mfu is not None:
            extra["mfu(%)"] = 100 * mfu
        if eval_loss is not None:
            extra["validation_metrics/loss"] = eval_loss
            self.event("evaluated", step=step + 1, loss=eval_loss, loss_hex=eval_loss.hex())
        self._recent.append((metrics, extra))
        self._write(metrics, extra)
        if self._display is None:
            return
        recent = statistics.median(self._step_times[-_RECENT:])
        self._display.show(
            ProgressLine(
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
                offload=described(metrics.offload) if metrics.offload is not None else "",
            )
        )

    def _offloaded(self, step: int, step_s: float) -> OffloadMetrics | None:
        """What was sent out; any rank records it once when its drive fails."""
        offloader = self._training.offloader
        if offloader is None:
            return None
        report = offloader.last_step
        if report.fault and not self._offload_failed:
            self._offload_failed = True
            rank = self._world.rank
            append_event(
                self._run.events, "offload_failed", step=step, rank=rank, reason=report.fault
            )
            self._note(f"rank {rank} keeps activations in memory: {report.fault}")
        return offload_metrics(
            report,
            step_s=step_s,
            ranks_on_drive=self._world.local_world_size,
            drive_tbw=self._config.offload.drive_tbw,
        )

    def straggler(self, step: int, slow: Straggler) -> None:
        """Report a rank that is slower than others with the same work."""
        self.event(
            "straggler",
            step=step,
            rank=slow.rank,
            phase=slow.phase,
            own_s=slow.own_s,
            usual_s=slow.usual_s,
        )
        self._note(
            f"rank {slow.rank} is slow: {slow.own_s:.3f} s a step on its own, where {slow.usual_s:.3f} s "
            f"is usual; most of it in {slow.phase}"
        )

    def skipped(self, step: int, outcome: Outcome) -> None:
        """Record a step that was not applied."""
        self.event(
            "step_skipped",
            step=step + 1,
            nonfinite_ranks=outcome.nonfinite_ranks,
            out_of_range_ranks=outcome.out_of_range_ranks,
        )

    def resumed(self, step: int, loaded: LoadStatistics | None, notes: Sequence[str]) -> None:
        """Record and show where the run goes on from."""
        for note in notes:
            self._note(note)
            self.event("resume_note", message=note)
        if loaded is None:
            return
        self.event(
            "resumed",
            step=step,
            seconds=loaded.seconds,
            read_bytes=loaded.node_bytes,
            samples=step * self._config.train.global_batch,
        )
        self._note(
            f"resumed after step {step}: {loaded.node_bytes / 2**20:,.0f} MiB read in "
            f"{loaded.seconds:.2f} s"
        )

    def checkpoint_skipped(self, step: int) -> None:
        """Record that the save before was still under way (checkpoint.policy)."""
        self.event("checkpoint_skipped", step=step)
        self._note(f"checkpoint of step {step} left out: the one before is being written")

    def checkpoints(self, ended: Sequence[SaveResult | UploadResult]) -> None:
        """Record and show saves and uploads that have ended."""
        for result in ended:
            fields = checkpoint_fields(result)
            if result.error:
                self.event("checkpoint_failed", error=result.error, **fields)
                self._note(f"checkpoint of step {result.step} failed: {result.error}")
            else:
                self.event("checkpoint_committed", **fields)
                self._note(describe_save(result))

    def _note(self, text: str) -> None:
        if self._display is not None:
            self._display.note(text)

    def finished(self, digest: str) -> None:
        """Record and show that the run reached its last step."""
        total_s = perf_counter() - self._began_s
        steps = self._config.train.steps
        self.event("run_finished", steps=steps, total_s=total_s, parameter_digest=digest)
        if self._display is None:
            return
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
