"""How batches of transport problems lie in public tensors, and how operators take them: ``[B, n, m]``.

A ragged batch is padded to its largest problem, with entries of weight 0 whose potential is infinite: they go nowhere,
and kernels leave them out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Entries:
    """The rows of all problems, or the columns: ``[*shape]`` = ``[..., n]`` outside, ``[B, n]`` inside; further
    dimensions may follow."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.count = shape, shape[-1]

    def inside(self, outside: Tensor, fill: float = 0.0) -> Tensor:
        return outside.reshape(-1, *outside.shape[len(self.shape) - 1 :])

    def outside(self, inside: Tensor) -> Tensor:
        return inside.reshape(*self.shape, *inside.shape[2:])

    @property
    def padding(self) -> Tensor | None:
        """``[B, n]``: whether it is padding; None where there is none."""
        return None

    def uniform(self, like: Tensor) -> Tensor:
        """Weights of 1 / n, ``[B, n]``, float64."""
        return like.new_full((math.prod(self.shape[:-1]), self.count), 1 / self.count, dtype=torch.float64)

    def over_ranks(self, numbers: Tensor) -> Tensor:
        """Sums over what other processes have of these entries; of constants."""
        return numbers

    def agree(self, check: Callable[[], T]) -> T:
        """What a check of arguments returns, unless it raises, here or in another process."""
        return check()

    def __str__(self) -> str:
        return str(self.count)


class RaggedEntries(Entries):
    """``[N]`` outside, problem k's at ``offsets[k]`` to ``offsets[k + 1]``; ``[B, n]`` inside, n the largest."""

    def __init__(self, offsets: Sequence[int], device: torch.device) -> None:
        self.shape, self.offsets = (offsets[-1],), offsets
        self.lengths = [end - begin for begin, end in itertools.pairwise(offsets)]
        self.count = max(self.lengths)
        first, lengths = torch.tensor([offsets[:-1], self.lengths], device=device).unsqueeze(2)
        positions = torch.arange(self.count, device=device)
        self._is_padding: Tensor = positions >= lengths  # [B, n]
        self._source = torch.where(self._is_padding, 0, first + positions)
        padded = [range(k * self.count, k * self.count + length) for k, length in enumerate(self.lengths)]
        self._target = torch.tensor([position for part in padded for position in part], device=device)

    def inside(self, outside: Tensor, fill: float = 0.0) -> Tensor:
        is_padding = self._is_padding.reshape(*self._is_padding.shape, *[1] * (outside.dim() - 1))
        return outside[self._source].masked_fill(is_padding, fill)

    def outside(self, inside: Tensor) -> Tensor:
        return inside.flatten(0, 1)[self._target]

    @property
    def padding(self) -> Tensor:
        return self._is_padding

    def uniform(self, like: Tensor) -> Tensor:
        lengths = torch.tensor(self.lengths, dtype=torch.float64, device=like.device).unsqueeze(1)
        return (1 / lengths).masked_fill(self._is_padding, 0)

    def __str__(self) -> str:
        return str(self.lengths)


class Problems:
    """Rows and columns of a batch of the shape given."""

    def __init__(self, shape: tuple[int, ...], rows: Entries, columns: Entries) -> None:
        self.shape, self.rows, self.columns = shape, rows, columns

    def numbers(self, inside: Tensor) -> Tensor:
        """``[*shape]`` from ``[B]``."""
        return inside.reshape(self.shape)

    def matrices(self, inside: Tensor) -> Tensor | list[Tensor]:
        """``[*shape, n, m]`` from ``[B, n, m]``; of a ragged batch a list of ``[n, m]``."""
        if isinstance(self.rows, RaggedEntries) and isinstance(self.columns, RaggedEntries):
            sizes = zip(inside, self.rows.lengths, self.columns.lengths, strict=True)
            return [matrix[:n, :m] for matrix, n, m in sizes]
        return inside.reshape(*self.shape, *inside.shape[1:])

    def __str__(self) -> str:
        return f"n={self.rows}, m={self.columns}" + (f", batch={list(self.shape)}" if self.shape else "")
