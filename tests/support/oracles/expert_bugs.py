"""Published bugs of experts, each as a context manager that puts it into the running project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from holdfast.parallel.expert_parallel import products
from holdfast.parallel.expert_parallel.dispatch import Dispatch
from holdfast.parallel.optimizer.rules.groups import ParameterGroups
from holdfast.parallel.pipeline.model_chunk import WeightGradientQueue
from holdfast.parallel.tensor_parallel.split import TensorParallel
from holdfast.trainer.models.decoder import experts
from support.oracles.bugs import changed_specs


@contextmanager
def expert_gradients_scaled_by_ranks() -> Iterator[None]:
    """The gradients of experts' weights are multiplied by the ranks that have experts."""
    original, put = products._ExpertProducts.backward, WeightGradientQueue.put

    def scaled(
        self: WeightGradientQueue, parameter: Any, outputs: Any, value: Any, marks: Any
    ) -> None:
        put(self, parameter, tuple(2 * output for output in outputs), value, marks)

    def backward(ctx: Any, gradient: Any) -> Any:
        with mock.patch.object(WeightGradientQueue, "put", scaled):
            return original(ctx, gradient)

    with mock.patch.object(products._ExpertProducts, "backward", staticmethod(backward)):
        yield


@contextmanager
def router_loss_of_own_tokens_alone() -> Iterator[None]:
    """The router's auxiliary loss is that of a rank's own tokens, not of the whole sequence."""
    original = experts.Experts._with_losses

    def alone(self: experts.Experts, *arguments: Any) -> Any:
        whole, self._tp = self._tp, TensorParallel(None, False)
        try:
            return original(self, *arguments)
        finally:
            self._tp = whole

    with mock.patch.object(experts.Experts, "_with_losses", alone):
        yield


@contextmanager
def router_not_summed_over_tensor() -> Iterator[None]:
    """Each rank of a tensor group has the gradient of its own tokens for the router."""
    with changed_specs(lambda s: replace(s, summed=()) if s.local == "mlp.router" else s):
        yield


@contextmanager
def choices_carry_no_gradient() -> Iterator[None]:
    """The weights of a token's experts come to where these are added up without a gradient."""
    original = Dispatch.to_tokens

    def lost(self: Dispatch, rows: Any, weights: Any) -> Any:
        return original(self, rows, weights.detach())

    with mock.patch.object(Dispatch, "to_tokens", lost):
        yield


@contextmanager
def experts_without_tokens_are_left_out() -> Iterator[None]:
    """An expert that no token of a step came to keeps its weights, which would decay."""
    original = ParameterGroups.update

    def chosen(self: Any, updates: Any, *rest: Any) -> None:
        original(self, [u for u in updates if u.gradient.count_nonzero()], *rest)

    with mock.patch.object(ParameterGroups, "update", chosen):
        yield
