"""Times the tiles that the logits' product of linear_stablemax may have, beside torch's own product, on this GPU.

    python tools/tune_linear_stablemax.py [R H V]

What is best belongs into `_TILES` of triton_kernels/linear_stablemax.py: a choice made there keeps the same bits on
every run, which one made by timing at run time would not. Every candidate is checked before it is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from tiles import milliseconds, relative_error, tabulate

from pyreg.triton_kernels import linear_stablemax as kernels
from pyreg.triton_kernels.linear_stablemax import Tiles

CANDIDATES = [
    *(Tiles(128, 256, 64, 2, 8, 4, descriptors=True, group=group) for group in (4, 8, 16, 32)),
    Tiles(128, 256, 64, 2, 8, 3, descriptors=True),
    Tiles(128, 256, 64, 1, 8, 3, descriptors=True),
    Tiles(256, 128, 64, 2, 8, 4, descriptors=True, group=8),
    Tiles(256, 128, 64, 2, 8, 3, descriptors=True, group=8),
    Tiles(128, 128, 64, 2, 8, 4, descriptors=True),
    Tiles(128, 128, 128, 2, 8, 3, descriptors=True),
    Tiles(128, 128, 64, 2, 4, 4, descriptors=True),
    # A warp group that copies, two that multiply. Triton 3.6 compiles those of one part alone.
    *(Tiles(128, 256, 64, 1, 4, 3, descriptors=True, specialized=True, group=group) for group in (8, 16)),
    Tiles(256, 128, 64, 1, 4, 3, descriptors=True, specialized=True, group=8),
    Tiles(128, 256, 64, 2, 4, 4, descriptors=True, specialized=True),
    Tiles(256, 128, 64, 2, 4, 4, descriptors=True, specialized=True, group=8),
    # Pointers: sm_80, and addresses that no descriptor takes.
    Tiles(128, 128, 64, 1, 8, 4),
    Tiles(128, 128, 64, 2, 8, 3),
    Tiles(128, 256, 32, 2, 8, 4),
]


def main() -> None:
    n_rows, n_features, n_classes = map(int, sys.argv[1:]) if len(sys.argv) == 4 else (4096, 4096, 128256)
    random = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": random}
    x = torch.randn(n_rows, n_features, **options).bfloat16()
    weight = (torch.randn(n_classes, n_features, **options) / n_features**0.5).bfloat16()
    labels = torch.randint(n_classes, (n_rows,), **options)
    operations = 2 * n_rows * n_features * n_classes

    logits = torch.empty(n_rows, n_classes, dtype=torch.bfloat16, device="cuda")
    product = milliseconds(lambda: torch.mm(x, weight.T, out=logits))

    sample = slice(0, n_rows, max(1, n_rows // 64))
    few = x[sample].double() @ weight.double().T
    target = labels[sample, None]
    share = torch.where(few < 0, 1 / (1 - few), few + 1)
    exact = torch.log1p((share.sum(1, keepdim=True) - share.gather(1, target)) / share.gather(1, target))[:, 0]
    slopes = torch.where(few < 0, (1 - few) ** -2, 1.0).scatter(1, target, 0.0)
    del few, share
    derivatives = kernels.new_derivatives(n_rows, weight)
    scale = kernels._slope_scale(x.dtype) ** 2

    def attempt(tiles: Tiles) -> tuple[Callable[[], object], list[float]]:
        kernels._choose_tiles = lambda *_: tiles
        derivatives.fill_(float("nan"))
        loss = forward().loss[sample]
        return forward, [relative_error(loss, exact) / 1e-5, relative_error(derivatives[sample] / scale, slopes) * 2**8]

    def forward() -> kernels.RowTerms:
        return kernels.forward(x, weight, None, labels, None, derivatives)

    title = f"{n_rows} x {n_features} -> {n_classes}, bfloat16"
    tabulate(title, ("torch.mm", product), operations, CANDIDATES, attempt)


if __name__ == "__main__":
    main()
