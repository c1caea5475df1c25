"""The terms of this rank. It needs torch, and the training data."""

from __future__ import annotations

from pathlib import Path

from holdfast.trainer.config import DataConfig, RunConfig
from holdfast.trainer.step import backend_of, choose_device, open_split, open_validation
from holdfast.trainer.terms.certificate import make_certificate
from holdfast.trainer.terms.terms import Terms, config_terms, software_versions


def own_terms(config: RunConfig, local_rank: int) -> Terms:
    """What this rank is going to train with. Local.

    Raises:
        ConfigError: it has no device of its own.
        DataError: the data cannot be used.
    """
    device = choose_device(config, local_rank)
    resolved = {"train.device": device.type, "parallel.backend": backend_of(config, device)}
    return Terms(
        config_terms(config, resolved),
        _fingerprint(config),
        _source(config.data),
        software_versions(),
        make_certificate(config, device),
    )


def _fingerprint(config: RunConfig) -> str:
    """What stands for the data that a rank trains and evaluates on."""
    train = open_split(config, "train").fingerprint
    if not (config.train.eval_every and config.data.validation):
        return train
    named = [f"{name} {data.fingerprint}" for name, data in open_validation(config).items()]
    return ", ".join([train, *named])


def _source(data: DataConfig) -> str:
    """Where the data is read, for a person."""
    if data.kind == "synthetic":
        return "synthetic"
    named = ", ".join(data.path[:3]) or "the Python standard library"
    more = f" and {len(data.path) - 3} more" if len(data.path) > 3 else ""
    return f"{named}{more}, in {Path.cwd()}"
