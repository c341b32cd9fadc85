"""What Triton kernels and their launchers share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

EMULATED = tl.constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1: kernels run as Python, on CPU tensors

OPTIONS = {"enable_fp_fusion": True}  # a product and its sum rounded once; Triton's own default changes in 3.10


@triton.jit
def round_to(x, dtype: tl.constexpr):
    if EMULATED and dtype == tl.bfloat16:  # the interpreter cuts digits off
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


def product_precision(dtype: torch.dtype) -> str:
    """How operands are multiplied: float32 ones as torch multiplies them, others exactly."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def product_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a b, or out += a b; 16-bit operands are summed in float32 where out is float32."""
    if a.dtype != out.dtype and not out.is_cuda:
        a, b = a.to(out.dtype), b.to(out.dtype)
    options = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, **options, out=out)
    else:
        torch.mm(a, b, **options, out=out)
