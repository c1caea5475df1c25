"""Resuming: the checkpoints to resume from, and the check that the configuration fits them.

One process calls it, before the workers start. Needs no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from holdfast.checkpoint.format import Manifest, expanded, scheme_of, step_of
from holdfast.checkpoint.stores import (
    Best,
    CheckpointStore,
    LocalStore,
    best_names,
    find_checkpoint,
    open_store,
    readable,
)
from holdfast.parallel.errors import CheckpointError, ConfigError
from holdfast.parallel.reading import converted
from holdfast.trainer.config import (
    EVERY_CHANGE,
    HELD_OUT,
    DataConfig,
    OptimizerConfig,
    Removal,
    RunConfig,
    advice_to_allow,
    anchored,
    flat_keys,
    lacking_removals,
    refused_changes,
    removals_of,
    removed_before,
    validation_names,
    with_removals,
)
from holdfast.trainer.learning_rates import learning_rate
from holdfast.trainer.models import FAMILIES, family_of
from holdfast.trainer.run.initial_weights import (
    check_converted,
    check_tensors,
    first_weights,
    has_state,
    is_converted,
    lacks_average,
)
from holdfast.trainer.run.memory_copies import memory_root
from holdfast.trainer.step import state_format

OF_THE_STATE = ("optimizer.name", "optimizer.moments_dtype")
"""The keys that say what the optimizer's state is."""
MUST_MATCH = (
    "model.",
    "data.",
    "train.seq_len",
    "train.global_batch",
    "train.batch_ramp",
    "train.length_ramp",
    "train.micro_batch",
    "train.seed",
    "train.precision",
    *OF_THE_STATE,
)
"""The keys that must not change, because the run would be another run."""
REMOVED = "data.without"
_MAY_DIFFER = ("data.validation", REMOVED, "model.from_hf", "model.multi_token_loss_coef")
"""The keys among these that change nothing of the training, or nothing once it has begun, a factor
that is lowered as training goes on, and what is removed from a step on: see `_other_removed`."""
_MOST_NAMED = 8
"""The samples that an error names at most."""
DATA_PATHS = ("data.path", "data.tokenizer")
"""Keys that name files: their content counts, and not their names."""
FINGERPRINT = "data_fingerprint"
"""The scalar of a manifest that has the fingerprint of the run's data."""
CERTIFICATE = "certificate"
"""The scalar of a manifest that has the certificate of the machines that made it, as JSON."""
_OF_THE_DATA = ("data.", "model.vocab", "train.seq_len", "train.seed")
"""The keys with which the fingerprint of the data changes."""
WORTH_SAYING = (
    "train.steps",
    "train.clip_grad_norm",
    "train.z_loss_coef",
    "model.multi_token_loss_coef",
    "train.vocab_chunk",
    "train.context_chunks",
    "train.compile",
    "parallel.reduce_dtype",
    "optimizer.",
    "numerics.",
)
"""The keys that may change and affect the computation."""


@dataclass(frozen=True, slots=True)
class Resume:
    """The checkpoints from which a run may resume, the best first; none to start at step 0."""

    candidates: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes for a person, one line each."""
    allow_change: tuple[str, ...] = ()
    """The keys that may differ from the checkpoint's though they must match."""
    removals: tuple[Removal, ...] = ()
    """The samples that the run has removed, which the configuration does not say."""


def checkpoint_root(root: Path, config: RunConfig) -> Path:
    """The folder of a run's checkpoints on the local disk."""
    path = config.checkpoint.path
    if not path or config.checkpoint.url:
        return root / "checkpoints"
    return expanded(path, "checkpoint.path")


def best_rule(config: RunConfig) -> Best | None:
    """Which checkpoints of a run stay for their losses; None: none do. Pure."""
    section = config.checkpoint
    if not section.keep_best:
        return None
    return Best(section.keep_best, section.best_by or validation_names(config.data)[0])


