"""Optimizers, named as in :mod:`torch.optim`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import ParamsT

from pyreg.ops.orthograd import orthogonalize_gradients_

__all__ = ["OrthoGrad", "orthogonalize_gradients_"]


class OrthoGrad(Optimizer):
    r"""Any optimizer, on gradients that are made orthogonal to the weights.

    .. code-block:: text

        g_perp = g - (w.g / (w.w + 1e-30)) w
        g'     = g_perp |g| / (|g_perp| + 1e-30)

    for each parameter tensor; then the base optimizer steps with ``g'``, which takes the place of ``param.grad``. Rules
    for dtypes, zero weights and parallel gradients: :func:`orthogonalize_gradients_`. Weight decay is the base
    optimizer's and comes after the projection.

    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's own, so learning-rate schedulers,
    ``torch.amp.GradScaler`` (with ``unscale_`` before gradient clipping, as ever), ``add_param_group`` and per-group
    options work as they do without OrthoGrad, and ``state_dict`` has the base optimizer's layout: checkpoints load
    from one into the other.

    Args:
        params: parameters or parameter groups, as the base optimizer takes them.
        base_optimizer_cls: the class of the optimizer that takes the step.
        **base_kwargs: its arguments: ``lr``, ``weight_decay``, ``foreach``, ``fused``, ``maximize``, ...

    Attributes:
        base_optimizer: the optimizer that takes the step.

    Raises:
        TypeError: ``base_optimizer_cls`` is no subclass of ``torch.optim.Optimizer``.
        ValueError: ``differentiable=True``: the projection has no gradient.

    Source: Prieto et al., "Grokking at the Edge of Numerical Stability", arXiv 2501.04697.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> optimizer = pyreg.optim.OrthoGrad(model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        >>> model(torch.randn(16, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    base_optimizer: Optimizer

    def __init__(self, params: ParamsT, base_optimizer_cls: Callable[..., Optimizer] = SGD, **base_kwargs: Any) -> None:
        if not (isinstance(base_optimizer_cls, type) and issubclass(base_optimizer_cls, Optimizer)):
            raise TypeError(
                "OrthoGrad: expected base_optimizer_cls to be a subclass of torch.optim.Optimizer, got "
                f"{base_optimizer_cls!r}; pass the class and its arguments, as in "
                "OrthoGrad(params, torch.optim.AdamW, lr=1e-3)"
            )
        base_optimizer = base_optimizer_cls(params, **base_kwargs)
        for group in base_optimizer.param_groups:
            _check_group(group)
        # Sets up hooks and profiling as Optimizer.__init__ does, which would also make groups and state of its own.
        self.__setstate__({"base_optimizer": base_optimizer})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Projects the gradients, then takes the base optimizer's step.

        Args:
            closure: evaluates the loss and its gradients. The base optimizer calls it as always, with gradients
                enabled, and each evaluation is projected before it goes on: once a step for most optimizers; for
                :class:`torch.optim.LBFGS`, which evaluates several times a step, every time.

        Returns:
            What the closure returned; None without one.
        """
        if closure is None:
            self._orthogonalize()
            self.base_optimizer.step()
            return None

        def evaluate() -> float:
            with torch.enable_grad():
                loss = closure()
            self._orthogonalize()
            return loss

        return self.base_optimizer.step(evaluate)

    def _orthogonalize(self) -> None:
        orthogonalize_gradients_([param for group in self.param_groups for param in group["params"]])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with options of its own to the base optimizer."""
        _check_group(param_group)
        self.base_optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        return f"OrthoGrad({self.base_optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:
            super().__setstate__(state)
        else:  # from load_state_dict: groups and state
            self.base_optimizer.__setstate__(state)


def _check_group(group: dict[str, Any]) -> None:
    if group.get("differentiable"):
        raise ValueError(
            "OrthoGrad: expected differentiable=False, got True: the projection of the gradients is not recorded for "
            "autograd; leave differentiable out"
        )
