"""A published model folder that is read into memory, as a conversion would read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from holdfast.checkpoint.convert.sources import Engine, EntryChecks
from holdfast.checkpoint.convert.work.request import Conversion, PreparedConversion, prepare
from holdfast.checkpoint.format import TORCH_DTYPES, WEIGHT
from holdfast.checkpoint.loading import Targets


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """The weights of a Hugging Face folder, whatever files they are in."""

    _prepared: PreparedConversion

    @property
    def files(self) -> Mapping[str, bytes]:
        """The small files of the folder, by name."""
        return self._prepared.catalog.files

    @property
    def weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The type that each weight is read in (by safetensors' name), and its shape."""
        expected = self._prepared.output.expected
        return {t.name: (dtype, t.shape) for t, dtype in expected if t.kind == WEIGHT}

    def fill(self, targets: Targets) -> None:
        """Read weights to where they belong. Local.

        Raises:
            CheckpointError: the folder cannot be read, or is damaged.
        """
        catalog = self._prepared.catalog
        entries = EntryChecks(catalog.root, catalog.records)
        with Engine(
            catalog.root, None, checks=catalog.checks, entries=entries, scales=catalog.scales
        ) as engine:
            for unit in self._prepared.output.units:
                wanted = targets.get(unit.tensor.name, ())
                if unit.tensor.kind != WEIGHT or not wanted:
                    continue
                content = bytearray(engine.content(unit))
                values = torch.frombuffer(content, dtype=TORCH_DTYPES[unit.dtype])
                values = values.view(unit.box.shape)
                for target in wanted:
                    common = target.box.intersect(unit.box)
                    if common is not None:
                        part = values[common.relative_to(unit.box).slices]
                        target.memory[common.relative_to(target.box).slices].copy_(part)


def open_published(folder: Path, dtype: str = "") -> PublishedModel:
    """The model of a Hugging Face folder; no weight is read yet.

    Args:
        dtype: the type that weights are read in, by safetensors' name; "": that of the files.
    Raises:
        CheckpointError: the folder is damaged, incomplete, or contradicts its config.json.
    """
    asked = Conversion(folder, Path(), to="hf", source_format="hf", dtype=dtype)
    return PublishedModel(prepare(asked))
