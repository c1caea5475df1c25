"""One worker's work under the active plan: steps, comparisons of state, and records."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import msgspec
import torch

from holdfast.elastic import (
    Fault,
    FaultEffects,
    FaultInjector,
    Membership,
    MembershipEvent,
    WorkerSpec,
    fault_from_data,
)
from holdfast.parallel.comm import STATE_TRANSFER
from holdfast.parallel.optimizer import MASTER
from holdfast.trainer.config import RunConfig
from holdfast.trainer.elastic.corruption import compare_copies, repair
from holdfast.trainer.elastic.flipped_products import FlippedProducts
from holdfast.trainer.elastic.incidents import ChangeFiles, ChangeRecord, record_of, write_changes
from holdfast.trainer.elastic.recovery import CompletedChange
from holdfast.trainer.elastic.saves import ElasticSaves, world_of
from holdfast.trainer.elastic.transition import WITHIN_STEP
from holdfast.trainer.loop import Parts, finish, place_of, run_step, stop
from holdfast.trainer.reports import EventFile, PhaseClock, Reporter
from holdfast.trainer.run import RunDirectory, checkpoint_root, locate_log
from holdfast.trainer.saves import Checkpoints
from holdfast.trainer.step import Outcome, Requests, Training, evaluates_after

logger = logging.getLogger("holdfast.elastic")


class ElasticSession:
    """Trains, compares and records as one worker. Call `go_on` first, and after each change.

    Its attributes are the parts of a step, and what is to be recorded of a change.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: WorkerSpec,
        membership: Membership,
        run: RunDirectory,
        events: EventFile,
        saves: ElasticSaves,
    ) -> None:
        self._config, self._spec, self._membership = config, spec, membership
        self._records, self._saves = ChangeFiles.of(run, events), saves
        self._training: Training | None = None
        self._reporter: Reporter | None = None
        self._clock = PhaseClock()
        self._digest = ""
        """The digest of the state at the newest comparison since the last change."""
        self._heard: Sequence[MembershipEvent] = ()
        """The membership events that led to the last change."""
        self._products = FlippedProducts()
        self._changes: list[ChangeRecord] = []
        """The changes since the last vote; recorders write theirs before they vote."""
        self._faults = FaultInjector(
            spec.rank,
            spec.incarnation,
            [fault_from_data(msgspec.to_builtins(fault)) for fault in config.elastic.chaos],
            asked=run.chaos,
            note=self._note_fault,
            effects=FaultEffects(
                self._corrupt, membership.cut_off, self._deadlock, self._products.flip_for
            ),
            disk=checkpoint_root(run.root, config),
        )

    def step(self, step: int, *, change: bool, leave: bool) -> Outcome:
        """Run one step, counted from 0. Collective; as `holdfast.trainer.loop.run_step`."""
        parts = self._parts()
        with self._products:
            outcome = run_step(parts, step, change=change, leave=leave)
        self._membership.committed(parts.training.progress.decided)
        self._changes.clear()
        return outcome

    def finish(self) -> None:
        """Save and report after the last step. Collective over all ranks."""
        parts = self._parts()
        finish(parts, parts.training.progress.decided)
        parts.training.groups.control.barrier()
        self._saves.end()

    def stop(self, step: int, requests: Requests, *, leaving: bool) -> None:
        """Save and end before the last step.

        Collective; raises `Stopped` if a signal asked for it.
        """
        parts = self._parts()
        stop(parts, step, requests, leaving=leaving)
        parts.training.groups.control.barrier()

    def compare(self, step: int) -> bool:
        """Compare all copies of the state, and repair shadows. Collective over all ranks.

        Returns:
            Whether training can continue from the state.
        """
        training = self._parts().training
        control = training.groups.control
        compared = compare_copies(training, control)
        found = compared.corrupt
        self._digest = compared.digest
        spared = all(corruption.spares_training for corruption in found)
        if found and spared:
            repair(training, found, control)
        if self._spec.rank == training.plan.stage_replicas.ranks[0]:
            with training.busy("report"):
                for corruption in found:
                    self._records.events.append(
                        "corruption",
                        step=step,
                        ranks=corruption.suspects,
                        block=corruption.tensor,
                        repaired=spared,
                    )
        if not spared:
            logger.error("state is corrupt at step %d: %s", step, [c.tensor for c in found])
        return spared

    def go_on(self, change: CompletedChange, training: Training) -> None:
        """Continue with the training that a change has activated. Local."""
        self._training, self._clock, self._digest = training, PhaseClock(), ""
        locate_log(lambda: place_of(training))
        with training.busy("report"):
            self._report_change(change, training)
        self._heard = self._membership.drain_events()
        self._faults.at(training.progress.decided + 1, "change")

    def _report_change(self, change: CompletedChange, training: Training) -> None:
        following, notes = self._saves.go_on(training)
        world = world_of(change.after, self._spec)
        if self._reporter is None:
            # The last step may be missing in the records; this rank writes it if it is the lowest.
            first = training.progress.decided - (_interrupted_step(change) is not None)
            self._reporter = Reporter(
                training, world, self._records.run, [], self._records.events, first, shown=False
            )
            self._reporter.started(first)
        elif change.from_checkpoint is not None:
            self._reporter.roll_back(change.from_checkpoint)
        self._reporter.change(training, world)
        self._go_back_with_others(training, following)
        if change.from_checkpoint is not None:
            self._reporter.resumed(training.progress.decided, following.loaded, notes)
        self._reporter.checkpoints(following.results())

    def _go_back_with_others(self, training: Training, following: Checkpoints) -> None:
        """Follow the ranks that had gone back when a change interrupted that, where it did."""
        progress, reporter = training.progress, self._reporter
        if progress.rewinds and reporter is not None and reporter.reported > progress.decided:
            following.forget_after(progress.decided)
            without = [number for found in training.config.data.without for number in found.samples]
            message = f"the run goes back to step {progress.decided}, as other ranks have"
            why = {"by": "recovery", "samples": without, "message": message}
            reporter.went_back(progress.decided, why)

    def record(self, change: CompletedChange, *, urgent: bool) -> None:
        """Record a change on its recorder, and keep it on ranks with history. Local.

        Args:
            urgent: whether the change interrupted a step.
        """
        training = self._parts().training
        if self._spec.rank in change.ranks_with_history:
            record = record_of(change, self._heard, training, urgent=urgent, digest=self._digest)
            self._changes.append(record)
        if self._spec.rank == change.recorder:
            with training.busy("report"):
                write_changes(self._records, self._changes)

    def evaluate_interrupted_step(self, change: CompletedChange) -> dict[str, float]:
        """The losses of validation sets after the step before a change, if that is due.

        The evaluation may be what the change interrupted, and a newcomer that is to write the
        records has not taken part in it. Collective over all ranks.
        """
        within = any(member.phase == WITHIN_STEP for member in change.after.members)
        lacking = _interrupted_step(change) is not None and (within or change.recovery.fresh)
        if lacking and evaluates_after(self._config, change.recovery.steps):
            return self._parts().training.evaluate()
        return {}

    def report_interrupted_step(
        self, change: CompletedChange, evaluated: Mapping[str, float]
    ) -> None:
        """Report the step before a change, as all ranks know it, and save it if that is due.

        Args:
            evaluated: the losses of validation sets after it.
        """
        outcome, steps = _interrupted_step(change), change.recovery.steps
        if outcome is None:
            return
        parts = self._parts()
        with parts.training.busy("report"):
            if outcome.has_numbers:
                lr = self._config.rate_of(steps - 1)
                parts.reporter.step(steps - 1, outcome, lr, (), None, evaluated)
            parts.checkpoints.evaluated(steps, evaluated)
            if steps > parts.checkpoints.committed_step:
                parts.checkpoints.after_step(steps, outcome)

    def close(self) -> None:
        if self._reporter is not None:
            self._reporter.close()
        self._records.incidents.close()

    def _parts(self) -> Parts:
        assert self._training is not None
        assert self._reporter is not None
        saves = self._saves.current
        trace = self._records.run.trace
        return Parts(self._training, saves, self._reporter, self._faults.at, self._clock, trace)

    def _note_fault(self, fault: Fault) -> None:
        fields = asdict(fault)
        self._records.events.append("fault_injected", **fields)
        logger.warning("on purpose: %s", fields)

    def _deadlock(self) -> None:
        """Wait for a message of the next rank, which does not send it."""
        control = self._parts().training.groups.control
        peer = control.ranks[(control.index + 1) % control.size]
        control.receive(torch.zeros(1), peer, STATE_TRANSFER.stop - 1).wait()

    def _corrupt(self) -> None:
        """Flip one bit of a block that this rank owns, or else shadows."""
        training = self._parts().training
        optimizer, shadows = training.optimizer, training.shadows
        kind = (*optimizer.form.held[1:], MASTER)[0]
        owned = bool(optimizer.owned)
        state = optimizer.block_state(0) if owned else shadows.block_state(shadows.blocks[0])
        values = state[kind]
        values.view(torch.int32 if values.dtype == torch.float32 else torch.int64)[0] ^= 1 << 20


def _interrupted_step(change: CompletedChange) -> Outcome | None:
    """The outcome of the step before a change; None if a checkpoint was loaded."""
    return change.recovery.outcome if change.from_checkpoint is None else None
