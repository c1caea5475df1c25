"""The training of one rank: its plan, model, optimizer and data, and the four parts of a step.

A step is a transaction: `compute` and `reduce` change nothing durable, `vote` tells every rank that
all can finish, `apply` updates the state. trainer/loop.py calls them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from time import perf_counter

import torch
from torch import Tensor

from holdfast.parallel.comm import BusyKind, Groups
from holdfast.parallel.errors import OffloadError
from holdfast.parallel.expert_parallel import add_lost_gradients
from holdfast.parallel.layout import LostGradient, Slices
from holdfast.parallel.offload import Offloader
from holdfast.parallel.optimizer import (
    BackgroundTransfer,
    Fence,
    GradientAccumulator,
    HeadFactors,
    ParameterBuffer,
    ShadowState,
    ShardedOptimizer,
    clipping_factor,
    head_factors,
)
from holdfast.parallel.pipeline import ActionTimes, Chunk
from holdfast.parallel.plan import Plan, evaluation_program, shards, training_program
from holdfast.parallel.schedules import Program
from holdfast.trainer.config import Removal, RunConfig, with_removals
from holdfast.trainer.data import Dataset
from holdfast.trainer.models import further_losses_of
from holdfast.trainer.step.audit import StepAudits, WrongComputation, passes_through
from holdfast.trainer.step.construction import (
    ModelParts,
    carried_model,
    expert_team,
    new_executor,
    new_model,
    new_optimizer,
    new_runners,
    new_shadows,
    open_split,
    prepared,
)
from holdfast.trainer.step.digest import parameter_digest
from holdfast.trainer.step.evaluation import (
    batches_of,
    mean_held_out_loss,
    open_validation,
)
from holdfast.trainer.step.history import StateHistory, live_state, restore
from holdfast.trainer.step.in_flight import StepInFlight
from holdfast.trainer.step.micro_batches import (
    Claims,
    Included,
    Inputs,
    MicroBatches,
    RankInputs,
    reads_batches,
)
from holdfast.trainer.step.offloading import open_offloader
from holdfast.trainer.step.programs import StepPrograms
from holdfast.trainer.step.state_views import TrainingState, block_numbers
from holdfast.trainer.step.vote import (
    NO_REQUESTS,
    AtPhase,
    Losses,
    Notes,
    Outcome,
    RankTimes,
    Requests,
    SliceLosses,
    StepProgress,
    by_slice,
    judged,
    loss_slots,
    micro_batch_work,
    no_hook,
    usual_s,
)
from holdfast.trainer.step.voting import StepVote, Told

_NOT_KNOWN = 1 << 62
"""As the number of gradients that a parameter is offered: it is not known yet."""


def _told(at: AtPhase, step: int, half: bool) -> None:
    """Tell of a micro-batch's gradients, with which half of a step's may have begun."""
    at(step, "micro-batch")
    if half:
        at(step, "backward")


class Training:
    """All that one rank holds for training under one plan.

    It wires parts that have modules of their own, so it has an attribute for each: where it stands
    (config, rank, device, plan, groups), its data and model, the running step, the optimizer and
    its followers, the executor.
    """

    def __init__(
        self,
        config: RunConfig,
        rank: int,
        device: torch.device,
        plan: Plan,
        groups: Groups,
        *,
        before: Training | None = None,
        initial: bool = True,
    ) -> None:
        """Build the parts, or reuse those of `before`.

        Args:
            before: this rank's training under the plan before; the parts that the change leaves
                unchanged are reused.
            initial: whether to draw initial weights; False if they are filled from elsewhere.
        """
        self.config, self.rank, self.device = _going_on(config, before), rank, device
        self.plan, self.groups = plan, groups
        self.data = open_split(config, "train") if before is None else before.data
        self._validation = None if before is None else before._validation
        """The data to evaluate on, by name; what is held out is opened by the first evaluation."""
        if before is None and config.train.eval_every and config.data.validation:
            self._validation = open_validation(config)
        self.progress = StepProgress() if before is None else replace(before.progress)
        self.offloader = self._new_offloader() if before is None else before.offloader
        self._is_gathering = False
        """Whether parameters of the last update may be on their way to or from this rank."""
        self.model = self._model_after(before, initial=initial)
        if self.offloader is not None:
            self.offloader.keep(*self.model.buffer.tensors)
        self._shadows = self._shadows_after(before)
        self.optimizer = self._optimizer_after(before, initial=initial)
        if self.model.layers is not None:
            self.model.layers.connect(plan, rank, groups.world)
        self._voting = StepVote(config, plan, rank, self.optimizer, groups)
        self._fence: Fence | None = None
        """The fence that is called before a block changes, while a snapshot copies the state."""
        self.background_transfer: BackgroundTransfer | None = None
        """This rank's part in the background transfer to the next plan."""
        team = None if before is None else before._team
        self._team = expert_team(config, plan, rank, groups, team)
        self._programs = StepPrograms(plan, rank, self.model, self._team)
        begun, program = self.progress.decided, self._programs.whole[0]
        self._in_flight = StepInFlight(plan, rank, self.model, program, begun, self._team)
        last = len(plan.placement) - 1
        self._micro_batches = self._new_micro_batches()
        self._audits, self._claims = self._new_audits(), Claims(plan, rank, groups, device)
        self._runners = new_runners(
            self.model,
            last,
            context=self._micro_batches.context,
            before_gradients=self._in_flight.before_gradients,
            watch=self._audits.watch.see,
        )
        self.executor = new_executor(
            config, self._runners, plan, rank, groups, device, self.offloader
        )
        self._start(begun, self.data, training=True)

    @cached_property
    def history(self) -> StateHistory:
        """The steps that can be taken back: those since the last change of plan."""
        return StateHistory(self.config.elastic.rewind)

    def _new_micro_batches(self) -> MicroBatches:
        config, model = self.config, self.model
        return MicroBatches(
            config,
            self.data,
            self.device,
            model.accumulator.slices,
            reads=reads_batches(config, model.chunks, len(self.plan.placement) - 1),
            recorder=self.groups.recorder,
            experts=self._team,
        )

    def _new_audits(self) -> StepAudits:
        config = self.config
        return StepAudits(
            self.plan,
            self.rank,
            self.model,
            self.groups.control,
            self._compute_apart,
            seed=config.train.seed,
            every=config.elastic.audit_every,
        )

    def _new_offloader(self) -> Offloader | None:
        # Of the training, which later plans do not keep, it holds nothing.
        grace_s = self.config.elastic.startup_grace_s
        waiting = partial(self.groups.recorder.busy, "offload", grace_s)
        return open_offloader(self.config, self.device, waiting)

    def _model_after(self, before: Training | None, *, initial: bool) -> ModelParts:
        """The model of the plan before if it can be reused; otherwise a new one."""
        groups = self.groups
        if before is not None and before.groups.shards is groups.shards:
            carried = carried_model(before.model, before.plan, self.plan, self.rank)
            if carried is not None:
                return carried
        return new_model(
            self.config,
            self.plan,
            self.rank,
            groups,
            self.device,
            initial=initial,
            before=None if before is None else before.model.buffer,
        )

    def _optimizer_after(self, before: Training | None, *, initial: bool) -> ShardedOptimizer:
        """The optimizer of this rank's blocks; it reuses what it can of the plan before."""
        return new_optimizer(
            self.config,
            self.plan,
            self.rank,
            self.model,
            self.groups,
            self._shadows,
            None if before is None else before.optimizer.owned_state,
            initial=initial,
        )

    def _shadows_after(self, before: Training | None) -> ShadowState | None:
        """The copies of other ranks' blocks; None in a run that is not elastic."""
        plan = self.plan
        if not (self.config.elastic.enabled or plan.shadows or plan.incoming):
            return None
        old = None if before is None else before._shadows
        copies = None if old is None else old.copies
        return new_shadows(self.config, plan, self.rank, self.device, copies)

    @property
    def rank_times(self) -> Mapping[int, RankTimes]:
        """The times of all ranks, as the last vote that compared them told."""
        return self._voting.rank_times

    @property
    def parameter_buffer(self) -> ParameterBuffer:
        """This rank's parameters, flat, once all of them have arrived."""
        self.finish_gather()
        return self.model.buffer

    @property
    def accumulator(self) -> GradientAccumulator:
        """This rank's gradient sums."""
        return self.model.accumulator

    @property
    def chunks(self) -> list[Chunk]:
        """This rank's model chunks, in order."""
        return list(self.model.chunks.values())

    @property
    def shadows(self) -> ShadowState:
        """The copies of other ranks' blocks. Only an elastic run has them."""
        assert self._shadows is not None
        return self._shadows

    def state(self) -> TrainingState:
        """The place of this rank's saved state, once all parameters have arrived. Local."""
        return TrainingState(
            self.plan, self.rank, self.parameter_buffer, self.optimizer, self._saved_shadows
        )

    @property
    def saves_from_shadows(self) -> bool:
        """Whether checkpoints are taken from the shadows' copies in host memory."""
        return self._saved_shadows is not None

    @property
    def _saved_shadows(self) -> ShadowState | None:
        shadows = self._shadows
        saved = shadows is not None and shadows.in_host_memory and bool(self.plan.shadows)
        return shadows if saved else None

    def busy(self, kind: BusyKind) -> AbstractContextManager[None]:
        """Mark a block as work without messages, for those that look for hangs."""
        return self.groups.recorder.busy(kind, self.config.elastic.startup_grace_s)

    def protect(self, fence: Fence | None) -> None:
        """Have `fence` called before a block changes, while a snapshot copies the state. Local.

        Blocks are numbered as by `state().before`; see `block_numbers`.
        """
        self._fence = fence

    @property
    def current_micro_batch(self) -> int:
        """The micro-batch whose forward pass ran last."""
        return self._micro_batches.current

    @property
    def slices(self) -> Slices:
        """The slices of sequences, and those that this rank computes."""
        return self._micro_batches.slices

    @property
    def step_micro_batches(self) -> int:
        """The number of micro-batches of a step over all replicas, at most."""
        return self.config.train.global_batch // self.config.train.micro_batch

    def _start(self, step: int, data: Dataset, *, training: bool) -> None:
        noted = self._noted_parts if training and self.config.log.has_norms(step) else ()
        self._micro_batches.begin(step, data, training=training, noted=noted)
        for runner in self._runners.values():
            runner.clear()

    def compute(
        self, step: int, at: AtPhase = no_hook, only: frozenset[int] | None = None
    ) -> ActionTimes:
        """A: run the program of `step`; gradients accumulate. Collective over the pipeline group.

        After a recovery (`resume_step`) only missing micro-batches are computed.

        Args:
            step: counted from 0.
            at: called during the phase; see `AtPhase`.
            only: the micro-batches that are computed; None: all of the step.
        """
        if self.background_transfer is not None:
            self.background_transfer.start(lambda: at(step + 1, "fill"))
        self._start(step, self.data, training=True)
        planned = only is not None or self.history.is_trial
        if self._claims_in(step) and not planned:
            return self._compute_claimed(step, at)
        is_audited = self._audits.is_due(step) and not self.history.is_trial
        if is_audited and not self._in_flight.resumes(step):
            self._in_flight.begin(step)
            self._audits.begin(step, self._micro_batches_of(step))
        lost = list[LostGradient]()
        only = self._only_of(step) if only is None else only
        if self._in_flight.begin(step, partial(_told, at, step + 1)):
            only = self.to_compute(step)
            lost = self._in_flight.lost_gradients(only)
        offers = self._programs.offers(only, lost)
        self.optimizer.begin_step(offers, lambda: at(step + 1, "exchange"), only)
        receiving = partial(at, step + 1, "prefetch")
        with self._layers_of(self._programs.of_rank(only), receiving, only):
            try:
                if self._team is not None:
                    add_lost_gradients(lost, self.chunks, self._team)
                return self.executor.run(*self._programs.of(only))
            except OffloadError as error:
                return self._go_on_in_memory(step, error)

    def _claims_in(self, step: int) -> bool:
        """Whether ranks claim the micro-batches of a step, and do not compute by the plan."""
        planned = self._audits.is_due(step) or self._in_flight.resumes(step)
        return self.config.elastic.claims and not planned

    def _compute_claimed(self, step: int, at: AtPhase) -> ActionTimes:
        """Compute what this rank claims. See `Claims`."""
        claims, programs = self._claims, self._programs
        of_one = programs.offers(programs.first)
        last = False

        def before(half: bool) -> None:
            """See whether these gradients are this rank's last, whose sums may leave."""
            nonlocal last
            _told(at, step + 1, half)
            if not last and claims.is_last():
                last = True
                self.optimizer.go_on(of_one)

        self._in_flight.begin(step, before)
        self.optimizer.begin_step(
            dict.fromkeys(of_one, _NOT_KNOWN), lambda: at(step + 1, "exchange")
        )
        times = ActionTimes()
        for number in claims.step(self._only_of(step)):
            times.extend(self.executor.run(programs.of_one(number), {}))
        return times

    def _compute_apart(self, plan: Plan, begun: bool) -> None:
        """Run the program of a plan without effect on the step.

        Args:
            begun: whether the step has sums already.
        """
        micro_batches, notes = self._micro_batches, self._micro_batches.notes
        losses = {index: dict(runner.losses) for index, runner in self._runners.items()}
        micro_batches.notes = Notes()
        program_of = partial(training_program, plan)
        aside = self.accumulator.aside() if begun else nullcontext()
        with aside, self._layers_of(program_of):
            self.executor.run(*prepared(self.rank, program_of))
        micro_batches.notes = notes
        for index, runner in self._runners.items():
            runner.losses.clear()
            runner.losses.update(losses[index])

    def audit(self) -> WrongComputation | None:
        """Between reduce and vote: whether a rank has computed wrongly. Collective over all ranks.

        See `StepAudits`. If it is known which rank does, sums of this step with micro-batches that
        have passed that rank are forgotten, so that they are computed again without it.
        """
        wrong = self._audits.finish()
        if (
            wrong is not None
            and wrong.decided
            and passes_through(self.plan, self.rank, wrong.ranks)
        ):
            self.accumulator.clear()
        return wrong

    @contextmanager
    def _layers_of(
        self,
        program_of: Callable[[int], Program],
        receiving: Callable[[], None] = lambda: None,
        only: frozenset[int] | None = None,
    ) -> Iterator[None]:
        """Have the parameters of layers that replicas share in memory while a program uses them."""
        layers = self.model.layers
        if layers is not None:
            layers.begin(program_of, receiving, only)
        yield
        if layers is not None:
            layers.end()

    def _only_of(self, step: int) -> frozenset[int] | None:
        """The micro-batches of a step with a smaller batch than the others; None: it has all."""
        count = self._micro_batches_of(step)
        return None if count == self.step_micro_batches else frozenset(range(count))

    def _go_on_in_memory(self, step: int, error: OffloadError) -> ActionTimes:
        """Keep all activations in memory from now on, because some could not be read back.

        The sums of complete parameters may have left already, so the rest of the step is computed.
        With pipeline or tensor peers, or with peers that send parameters, it cannot be repeated
        here, and the error propagates.
        """
        alone = self.model.layers is None and self.groups.shards.size == 1
        if self.offloader is None or self.plan.stage_replicas.pipeline > 1 or not alone:
            raise error
        self.offloader.abort(str(error))
        self.executor.run_weight_parts()
        included = self._included_here()
        self._in_flight.resume(step, included, self._in_flight)
        self._start(step, self.data, training=True)
        self._in_flight.begin(step)
        missing = self.to_compute(step)
        self.optimizer.go_on(self._programs.offers(missing))
        return self.executor.run(*self._programs.of(missing))

    @property
    def _noted_parts(self) -> tuple[int, ...]:
        """The parts whose tokens' outputs this rank notes; none: another rank has these tokens."""
        here = self.plan.mesh_of(self.rank).along(self.groups.shards.index)
        is_copy = here["tensor"] > 0 and not self.config.parallel.sequence_parallel
        return () if is_copy else self.plan.parts_of(self.rank)

    def to_compute(self, step: int) -> frozenset[int]:
        """The micro-batches of `step` that some rank's sums lack when it begins."""
        return self._in_flight.missing(step, self._micro_batches_of(step))

    def _micro_batches_of(self, step: int) -> int:
        return self.config.train.batch_of(step) // self.config.train.micro_batch

    def included(self) -> Included:
        """After an interrupted step, the micro-batches in each parameter's sums here. Local.

        The result is empty if the step is decided, or if sums are shared: those of a lost rank are
        lost for all micro-batches.
        """
        step = self._in_flight.step
        if shards(self.plan, "gradients"):
            return {}
        if not self._micro_batches.training or self.progress.decided != step:
            return {}
        self.executor.run_weight_parts()
        return self._included_here()

    def _included_here(self) -> Included:
        """The units in each parameter's sums here; what was noted of them is kept."""
        return self._in_flight.included(self._last_losses, self._micro_batches.notes)

    def kept_inputs(self) -> RankInputs:
        """After an interrupted step, what is kept of its inputs of experts. Local."""
        return self._in_flight.kept_inputs()

    def resume_step(
        self,
        step: int,
        included: Included,
        before: Training | None,
        inputs: Mapping[int, Inputs] | None = None,
    ) -> None:
        """Compute only what is missing in `included` when `step` is computed next. Local.

        Args:
            before: this rank's interrupted training; None if its sums are not valid.
            inputs: as of `inputs_after_change`.
        """
        interrupted = None if before is None else before._in_flight
        self._in_flight.resume(step, included, interrupted, inputs)

    def release(self) -> None:
        """Free the memory of what the next step begins without, until it begins. Local."""
        self._in_flight.release()

    def reduce(self) -> tuple[Tensor, int]:
        """B: add every block's sum at its owner and send it to its shadows. Collective over these.

        Returns:
            Each block's square sum, and flags; see `ShardedOptimizer.reduce`.
        """
        since = perf_counter()
        self.finish_gather()
        found = self.optimizer.reduce()
        if self.model.layers is not None:
            self.model.layers.finish()
        self.groups.recorder.blocked_s += perf_counter() - since
        return found

    def vote(
        self,
        squares: Tensor,
        flags: int,
        requests: Requests = NO_REQUESTS,
        times: RankTimes | None = None,
    ) -> Outcome:
        """C: all-reduce the gradient norm and the loss. Collective over all ranks.

        A rank votes only with all the gradients that it owns, and with no state under way. So any
        rank with the result of the vote knows that all ranks can apply the step.

        Args:
            times: this rank's, in a step that compares those of all ranks; see `rank_times`.
        """
        if self.background_transfer is not None:
            requests = replace(requests, filling=not self.background_transfer.pause())
        losses = self._reported_losses
        reported = {} if losses is None else self._in_flight.reported(losses)
        kinds = 1 + further_losses_of(self.config.model)
        told = Told(
            self._in_flight.step,
            squares,
            flags,
            loss_slots(reported, self.step_micro_batches, self.slices.count, kinds),
            self._in_flight.reported_notes(self._micro_batches.notes),
            times,
        )
        outcome = self._voting.outcome(told, requests, self._micro_batches.predicted)
        if times is not None:
            own_work = micro_batch_work(self.plan, self.rank)
            self._claims.pace.of_all_s = usual_s(self.rank_times) * own_work
        outcome = judged(outcome, self.progress.recent, self.config.numerics)
        if not outcome.usable:
            before = self.progress.outcome
            outcome = replace(outcome, skipped=1 + (before.skipped if before is not None else 0))
        window = self.config.numerics.spike_window
        self.history.deciding(self.progress)
        self.progress.decide(self._in_flight.step + 1, outcome, window)
        self.progress.filled = not outcome.requests.filling
        return outcome

    def work_done(self) -> float:
        """The operations of this rank's forward passes in the step so far. Local.

        See `micro_batch_work`.
        """
        count, attended = self._micro_batches.computed()
        whole, linear = (micro_batch_work(self.plan, self.rank, share) for share in (1.0, 0.0))
        return linear * count + (whole - linear) * attended

    def apply(self, lr: float, at: AtPhase = no_hook) -> None:
        """D: update by owners, gather parameters. Collective over the replicas of a stage.

        With parallel.overlap, parameters arrive beside what follows; see `finish_gather`, which
        also tells of a peer that was lost meanwhile: the update is done whole. A step that must not
        be applied changes nothing.

        Args:
            at: called during the phase; see `AtPhase`.
        """
        sending = partial(at, self.progress.decided, "gather")
        self._update(lr, partial(self.optimizer.update_and_send, sending=sending))
        self._is_gathering = not self.progress.complete
        if not self.config.parallel.overlap:
            self.finish_gather()

    def update(self, lr: float) -> None:
        """Update the owned and shadowed blocks as the last vote decided. Local.

        Parameters are gathered later, under the next plan.
        """
        self._update(lr, self.optimizer.update)
        self._is_gathering = False

    def _update(
        self, lr: float, update: Callable[[float, float, Fence | None, HeadFactors], None]
    ) -> None:
        outcome = self.progress.outcome
        assert outcome is not None
        if self.background_transfer is None:  # what it fills is not to be put back
            self.history.keep(self._live() if outcome.usable else None)
        if outcome.usable:
            self.progress.complete = False
            factor = clipping_factor(outcome.grad_norm, self.config.train.clip_grad_norm)
            heads = head_factors(outcome.logits, self.config.optimizer.qk_clip)
            fence, numbers = self._fence, block_numbers(self.optimizer, self._saved_shadows)
            if self._shadows is not None:
                self._shadows.update(lr, factor, fence and numbers.fence_of_shadows(fence), heads)
            update(lr, factor, fence and numbers.fence_of_owned(fence), heads)
        self.progress.updated = self.progress.decided

    def finish_gather(self) -> None:
        """Wait until all parameters are here, and this rank's own have left for their holders.

        Raises:
            PeerLost: a peer is gone.
        """
        if self._is_gathering:
            self.model.arrival.finish()
            self._is_gathering, self.progress.complete = False, True

    @property
    def has_all_parameters(self) -> bool:
        """Whether the parameters here are those after the last update; asked without waiting."""
        arrived = self._is_gathering and not self.model.arrival.is_pending
        return self.progress.complete or arrived

    def close(self) -> None:
        """End what runs beside a step, once the communicators are aborted. Local."""
        self.optimizer.close()
        if self.model.layers is not None:
            self.model.layers.cancel()
        if self.background_transfer is not None:
            self.background_transfer.close()

    def _live(self) -> list[Tensor]:
        return live_state(self.optimizer, self._shadows)

    def take_back(self, step: int) -> None:
        """Set this rank's blocks and its progress to those after `step` steps. Local.

        All ranks do, and then have parameters of other steps until `gather_again`.

        Raises:
            KeyError: this state is not known; see `history`.
        """
        kept = self.history.find(step)
        self._put_back(kept.progress, kept.copies)

    def _put_back(self, progress: StepProgress, copies: tuple[Tensor, ...] | None) -> None:
        if self._fence is not None:  # a snapshot may still copy what is overwritten here
            numbers = block_numbers(self.optimizer, self._saved_shadows)
            self._fence(numbers.of_owned(numbers.owned))
        if copies is not None:
            restore(self._live(), copies)
        self.progress = replace(progress, complete=False)
        self._in_flight.resume(-1, {}, None)
        self.optimizer.round_masters()

    def go_back(self, step: int, removals: Sequence[Removal]) -> None:
        """Go on from the state after `step` steps, and without some samples. As `take_back`."""
        rewinds = self.progress.rewinds + 1
        self.model.arrival.cancel()
        self._is_gathering = False
        self.take_back(step)
        self.progress.rewinds = rewinds
        self.history.forget_from(step)
        self.remove(removals)

    def gather_again(self) -> None:
        """Bring every rank the parameters of its blocks' owners. Collective over their holders."""
        self.optimizer.gather()
        self.progress.complete = True

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Steps within the block are tried: afterwards state and data are those before it.

        Collective over all ranks. If a rank is lost meanwhile, its blocks are put back on each of
        the others, and their parameters are left to the recovery.
        """
        self.finish_gather()
        progress, config, data = self.progress, self.config, self.data
        with self.history.trial(self._live()) as copies:
            try:
                yield
                self.finish_gather()
            finally:
                self.model.arrival.cancel()
                self.config, self.data, self._is_gathering = config, data, False
                self._put_back(progress, copies)
        self.gather_again()

    def remove(self, removals: Sequence[Removal]) -> None:
        """Train without more samples from now on. Local."""
        before = self.config.train.samples_before
        self.config = with_removals(self.config, removals)
        self.data = self.data.without([(before(found.start), found.samples) for found in removals])

    @property
    def _last_losses(self) -> Losses | None:
        """The loss sums of what has passed the model's last chunk; None if it is elsewhere."""
        last = self._runners.get(len(self.plan.placement) - 1)
        return None if last is None else last.losses

    @property
    def _reported_losses(self) -> Losses | None:
        """The same on the rank of a stage replica that reports a slice's; None on the others."""
        here = self.plan.mesh_of(self.rank).along(self.groups.shards.index)
        others = (index for axis, index in here.items() if axis != "context")
        return None if any(others) else self._last_losses

    def evaluate(self) -> dict[str, float]:
        """The mean loss of each validation set, by name. Collective over all ranks.

        It is that of `train.eval_batches` global batches, or of as many as the set has.
        """
        if self._validation is None:
            with self.busy("read"):
                self._validation = open_validation(self.config)
        return {
            name: mean_held_out_loss(
                partial(self._losses_on, data),
                partial(data.predicted, global_batch=self.config.train.global_batch),
                lambda slots: self.groups.control.all_reduce(slots).wait(),
                batches=batches_of(self.config, name, data),
                micro_batches=self.step_micro_batches,
                slices=self.slices.count,
            )
            for name, data in self._validation.items()
        }

    def _losses_on(self, data: Dataset, batch: int) -> SliceLosses:
        self._start(batch, data, training=False)
        with self.busy("evaluate"), self._layers_of(partial(evaluation_program, self.plan)):
            self.executor.run(*self._programs.of_evaluation)
        if self.model.layers is not None:
            self.model.layers.finish()
        return by_slice(self._reported_losses or {}, self.slices, self.plan.stretches)

    def parameter_digest(self) -> str:
        """SHA-256 over all parameters; see `digest.parameter_digest`. Collective over all ranks."""
        self.finish_gather()
        with self.busy("compare"):
            return parameter_digest(self.plan, self.optimizer, self.groups.control)


def _going_on(config: RunConfig, before: Training | None) -> RunConfig:
    """The configuration without the samples that have been removed since the run began. Pure."""
    return config if before is None else with_removals(config, before.config.data.without)
