"""The losses of the pairwise contrastive family, and what their tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyreg.functional import conr_loss, info_nce, supcon_loss
from pyreg.reference import conr as conr_reference
from pyreg.reference import info_nce as info_nce_reference
from pyreg.reference import supcon as supcon_reference
from tests.oracle import ROUNDOFF

REDUCTIONS = ("mean", "sum", "none")


@dataclass
class Loss:
    """A loss of features ``[N, D]``, with keys beside them where ``trained`` is 2."""

    operator: str
    fused: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    others: Callable[[int], dict[str, Any]]
    options: dict[str, Any]
    trained: int = 1

    def arguments(self, count: int, device: torch.device) -> dict[str, Any]:
        """What there is beside the features of N rows."""
        others = self.others(count)
        return {**{name: tensor.to(device) for name, tensor in others.items()}, **self.options}

    def features(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(self.trained)]
        if self.trained == 2:  # a positive is more like its query than others are
            tensors[1] = tensors[0] + 0.7 * tensors[1]
        return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]

    def plain(self, *features: Tensor, **arguments: Any) -> Tensor:
        """By plain PyTorch in the features' dtype. In 16 bits normalised features are rounded, the rest is float32, as
        in torch's own losses."""
        if features[0].dtype.itemsize > 2:
            return self.reference(*features, **arguments)
        if arguments.get("normalize", True):
            features = tuple(F.normalize(f.flatten(1), eps=1e-12) for f in features)
        return self.reference(*(f.float() for f in features), **arguments).to(features[0].dtype)

    def assert_as_accurate(
        self, features: list[Tensor], arguments: dict[str, Any], ours: list[Tensor], *, floor: float
    ) -> None:
        """Loss and gradients are wrong by at most twice what plain PyTorch in their dtype is wrong by, both against
        float64, plus ``floor`` roundoffs of themselves and of what they are differences of.

        Those are scores, for the loss: up to 1 / temperature. For the gradient they are the two terms of the score's
        gradient, both near 1, that come together where a row has found its positive, and its two parts along and
        across z, of which the latter alone is kept: 1 / (temperature |f_i|) for row i.
        """
        theirs = value_and_gradients(self.plain, features, **arguments)
        truth = value_and_gradients(self.plain, in_float64(features), **arguments)
        count, reduction = len(features[0]), arguments.get("reduction", "mean")
        rows, whole = {"mean": (1 / count, 1.0), "sum": (1.0, count), "none": (1.0, count**0.5)}[reduction]
        scales = [whole / arguments["temperature"]]
        for tensor in features:
            lengths = tensor.detach().double().norm(dim=1).clamp_min(1e-12)
            if arguments.get("normalize", True):
                lengths = 1 / lengths
            scales.append(rows / arguments["temperature"] * lengths.norm().item())
        for actual, plain, expected, scale in zip(ours, theirs, truth, scales, strict=True):
            assert actual.dtype == plain.dtype
            assert actual.isfinite().all()
            error, plain_error = ((x.double() - expected).norm().item() for x in (actual, plain))
            roundoffs = max(floor, 64) if actual.dtype == torch.float64 else floor
            limit = 2 * plain_error + roundoffs * ROUNDOFF[actual.dtype] * (expected.norm().item() + scale)
            assert error <= limit, f"error {error:.2e}, limit {limit:.2e} (plain PyTorch {plain_error:.2e})"


def _of_conr(count: int) -> dict[str, Tensor]:
    """Labels in eighths, whose differences are exact: dense, but a lone one at their end; some preds far from all."""
    targets = torch.randint(max(2 * count, 8), (count,)) / 8
    preds = targets + torch.randint(-80, 80, (count,)) / 8
    if count > 2:
        targets[0] = 2 * count + 40
    preds[5::11] = -100 * torch.arange(len(preds[5::11])).float()
    return {"targets": targets, "preds": preds.unsqueeze(1), "weights": torch.rand(count) + 0.2}


def _of_supcon(count: int) -> dict[str, Tensor]:
    """About four of each label, and a lone one."""
    labels = torch.randint(max(count // 4, 1), (count,))
    labels[:1] = -(2**40)
    return {"labels": labels}


def _of_info_nce(count: int) -> dict[str, Tensor]:
    """Some rows share their id with another, and are not its negatives."""
    ids = torch.arange(count) + 2**40
    ids[3::3] = torch.randint(max(count, 1), ids[3::3].shape)
    return {"log_q": torch.rand(count).log(), "ids": ids}


_nce = functools.partial(Loss, "info_nce", info_nce, info_nce_reference.info_nce)
LOSSES = {
    **{
        f"conr-{variant}": Loss(
            "conr", conr_loss, conr_reference.conr_loss, _of_conr, {"variant": variant, "temperature": 0.2, "eta": 0.05}
        )
        for variant in ("paper", "agedb", "nyud2")
    },
    "supcon": Loss("supcon", supcon_loss, supcon_reference.supcon_loss, _of_supcon, {"temperature": 0.2}),
    "info_nce": _nce(_of_info_nce, {"temperature": 0.2}, trained=2),
    "info_nce-symmetric": _nce(_of_info_nce, {"temperature": 0.2, "symmetric": True}, trained=2),
    "info_nce-raw": _nce(_of_info_nce, {"temperature": 4.0, "normalize": False, "symmetric": True}, trained=2),
}


def value_and_gradients(function: Callable[..., Tensor], features: list[Tensor], **arguments: Any) -> list[Tensor]:
    """The loss and its gradients, for an uneven upstream gradient."""
    loss = function(*features, **arguments)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    wanted = [tensor for tensor in features if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss))]


def in_float64(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