def _best_place(root: Path, config: RunConfig) -> str:
    """The run's checkpoint with the lowest loss, on the disk or else at its URL.

    Raises:
        ConfigError: no checkpoint of the run has such a loss.
    """
    name = config.checkpoint.best_by or next(iter(validation_names(config.data)), HELD_OUT)
    stores: list[CheckpointStore] = [LocalStore(checkpoint_root(root, config).absolute())]
    if config.checkpoint.url:
        stores.append(open_store(config.checkpoint.url))
    for store in stores:
        if found := best_names(store, Best(1, name)):
            return store.place_of(found[0])
    raise ConfigError(
        f"--resume best: no checkpoint of {root} was evaluated on {name!r}, so none is best; a "
        "checkpoint has losses if its step is one of train.eval_every"
    )


def find_resume(
    root: Path, config: RunConfig, wanted: str, *, allow_change: tuple[str, ...] = ()
) -> Resume:
    """Find the checkpoints from which a run resumes.

    Args:
        wanted: "auto" (the newest of this run's own, in memory, on disk or at its URL; before it
            has one, the weights of `model.from_hf`), "best" (the one of its own with the lowest
            loss, on disk or at its URL), "none" (those weights, or nothing), or a path or URL. A
            run can begin with converted weights; once it has checkpoints of its own, the same
            command resumes from these.
        allow_change: the result of `allowed_changes`.
    Raises:
        ConfigError: the configuration differs from the checkpoint's in a key that must not change,
            or the path is not a checkpoint.
    """
    if wanted == "none":
        return _beginning(root, config, allow_change)
    removals = lacking_removals(config.data.without, removals_of(root / "config.toml"))
    found = _found(root, with_removals(config, removals), wanted, allow_change)
    notes = (
        f"the run goes on without sample {', '.join(map(str, removal.samples))}, which it has "
        f"removed after step {removal.start} ({REMOVED})"
        for removal in removals
    )
    return replace(found, notes=(*notes, *found.notes), removals=tuple(removals))


def _found(root: Path, config: RunConfig, wanted: str, allow_change: tuple[str, ...]) -> Resume:
    """As `find_resume`, for what is not "none", and a configuration that removes all samples."""
    if wanted == "best":
        wanted = _best_place(root, config)
    if wanted != "auto":
        try:
            found = find_checkpoint(wanted)
            manifest = found.manifest()
        except CheckpointError as error:
            raise ConfigError(f"--resume {wanted}: {_convertible(wanted) or error}") from error
        if is_converted(manifest) and not has_state(manifest, state_format(config)):
            own = _found(root, config, "auto", allow_change)
            if own.candidates:
                began = f"the run has checkpoints of its own; {found.place} is what it began with"
                return replace(own, notes=(began, *own.notes))
        notes = check_same_run(manifest, config, found.place, allow_change=allow_change)
        place = found.place if scheme_of(found.place) else str(Path(found.place).absolute())
        return Resume((place,), notes, allow_change)
    candidates: dict[int, tuple[str, Manifest]] = {}
    memory = memory_root(root)
    for folder in (checkpoint_root(root, config), *((memory,) if memory is not None else ())):
        store = LocalStore(folder.absolute())
        for name, manifest in readable(store):
            candidates.setdefault(manifest.step, (store.place_of(name), manifest))
    if not candidates and config.checkpoint.url:
        remote = open_store(config.checkpoint.url)
        candidates = {m.step: (remote.place_of(name), m) for name, m in readable(remote)}
    ordered = [candidates[step] for step in sorted(candidates, reverse=True)]
    if not ordered:
        return _beginning(root, config, allow_change)
    notes = check_same_run(ordered[0][1], config, ordered[0][0], allow_change=allow_change)
    return Resume(tuple(path for path, _ in ordered), notes, allow_change)


def _beginning(root: Path, config: RunConfig, allow_change: tuple[str, ...]) -> Resume:
    """The weights with which a run begins; none are drawn."""
    place = first_weights(root, config)
    if place is None:
        return Resume()
    manifest = find_checkpoint(str(place)).manifest()
    notes = check_same_run(manifest, config, str(place), allow_change=allow_change)
    return Resume((str(place.absolute()),), notes, allow_change)


def _convertible(wanted: str) -> str:
    """What to do with a checkpoint of another format; empty if it is of none."""
    if scheme_of(wanted):
        return ""
    from holdfast.checkpoint.convert import recognise

    try:
        form = recognise(expanded(wanted, "--resume"))
    except OSError:
        form = None
    if form is None or form == "holdfast":
        return ""
    begin = shlex.quote(f"{Path(wanted).name}-start")
    return (
        f"it is a checkpoint of another format ({form}); convert it with `holdfast convert "
        f"{shlex.quote(wanted)} {begin} --to holdfast`, and give --resume {begin}"
    )


