"""The optimizer blocks of one training by key, owned or shadowed. Local."""

from __future__ import annotations

from holdfast.parallel.optimizer import BlockState, ShadowedBlock
from holdfast.parallel.plan import BlockKey
from holdfast.trainer.step import Training


class BlockStates:
    """Reads blocks from a training's live state, and writes received blocks into it."""

    def __init__(self, training: Training | None) -> None:
        """No state is read yet.

        Args:
            training: None for a rank that has none, and so no block.
        """
        self._owned: dict[BlockKey, int] = {}
        self._shadowed: dict[BlockKey, ShadowedBlock] = {}
        if training is None:
            return
        self._optimizer, self._shadows = training.optimizer, training.shadows
        self._owned = {owned.key: number for number, owned in enumerate(training.optimizer.owned)}
        self._shadowed = {block.key: block for block in training.shadows.blocks}

    def read(self, key: BlockKey) -> BlockState:
        """A held block's live state by kind, flat."""
        number = self._owned.get(key)
        if number is not None:
            return self._optimizer.block_state(number)
        return self._shadows.block_state(self._shadowed[key])

    def write(self, key: BlockKey, state: BlockState) -> None:
        """Write a block's state in every place where this training keeps it."""
        number = self._owned.get(key)
        if number is not None:
            _fill(self._optimizer.block_state(number), state)
        block = self._shadowed.get(key)
        if block is not None:
            _fill(self._shadows.block_state(block), state)
            self._shadows.round_weights(block)


def _fill(target: BlockState, source: BlockState) -> None:
    for kind, values in target.items():
        if values.data_ptr() != source[kind].data_ptr():
            values.copy_(source[kind])
