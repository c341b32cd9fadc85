"""What Triton kernels and their launchers share."""

from __future__ import annotations

import contextvars
from collections.abc import Callable

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


def gpu_family(major: int, minor: int) -> str:
    """The architecture whose instructions and shared memory a GPU of this compute capability has."""
    if major >= 12:
        return "sm_120"
    if major >= 10:
        return "sm_100"
    if major == 9:
        return "sm_90"
    return "sm_80" if minor in (0, 7) else "sm_86"


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


def with_scratch(launch: Callable[[], None]) -> None:
    """Runs a launch whose tensor descriptors lie in scratch memory.

    The allocator of scratch memory belongs to the context: to a copy of the caller's.
    """

    def run() -> None:
        triton.set_allocator(_allocate_scratch)
        launch()

    contextvars.copy_context().run(run)


def _allocate_scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
