"""The strips of tokens with which tensor-parallel layers hide their communication. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from holdfast.parallel.plan import Plan
from holdfast.trainer.config import RunConfig

STRIP_S = 2e-4
"""What a further message of each exchange costs."""
_LEAST_TOKENS = 64
"""Of a strip: products of fewer are slow."""
_MOST = 64


@dataclass(frozen=True, slots=True)
class StripsPlan:
    """An estimate of one layer's forward pass on a rank, with several numbers of strips."""

    computed_s: float
    exchanged_s: float
    strips: int
    """The configured number."""
    best: int
    per_message: int
    """The strips that travel together, at most."""

    def seconds(self, strips: int) -> float:
        """With so many strips: all but the first or the last are beside the others' messages."""
        longer = max(self.computed_s, self.exchanged_s)
        shorter = min(self.computed_s, self.exchanged_s)
        messages = -(-strips // self.per_message)
        return longer + shorter / messages + STRIP_S * (messages - 1)

    @property
    def text(self) -> str:
        """For a person."""
        told = (
            f"a layer computes for {self.computed_s * 1e3:.3g} ms forwards and exchanges for "
            f"{self.exchanged_s * 1e3:.3g} ms: {self.seconds(self.strips) * 1e3:.3g} ms"
        )
        if self.best == self.strips:
            return told
        return (
            f"{told}; with numerics.tensor_strips = {self.best} about "
            f"{self.seconds(self.best) * 1e3:.3g} ms"
        )


def strips_plan(
    config: RunConfig, plan: Plan, flops_per_s: float, link_bytes_per_s: float
) -> StripsPlan | None:
    """The best number of strips at some rates, above 0; None where nothing is exchanged."""
    mesh, train = plan.configured_mesh, config.train
    if mesh.tensor == 1 or not config.parallel.sequence_parallel:
        return None
    layer, parts = plan.layers[1], config.tensor_parts
    found = StripsPlan(
        computed_s=layer.forward_flops / mesh.shards / flops_per_s,
        # Tokens are gathered before attention and MLP, and sums scattered after each.
        exchanged_s=4 * (mesh.tensor - 1) * layer.output_bytes / link_bytes_per_s,
        strips=config.numerics.tensor_strips,
        best=1,
        per_message=config.parallel.strips_per_message,
    )
    tokens = train.seq_len // train.context_chunks
    possible = [
        strips
        for strips in range(parts, _MOST + 1, parts)
        if tokens % strips == 0 and tokens // strips * train.micro_batch >= _LEAST_TOKENS
    ]
    best = min((1, *possible), key=lambda strips: (found.seconds(strips), strips))
    return replace(found, best=best)
