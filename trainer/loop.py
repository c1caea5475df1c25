"""The training loop of one rank: compute, reduce, vote, apply."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic, perf_counter, sleep

from torch.distributed import Store

from holdfast.parallel.comm import WaitNews, watch_waits
from holdfast.parallel.errors import (
    ComputesWrongly,
    Diverged,
    Interrupted,
    NotSaved,
    NumericsError,
    Stopped,
    Undecided,
)
from holdfast.parallel.output import DiskWord, tell
from holdfast.parallel.schedules import StepPhase
from holdfast.trainer.check import recorded_operations
from holdfast.trainer.config import RunConfig
from holdfast.trainer.reports import (
    EventFile,
    PhaseClock,
    Reporter,
    introduce,
    note_operations,
    trace,
    workers_of,
)
from holdfast.trainer.run import RunDirectory, Signals, locate_log
from holdfast.trainer.saves import Checkpoints, answer_request, go_back_from_spike
from holdfast.trainer.step import (
    AtPhase,
    Outcome,
    Requests,
    Training,
    WrongComputation,
    evaluates_after,
    no_hook,
    open_training,
    probe,
    wants_probe,
)
from holdfast.trainer.worlds import WorldInfo

logger = logging.getLogger("holdfast.loop")

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
"""The pauses between the tries of a last save."""
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that a step of one rank works with."""

    training: Training
    checkpoints: Checkpoints
    reporter: Reporter
    at: AtPhase = no_hook
    """Called at each phase of a step; faults are injected here."""
    clock: PhaseClock = field(default_factory=PhaseClock)
    trace: Path = Path("trace")
    """The folder of traces."""


def train(
    config: RunConfig,
    world: WorldInfo,
    store: Store,
    run: RunDirectory,
    *,
    alone: bool = True,
) -> None:
    """Train all steps of `config` on this rank. Collective over all workers.

    Args:
        alone: whether a second interrupt ends this process; False: its parent does that.

    Raises:
        NumericsError: a step's gradients were unusable, and numerics.nonfinite is "error".
        Diverged: too many steps in a row were not applied; see `end_divergence`.
        CheckpointError: the last step could not be saved.
        PeerLost: another worker is gone.
        Stopped: a signal ended the run early; its state is saved.
    """
    introduce(store, world)
    training = open_training(config, world, store)
    locate_log(lambda: place_of(training))
    workers = workers_of(store, world)
    signals = Signals()
    machines = [worker["machine"] for worker in workers]
    checkpoints = Checkpoints(training, world, store, run, machines, signals)
    notes = list(run.resume.notes)
    first = checkpoints.resume(notes.append)
    events = EventFile(run.events, DiskWord(lambda line: tell(f"holdfast: {line}")))
    reporter = Reporter(training, world, run, workers, events, first)
    parts = Parts(training, checkpoints, reporter, trace=run.trace)
    steps = config.train.steps
    waits = watch_waits(training.groups, world.rank, store, lambda news: tell_wait(news, events))
    try:
        reporter.resumed(first, checkpoints.loaded, notes)
        reporter.started(first, [worker["node"] for worker in workers])
        signals.listen(reporter.interrupted, alone=alone)
        done, stop_after = first, config.train.stop_after
        while done < steps:
            outcome = run_step(parts, done)
            done = training.progress.decided
            if outcome.requests.stop or (stop_after and done >= stop_after):
                stop(parts, done, outcome.requests)
                return
        finish(parts, max(first, steps))
    except Exception as error:
        note_operations(error, training.groups.recorder)
        raise
    finally:
        waits.close()
        signals.close()
        checkpoints.close()
        reporter.close()


def tell_wait(news: WaitNews, events: EventFile) -> None:
    """Tell of a wait: a person and the events on one rank, the logs of all. From any thread."""
    logger.warning("%s", news.line())
    if news.is_teller:
        tell(f"holdfast: {news.line()}")
        name = "went_on" if news.is_over else "waiting"
        where = {"step": news.step, "operation": news.operation}
        events.append(name, rank=news.rank, seconds=news.seconds, peers=news.peers, **where)


def place_of(training: Training) -> tuple[int, int]:
    """The generation, and the step under way, counted from 1 and limited to the last. Local."""
    step = min(training.progress.decided + 1, training.config.train.steps)
    return training.plan.generation, step


