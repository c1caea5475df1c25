"""The allowed values of keys that name an entry of a registry, read from the registry."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from holdfast.parallel.errors import unknown_name


def registries() -> Mapping[str, Collection[str]]:
    """By key (section.key): the registry whose names are its values. One line per registry."""
    from holdfast.parallel.optimizer import OPTIMIZERS
    from holdfast.parallel.plan import MICRO_BATCH_ORDERS
    from holdfast.parallel.precision import PRECISIONS
    from holdfast.parallel.schedules import SCHEDULES
    from holdfast.trainer.learning_rates import DECAY_SHAPES, LEARNING_RATES
    from holdfast.trainer.models import FAMILIES

    return {
        "model.family": FAMILIES,
        "optimizer.name": OPTIMIZERS,
        "optimizer.schedule": LEARNING_RATES,
        "optimizer.decay_shape": DECAY_SHAPES,
        "parallel.schedule": SCHEDULES,
        "parallel.micro_batch_order": MICRO_BATCH_ORDERS,
        "train.precision": PRECISIONS,
    }


def choice_problem(key: str, value: object, allowed: Collection[str]) -> str:
    """The problem of a value: key, value, allowed, nearest; empty if it is allowed. Pure."""
    return "" if value in allowed else unknown_name(key, str(value), allowed)
