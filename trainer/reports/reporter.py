"""The reporter of one rank: it hands committed steps to records, console and traces."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch

from holdfast.checkpoint.loading import LoadStatistics
from holdfast.checkpoint.saving import SaveResult
from holdfast.checkpoint.tiers import UploadResult
from holdfast.parallel.comm import SlowLink
from holdfast.parallel.output import SAVING, WholeFiles
from holdfast.parallel.pipeline import ActionTimes
from holdfast.trainer.config import HELD_OUT
from holdfast.trainer.data import coverage_of
from holdfast.trainer.reports.checkpoint_events import (
    SaveFailures,
    checkpoint_fields,
    describe_save,
)
from holdfast.trainer.reports.digests import StepDigests
from holdfast.trainer.reports.events import EventFile
from holdfast.trainer.reports.flops import step_flops, utilisation
from holdfast.trainer.reports.metrics import StepMetrics, load_of
from holdfast.trainer.reports.offload_metrics import OffloadMetrics, offload_metrics
from holdfast.trainer.reports.record_keeper import RecordKeeper
from holdfast.trainer.reports.run_console import RunConsole
from holdfast.trainer.reports.start_facts import start_facts
from holdfast.trainer.reports.trace import PhaseSpan, write_trace
from holdfast.trainer.reports.workers import Worker
from holdfast.trainer.run import RunDirectory
from holdfast.trainer.step import Outcome, Straggler, Training, WrongComputation
from holdfast.trainer.worlds import WorldInfo


class Reporter:
    """Reports the run on one rank; the lowest rank writes the records. Local."""

    def __init__(
        self,
        training: Training,
        world: WorldInfo,
        run: RunDirectory,
        workers: Sequence[Worker],
        events: EventFile,
        first: int = 0,
        *,
        shown: bool = True,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """Open the records, console and traces of this rank.

        Args:
            workers: the workers whose start is recorded.
            events: the events of this process.
            first: the number of steps done already; records of later steps are dropped.
            shown: False if another process shows the records.
        """
        self._training, self._world, self._clock = training, world, clock
        config = training.config
        self._last_s = self._began_s = clock()
        self.reported = first
        """The last step that this rank has reported."""
        self._offload_failed = False
        self._failures = SaveFailures()
        writes = _is_writer(training, world)
        self._events, self._traces = events, WholeFiles(run.trace, events.word)
        self._records = RecordKeeper(
            run, events, tensorboard=config.log.tensorboard, first=first, writes=writes
        )
        for worker in workers:
            self._records.event("worker_started", **worker)
        self._console: RunConsole | None = None
        if writes and shown:
            self._console = RunConsole(run, config, training.plan)

    def change(self, training: Training, world: WorldInfo) -> None:
        """Continue under another plan; a rank that becomes the writer completes the records."""
        self._training, self._world = training, world
        self._records.change(writes=_is_writer(training, world))

    def roll_back(self, step: int) -> None:
        """Forget the steps after `step`, which the run repeats."""
        self.reported = step
        self._records.roll_back(step)

    def step(
        self,
        step: int,
        outcome: Outcome,
        lr: float,
        phases: Sequence[PhaseSpan],
        times: ActionTimes | None,
        evaluated: Mapping[str, float],
    ) -> None:
        """Report one committed step, counted from 0; once only.

        Args:
            evaluated: the losses of the validation sets after it, by name; empty: none.
            times: the action times of the program; None if a recovery finished the step.
        """
        if step < self.reported:
            return
        self.reported = step + 1
        self._trace(step + 1, phases, times)
        now = self._clock()
        step_s, self._last_s = now - self._last_s, now
        metrics = self._metrics(step + 1, outcome, lr, step_s, evaluated)
        memory_gib, mfu = _peak_memory_gib(self._training.device), self._utilisation(step_s)
        extra = {"memory/max_active(GiB)": memory_gib}
        if mfu is not None:
            extra["mfu(%)"] = 100 * mfu
        for name, norms in (("grad", metrics.grad_norms), ("param", metrics.param_norms)):
            extra |= {f"{name}_norm/{layer}": norm for layer, norm in norms.items()}
        for tag, values in (
            ("attention_logit", metrics.attention_logit),
            ("experts_load", metrics.expert_load),
            ("experts_entropy", metrics.expert_entropy),
            ("experts_unused", metrics.experts_unused),
            ("output_rms", metrics.output_rms),
            ("output_max", metrics.output_max),
        ):
            extra |= {
                f"{tag}/{layer}": value for layer, value in values.items() if value is not None
            }
        if metrics.multi_token_loss is not None:
            extra["loss_metrics/multi_token_loss"] = metrics.multi_token_loss
        if self._training.config.numerics.spike_window:
            extra["optim/step_skipped"] = float(bool(outcome.spike))
        for name, loss in evaluated.items():
            own = "" if name == HELD_OUT else f"/{name}"
            extra[f"validation_metrics/loss{own}"] = loss
            self._records.event(
                "evaluated", step=step + 1, set=name, loss=loss, loss_hex=loss.hex()
            )
        digests = None
        if outcome.bit_sums:
            sums = tuple(zip(*outcome.bit_sums, strict=True))
            digests = StepDigests(metrics.step, metrics.loss_hex, *sums)
        self._records.step(metrics, extra, digests)
        if self._console is not None:
            self._console.step(metrics, memory_gib=memory_gib, mfu=mfu)
        elif self._records.waits:
            steps = self._training.config.train.steps
            self._events.word.say(f"step {metrics.step}/{steps}  loss {metrics.loss:.4f}")

    def _metrics(
        self,
        step: int,
        outcome: Outcome,
        lr: float,
        step_s: float,
        evaluated: Mapping[str, float],
    ) -> StepMetrics:
        """The line of metrics.jsonl for a step, counted from 1."""
        train, plan = self._training.config.train, self._training.plan
        tokens = train.batch_of(step - 1) * train.seq_len
        norms = outcome.layer_norms
        names = [layer.name for layer in plan.layers] if norms else []
        layers = dict(zip(names, norms, strict=True))
        outputs = {
            layer.name: output or (None, None)
            for layer, output in zip(
                plan.layers if outcome.layer_outputs else (), outcome.layer_outputs, strict=False
            )
        }
        loads = {
            layer.name: load_of(choices)
            for layer, choices in zip(
                plan.layers if outcome.loads else (), outcome.loads, strict=True
            )
            if any(choices)
        }
        further = outcome.further_losses
        return StepMetrics(
            step=step,
            loss=outcome.loss,
            loss_hex=outcome.loss.hex(),
            grad_norm=outcome.grad_norm,
            grad_norm_hex=outcome.grad_norm.hex(),
            lr=lr,
            tokens=train.samples_before(step) * train.seq_len,
            step_s=step_s,
            tokens_per_s=tokens / step_s,
            world=plan.stage_replicas.size,
            generation=plan.generation,
            skipped="spike" if outcome.spike else "",
            validation=dict(evaluated),
            validation_hex={name: loss.hex() for name, loss in evaluated.items()},
            grad_norms={name: norms[0] for name, norms in layers.items()},
            param_norms={name: norms[1] for name, norms in layers.items()},
            output_rms={name: output[0] for name, output in outputs.items()},
            output_max={name: output[1] for name, output in outputs.items()},
            multi_token_loss=further[0] if further else None,
            multi_token_loss_hex=further[0].hex() if further else "",
            attention_logit={
                layer.name: max(of_heads)
                for layer, of_heads in zip(plan.layers, outcome.logits, strict=False)
                if of_heads
            },
            expert_load={name: load.most for name, load in loads.items()},
            expert_entropy={name: load.entropy for name, load in loads.items()},
            experts_unused={name: load.unused for name, load in loads.items()},
            offload=self._offloaded(step, step_s),
        )

    def _trace(self, step: int, phases: Sequence[PhaseSpan], times: ActionTimes | None) -> None:
        """Write the trace of a step, counted from 1, if it is one of log.trace_steps."""
        if times is None or step not in self._training.config.log.trace_steps:
            return
        rank = self._world.rank
        plan = self._training.plan
        place, at = "spare", plan.stage_replicas.find(rank)
        if at is not None:
            shard = plan.mesh_of(rank).shard_text(at.shard)
            place = f"stage {at.pipeline}, replica {at.data}, {shard}"
        write_trace(self._traces, rank, f"rank {rank} ({place})", step, phases, times)

    def _offloaded(self, step: int, step_s: float) -> OffloadMetrics | None:
        """The offload metrics of a step; any rank records once that its drive failed."""
        offloader = self._training.offloader
        if offloader is None:
            return None
        report = offloader.last_step
        if report.fault and not self._offload_failed:
            self._offload_failed = True
            rank = self._world.rank
            self._events.append("offload_failed", step=step, rank=rank, reason=report.fault)
            self._note(f"rank {rank} keeps activations in memory: {report.fault}")
        return offload_metrics(
            report,
            step_s=step_s,
            ranks_on_drive=self._world.local_world_size,
            drive_tbw=self._training.config.offload.drive_tbw,
        )

    def _tell(self, name: str, message: str, **fields: Any) -> None:
        """Record an event with a message, and show that."""
        self._records.event(name, **fields, message=message)
        self._note(message)

    def straggler(self, step: int, slow: Straggler) -> None:
        """Report a rank that is slower than others with the same work."""
        message = (
            f"rank {slow.rank} is slow: {slow.own_s:.3f} s a step on its own, where "
            f"{slow.usual_s:.3f} s is usual; most of it in {slow.phase}"
        )
        self._tell(
            "straggler",
            message,
            step=step,
            rank=slow.rank,
            phase=slow.phase,
            own_s=slow.own_s,
            usual_s=slow.usual_s,
        )

    def slow_link(self, step: int, slow: SlowLink) -> None:
        """Report a part of the network that is slower than others of its kind."""
        message = (
            f"{slow.place} is slow: messages take {slow.ratio:.1f} times as long as usual, "
            f"{slow.excess_s:.3f} s more a step"
        )
        self._tell(
            "slow_link",
            message,
            step=step,
            side=slow.side,
            source=slow.source,
            destination=slow.destination,
            ratio=slow.ratio,
            excess_s=slow.excess_s,
        )

    def computes_wrongly(self, step: int, wrong: WrongComputation) -> None:
        """Record and show that an audit of a step, counted from 1, has found wrong results."""
        self._tell(
            "wrong_computation",
            str(wrong),
            step=step,
            micro_batch=wrong.micro_batch,
            ranks=wrong.ranks,
            decided=wrong.decided,
            what=wrong.what,
        )

    def skipped(self, step: int, outcome: Outcome, reason: str) -> None:
        """Record and show a step, counted from 0, that was not applied."""
        self._records.event(
            "step_skipped",
            step=step + 1,
            nonfinite_ranks=outcome.nonfinite_ranks,
            out_of_range_ranks=outcome.out_of_range_ranks,
            in_a_row=outcome.skipped,
            **({"loss": outcome.loss, "grad_norm": outcome.grad_norm} if outcome.spike else {}),
            reason=reason,
        )
        self._note(reason)

    def went_back(self, step: int, why: Mapping[str, Any]) -> None:
        """Record and show that the run went back to the state after `step` steps. On every rank.

        Args:
            why: the fields of the event, a message among them.
        """
        if self.reported > step:
            self.roll_back(step)
        if not self._records.writes:
            return
        self._records.note_config(self._training.config)
        self._records.event("rewound", step=step, **why)
        self._note(why["message"])

    def stays(self, step: int, message: str, request: str = "") -> None:
        """Record and show that the run does not go back, after `step` steps.

        Args:
            request: the name of a person's request; empty: there is none.
        """
        of = {"request": request} if request else {}
        self._tell("not_rewound", message, step=step, **of)

    def resumed(self, step: int, loaded: LoadStatistics | None, notes: Sequence[str]) -> None:
        """Record and show where the run continues from."""
        for note in notes:
            self._note(note)
            self._records.event("resume_note", message=note)
        if loaded is None:
            return
        self._records.event(
            "resumed",
            step=step,
            seconds=loaded.seconds,
            read_bytes=loaded.node_bytes,
            samples=self._training.config.train.samples_before(step),
        )
        self._note(
            f"resumed after step {step}: {loaded.node_bytes / 2**20:,.0f} MiB read in "
            f"{loaded.seconds:.2f} s"
        )

    def started(self, step: int, nodes: Sequence[str] = ()) -> None:
        """Record and show what the run is started with, and what it trains on, from `step` on.

        Args:
            nodes: the host of each rank, where the launcher tells it.
        """
        training = self._training
        facts = start_facts(training.device)
        ranks = training.plan.stage_replicas.size
        hosts = list(dict.fromkeys(nodes))
        self._records.event("run_started", step=step, ranks=ranks, nodes=hosts, **facts)
        data = coverage_of(self._training.config, self._training.data)
        message = f"data: {data.line()}"
        self._records.event("data_opened", step=step, message=message, **data.as_dict())
        self._note(message)

    def checkpoint_skipped(self, step: int) -> None:
        """Record that a save was skipped, as the last one was under way (checkpoint.policy)."""
        self._records.event("checkpoint_skipped", step=step)
        self._note(f"checkpoint of step {step} left out: the one before is being written")

    def checkpoints(self, ended: Sequence[SaveResult | UploadResult]) -> None:
        """Record and show ended saves and uploads."""
        for result in ended:
            fields = checkpoint_fields(result)
            if result.error:
                self._records.event("checkpoint_failed", error=result.error, **fields)
                self._note(self._failures.failed(fields["tier"], result.step, result.error))
            else:
                self._failures.succeeded(fields["tier"])
                if isinstance(result, SaveResult):
                    self._note(result.note)
                self._records.event("checkpoint_committed", **fields)
                self._note(describe_save(result))

    def finished(self, digest: str) -> None:
        """Record and show that the run reached its last step."""
        total_s = self._clock() - self._began_s
        steps = self._training.config.train.steps
        self._records.event("run_finished", steps=steps, total_s=total_s, parameter_digest=digest)
        self._note(self._failures.summary())
        if self._console is not None:
            self._console.finish(digest, total_s)
        elif self._records.waits:
            self._events.word.say(f"all {steps} steps are done, parameters sha256 {digest[:16]}")

    def interrupted(self) -> None:
        """Show that a person has interrupted the run; called by a signal's handler."""
        if self._console is not None:
            self._console.display.tell_soon(f"holdfast: {SAVING}")

    def past_end(self, done: int) -> None:
        """Record and show that the run is past its last step already."""
        message = (
            f"the run is at step {done}, past train.steps = {self._training.config.train.steps}: "
            "nothing is trained and nothing is written; raise train.steps to go on"
        )
        self._records.event("resume_note", message=message)
        self._note(message)

    def close(self) -> None:
        if self._console is not None:
            self._console.close()
        self._records.close()
        self._traces.close()
        self._events.close()

    def _note(self, text: str) -> None:
        if self._console is not None and text:
            self._console.display.note(text)

    def _utilisation(self, step_s: float) -> float | None:
        device = self._training.device
        if device.type != "cuda":
            return None
        train = self._training.config.train
        micro_batches = train.batch_of(self.reported - 1) // train.micro_batch
        flops = step_flops(self._training.plan.layers, micro_batches)
        name = torch.cuda.get_device_name(device)
        return utilisation(flops, step_s, self._world.world_size, name)


def _is_writer(training: Training, world: WorldInfo) -> bool:
    """Whether this rank, as the lowest, writes the records."""
    return world.rank == training.plan.stage_replicas.ranks[0]


def _peak_memory_gib(device: torch.device) -> float:
    """This rank's peak memory: of torch's allocator on a GPU, resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
