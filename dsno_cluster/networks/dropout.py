"""Training without dropout."""

from __future__ import annotations

from typing import Self

from torch import nn


class DropoutSwitch(nn.Module):
    """A module whose dropout can be switched off for good, so that it answers in training as when it is evaluated."""

    has_dropout = True

    def without_dropout(self) -> Self:
        """This module, of which every part is left in the mode for evaluation from now on, `train()` or not."""
        self.has_dropout = False
        return self.train()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and self.has_dropout)
