"""A micro-batch's tokens and documents, as the chunks of a model take them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents in the sequences of a micro-batch.

    Sequences are laid one after another and have no gaps, so `cu_seqlens` has all of their ends
    too. Attention does not cross the end of a document, and positions begin anew there.
    """

    cu_seqlens: tuple[int, ...]
    """The documents' ends in the sequences one after another, ascending from 0: the field's name
    for cumulative lengths."""
    positions: Tensor
    """Each token's position in its document: int64[seq, micro_batch]."""

    @classmethod
    def of(cls, lengths: Iterable[int], micro_batch: int) -> Documents:
        """Documents of these lengths, sequence after sequence, on the CPU.

        Args:
            lengths: 1 or more each; they fill `micro_batch` sequences of equal length.
        """
        ends = tuple(accumulate(lengths, initial=0))
        starts = torch.zeros(ends[-1], dtype=torch.int64)
        begun = torch.tensor(ends[:-1])
        starts[begun] = begun
        positions = torch.arange(ends[-1]) - starts.cummax(0).values
        return cls(ends, positions.view(micro_batch, -1).t().contiguous())

    @property
    def lengths(self) -> list[int]:
        """The documents' lengths, sequence after sequence."""
        return [stop - start for start, stop in pairwise(self.cu_seqlens)]


class Batch(NamedTuple):
    """The sequences of one micro-batch."""

    tokens: Tensor
    """int64[micro_batch, seq_len]"""
    targets: Tensor
    """The token after each: int64[micro_batch, seq_len]; negative where none is predicted, which
    only batches with documents have."""
    documents: Documents | None = None
    """None: each sequence is one document."""

    def learned(self) -> Tensor:
        """The tokens of documents of which something is predicted: bool[micro_batch, seq_len].

        The others are padding, or documents of one token.
        """
        if self.documents is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        document = self._begins().flatten().cumsum(0) - 1
        predicted = torch.bincount(document, (self.targets >= 0).flatten().double())
        return (predicted > 0)[document].view_as(self.targets)

    def next_tokens(self) -> Tensor:
        """The token after each: int64[micro_batch, seq_len].

        The last token of a document, and of a sequence, is followed by its target if it has one,
        else by itself.
        """
        following = torch.where(self.targets < 0, self.tokens, self.targets)
        inside = ~self._begins()[:, 1:]
        following[:, :-1] = torch.where(inside, self.tokens[:, 1:], following[:, :-1])
        return following

    def further_targets(self) -> Tensor:
        """The token after each target: int64[micro_batch, seq_len].

        It is negative where the document, or the sequence, ends before, or it is not predicted.
        """
        further = torch.full_like(self.targets, -1)
        further[:, :-1] = self.targets[:, 1:].masked_fill(self._begins()[:, 1:], -1)
        return further

    def _begins(self) -> Tensor:
        """The tokens with which a document begins: bool[micro_batch, seq_len]."""
        if self.documents is not None:
            return self.documents.positions.t() == 0
        begins = torch.zeros_like(self.tokens, dtype=torch.bool)
        begins[:, 0] = True
        return begins

    def cut(self, length: int) -> Batch:
        """The same tokens in documents of at most `length` tokens, cut from each sequence's begin.

        A token at an end still predicts the next one.
        """
        rows, size = self.tokens.shape
        ends = {row * size + stop for row in range(rows) for stop in range(0, size, length)}
        ends.update(() if self.documents is None else self.documents.cu_seqlens, {rows * size})
        documents = Documents.of([stop - start for start, stop in pairwise(sorted(ends))], rows)
        return self._replace(documents=documents)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        documents = self.documents
        if documents is not None:
            documents = Documents(documents.cu_seqlens, documents.positions.to(device))
        return Batch(self.tokens.to(device), self.targets.to(device), documents)