class StepTimer:
    """Measures the phases of one step, and calls hooks at their beginnings. Local."""

    def __init__(self, parts: Parts, step: int) -> None:
        """Begin to measure `step`, counted from 0."""
        self._parts, self._step = parts, step
        self.spans: list[trace.PhaseSpan] = []
        """The spans of the ended phases, in seconds of `perf_counter`."""
        self._start = perf_counter()
        parts.clock.start(parts.training)

    @contextmanager
    def phase(self, phase: StepPhase) -> Iterator[None]:
        """Measure one phase; a phase that raises leaves no span."""
        self._parts.at(self._step + 1, phase)
        yield
        self._parts.clock.end(self._parts.training, len(self.spans))
        stop = perf_counter()
        self.spans.append(trace.PhaseSpan(phase, self._start, stop))
        self._start = stop


def run_step(parts: Parts, step: int, *, change: bool = False, leave: bool = False) -> Outcome:
    """Run one step: compute, reduce, vote, apply, report, save. Collective over all ranks.

    Afterwards `training.progress` says how many steps are done: fewer than before if the run has
    gone back.

    Args:
        change: whether this rank knows of ranks that wait to join or leave.
        leave: whether this rank leaves at the next change.
    """
    training, checkpoints, reporter = parts.training, parts.checkpoints, parts.reporter
    config = training.config
    lr = config.rate_of(step)
    training.groups.recorder.note_step(step + 1)
    timer = StepTimer(parts, step)
    recording = recorded_operations(
        parts.trace,
        step + 1,
        training.rank,
        lambda: training.current_micro_batch,
        steps=config.log.operation_steps,
        kept=config.log.operation_values,
    )
    with timer.phase("compute"), recording:
        times = training.compute(step, parts.at)
    with timer.phase("reduce"):
        squares, flags = training.reduce()
    if (wrong := training.audit()) is not None:
        _end_of_wrong(parts, step, wrong)
    every = config.elastic.straggler_every
    compares = bool(every) and (step + 1) % every == 0
    with timer.phase("vote"):
        own = parts.clock.times(training, probed_s(parts, step)) if compares else None
        requests = replace(checkpoints.requests(), change=change, leave=leave)
        outcome = training.vote(squares, flags, requests, own)
    with timer.phase("apply"):
        training.apply(lr, parts.at)
    if outcome.spike and go_back_from_spike(training, checkpoints, reporter, step, outcome):
        return outcome
    if not outcome.usable:
        with training.busy("report"):
            reporter.skipped(step, outcome, refuse(config, step, outcome))
        end_divergence(config, step, outcome)
    evaluated = training.evaluate() if evaluates_after(config, step + 1) else {}
    if compares:
        stragglers = parts.clock.compare(training, config.elastic.straggler_factor)
        links = parts.clock.links.compare(training, config.elastic.slow_link_factor)
        with training.busy("report"):
            for straggler in stragglers:
                reporter.straggler(step + 1, straggler)
            for link in links:
                reporter.slow_link(step + 1, link)
    with training.busy("report"):
        if outcome.has_numbers:
            reporter.step(step, outcome, lr, timer.spans, times, evaluated)
        checkpoints.evaluated(step + 1, evaluated)
        if checkpoints.after_step(step + 1, outcome):
            reporter.checkpoint_skipped(step + 1)
        reporter.checkpoints(checkpoints.results())
    if outcome.requests.rewind and not outcome.requests.stop:
        answer_request(training, checkpoints, reporter, step + 1)
    return outcome


def probed_s(parts: Parts, step: int) -> float:
    """The seconds that this rank takes for a fixed computation; 0 where none is asked for. Local.

    Args:
        step: counted from 0.
    """
    training = parts.training
    if not wants_probe(training.plan):
        return 0.0
    start = perf_counter()
    probe(training.device)
    parts.at(step + 1, "micro-batch")
    return perf_counter() - start


def _end_of_wrong(parts: Parts, step: int, wrong: WrongComputation) -> None:
    """Report that a rank computes wrongly; that rank ends, and the step goes on without it.

    Raises:
        ComputesWrongly: this rank does.
        Undecided: it is not known which rank does, so that no result of the step can be used.
    """
    with parts.training.busy("report"):
        parts.reporter.computes_wrongly(step + 1, wrong)
    if not wrong.decided:
        raise Undecided(
            f"{wrong}, and again when both try it once more; test these machines, and go on "
            "without the sick one from the last checkpoint (three replicas would name it)"
        )
    if parts.training.rank in wrong.ranks:
        raise ComputesWrongly(f"{wrong}; this rank takes no further part, test its machine")


