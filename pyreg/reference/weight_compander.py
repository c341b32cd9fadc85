"""The weight compander: weights as a saturating function of what is trained (arXiv 2306.16993).

    w = Psi(v) = a f(u),   u = v / b,   Psi'(v) = (a / b) f'(u)

    kind      f          f'                         range of w
    arctan    arctan u   1 / (1 + u^2)              |w| < |a| pi / 2
    arsinh    arsinh u   1 / sqrt(1 + u^2)          all
    erf       erf u      2 / sqrt(pi) exp(-u^2)     |w| < |a|

`a` and `b` are numbers, or tensors that hold one value for all of v or one for each slice of v's dimension 0. Results
have v's dtype; bf16 and fp16 compute in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Constant = Tensor | float  # a or b

FUNCTION: dict[str, Callable[[Tensor], Tensor]] = {"arctan": torch.atan, "arsinh": torch.asinh, "erf": torch.erf}
DERIVATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "arctan": lambda u: 1 / (1 + u * u),
    "arsinh": lambda u: 1 / torch.sqrt(1 + u * u),
    "erf": lambda u: 2 / math.sqrt(math.pi) * torch.exp(-u * u),
}
INVERSE: dict[str, Callable[[Tensor], Tensor]] = {"arctan": torch.tan, "arsinh": torch.sinh, "erf": torch.erfinv}


def weight_compander(v: Tensor, a: Constant, b: Constant, kind: str = "arctan") -> Tensor:
    """`a f(v / b)`."""
    x, a, b = computed(v, a, b)
    return (a * FUNCTION[kind](x / b)).to(v.dtype)


def slope(v: Tensor, a: Constant, b: Constant, kind: str = "arctan") -> Tensor:
    """`Psi'(v) = (a / b) f'(v / b)`, in the dtype that is computed in."""
    x, a, b = computed(v, a, b)
    return a / b * DERIVATIVE[kind](x / b)


def inverse(w: Tensor, a: Constant, b: Constant, kind: str = "arctan") -> Tensor:
    """`v = b f^-1(w / a)`, computed in fp64; NaN or wrong where w is out of range."""
    x, a, b = computed(w, a, b, torch.float64)
    return (b * INVERSE[kind](x / a)).to(w.dtype)


@torch.no_grad()
def to_weight_gradient_(
    grad: Tensor, v: Tensor, a: Constant, b: Constant, kind: str, decay: float = 0.0, decay_on: str = "w"
) -> None:
    """The gradient by v becomes that by w, the gradient of `decay sum w^2` or `decay sum v^2` added to it:

        grad <- grad / p + 2 decay w   or   (grad + 2 decay v) / p,   p = Psi'(v)

    Where p is 0 the quotient counts as 0. The largest finite numbers of grad's dtype bound the result; a gradient that
    is not finite itself stays as it is.
    """
    p = slope(v, a, b, kind)
    x, a, b = computed(v, a, b)
    numerator = grad.to(p.dtype)
    if decay != 0 and decay_on == "v":
        numerator = numerator + 2 * decay * x
    result = torch.where(p == 0, 0, numerator / p)
    if decay != 0 and decay_on == "w":
        result = result + 2 * decay * a * FUNCTION[kind](x / b)
    largest = torch.finfo(grad.dtype).max
    grad.copy_(torch.where(grad.isfinite(), result.clamp(-largest, largest), grad))


@torch.no_grad()
def rescale_step_(v: Tensor, old_v: Tensor, a: Constant, b: Constant, kind: str) -> None:
    """`v <- old + (v - old) Psi'(old)`: a step that an optimizer took as if v were w becomes one of v."""
    p = slope(old_v, a, b, kind)
    old = old_v.to(p.dtype)
    v.copy_(old + (v.to(p.dtype) - old) * p)


def computed(v: Tensor, a: Constant, b: Constant, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """v, a and b in the dtype that is computed in; a and b shaped to broadcast against v."""
    dtype = torch.promote_types(v.dtype, dtype)
    return v.to(dtype), _constant(a, v, dtype), _constant(b, v, dtype)


def _constant(c: Constant, v: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(c, Tensor):
        return torch.full((), c, dtype=dtype, device=v.device)
    return c.to(dtype).reshape(() if c.numel() == 1 else (-1, *[1] * (v.dim() - 1)))
