"""One rank's training: its plan, model chunks, gradients, optimizer and data, and a step's four parts.

A step is a transaction: `compute` and `reduce` change nothing durable, `vote` tells every rank that all
can finish, `apply` updates the state. trainer/loop.py is the order in which they are called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch

from holdfast.parallel.comm import Groups
from holdfast.parallel.errors import OffloadError
from holdfast.parallel.optimizer import (
    NONFINITE,
    OUT_OF_RANGE,
    BackgroundTransfer,
    Fence,
    GradientAccumulator,
    ParameterBuffer,
    ShadowState,
    ShardedOptimizer,
    clipping_factor,
    norm_from_squares,
)
from holdfast.parallel.pipeline import (
    ActionTimes,
    Chunk,
    Executor,
    MessageShape,
    MicroBatchContext,
    ModelChunkRunner,
    receive_order,
)
from holdfast.parallel.plan import Plan, evaluation_program, training_program
from holdfast.parallel.precision import PRECISIONS
from holdfast.parallel.schedules import Action, Op, Program
from holdfast.trainer.config import RunConfig
from holdfast.trainer.data import Dataset, open_dataset
from holdfast.trainer.step.construction import new_chunks
from holdfast.trainer.step.offloading import open_offloader
from holdfast.trainer.step.partial_sums import (
    NOT_INTERRUPTED,
    Included,
    IncludedByShard,
    InterruptedStep,
    ParameterKey,
)
from holdfast.trainer.step.planning import shadows_in_host_memory
from holdfast.trainer.step.progress import NO_REQUESTS, Outcome, Requests, StepProgress
from holdfast.trainer.step.saved_tensors import state_format
from holdfast.trainer.step.state_views import TrainingState, block_numbers


class Training:
    """All that one rank holds for training under one plan."""

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
        """Local.

        Args:
            before: this rank's training under the plan before; what the change leaves as it is, is
                taken over from it.
            initial: whether to draw initial weights; not where they are filled from elsewhere.
        """
        self.config, self.rank, self.device = config, rank, device
        self.plan, self.groups = plan, groups
        self.data: Dataset = before.data if before is not None else self._open_data("train")
        self._eval_data: Dataset | None = before._eval_data if before is not None else None
        self.progress = StepProgress() if before is None else replace(before.progress)
        self.offloader = open_offloader(config, device) if before is None else before.offloader
        self._build_model(before, initial=initial)
        self._clear_step(self.progress.decided)

    def _open_data(self, split: str) -> Dataset:
        config = self.config
        return open_dataset(
            config.data,
            vocab=config.model.vocab,
            seq_len=config.train.seq_len,
            seed=config.data.seed or config.train.seed,
            split=split,
        )

    def _build_model(self, before: Training | None, *, initial: bool) -> None:
        config, plan = self.config, self.plan
        train = config.train
        dtype = PRECISIONS[train.precision].dtype
        last = len(plan.placement) - 1
        if before is not None and _same_layers(before, self):
            self.parameter_buffer, self.accumulator = before.parameter_buffer, before.accumulator
            chunks = dict(zip(plan.chunks_of(self.rank), before.chunks, strict=True))
        else:
            chunks = new_chunks(
                config, plan, self.rank, self.groups["tensor"], self.device, initial=initial
            )
            rows = [row for chunk in chunks.values() for row in chunk.named_specs()]
            self.parameter_buffer = ParameterBuffer(rows, dtype=dtype, device=self.device)
            self.accumulator = GradientAccumulator(
                self.parameter_buffer,
                exact=config.numerics.reduction == "exact",
                fraction_bits=config.numerics.fraction_bits,
            )
        self._runners = {
            index: ModelChunkRunner(
                chunk,
                is_last=index == last,
                context=self._context,
                loss_gradient=1.0 / self.step_tokens,
                before_gradients=self._skip_included,
            )
            for index, chunk in chunks.items()
        }
        for chunk in chunks.values():
            chunk.queue.sink = self.accumulator
        form = state_format(config)
        settings = form.rule.settings(config.optimizer)
        self.optimizer = ShardedOptimizer(
            plan,
            self.rank,
            self.parameter_buffer,
            self.accumulator,
            self.groups.world,
            self.groups["tensor"],
            form,
            settings,
            before=before.optimizer.owned_state if before is not None else None,
        )
        self.shadows = ShadowState(
            plan,
            self.rank,
            device=self.device,
            comm=self.groups.world,
            form=form,
            settings=settings,
            in_host_memory=shadows_in_host_memory(config, self.device.type),
            before=before.shadows.copies if before is not None else None,
        )
        if self.offloader is not None:
            self.offloader.keep(self.parameter_buffer.values)
        sequence_parallel = config.parallel.sequence_parallel and self.groups["tensor"].size > 1
        rows_of_message = train.seq_len // (self.groups["tensor"].size if sequence_parallel else 1)
        shape = (rows_of_message, train.micro_batch, config.model.hidden)
        self.executor = Executor(
            self._runners,
            last,
            MessageShape(shape, dtype, self.device),
            self.groups["pipeline"],
            self.step_micro_batches,
            self.offloader,
        )
        if config.elastic.enabled:
            self.optimizer.keep_own_sums()
        self._interrupted = NOT_INTERRUPTED
        self._own_losses: dict[int, torch.Tensor] = {}
        self._train_program = self._prepared(lambda rank: training_program(plan, rank))
        self._backwards = 0
        backwards = (Op.BACKWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT)
        self._half_at = sum(action.op in backwards for action in self._train_program[0]) // 2 * 2
        self.at_half: Callable[[], None] = lambda: None
        """Called when half of a step's backward passes have been done: where faults are injected."""
        self.background_transfer: BackgroundTransfer | None = None
        """This rank's part in giving ranks what they will have under the next plan."""
        self.at_background_transfer: Callable[[], None] = lambda: None
        """Called when some of that is on its way, in another thread: where faults are injected."""
        self._eval_program: tuple[Program, dict[Action, int]] | None = None

    def state(self) -> TrainingState:
        """Where this rank keeps what is saved. Local."""
        shadows = self.shadows if self.saves_from_shadows else None
        return TrainingState(self.plan, self.rank, self.parameter_buffer, self.optimizer, shadows)

    @property
    def saves_from_shadows(self) -> bool:
        """Whether checkpoints are taken from the copies that shadows have in host memory."""
        return self.shadows.in_host_memory and bool(self.plan.shadows)

    def protect(self, fence: Fence | None) -> None:
        """Ask `fence` before blocks change that a snapshot copies, numbered as `state().before` does."""
        numbers = block_numbers(self.optimizer, self.shadows if self.saves_from_shadows else None)
        self.shadows.fence = None if fence is None else numbers.fence_of_shadows(fence)
        self.optimizer.fence = None if fence is None else numbers.fence_of_owned(fence)

    @property
    def chunks(self) -> list[Chunk]:
        """This rank's model chunks, in order."""
        return [runner.chunk for runner in self._runners.values()]

    @property
    def current_micro_batch(self) -> int:
        """The micro-batch whose forward pass ran last."""
        return self._current_micro_batch

    @property
    def step_micro_batches(self) -> int:
        """Micro-batches of one step over all replicas."""
        return self.config.train.global_batch // self.config.train.micro_batch

    @property
    def step_tokens(self) -> int:
        """Tokens of one step over all replicas."""
        return self.config.train.global_batch * self.config.train.seq_len

    def _prepared(self, program_of: Callable[[int], Program]) -> tuple[Program, dict[Action, int]]:
        """This rank's program and the order in which its peers send to it."""
        program = program_of(self.rank)
        peers = {a.peer for a in program if a.peer is not None}
        return program, receive_order(program, {p: program_of(p) for p in peers}, self.rank)

    def _clear_step(self, step: int, *, training: bool = True) -> None:
        self._step = step
        self._is_training = training
        self._current_micro_batch = 0
        self._tokens: dict[int, torch.Tensor] = {}
        for runner in self._runners.values():
            runner.clear()

    def _context(self, micro_batch: int) -> MicroBatchContext:
        self._current_micro_batch = micro_batch
        tokens = None
        if self._reads_tokens:
            tokens = self._tokens.get(micro_batch)
            if tokens is None:
                data = self.data if self._is_training else self._eval_data
                assert data is not None
                train = self.config.train
                tokens = data.batch(
                    self._step,
                    micro_batch,
                    global_batch=train.global_batch,
                    micro_batch_size=train.micro_batch,
                ).to(self.device)
                self._tokens[micro_batch] = tokens
        return MicroBatchContext(self._step, micro_batch, self._is_training, tokens)

    @property
    def _reads_tokens(self) -> bool:
        return 0 in self._runners or len(self.plan.placement) - 1 in self._runners

    def compute(self, step: int) -> ActionTimes:
        """A: run the program of `step`; gradient sums accumulate. Collective over the pipeline group.

        After a recovery (`resume_step`) only missing micro-batches are computed.
        """
        if self.background_transfer is not None:
            self.background_transfer.start(self.at_background_transfer)
        self._clear_step(step)
        self.optimizer.begin_step()
        self.executor.halved.clear()
        self._backwards = 0
        if self._interrupted.step != step:
            self._interrupted = NOT_INTERRUPTED
            self._own_losses = {}
            self.accumulator.clear()
            return self._run_whole(step)
        missing = self.to_compute(step)
        return self.executor.run(
            *self._prepared(lambda rank: training_program(self.plan, rank, missing))
        )

    def _run_whole(self, step: int) -> ActionTimes:
        """Run the step's program; once more, with all in memory, if activations could not be read back.

        Where other ranks are in the midst of the same program, that is theirs to survive.
        """
        try:
            return self.executor.run(*self._train_program)
        except OffloadError as error:
            if (
                self.offloader is None
                or self.plan.stage_replicas.pipeline * self.plan.stage_replicas.shards > 1
            ):
                raise
            self.offloader.abort(str(error))
        return self.compute(step)

    def to_compute(self, step: int) -> frozenset[int]:
        """The micro-batches that are not in everybody's sums yet when `step` begins."""
        interrupted = self._interrupted if self._interrupted.step == step else NOT_INTERRUPTED
        return interrupted.missing(self.plan, self.step_micro_batches)

    def included(self) -> Included:
        """After an interrupted step: the micro-batches that each parameter's sums hold on this rank. Local.

        Empty when the step is decided.
        """
        started = self._is_training and self.progress.decided == self._step
        if not started:
            return {}
        self.executor.run_weight_parts()
        self.optimizer.restore_own_sums()
        included = {
            (part.layer, part.spec_index): frozenset(
                self.accumulator.included.get(part.parameter, ())
            )
            for part in self.parameter_buffer.segments
        }
        last = self._runners.get(len(self.plan.placement) - 1)
        if last is not None:
            known = {**last.losses, **self._own_losses}
            self._own_losses = {m: known[m] for m in included[self._loss_parameter]}
        return included

    @property
    def _loss_parameter(self) -> ParameterKey:
        """The rank whose sums hold a micro-batch's gradient of this parameter reports its loss."""
        return len(self.plan.layers) - 1, 0

    def resume_step(self, step: int, included: IncludedByShard, before: Training | None) -> None:
        """Compute only what `included` lacks when `step` is computed next.

        Args:
            before: this rank's training that was interrupted; None where its sums do not go on.
        """
        self._interrupted = InterruptedStep(step, included)
        if before is None:
            self.accumulator.clear()
        else:
            self._own_losses = before._own_losses

    def _skip_included(self, micro_batch: int) -> None:
        """Before a micro-batch's gradients: leave out the parameters that have them already."""
        self._backwards += 1
        if 2 * self._backwards == self._half_at:
            self.at_half()
        self.accumulator.micro_batch = micro_batch
        self.accumulator.skipped = frozenset()
        if self._interrupted is not NOT_INTERRUPTED:
            index = self.plan.stage_replicas.shard_index(self.rank)
            self.accumulator.skipped = frozenset(
                part.parameter
                for part in self.parameter_buffer.segments
                if self._interrupted.has(index, (part.layer, part.spec_index), micro_batch)
            )

    def reduce(self) -> tuple[torch.Tensor, int]:
        """B: every block's sum arrives at its owner and its shadows. See `ShardedOptimizer.reduce`."""
        squares, flags = self.optimizer.reduce()
        self.shadows.exchange(self.optimizer.gradients)
        return squares, flags

    def vote(self, squares: torch.Tensor, flags: int, requests: Requests = NO_REQUESTS) -> Outcome:
        """C: the all-reduce that carries the gradient norm and the loss. Collective over all ranks.

        A rank enters only with all the gradients it owns, so whoever leaves knows that all can apply; and
        with no state under way.
        """
        if self.background_transfer is not None:
            requests = replace(requests, filling=not self.background_transfer.pause())
        ballot = torch.cat(
            [
                squares,
                self._loss_slots(),
                torch.tensor(
                    [
                        bool(flags & NONFINITE),
                        bool(flags & OUT_OF_RANGE),
                        requests.save,
                        requests.stop,
                        requests.busy,
                        requests.change,
                        requests.filling,
                        requests.leave,
                    ],
                    dtype=torch.float64,
                ),
            ]
        )
        self.groups.control.all_reduce(ballot).wait()
        summed = ballot.tolist()
        slots, losses = self.optimizer.slots, self.step_micro_batches
        nonfinite, out_of_range, *asked = (int(count) for count in summed[slots + losses :])
        finite = bool(torch.isfinite(ballot[:slots]).all())
        outcome = Outcome(
            loss=mean_loss(summed[slots : slots + losses], self.step_tokens),
            grad_norm=norm_from_squares(summed[:slots])
            if finite and not nonfinite
            else float("nan"),
            nonfinite_ranks=nonfinite,
            out_of_range_ranks=out_of_range,
            requests=Requests(*map(bool, asked)),
            leaving_ranks=asked[-1],
        )
        self.progress.decided, self.progress.outcome = self._step + 1, outcome
        self.progress.filled = not outcome.requests.filling
        return outcome

    def apply(self, lr: float) -> None:
        """D: owners update, parameters are gathered. Collective over the replicas of a stage.

        A step that may not be applied changes nothing.
        """
        self.update(lr)
        self.gather()

    def update(self, lr: float) -> None:
        """Owners and shadows update their blocks as the last vote has decided. Local."""
        outcome = self.progress.outcome
        assert outcome is not None
        if outcome.usable:
            self.progress.complete = False
            factor = clipping_factor(outcome.grad_norm, self.config.train.clip_grad_norm)
            self.shadows.update(lr, factor)
            self.optimizer.update(lr, factor)
        self.progress.updated = self.progress.decided

    def gather(self) -> None:
        """Bring the updated parameters to all who hold them. Collective over the replicas of a stage."""
        if not self.progress.complete:
            self.optimizer.gather()
            self.progress.complete = True

    def _loss_slots(self) -> torch.Tensor:
        """Each micro-batch's loss sum in its slot, where this rank is the one that reports it."""
        slots = torch.zeros(self.step_micro_batches, dtype=torch.float64)
        last = self._runners.get(len(self.plan.placement) - 1)
        if last is not None and self.groups["tensor"].index == 0:
            interrupted = self._interrupted if self._is_training else NOT_INTERRUPTED
            if interrupted is not NOT_INTERRUPTED:
                for micro_batch, loss in self._own_losses.items():
                    slots[micro_batch] = loss
            for micro_batch, loss in last.losses.items():
                if not interrupted.has(0, self._loss_parameter, micro_batch):
                    slots[micro_batch] = loss
        return slots

    def evaluate(self) -> float:
        """Mean held-out loss over `train.eval_batches` global batches. Collective over all ranks."""
        if self._eval_program is None:
            self._eval_data = self._open_data("eval")
            self._eval_program = self._prepared(lambda rank: evaluation_program(self.plan, rank))
        total = 0.0
        for batch in range(self.config.train.eval_batches):
            self._clear_step(batch, training=False)
            self.executor.run(*self._eval_program)
            slots = self._loss_slots()
            self.groups.control.all_reduce(slots).wait()
            total += mean_loss(slots.tolist(), self.step_tokens)
        return total / self.config.train.eval_batches

    def parameter_digest(self) -> str:
        """SHA-256 over all parameters, equal for equal bits in any layout of one tensor size.

        Collective over all ranks. Every owner hashes its blocks; the digest is over all block hashes
        in block order.
        """
        halves = torch.zeros(self.optimizer.slots, 4, dtype=torch.int64)
        for block in self.optimizer.owned:
            values = self.parameter_buffer.values[block.start : block.stop].contiguous().cpu()
            digest = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).digest()
            words = [
                int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8, 16, 24)
            ]
            halves[self.optimizer.slot(block)] = torch.tensor(words)
        self.groups.control.all_reduce(halves).wait()
        return hashlib.sha256(halves.numpy().tobytes()).hexdigest()


def _same_layers(before: Training, after: Training) -> bool:
    """Whether a rank's modules serve under the next plan: the same layers, the same tensor group."""
    old, new, rank = before.plan, after.plan, after.rank
    layers = [[plan.chunk_layers[chunk] for chunk in plan.chunks_of(rank)] for plan in (old, new)]
    return layers[0] == layers[1] and before.groups["tensor"] is after.groups["tensor"]


def mean_loss(sums: list[float], tokens: int) -> float:
    """Micro-batch loss sums added in micro-batch order in float64, divided once."""
    total = 0.0
    for value in sums:
        total += value
    return total / tokens