def check_same_run(
    manifest: Manifest, config: RunConfig, where: str, *, allow_change: tuple[str, ...]
) -> tuple[str, ...]:
    """Compare a configuration with that of a checkpoint. Returns notes on harmless changes.

    Raises:
        ConfigError: keys that must not change differ, and `allow_change` does not name them; or
            the checkpoint's weights are not those of the model.
    """
    if is_converted(manifest):
        return check_converted(manifest, config, where, allow_change=allow_change)
    saved, now = manifest.config, msgspec.to_builtins(config)
    differing = differing_from_run(saved, manifest.scalars.get(FINGERPRINT), config)
    changed = {
        key: f"{key} = {mine!r} (the checkpoint has {its!r})" for key, its, mine in differing
    }
    if other := _other_removed(manifest, config):
        changed[REMOVED] = other
    if config.optimizer.ema and lacks_average(manifest, state_format(config)):
        key = "optimizer.ema"
        changed[key] = f"{key} = {config.optimizer.ema} (the checkpoint has no average)"
    if refused := refused_changes(changed, allow_change):
        told = "; ".join(changed[key] for key in refused)
        raise ConfigError(
            f"{where} is of another run: {told}; change it back, start over with --resume none, or "
            f"{advice_to_allow(changed, allow_change)}"
        )
    if any(key.startswith("model.") for key in changed):
        check_tensors(manifest, config, where)
    notes = [f"changed since the checkpoint: {line}" for line in changed.values()]
    if not changed.keys().isdisjoint((*OF_THE_STATE, "optimizer.ema")):
        notes.append("starts from the checkpoint's weights, at step 0: other optimizer state")
    for key, its, mine in differing_keys(saved, now, WORTH_SAYING):
        if key in changed:
            continue
        notes.append(f"changed since the checkpoint: {key} = {mine!r} (was {its!r})")
    return (*notes, *_other_rate(manifest, config))


def _other_removed(manifest: Manifest, config: RunConfig) -> str:
    """How the samples differ that were removed before a checkpoint's step; empty: they do not."""
    saved = manifest.config.get("data", {}).get("without", [])
    try:
        its = removed_before(converted(saved, list[Removal]), manifest.step)
    except (msgspec.ValidationError, TypeError):
        return f"{REMOVED} (the checkpoint's is not understood)"
    mine = removed_before(config.data.without, manifest.step)
    if mine == its:
        return ""
    told = [
        f"{said} sample {', '.join(str(sample) for sample, _ in sorted(found)[:_MOST_NAMED])}"
        for said, found in (
            ("the steps before the checkpoint were without", its.items() - mine.items()),
            ("the checkpoint does not say that its steps were without", mine.items() - its.items()),
        )
        if found
    ]
    return f"{REMOVED} ({'; '.join(told)})"


def _other_rate(manifest: Manifest, config: RunConfig) -> Iterator[str]:
    """A note if the next step has another learning rate than the checkpoint's run would have."""
    step, steps = manifest.step, manifest.config.get("train", {}).get("steps")
    section = manifest.config.get("optimizer", {})
    known = {key: section[key] for key in OptimizerConfig.__struct_fields__ if key in section}
    try:
        saved = converted(known, OptimizerConfig)
        expected = learning_rate(step, steps=steps, stages=saved.all_stages)
    except (msgspec.ValidationError, TypeError, KeyError):
        return  # of a version that is not understood
    found = config.rate_of(step)
    if found != expected and step < min(steps, config.train.steps):
        yield (
            f"the learning rate of step {step + 1} is {found:.3g}; as the checkpoint has it, it "
            f"would be {expected:.3g}"
        )


