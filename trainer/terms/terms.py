"""What a rank is going to train with, as names and texts, and the judgement of many. Pure.

Needs no torch.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import msgspec

from holdfast.checkpoint.format import expanded
from holdfast.parallel.errors import ConfigError, named_ranks
from holdfast.parallel.reading import decode_json
from holdfast.trainer.config import RunConfig, flat_keys

OF_A_MACHINE = (
    "log.every",
    "log.tensorboard",
    "log.trace_steps",
    "log.operation_steps",
    "log.operation_values",
    "data.path",
    "data.tokenizer",
    "data.validation",
    "checkpoint.arena_mib",
    "elastic.lighthouse",
    "offload.path",
    "offload.limit_gib",
    "offload.limit_mib_per_s",
    "offload.staging_mib",
    "offload.compact_heap",
    "offload.drive_tbw",
)
"""The keys that may differ between the machines of a run, because the bits and the order of
messages do not depend on them. The data's fingerprints stand for its paths."""
DATA = "data"
_DEPENDS_ON_THE_DEVICE = ("train.device", "parallel.backend")
_NO_BITS = "numerics.reduction = 'fast', which promises no bits (without [elastic])"
_LONGEST = 80
"""The most characters of a value that are told."""
_MOST_LINES = 20
"""The most differing names that are told."""


_WORK = ("model.", "train.", "optimizer.", "numerics.tensor_", "parallel.tensor")
_NOT_THE_WORK = (
    "train.steps",
    "train.global_batch",
    "train.batch_ramp",
    "train.length_ramp",
    "train.eval_",
    "train.activation_gib",
)


class TermsDiffer(ConfigError):
    """The ranks of a run are not going to train with the same; one line for each difference."""


class Terms(msgspec.Struct, frozen=True):
    """What one rank is going to train with."""

    config: dict[str, str] = {}
    """By `section.key`: the resolved value as JSON."""
    data: str = ""
    """The fingerprint of the training data, and those of named validation sets."""
    data_from: str = ""
    """Where this rank reads it, for a person; it is not compared."""
    versions: dict[str, str] = {}
    """By package."""
    certificate: dict[str, str] = {}
    """By kind of operation: a hash of what this rank's device computes."""
    error: str = ""
    """Why this rank cannot train; the other fields are then empty."""

    @property
    def compared(self) -> dict[str, str]:
        """All that must be equal beside the certificate, by name."""
        return {
            **self.config,
            DATA: self.data,
            **{f"version of {name}": value for name, value in self.versions.items()},
        }


@dataclass(frozen=True, slots=True)
class Verdict:
    """The conclusion from the terms of all ranks."""

    refused: tuple[str, ...] = ()
    """Why the ranks do not train together, one line each; empty: they do."""
    notes: tuple[str, ...] = ()
    """Differences that are allowed, for a person."""


