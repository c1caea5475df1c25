"""A small program of plain torch whose whole state goes through the library's checkpoints.

It has what such programs have: a buffer that changes in the forward pass, dropout, an optimizer
with a schedule, the state of torch's random generator, and plain values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PlainProgram:
    """A model and what trains it; every value of its state depends on `seed` until it is loaded."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(8, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 4)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01 * (seed + 1))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.random: Tensor = torch.get_rng_state()
        self.note = f"seed {seed}"

    def state(self) -> dict[str, Any]:
        """What is saved and loaded."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "random": self.random,
            "note": self.note,
        }

    def train(self, steps: int) -> list[str]:
        """Train some steps from the random state on; the losses as exact hexadecimal floats."""
        torch.set_rng_state(self.random)
        losses = []
        for _ in range(steps):
            loss = self.model(torch.randn(16, 8)).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item().hex())
        self.random.copy_(torch.get_rng_state())
        return losses
