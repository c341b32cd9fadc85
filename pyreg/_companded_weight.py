"""How a companded model computes its weights: all of them in one pass when its forward begins.

:class:`CompandedWeight` is the parametrization of one weight, :class:`JointPass` the pair of hooks on the model that
:func:`pyreg.compand` was called with. The pass leaves every parametrization its result, which is good until that
forward ends and is asked for again whenever anything it came from has changed. Outside of the model's forward, as when
a layer is called alone or ``layer.weight`` is read, a parametrization computes its own weight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import ParametrizationList

from pyreg.nn import WeightCompander
from pyreg.ops.weight_compander import weight_companders

Sources = tuple[Tensor, Tensor, Tensor]  # v, a, b


@dataclass(frozen=True)
class JointResult:
    """A weight that a joint pass has computed, and what it was computed from."""

    w: Tensor
    sources: Sources
    trained: tuple[bool, ...]  # which of the sources w has a gradient for
    state: tuple[tuple[int, int], ...]  # of w and the sources
    forward: FrameType | None  # the call in which it is good; None: it is part of a compiled graph

    def is_good_for(self, v: Tensor, a: Tensor, b: Tensor) -> bool:
        """Whether ``w`` is what the sources would give now, for any use that autograd may make of it."""
        if v is not self.sources[0] or a is not self.sources[1] or b is not self.sources[2]:
            return False  # torch.func.functional_call with other parameters inside of the forward
        if torch.is_grad_enabled() and _trained(self.sources) != self.trained:
            return False  # computed under no_grad, used under enable_grad, or frozen or released in between
        if torch.compiler.is_compiling():
            return self.forward is None
        if self.w.is_inference() and not torch.is_inference_mode_enabled():
            return False
        return _state((self.w, *self.sources)) == self.state and _is_running(self.forward)


class CompandedWeight(WeightCompander):
    """The :class:`pyreg.nn.WeightCompander` of a weight that a :class:`JointPass` may have computed already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Of the module itself from the start on: a graph that was compiled without it would not do for the next call.
        self.joint: JointResult | None = None

    def forward(self, v: Tensor) -> Tensor:
        joint = self.joint  # another thread may take it away
        if joint is not None and joint.is_good_for(v, self.a, self.b):
            return joint.w
        return _companded([(v, self.a, self.b)], self.kind)[0]

    def __getstate__(self) -> dict[str, Any]:
        """A copy that is made within the forward has no share in it."""
        return {**vars(self), "joint": None}


class JointPass:
    """The forward pre-hook and the forward hook of a companded model."""

    def __init__(self, weights: Sequence[ParametrizationList]) -> None:
        companders: list[CompandedWeight] = [weight[0] for weight in weights]  # type: ignore[misc]
        self.weights = list(zip(weights, companders, strict=True))

    def add_to(self, model: torch.nn.Module) -> None:
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end, always_call=True)

    @staticmethod
    def remove_from(model: torch.nn.Module) -> None:
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), JointPass)]:
                del hooks[key]
                model._forward_hooks_always_called.pop(key, None)

    def begin(self, model: torch.nn.Module, args: Any) -> None:
        if getattr(model, "_is_replica", False):
            return  # nn.DataParallel: the parametrizations of the replica are others than ours
        compiling = torch.compiler.is_compiling()
        forward = None if compiling else sys._getframe(1)
        if self._is_inner(forward):
            return  # the outer call has computed the weights, and will forget them
        trained: list[CompandedWeight] = []
        frozen: list[CompandedWeight] = []
        sources: dict[CompandedWeight, Sources] = {}
        for weight, compander in self.weights:
            sources[compander] = of = (weight.original, compander.a, compander.b)
            (trained if any(_trained(of)) else frozen).append(compander)
        # Apart: of one node in the graph all results require a gradient, those of frozen weights too.
        for companders in (trained, frozen):
            if companders:
                ws = _companded([sources[compander] for compander in companders], companders[0].kind)
                for compander, w in zip(companders, ws, strict=True):
                    of = sources[compander]
                    state = () if compiling else _state((w, *of))
                    compander.joint = JointResult(w, of, _trained(of), state, forward)

    def end(self, model: torch.nn.Module, args: Any, output: Any) -> None:
        if self._is_inner(None if torch.compiler.is_compiling() else sys._getframe(1)):
            return
        for _, compander in self.weights:
            compander.joint = None

    def _is_inner(self, call: FrameType | None) -> bool:
        """Whether the model is calling itself: another call of it has left results and still runs."""
        joint = self.weights[0][1].joint
        return call is not None and joint is not None and joint.forward is not call and _is_running(joint.forward)


def _companded(sources: Sequence[Sources], kind: str) -> list[Tensor]:
    with _unseen_by_saved_tensors_hooks():
        vs, a, b = zip(*sources, strict=True)
        return weight_companders(vs, a, b, kind)


def _unseen_by_saved_tensors_hooks() -> AbstractContextManager[Any]:
    """What is saved for the gradient are parameters, which stay where they are: nothing to recompute or to offload.

    ``torch.utils.checkpoint`` counts what its function saves, the first time and again in the backward pass. The first
    time the joint pass has computed the weights outside of the function, the second time they are computed inside.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    return saved_tensors_hooks(_with_version, _same_version)


def _with_version(saved: Tensor) -> tuple[Tensor, int]:
    return saved, saved._version


def _same_version(packed: tuple[Tensor, int]) -> Tensor:
    """Autograd's own check of versions, which it leaves to hooks where there are any."""
    saved, version = packed
    if saved._version != version:
        raise RuntimeError(
            "weight_compander: a tensor needed for gradient computation has been modified by an inplace operation: "
            f"{list(saved.shape)} is at version {saved._version}, expected {version}; update parameters after backward"
        )
    return saved


def _trained(sources: Sources) -> tuple[bool, ...]:
    return tuple(torch.is_grad_enabled() and source.requires_grad for source in sources)


def _state(tensors: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """What tells whether tensors have changed: versions count changes in place, ``tensor.data = ...`` moves memory."""
    return tuple((0 if tensor.is_inference() else tensor._version, _address(tensor)) for tensor in tensors)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # torch.func's wrappers and fake tensors have no memory
        return 0


def _is_running(call: FrameType | None) -> bool:
    """Whether the call is on this thread's stack. A call that was left by KeyboardInterrupt, whose hooks never ran, is
    not; nor is one of another thread, whose weights belong to another graph."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call:
        frame = frame.f_back
    return call is not None and frame is call
