"""Supervised contrastive loss: the public function, and how torch traces, differentiates and batches it.

Kernels: ``csrc/supcon`` and, on CUDA, ``triton_kernels/contrastive.py``, or torch's own operators where Triton is not
there (``pyreg/ops/_pairs.py``). Definition: :mod:`pyreg.reference.supcon`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pyreg.ops import _checks, _contrastive, _library, _ranks
from pyreg.ops._options import Reduction
from pyreg.reference import supcon as reference

if TYPE_CHECKING:
    import torch.distributed as dist

_NAME = "supcon_loss"


def supcon_loss(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | bool | None = None,
) -> Tensor:
    r"""The supervised contrastive loss: samples of the same label attract each other, all others repel.

    .. code-block:: text

        z_i  = f_i / max(|f_i|, 1e-12)   (f_i without normalize)          s_ij = z_i . z_j / temperature
        P_i  = { j != i : y_j = y_i }
        l_i  = log( sum_{j != i} exp(s_ij) ) - 1 / |P_i| sum_{P_i} s_ij

    the paper's L_out, as pytorch-metric-learning's ``SupConLoss``. A row without positives has loss 0. With two views
    of each image as rows of the same label it is SimCLR's NT-Xent. Forward and backward form no ``[N, N]`` tensor: the
    memory needed is that of the features, some numbers a row, and tiles.

    Args:
        features: ``[N, D]``, or ``[N, ...]``, which is flattened to it; float64, float32, bfloat16 or float16.
        labels: ``[N]``, integers.
        temperature: above 0.
        normalize: whether features are brought to length 1.
        reduction: ``"mean"`` over the rows that have a positive, 0 where none has; ``"sum"`` or ``"none"``.
        group: a process group of :mod:`torch.distributed`, or True for the default one: the loss is that of the rows of
            all ranks, the same number on each (for ``"none"``, the rank's own rows of it). The gradient is that of the
            global loss times the number of ranks, right under DistributedDataParallel's averaging. Ranks may have
            different numbers of rows; finding them out waits for the GPU. Not for ``torch.compile``.

    Returns:
        The loss, ``[]``, or ``[N]`` for ``"none"``; of the features' dtype, float32 under autocast. Products are
        summed in float32, in float64 for float64. 0 for ``N = 0`` and ``N = 1``.

    Gradient:
        With respect to ``features``; for those shorter than 1e-12, which are divided by 1e-12, too. To any order: under
        ``create_graph`` and in ``torch.func`` it is the plain formula's, which has ``[N, N]`` tensors; of ``group`` the
        first order alone.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options that do not fit; the message says what was expected.

    Source: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv 2004.11362.

    Example:
        >>> features = torch.randn(64, 128, requires_grad=True)
        >>> labels = torch.randint(10, (64,))
        >>> pyreg.functional.supcon_loss(features, labels, temperature=0.1).backward()
    """
    code = _library.reduction_code(_NAME, reduction)
    temperature = _contrastive.check_temperature(_NAME, temperature)
    _checks.check_flag(_NAME, "normalize", normalize)
    rows = _contrastive.feature_rows(_NAME, "features", features)
    labels = _contrastive.integer_rows(_NAME, "labels", labels, rows.shape[0], "N", features)
    ranks = None if group is None else _ranks.process_group(_NAME, group, rows)

    if not _library.has_kernel(features):
        loss = reference.supcon_loss(rows, labels, temperature, normalize, reduction)
        return loss.to(_contrastive.loss_dtype(rows))
    numbers = (temperature, normalize)
    if ranks is not None:
        return _loss.of_all_ranks(_NAME, ranks, rows, (labels,), numbers, code)
    if rows.shape[0] == 0:
        return _contrastive.loss_of_no_rows(rows, code)
    return _loss(rows, (labels,), numbers, code)


# ---- the operator ----


_library.implement("supcon", _contrastive.on_cuda("supcon", row_count=-2), ["CUDA"])
_library.implement("supcon_backward", _contrastive.on_cuda("supcon_backward", row_count=-1), ["CUDA"])


def _dense(features: Tensor, labels: Tensor, temperature: float, normalize: bool, reduction: int) -> Tensor:
    """The reference, by the operator's arguments."""
    name = _contrastive.name_of(_library.REDUCTIONS, reduction)
    return reference.supcon_loss(features, labels, temperature, normalize, name)


def _divisor(statistics: Tensor) -> Tensor:
    """The number of rows that have a positive: their weight is 1."""
    return statistics[1].sum().clamp_min(1)


_loss = _contrastive.SymmetricLoss(
    "supcon", tensors=("features", "labels"), numbers=2, reference=_dense, divisor=_divisor
)