def save_last(parts: Parts, step: int, limit_s: float) -> str:
    """Save the state after `step` steps, again and again while that fails. Collective.

    The steps that the ranks still hold are not given up for a disk that may have room again.

    Args:
        limit_s: the time, on the first rank, after which no further save begins.
    Returns:
        The reason why the state is not saved; empty once it is.
    """
    checkpoints, groups = parts.checkpoints, parts.training.groups
    told: set[str] = set()
    reason = "its save has not ended"
    end_s, pause_s = monotonic() + limit_s, _FIRST_PAUSE_S
    while True:
        checkpoints.save(step)
        ended = checkpoints.finish()
        parts.reporter.checkpoints([result for result in ended if result.error not in told])
        errors = [result.error for result in ended if result.error]
        told.update(errors)
        reason = errors[-1] if errors else reason
        saved, over = checkpoints.settle(step, over=monotonic() + pause_s > end_s)
        if saved or over:
            return "" if saved else reason
        with groups.recorder.busy("save", pause_s + _POLL_S):
            again_s = monotonic() + pause_s
            while monotonic() < again_s:
                groups.signal.check()
                sleep(_POLL_S)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def finish(parts: Parts, done: int) -> None:
    """Save the last step and report the end. Collective over all ranks.

    Args:
        done: the number of steps done. A run that is past its last step already, because
            train.steps was lowered, writes nothing.
    Raises:
        NotSaved: the last step could not be saved.
    """
    training, checkpoints, reporter = parts.training, parts.checkpoints, parts.reporter
    steps = training.config.train.steps
    if done > steps:
        reporter.past_end(done)
        return
    reason = save_last(parts, steps, training.config.checkpoint.retry_s)
    digest = training.parameter_digest()
    if reason:
        raise NotSaved(f"all steps are done, but the last is not saved: {reason}")
    reporter.finished(digest)
    checkpoints.forget_memory()


def stop(parts: Parts, step: int, requests: Requests, *, leaving: bool = False) -> None:
    """End the run before its last step, with its state saved. Collective over all ranks.

    Args:
        leaving: whether it ends because all ranks leave.
    Raises:
        Stopped: a signal asked for it; `Interrupted`: a person.
        NotSaved: no signal asked for it, and the state could not be saved.
    """
    section, asked = parts.training.config.checkpoint, requests.stop or leaving
    limit_s = min(section.retry_s, section.exit_s / 2) if asked else section.retry_s
    reason = save_last(parts, step, limit_s)
    if reason and not asked:
        raise NotSaved(f"step {step} is done, but not saved: {reason}")
    if asked:
        saved = f"could not be saved: {reason}" if reason else "is saved"
        end = f"after step {step}, which {saved}"
        if requests.interrupt:
            raise Interrupted(f"interrupted {end}")
        raise Stopped(f"stopped by a signal {end}; the same command goes on")


def refuse(config: RunConfig, step: int, outcome: Outcome) -> str:
    """The reason for which a step, counted from 0, was not applied.

    Raises:
        NumericsError: the gradients are unusable, and numerics.nonfinite is "error".
    """
    if outcome.spike:
        message = f"step {step + 1} is a spike and was not applied: {outcome.spike}"
        logger.warning("%s", message)
        return message
    if outcome.nonfinite_ranks or outcome.grad_norm != outcome.grad_norm:
        reason = "a gradient or the loss is not finite"
    elif outcome.out_of_range_ranks:
        limit = 2.0 ** (63 - config.numerics.fraction_bits)
        reason = f"a gradient sum exceeds +-{limit:g} (numerics.fraction_bits)"
    else:
        reason = "all gradients are exactly zero"
    message = f"step {step + 1}: {reason}, loss {outcome.loss:g}; the step was not applied"
    if config.numerics.nonfinite == "error":
        advice = "lower optimizer.lr or check the data; numerics.nonfinite = 'skip' goes on instead"
        raise NumericsError(f"{message}; {advice}")
    logger.warning("%s", message)
    return message


def end_divergence(config: RunConfig, step: int, outcome: Outcome) -> None:
    """End a run that has skipped steps for too long.

    Raises:
        Diverged: the step, counted from 0, is the last of numerics.nonfinite_limit in a row, or of
            numerics.spike_limit if it is a spike.
    """
    key = "spike_limit" if outcome.spike else "nonfinite_limit"
    limit = getattr(config.numerics, key)
    if limit and outcome.skipped >= limit:
        raise Diverged(
            f"step {step + 1}: {outcome.skipped} steps in a row were not applied "
            f"(numerics.{key} = {limit}), so the run has diverged; go on from an earlier "
            "checkpoint with a lower optimizer.lr, or check the data"
        )
