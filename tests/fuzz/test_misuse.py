"""Every public function, with arguments of any kind: a result or an error that names the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyreg import functional as F
from pyreg.diagnostics import naive_loss_minimization_alignment, softmax_collapse_rate
from pyreg.nn import SamplesLoss
from pyreg.optim import orthogonalize_gradients_
from tests.fuzz.misuse import assert_result_or_named_error, junk

_X, _Y = torch.rand(4, 3), torch.rand(4, 3) + 0.5
_LABELS = torch.tensor([0, 1, 2, 1])
_SOLVER = {"max_iter": 20, "tol": 1e-3, "epsilon_scaling": None, "init": None}
_SIDES = {"a": None, "b": None, "rho_a": None, "rho_b": None, "reference": "product", "relative_epsilon": None}
_CROSS_ENTROPY = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}
_PARTIAL = {"epsilon": 0.1, "gamma": 1.0, "prior": None, "max_iter": 20, "tol": 1e-3}


def _samples_loss(x: Any, y: Any, **options: Any) -> Any:
    return SamplesLoss(**options)(x, y)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "stablemax": (F.stablemax, {"input": _X, "dim": -1, "dtype": None}),
    "log_stablemax": (F.log_stablemax, {"input": _X, "dim": -1, "dtype": None}),
    "stablemax_cross_entropy": (F.stablemax_cross_entropy, {"input": _X, "target": _LABELS, **_CROSS_ENTROPY}),
    "stablemax_cross_entropy_": (F.stablemax_cross_entropy_, {"input": _X, "target": _LABELS, **_CROSS_ENTROPY}),
    "linear_stablemax_cross_entropy": (
        F.linear_stablemax_cross_entropy,
        {"input": _X, "linear_weight": _Y, "target": _LABELS, "linear_bias": None, **_CROSS_ENTROPY},
    ),
    "weight_compander": (F.weight_compander, {"v": _X, "a": 1.0, "b": 1.0, "kind": "arctan"}),
    "weight_compander_inverse": (
        F.weight_compander_inverse,
        {"w": _X, "a": 1.0, "b": 1.0, "kind": "arctan", "clamp": False},
    ),
    "conr_loss": (
        F.conr_loss,
        {
            "features": _X,
            "targets": torch.arange(4.0),
            "preds": torch.zeros(4),
            "window": 1.0,
            "temperature": 0.2,
            "eta": 0.1,
            "weights": None,
            "variant": "paper",
            "label_norm": 2,
            "reduction": "mean",
        },
    ),
    "supcon_loss": (
        F.supcon_loss,
        {"features": _X, "labels": _LABELS, "temperature": 0.1, "normalize": True, "reduction": "mean"},
    ),
    "info_nce": (
        F.info_nce,
        {
            "query": _X,
            "key": _Y,
            "temperature": 0.1,
            "normalize": True,
            "symmetric": False,
            "log_q": None,
            "ids": None,
            "reduction": "mean",
        },
    ),
    "sinkhorn": (F.sinkhorn, {"cost": _X, "epsilon": 0.5, **_SIDES, **_SOLVER}),
    "sinkhorn_points": (
        F.sinkhorn_points,
        {
            "x": _X,
            "y": _Y,
            "cost": "sqeuclidean",
            "epsilon": 0.5,
            "x_offsets": None,
            "y_offsets": None,
            "streaming": None,
            **_SIDES,
            **_SOLVER,
        },
    ),
    "sinkhorn_divergence": (
        F.sinkhorn_divergence,
        {
            "x": _X,
            "y": _Y,
            "a": None,
            "b": None,
            "cost": "sqeuclidean",
            "epsilon": 0.5,
            "relative_epsilon": None,
            "rho": None,
            "max_iter": 20,
            "tol": 1e-3,
            "epsilon_scaling": None,
            "x_offsets": None,
            "y_offsets": None,
            "streaming": None,
        },
    ),
    "SamplesLoss": (
        _samples_loss,
        {
            "x": _X,
            "y": _Y,
            "loss": "sinkhorn",
            "p": 2,
            "blur": 0.3,
            "reach": None,
            "diameter": None,
            "scaling": 0.5,
            "debias": True,
            "potentials": False,
            "backend": "auto",
        },
    ),
    "monge_gap": (
        F.monge_gap,
        {
            "source": _X,
            "mapped": _Y,
            "epsilon": 0.5,
            "relative_epsilon": None,
            "cost": "sqeuclidean",
            "streaming": None,
            **_SOLVER,
        },
    ),
    "progressive_partial_transport": (F.progressive_partial_transport, {"logits": _X, "mass": 0.5, **_PARTIAL}),
    "semantic_partial_transport": (
        F.semantic_partial_transport,
        {
            "logits": _X,
            "mass": 0.5,
            "similarity": None,
            "features": _Y,
            "semantic_weight": 0.5,
            "mm_iter": 2,
            "mm_tol": 1e-3,
            **_PARTIAL,
        },
    ),
    "orthogonalize_gradients_": (orthogonalize_gradients_, {"params": [torch.nn.Parameter(_X)]}),
    "softmax_collapse_rate": (softmax_collapse_rate, {"logits": _X, "target": _LABELS}),
    "naive_loss_minimization_alignment": (naive_loss_minimization_alignment, {"params": [torch.nn.Parameter(_X)]}),
}


@pytest.mark.parametrize("operator", CALLS)
@given(data=st.data())
def test_any_argument_gives_a_result_or_a_named_error(operator: str, data: st.DataObject) -> None:
    function, arguments = CALLS[operator]
    changed = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True))
    changes = {name: data.draw(junk(), label=name) for name in changed}
    assert_result_or_named_error(operator, function, arguments, changes)
