"""The keys that may differ between a checkpoint and the configuration, as a person names them.

Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence

import msgspec

from holdfast.parallel.errors import ConfigError, shown
from holdfast.trainer.config.flat import flat_keys
from holdfast.trainer.config.sections import RunConfig
from holdfast.trainer.config.suggestions import meant_keys

OPTION = "--allow-change"
OF_A_MODEL_FOLDER = "config.json:"
"""Before a key of a model folder's config.json that has no counterpart in [model]."""
EVERY_CHANGE = ("*",)
"""For a run's own restarts, whose configuration was checked before; no person can give it."""
NAMELESS = ""
"""The option without a key, which allows nothing."""


def allowed_changes(values: Sequence[str], config: RunConfig) -> tuple[str, ...]:
    """The keys in the values of the option, which have commas between them.

    Raises:
        ConfigError: a key is unknown; the message has the nearest one.
    """
    keys = [key.strip() for value in values for key in value.split(",")]
    every = sorted(flat_keys(msgspec.to_builtins(config)))
    for key in keys:
        if key == NAMELESS or key in every or key.startswith(OF_A_MODEL_FOLDER):
            continue
        near = difflib.get_close_matches(key[:100], every, n=1, cutoff=0.6)
        meant = meant_keys(key) or "".join(near)
        hint = f"; did you mean {meant}?" if meant else "; write section.key, as data.path"
        raise ConfigError(f"{OPTION} {shown(key)}: is not a key{hint}")
    return tuple(dict.fromkeys(keys))


def refused_changes(changed: Collection[str], allowed: Collection[str]) -> list[str]:
    """The changed keys that are not allowed, in their order."""
    if set(EVERY_CHANGE) <= set(allowed):
        return []
    return [key for key in changed if key not in allowed]


def advice_to_allow(changed: Iterable[str], allowed: Collection[str]) -> str:
    """How to go on all the same: the exact option."""
    option = f"{OPTION} {','.join(dict.fromkeys(changed))}"
    if NAMELESS in allowed:
        return f"go on all the same with {option} ({OPTION} allows the keys that it names)"
    return f"go on all the same with {option}"
