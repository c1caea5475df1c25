"""A Hugging Face folder that no run has saved, as a source of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from holdfast.checkpoint.convert import PublishedModel, open_published
from holdfast.checkpoint.loading import Targets
from holdfast.parallel.precision import PRECISIONS
from holdfast.trainer.config import RunConfig


@dataclass(frozen=True, slots=True)
class FolderModel:
    """The model in a Hugging Face folder; see `ModelSource`."""

    where: str
    model: PublishedModel
    step: int | None = None
    run: RunConfig | None = None

    @property
    def files(self) -> Mapping[str, bytes]:
        return self.model.files

    @property
    def weights(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        return self.model.weights

    def fill(self, targets: Targets) -> None:
        self.model.fill(targets)


def published_model(folder: Path) -> FolderModel:
    """The model in a folder. Weights of a type that is not computed with are read as float32.

    Raises:
        CheckpointError: it is damaged or incomplete.
    """
    model = open_published(folder)
    known = {precision.stored for precision in PRECISIONS.values()}
    if {dtype for dtype, _ in model.weights.values()} - known:
        model = open_published(folder, "F32")
    return FolderModel(str(folder), model)
