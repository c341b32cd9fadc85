"""OrthoGrad: the gradient without its part along the weights, at its old length (arXiv 2501.04697).

    g_perp = g - (w.g / (w.w + 1e-30)) w
    g'     = g_perp |g| / (|g_perp| + 1e-30)

over each parameter tensor, flattened. A zero weight leaves g unchanged, a zero gradient stays zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

EPSILON = 1e-30


def orthogonalize_gradient(weight: Tensor, grad: Tensor) -> Tensor:
    """g' of one parameter, in the shape and dtype of `grad`; bf16 and fp16 compute in fp32: `EPSILON` is 0 in fp16."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    w, g = weight.to(dtype).flatten(), grad.to(dtype).flatten()
    perpendicular = g - (w.dot(g) / (w.dot(w) + EPSILON)) * w
    rescaled: Tensor = perpendicular * (g.norm() / (perpendicular.norm() + EPSILON))
    return rescaled.view(grad.shape).to(grad.dtype)


@torch.no_grad()
def orthogonalize_gradients_(params: Iterable[Tensor]) -> None:
    """Replaces the gradient of every parameter that has one."""
    for param in params:
        if param.grad is not None:
            param.grad.copy_(orthogonalize_gradient(param, param.grad))
