"""What the model sees of the work between its matrix products: residual sums, norms and activations.

Those who carry it out are in engine/kernels.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ElementWiseStep(Protocol):
    """One step's residual stream. Its results share buffers that belong to the step."""

    def add_norm(self, delta: Tensor | None, weight: Tensor) -> Tensor:
        """Adds `delta`, of the stream's shape, to the stream; returns the stream's RMS norm times `weight`
        `[hidden_size]`, good until the next call."""

    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, `[num_rows, intermediate_size]`, of both side by side; good until the next call."""


class ElementWise(Protocol):
    """Of one model."""

    def step(self, hidden: Tensor) -> ElementWiseStep:
        """`hidden`, `[num_tokens, hidden_size]`, is what the stream begins with, and belongs to the step."""
