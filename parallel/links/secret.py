"""The secret of a run: made at random, or given in the environment; keys are derived from it."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping

from holdfast.parallel.errors import ConfigError

SECRET_VARIABLE = "HOLDFAST_SECRET"
MAKE_SECRET = f"export {SECRET_VARIABLE}=$(openssl rand -hex 32)"
"""The shell command that makes one secret for all tasks that are started after it."""
ONE_SECRET = (
    f"name a folder with --out on a disk that all tasks see, or give them one secret: {MAKE_SECRET}"
)
"""The advice where the tasks of a job do not have the same secret."""
_LEAST_CHARACTERS = 16


def new_secret() -> str:
    """A secret at random: 64 hexadecimal digits."""
    return secrets.token_hex(32)


def derived_key(secret: str, purpose: str) -> bytes:
    """The key for one purpose, 32 bytes; keys of different purposes do not fit each other."""
    return hmac.digest(secret.encode(), purpose.encode(), "sha256")


def given_secret(environment: Mapping[str, str]) -> str:
    """The secret in `HOLDFAST_SECRET`; empty: none is given.

    Raises:
        ConfigError: it is too short.
    """
    secret = environment.get(SECRET_VARIABLE, "")
    if 0 < len(secret) < _LEAST_CHARACTERS:
        raise ConfigError(
            f"{SECRET_VARIABLE} has {len(secret)} characters; give it at least "
            f"{_LEAST_CHARACTERS}, at random: {MAKE_SECRET}"
        )
    return secret