def software_versions() -> dict[str, str]:
    """The versions that a run depends on, by name."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"holdfast": version("holdfast"), "torch": version("torch"), "python": python}


def config_terms(config: RunConfig, resolved: Mapping[str, str] | None = None) -> dict[str, str]:
    """The part of the terms that a configuration gives.

    Args:
        resolved: the values of the keys whose meaning depends on the device; None: the device is
            not known, and these keys are left out.
    """
    values = flat_keys(msgspec.to_builtins(config))
    for key in _DEPENDS_ON_THE_DEVICE:
        values.pop(key)
    path = config.checkpoint.path
    if path and not config.checkpoint.url:
        # A relative path is another place in another folder.
        values["checkpoint.path"] = str(expanded(path, "checkpoint.path").resolve())
    return {
        key: json.dumps(value)
        for key, value in sorted((values | dict(resolved or {})).items())
        if not key.startswith(OF_A_MACHINE)
    }


def same_work(changed: Iterable[str]) -> bool:
    """Whether the operations are the same though some keys differ, or lines that begin with them.

    Where they are not, other hashes of results say nothing. Pure.
    """
    return not any(key.startswith(_WORK) and not key.startswith(_NOT_THE_WORK) for key in changed)


def certificate_note(saved: str, own: Mapping[str, str], where: str) -> str:
    """The line on a checkpoint that was made with another certificate; empty: with this one. Pure.

    Args:
        saved: the certificate that the checkpoint says, as JSON; empty: none.
    """
    try:
        theirs = decode_json(saved, dict[str, str]) if saved else dict(own)
    except ValueError:
        theirs = {}
    differing = [kind for kind in {**theirs, **own} if theirs.get(kind) != own.get(kind)]
    if not differing:
        return ""
    return (
        f"{where} was made on machines that compute other bits in the same operations "
        f"({', '.join(differing)}); the run goes on, and its bits are no longer those of there"
    )


def judge(found: Mapping[int, Terms], names: Sequence[str] = ()) -> Verdict:
    """Whether ranks with these terms may train together, and why not.

    Args:
        found: by rank.
        names: what is compared, by its number, where these are not ranks.
    """
    whole = {rank: terms for rank, terms in found.items() if not terms.error}
    refused = [
        f"{_of(ranks, names)}: {error}"
        for error, ranks in _grouped({r: t.error for r, t in found.items() if t.error}).items()
    ]
    distinct = {id(terms): terms.compared for terms in whole.values()}
    for name in dict.fromkeys(itertools.chain.from_iterable(distinct.values())):
        if len({compared.get(name) for compared in distinct.values()}) > 1:
            values = {rank: distinct[id(terms)].get(name) for rank, terms in whole.items()}
            told = ", ".join(
                f"{_value(name, value, whole[ranks[0]])} on {_of(ranks, names)}"
                for value, ranks in _grouped(values).items()
            )
            refused.append(f"{name}: {told}; {_advice(name)}")
    if len(refused) > _MOST_LINES:
        refused = [*refused[:_MOST_LINES], f"{len(refused) - _MOST_LINES} more differ"]
    certified = _certificate(whole, names) if same_work(refused) else ""
    needed = any(_needs_certificate(terms) for terms in whole.values())
    if certified and needed:
        refused.append(f"{certified}; use machines and settings of one kind, or {_NO_BITS}")
    notes = (f"{certified}, as numerics.reduction = 'fast' allows",) if certified else ()
    return Verdict(tuple(refused), () if needed else notes)


def _needs_certificate(terms: Terms) -> bool:
    """Whether the ranks may train only if their certificates are equal.

    Fast mode promises no bits. But in an elastic run owners and shadows each apply every update.
    """
    fast = terms.config.get("numerics.reduction") == '"fast"'
    return not fast or terms.config.get("elastic.enabled") == "true"


def _certificate(whole: Mapping[int, Terms], names: Sequence[str]) -> str:
    """The line on certificates that differ; empty: they are equal."""
    distinct = {id(terms): terms.certificate for terms in whole.values()}
    kinds = dict.fromkeys(itertools.chain.from_iterable(distinct.values()))
    differing = [k for k in kinds if len({c.get(k) for c in distinct.values()}) > 1]
    if not differing:
        return ""
    values = {
        rank: " ".join(terms.certificate.get(kind, "none")[:8] for kind in differing)
        for rank, terms in whole.items()
    }
    told = ", ".join(f"{v} on {_of(ranks, names)}" for v, ranks in _grouped(values).items())
    return (
        f"certificate: {told}; these machines compute other bits in the same operations "
        f"({', '.join(differing)})"
    )


def _value(name: str, value: str | None, terms: Terms) -> str:
    """A value in words."""
    if value is None:
        return "none"
    if name == DATA:
        return f"fingerprint {value} ({terms.data_from})"
    return value if len(value) <= _LONGEST else value[:_LONGEST] + "…"


def _advice(name: str) -> str:
    if name == DATA:
        return (
            "they would read other tokens: give all the same files, and name them by paths that "
            "are the same everywhere"
        )
    if name.startswith("version of "):
        return "install the same everywhere"
    if name == "checkpoint.path":
        return "it must be the same place for all: name an absolute path"
    return "start all with the same file and the same --set"


def _grouped(values: Mapping[int, str | None]) -> dict[str | None, list[int]]:
    """The ranks of each value, in the order of their first ranks."""
    groups: dict[str | None, list[int]] = {}
    for rank, value in sorted(values.items()):
        groups.setdefault(value, []).append(rank)
    return groups


def _of(ranks: Collection[int], names: Sequence[str]) -> str:
    """Some ranks in words: `rank 3`, `ranks 0-3,8`."""
    if names:
        return " and ".join(names[rank] for rank in ranks)
    return named_ranks(sorted(ranks))
