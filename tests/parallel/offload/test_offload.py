"""Offloaded activations: less memory, each storage sent once, and equal gradients."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from holdfast.parallel.errors import ConfigError, OffloadError
from holdfast.parallel.offload import Bounds, Offloader
from support.runs.offloaded import BYTES, ROWS, WIDTH, Stack, equal, gradients, inputs, steps


def test_memory_is_free_between_the_passes(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make()
    total = model(inputs())
    assert not any(reference.expired() for reference in model.seen)  # autograd keeps all of them
    expected = gradients(model, total)
    model.seen.clear()
    with offloader:
        total = model(inputs())
        offloader.drain()
        assert all(reference.expired() for reference in model.seen)
        found = gradients(model, total)
    assert equal(found, expected)
    report = offloader.last_step
    assert report.sent_bytes == report.eligible_bytes
    assert report.sent_bytes >= len(model.seen) * BYTES


def test_a_storage_goes_out_once_and_comes_back_once(make: Callable[..., Offloader]) -> None:
    weight = torch.randn(WIDTH, WIDTH).requires_grad_()
    offloader = make()
    with offloader:
        value = inputs() @ weight
        parts = value.view(2, ROWS // 2, WIDTH).unbind(0)
        total = (value * value).sum() + value.t().sigmoid().mul(value.t()).sum()
        total = total + (parts[0] * parts[1]).sum()
        del parts
        offloader.drain()
        sent = offloader._statistics().written_bytes
        del value
        total.backward()
    # The input, the product and the sigmoid; pages are written whole.
    assert offloader.last_step.sent_bytes == 3 * BYTES
    assert sent <= 3 * (BYTES + 4096)
    assert offloader.last_step.read_bytes <= 3 * (BYTES + 4096)


def test_what_belongs_to_others_stays(make: Callable[..., Offloader]) -> None:
    weight = torch.randn(WIDTH, WIDTH).requires_grad_()
    table, mask = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    small = torch.randn(WIDTH)
    offloader = make()
    offloader.keep(table)
    with offloader:
        total = (weight.t()[:ROWS] * table).sum() + (weight[:ROWS] * mask).sum()
        total = total + (weight[0] * small).sum()
        assert offloader._account.sent_bytes == BYTES
        offloader.drain()
        total.backward()
    # The mask was sent, for nothing: it still is in memory, is not read back, and stays from now
    # on.
    assert offloader.last_step.read_bytes == 0
    with offloader:
        (weight[:ROWS] * mask).sum().backward()
    assert offloader.last_step.sent_bytes == 0


def test_a_module_can_be_kept(make: Callable[..., Offloader]) -> None:
    module = nn.BatchNorm1d(BYTES)
    offloader = make()
    offloader.keep(module)
    held = {id(t) for t in (*module.parameters(), *module.buffers())}
    assert len(offloader._held) == len(held)


def test_a_change_after_saving_is_an_error_even_when_the_bytes_are_away(
    make: Callable[..., Offloader],
) -> None:
    weight = torch.randn(WIDTH, WIDTH).requires_grad_()
    offloader = make()
    with offloader:
        value = inputs() @ weight
        total = value.square().sum()
        offloader.drain()
        value.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()


def test_a_changed_tensor_is_saved_again(make: Callable[..., Offloader]) -> None:
    weight = torch.randn(WIDTH, WIDTH).requires_grad_()

    def run() -> Tensor:
        value = (inputs() @ weight).detach().requires_grad_() * 1
        before = value.square()
        with torch.no_grad():
            value.add_(1)
        (weight[:ROWS] * value).sum().backward()
        del before
        assert weight.grad is not None
        found, weight.grad = weight.grad, None
        return found

    expected = run()
    with make():
        assert torch.equal(run(), expected)


def test_recomputation_and_offload_go_together(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make()

    def run() -> Tensor:
        value = inputs().requires_grad_() * 1
        for layer in model.layers:
            value = checkpoint(lambda v, layer=layer: layer(v).tanh(), value, use_reentrant=False)
        return value.square().mean()

    expected = gradients(model, run())
    with offloader:
        total = run()
        offloader.drain()
        assert equal(gradients(model, total), expected)
    # The inputs of the parts, and what the loss saves; not what the parts compute again.
    assert offloader.last_step.sent_bytes == (len(model.layers) + 1) * BYTES


def test_graphs_can_be_used_again_and_differentiated_twice(make: Callable[..., Offloader]) -> None:
    def run(drain: Callable[[], None]) -> list[Tensor]:
        value = inputs().requires_grad_()
        total = (value * 2).sigmoid().exp().sum()
        drain()
        (first,) = torch.autograd.grad(total, value, create_graph=True)
        drain()
        (again,) = torch.autograd.grad(total, value, retain_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), value)
        return [first.detach(), again, second]

    expected = run(lambda: None)
    offloader = make()
    with offloader:
        assert equal(run(offloader.drain), expected)


def test_room_on_the_drive_is_used_again(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make(bounds=Bounds(1.0, 1.0))
    rooms = []
    for _ in range(5):
        steps(model, offloader, 1)
        rooms.append(offloader.last_step.room_bytes)
        offloader.drain()
        assert offloader._statistics().used_bytes == 0
    assert len(set(rooms)) == 1


def test_the_limit_is_kept(make: Callable[..., Offloader]) -> None:
    model = Stack()
    expected = gradients(model, model(inputs()))
    offloader = make(limit_bytes=3 * (BYTES + 4096))
    assert all(equal(found, expected) for found in steps(model, offloader))
    assert 0 < offloader.last_step.sent_bytes <= 3 * BYTES
    assert offloader.last_step.room_bytes <= 3 * (BYTES + 4096)
    assert offloader.last_step.fault == ""


def test_two_runs_share_a_folder_that_is_deleted(
    make: Callable[..., Offloader], tmp_path: Path
) -> None:
    model, folder = Stack(), tmp_path / "drive"
    expected = gradients(model, model(inputs()))
    folder.mkdir()
    one, other = make(folder), make(folder)
    with one, other:
        second = model(inputs())
        other.drain()
    with one:
        first = model(inputs())
        one.drain()
    assert list(folder.iterdir()) == []
    shutil.rmtree(folder)
    assert equal(gradients(model, first), expected)
    assert equal(gradients(model, second), expected)
    assert all(equal(found, expected) for found in steps(model, one))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.*No such file"):
        Offloader(tmp_path / "missing")


def test_what_was_given_up_is_forgotten(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make()
    expected = gradients(model, model(inputs()))
    with offloader:
        lost = model(inputs())
        offloader.drain()
        assert offloader._statistics().used_bytes > 0
        offloader.cancel()
        assert offloader._statistics().used_bytes == 0
        with pytest.raises(OffloadError, match="given up"):
            lost.backward()
    assert all(equal(found, expected) for found in steps(model, offloader))


def test_a_closed_offloader_says_so(make: Callable[..., Offloader]) -> None:
    model, offloader = Stack(), make()
    with offloader:
        total = model(inputs())
        offloader.drain()
    offloader.close()
    with pytest.raises(OffloadError, match="close it after"):
        total.backward()
