"""Times the tiles and blocks that the pairwise contrastive losses may have, beside torch's own products, on this GPU.

    python tools/tune_contrastive.py [N D [bfloat16 | float32 | tf32]]

Of ConR, loss and gradient of N samples of D features. What is best belongs into `_FUSED_TILES` (up to `_MOST_FUSED`
samples), `_BLOCK_TILES` and `_BLOCK_BYTES` of triton_kernels/contrastive.py: a choice made there keeps the same bits on
every run, which one made by timing at run time would not. Every candidate is checked before it is timed.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from tiles import milliseconds, relative_error, tabulate
from torch import Tensor

from pyreg.ops import _pairs
from pyreg.triton_kernels import contrastive as kernels
from pyreg.triton_kernels.contrastive import Tiles


class Candidate(NamedTuple):
    tiles: Tiles
    block_megabytes: int = 0  # 0 where products stay in registers


def candidates(n_rows: int, dtype: torch.dtype) -> list[Candidate]:
    widest = 128 // dtype.itemsize
    if n_rows <= kernels._MOST_FUSED:
        choices = itertools.product((32, 64, 128), (widest // 2, widest), (4, 8), (3, 4, 5))
        return [Candidate(Tiles(*choice)) for choice in choices]
    # (size, rows at a time, warps): 4 to 16 elements of a thread at a time.
    shapes = ((128, 4, 4), (128, 8, 4), (128, 16, 4), (128, 8, 8), (128, 16, 8), (64, 8, 4), (64, 16, 4), (256, 8, 8))
    return [
        Candidate(Tiles(size, widest, warps, 1, piece, registers), megabytes)
        for (size, piece, warps), registers, megabytes in itertools.product(shapes, (128, 168, 255), (32, 64, 128, 256))
    ]


def main() -> None:
    n_rows, n_features = map(int, sys.argv[1:3]) if len(sys.argv) >= 3 else (32768, 512)
    name = sys.argv[3] if len(sys.argv) == 4 else "bfloat16"
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    random = torch.Generator("cuda").manual_seed(0)
    features = torch.randn(n_rows, n_features, device="cuda", generator=random).to(dtype)
    targets = torch.randint(100, (n_rows, 1), device="cuda", generator=random).float()
    preds = targets + 16 * torch.randn(n_rows, 1, device="cuda", generator=random)
    grad_rows = torch.full((n_rows,), 1 / n_rows, device="cuda")
    numbers = (1.0, 0.07, 0.01, 0, 2)  # window, temperature, eta, variant, norm of labels
    kernels._skips = lambda features: False

    def results(operators: object, features: Tensor) -> tuple[Tensor, Tensor]:
        tensors = (features, targets, preds, None)
        loss, statistics, _ = operators.conr(*tensors, *numbers, 1, torch.float32, 0, n_rows, False)  # type: ignore[attr-defined]
        backward = operators.conr_backward  # type: ignore[attr-defined]
        return loss, backward(grad_rows, *tensors, statistics, *numbers, 0, n_rows)

    exact_loss, exact_gradient = results(_pairs, features.double())
    allowed = {"bfloat16": 2**-7, "tf32": 2**-9, "float32": 1e-5}[name]

    def attempt(candidate: Candidate) -> tuple[Callable[[], object], list[float]]:
        kernels._choose_tiles = lambda *_: candidate.tiles
        kernels._BLOCK_BYTES = candidate.block_megabytes << 20
        loss, gradient = results(kernels, features)
        errors = [relative_error(loss, exact_loss) / 1e-4, relative_error(gradient, exact_gradient) / allowed]
        return lambda: results(kernels, features), errors

    # Half a Gram product forward; half of one and one with z backward: each of 2 N^2 D operations.
    square = features[: min(n_rows, 16384)]
    gram = milliseconds(lambda: square @ square.T) * (n_rows / len(square)) ** 2
    title = f"ConR of {n_rows} x {n_features}, {name}, loss and gradient"
    tabulate(title, ("the products", 2 * gram), 4 * n_rows**2 * n_features, candidates(n_rows, dtype), attempt)


if __name__ == "__main__":
    main()
