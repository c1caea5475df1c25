"""The load of one checkpoint into the state of one rank's run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch

from holdfast.checkpoint import CheckpointManager, Wanted
from holdfast.checkpoint.format import Manifest
from holdfast.checkpoint.loading import LoadStatistics, Targets
from holdfast.checkpoint.stores import checkpoint_at
from holdfast.parallel.errors import CheckpointError
from holdfast.parallel.reading import of_kind
from holdfast.trainer.run import (
    CERTIFICATE,
    RunDirectory,
    check_same_data,
    differing_keys,
    has_state,
)
from holdfast.trainer.step import (
    RecentSteps,
    Training,
    TrainingState,
    state_format,
    wanted_boxes,
    weights_only,
)
from holdfast.trainer.terms import certificate_note, same_work

RECENT = "recent_steps"
"""The scalar of a manifest that has what a guard of spikes remembers."""


def recent_to_data(recent: RecentSteps) -> dict[str, Any]:
    """The scalars of a manifest for the steps that a guard remembers; none without a guard. Pure.

    JSON has a number's shortest text that gives the same bits again.
    """
    kept = RecentSteps(recent.losses, recent.grad_norms)
    return {RECENT: msgspec.to_builtins(kept)} if recent.losses else {}


def recent_from_data(scalars: Mapping[str, Any], place: str) -> RecentSteps:
    """The steps that `recent_to_data` wrote; none where a run without a guard made the checkpoint.

    Raises:
        CheckpointError: they are no such steps.
    """
    try:
        return of_kind(scalars.get(RECENT, {}), RecentSteps)
    except ValueError as error:
        raise CheckpointError(f"{place}/manifest.json: {RECENT}: {error}") from error


class CheckpointLoading:
    """The loads of a run that resumes. All ranks call every method alike."""

    def __init__(
        self,
        training: Training,
        state: TrainingState,
        manager: CheckpointManager,
        run: RunDirectory,
        certificate: Mapping[str, str],
    ) -> None:
        """Nothing is loaded yet.

        Args:
            state: the place of the rank's saved state.
            certificate: that of the machines that go on.
        """
        self._training, self._state, self._manager = training, state, manager
        self._run, self._certificate = run, certificate
        self.statistics: LoadStatistics | None = None
        """The statistics of the last load."""

    def attempt(self, place: str, name: str, note: Callable[[str], None]) -> tuple[int, str]:
        """Load from one place. Collective.

        Args:
            name: a name of this load that no other one of the generation has.
            note: called with what a person should know.
        Returns:
            The step, and the reason if it failed on any rank.
        """
        step, mine = 0, ""
        try:
            step = self._load(place, name, note)
        except CheckpointError as error:
            mine = str(error)
        failed = torch.tensor([float(bool(mine))], dtype=torch.float64)
        self._training.groups.control.all_reduce(failed).wait()
        if failed.item():
            return step, mine or "another rank could not read it"
        return step, ""

    def _load(self, place: str, name: str, note: Callable[[str], None]) -> int:
        training = self._training
        with training.groups.recorder.busy("load", self._manager.longest_wait_s):
            manifest, self.statistics = self._manager.load(
                checkpoint_at(place), name, self._prepare, check=training.groups.signal.check
            )
        now, allowed = training.data.fingerprint, self._run.resume.allow_change
        check_same_data(manifest, now, place, allow_change=allowed)
        training.remove(self._run.resume.removals)
        recent = recent_from_data(manifest.scalars, place)
        if said := self._other_certificate(manifest, place):
            note(said)
        if not has_state(manifest, state_format(self._training.config)):
            training.optimizer.restart()
            training.progress.recent = RecentSteps()
            return 0
        training.optimizer.restore(int(manifest.scalars.get("optimizer_step", manifest.step)))
        training.progress.recent = recent
        training.progress.decided = training.progress.updated = manifest.step
        return manifest.step

    def _other_certificate(self, manifest: Manifest, place: str) -> str:
        """What to say if a checkpoint was made on machines that compute other bits; else empty."""
        config = self._training.config
        changed = differing_keys(manifest.config, msgspec.to_builtins(config), ("",))
        if not same_work(key for key, _, _ in changed):
            return ""
        saved = str(manifest.scalars.get(CERTIFICATE, ""))
        return certificate_note(saved, self._certificate, place)

    def _prepare(self, manifest: Manifest) -> tuple[Targets, Wanted]:
        """The targets of a checkpoint's tensors; weights only if it has no more."""
        plan, form = self._training.plan, state_format(self._training.config)
        wanted = {
            peer: wanted_boxes(plan, plan.stage_replicas.ranks[peer], form)
            for peer in self._manager.members.neighbours
        }
        targets = self._state.targets()
        if has_state(manifest, form):
            return targets, wanted
        wanted = {peer: weights_only(boxes, manifest, form) for peer, boxes in wanted.items()}
        return weights_only(targets, manifest, form), wanted
