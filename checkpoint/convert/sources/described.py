"""The description of a model beside its weights: what contradicts them is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.checkpoint.convert.sources.catalog import Catalog
from holdfast.checkpoint.format import WEIGHT
from holdfast.checkpoint.model_config import contradictions, read_config
from holdfast.parallel.errors import CheckpointError, shown
from holdfast.parallel.optimizer import MASTER


def check_described(catalog: Catalog, told_by: str = "config.json") -> None:
    """Check the config.json that accompanies the weights of a source.

    Args:
        told_by: what the sizes come from, for messages.
    Raises:
        CheckpointError: it is damaged, or contradicts the weights.
    """
    config = config_of(catalog)
    shapes = {tensor.name: tensor.shape for tensor in catalog.of_kind(MASTER, WEIGHT)}
    found = list(contradictions(config, shapes))
    if found:
        raise CheckpointError(
            f"{catalog.root}: {told_by} contradicts the weights: {'; '.join(found)}; give the "
            "folder of the right config.json with --model-files"
        )


def config_of(catalog: Catalog) -> Mapping[str, Any]:
    """The keys of the config.json that accompanies the weights; none without the file.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return read_config(catalog.files.get("config.json", b"{}"))
    except ValueError as error:
        told = f"{catalog.root}: config.json is damaged: {shown(str(error))}"
        raise CheckpointError(told) from error