def check_same_data(
    manifest: Manifest, fingerprint: str, where: str, *, allow_change: tuple[str, ...]
) -> None:
    """Check that the data is that on which a checkpoint was trained.

    Args:
        fingerprint: of the data as it is now.
    Raises:
        ConfigError: it is other data, and no key is allowed to change with which it changes.
    """
    saved = manifest.scalars.get(FINGERPRINT)
    expected = any(key.startswith((*_OF_THE_DATA, *EVERY_CHANGE)) for key in allow_change)
    if saved not in (None, fingerprint) and not expected:
        raise ConfigError(
            f"{where} was trained on other data: its fingerprint is {saved}, that of [data] now is "
            f"{fingerprint}; bring the files back, start over with --resume none, or "
            f"{advice_to_allow(DATA_PATHS[:1], allow_change)}"
        )


def differing_from_run(
    saved: dict[str, Any], fingerprint: object, config: RunConfig
) -> list[tuple[str, Any, Any]]:
    """The keys by which a configuration is another run's; as `differing_keys` gives them.

    Paths of data differ only if the data there does.

    Args:
        saved: the configuration of a run, as nested dicts.
        fingerprint: of the run's data; anything but a text: it is not known.
    Raises:
        DataError: the data is named by another path, and cannot be read there.
    """
    # An earlier version kept paths as they were given, relative to a folder that is not known.
    given = {key for key, *_ in differing_keys(saved, msgspec.to_builtins(config), MUST_MATCH)}
    found = [
        difference
        for difference in differing_keys(saved, msgspec.to_builtins(anchored(config)), MUST_MATCH)
        if difference[0] in given and difference[0] not in _MAY_DIFFER
    ]
    of_data = {key for key, *_ in found if key.startswith("data.")}
    if of_data and of_data <= {*DATA_PATHS} and fingerprint == _moved_data(saved, config):
        return [difference for difference in found if difference[0] not in of_data]
    return found


def _moved_data(saved: dict[str, Any], config: RunConfig) -> str:
    """The fingerprint that a run's data would have at the paths of a configuration.

    It is empty if the run's configuration is of a version that is not understood.
    """
    from holdfast.trainer.data import open_samples  # which imports torch

    paths = {"path": config.data.path, "tokenizer": config.data.tokenizer}
    try:
        data = converted({**saved["data"], **paths}, DataConfig)
        vocab, train = int(saved["model"]["vocab"]), saved["train"]
        seq_len, seed = int(train["seq_len"]), int(data.seed or train["seed"])
    except (msgspec.ValidationError, KeyError, TypeError, ValueError):
        return ""
    return open_samples(
        data,
        vocab=vocab,
        seq_len=seq_len,
        seed=seed,
        split="train",
        before=config.train.samples_before,
    ).fingerprint


def differing_keys(
    saved: dict[str, Any], now: dict[str, Any], prefixes: tuple[str, ...]
) -> list[tuple[str, Any, Any]]:
    """The keys of two configurations (nested dicts) that differ: (key, saved value, value now).

    A key that came after the saved configuration has its default there.
    """
    # In the form of a manifest: JSON has no tuples.
    plain = msgspec.json.decode(msgspec.json.encode((saved, now)))
    # An older version that lacks a key did what its default does.
    sections = {field.name: field.type for field in msgspec.structs.fields(RunConfig)}
    older = {
        name: msgspec.to_builtins(of())
        for name, of in sections.items()
        if name in saved and name != "model"
    }
    older["model"] = _model_defaults(saved)
    flat_saved, flat_now = flat_keys(older) | flat_keys(plain[0]), flat_keys(plain[1])
    return [
        (key, flat_saved.get(key), flat_now.get(key))
        for key in sorted(flat_saved.keys() | flat_now.keys())
        if key.startswith(prefixes) and flat_saved.get(key) != flat_now.get(key)
    ]


def _model_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """The defaults of the keys of a saved configuration's [model]."""
    model = saved.get("model")
    family = model.get("family") if isinstance(model, dict) else None
    if not isinstance(family, str) or family not in FAMILIES:
        return {}
    fields = msgspec.structs.fields(family_of(family).section)
    return {
        field.name: msgspec.to_builtins(field.default)
        for field in fields
        if field.default is not msgspec.NODEFAULT
    }


def set_aside_newer(root: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step`: the run takes another course. Returns the new names."""
    store = LocalStore(root)
    return [store.set_aside(name) for name in store.folders() if (step_of(name) or 0) > step]
