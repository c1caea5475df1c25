"""The loss of a model on the validation sets of a configuration, as its run computes it."""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from torch import Tensor

from holdfast.launch.text.opening import (
    ModelDescription,
    TextModel,
    load_model,
    precision_of_model,
)
from holdfast.launch.text.scoring import Score
from holdfast.launch.text.sources import ModelSource
from holdfast.launch.text.tokens import named_tokenizer, open_tokenizer
from holdfast.parallel.errors import ConfigError
from holdfast.parallel.layout import slices_of
from holdfast.parallel.pipeline import MicroBatchContext, Passage
from holdfast.trainer.config import RunConfig, validation_data
from holdfast.trainer.data import Dataset
from holdfast.trainer.step import (
    batches_of,
    by_slice,
    choose_device,
    mean_held_out_loss,
    open_validation,
)


def load_like_run(described: ModelDescription, config: RunConfig, device: str) -> TextModel:
    """A model that computes as the ranks of a run do. It sets the threads and kernels of a rank.

    Args:
        config: as `held_out_config` gives it.
        device: "auto", "cpu" or "cuda"; "auto": the run's.
    """
    if device != "auto":
        train = msgspec.structs.replace(config.train, device=device)
        config = msgspec.structs.replace(config, train=train)
    return load_model(described, choose_device(config, 0), config.train.seq_len, like=config)


def held_out_scores(model: TextModel, config: RunConfig, batches: int = 0) -> list[Score]:
    """The mean loss of a token in each validation set of a configuration, what it holds out first.

    In exact mode it has the bits that the run's ranks get, in any layout, on processors of their
    kind. (Without `numerics.tensor_shards`, of one tensor rank, or of two.) Local.

    Args:
        model: loaded to compute as the run does.
        batches: the global batches of each set; 0: as many as in training.
    """
    return [
        _score(model, config, name, data, batches or batches_of(config, name, data))
        for name, data in open_validation(config).items()
    ]


def _score(model: TextModel, config: RunConfig, name: str, data: Dataset, batches: int) -> Score:
    train = config.train
    passes = _Passes(config, model, data, byte_counts(config, name))
    loss = mean_held_out_loss(
        passes.losses,
        lambda batch: data.predicted(batch, global_batch=train.global_batch),
        lambda sums: None,
        batches=batches,
        micro_batches=train.global_batch // train.micro_batch,
        slices=passes.slices.count,
    )
    return Score(name, loss, passes.tokens, passes.bytes)


class _Passes:
    """The passes of global batches through a model, and what they have in them."""

    def __init__(
        self, config: RunConfig, model: TextModel, data: Dataset, counts: np.ndarray | None
    ) -> None:
        """Nothing is computed yet.

        Args:
            counts: the bytes that each token stands for; None: not known.
        """
        self._train, self._model, self._data, self._counts = config.train, model, data, counts
        self.slices = slices_of(config.train.seq_len, config.train.context_chunks, 1, 0)
        self.tokens = 0
        """The tokens that were predicted."""
        self.bytes: int | None = None if counts is None else 0
        """Their bytes."""

    @torch.no_grad()
    def losses(self, number: int) -> dict[tuple[int, int], Tensor]:
        """The loss sums of a global batch, by micro-batch and slice."""
        train, found = self._train, {}
        for micro_batch in range(train.global_batch // train.micro_batch):
            batch = self._data.batch(
                number,
                micro_batch,
                global_batch=train.global_batch,
                micro_batch_size=train.micro_batch,
            )
            self._count(batch.targets.numpy())
            context = MicroBatchContext(
                number, micro_batch, False, batch.to(self._model.device), slices=self.slices
            )
            found[Passage(micro_batch)] = self._model.chunk(None, context)
        return by_slice(found, self.slices)

    def _count(self, targets: np.ndarray) -> None:
        predicted = targets[targets >= 0]
        self.tokens += len(predicted)
        if self._counts is not None:
            assert self.bytes is not None
            self.bytes += int(self._counts[predicted].sum())


def byte_counts(config: RunConfig, name: str) -> np.ndarray | None:
    """The bytes that each token of a validation set stands for: int64[model.vocab].

    None where that is not known: the data is no text, or a token's text depends on its neighbours.
    """
    sets = {own.name: validation_data(config.data, own) for own in config.data.validation}
    data = sets.get(name, config.data)
    if data.kind != "text":
        return None
    files, _ = named_tokenizer(data.tokenizer)
    tokenizer = open_tokenizer(files, "data.tokenizer", adds_special_tokens=False)
    counts = tokenizer.byte_counts()
    if counts is None:
        return None
    found = np.zeros(max(len(counts), config.model.vocab), dtype=np.int64)
    found[: len(counts)] = counts
    return found


def held_out_config(described: ModelDescription, data: RunConfig | None = None) -> RunConfig:
    """The configuration whose held-out data a model is evaluated on. Local.

    Args:
        data: the configuration that the data, its order and the shape of batches come from; None:
            that of the model's run.
    Raises:
        ConfigError: the model is of no run, or the data is not for it.
    """
    source, section = described.source, described.section
    if data is None:
        if source.run is None:
            raise ConfigError(
                f"{source.where} is of no run, so it has no data of its own; give --text FILE, or "
                "--data CONFIG.toml"
            )
        return source.run
    train = msgspec.structs.replace(data.train, precision=precision_of_model(source).name)
    if train.seq_len > described.context:
        raise ConfigError(
            f"--data: train.seq_len = {train.seq_len}, and {source.where} takes "
            f"{described.context} tokens at most"
        )
    given = {"model": section, "data": data.data, "train": train}
    config = msgspec.structs.replace(source.run or RunConfig(model=section), **given)
    _check_tokenizer(config, source)
    return config


def _check_tokenizer(config: RunConfig, source: ModelSource) -> None:
    """Refuse text that another tokenizer than the model's would encode."""
    if config.data.kind != "text" or "tokenizer.json" not in source.files:
        return
    files, _ = named_tokenizer(config.data.tokenizer)
    theirs, ours = (
        open_tokenizer(found, where, adds_special_tokens=False).library.get_vocab()
        for found, where in ((files, "data.tokenizer"), (source.files, source.where))
    )
    if theirs != ours:
        raise ConfigError(
            f'--data: data.tokenizer = "{config.data.tokenizer}" is not the tokenizer of '
            f"{source.where}; name the tokenizer.json of the model"
        )
