"""ConR: the public function, and how torch traces, differentiates and batches it.

Kernels: ``csrc/conr`` and, on CUDA, ``triton_kernels/contrastive.py``, or torch's own operators where Triton is not
there (``pyreg/ops/_pairs.py``). Definition: :mod:`pyreg.reference.conr`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyreg.ops import _checks, _contrastive, _library, _pairs, _ranks
from pyreg.ops._options import Reduction, Variant
from pyreg.reference import conr as reference

if TYPE_CHECKING:
    import torch.distributed as dist

_NAME = "conr_loss"


def conr_loss(
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    *,
    window: float = 1.0,
    temperature: float = 0.07,
    eta: float = 0.01,
    weights: Tensor | None = None,
    variant: Variant = "paper",
    label_norm: float = 2,
    reduction: Reduction = "mean",
    group: dist.ProcessGroup | bool | None = None,
) -> Tensor:
    r"""ConR, the contrastive regularizer for deep imbalanced regression: samples with close labels attract each other;
    those whose labels are far apart but whose predictions are close repel each other, the more the farther the labels.

    .. code-block:: text

        z_i  = f_i / max(|f_i|, 1e-12)        s_ij = z_i . z_j / temperature
        d_ij = |y_i - y_j|                    e_ij = |yhat_i - yhat_j|
        positives  P_i = { j != i : d_ij <= window }
        negatives  N_i = { j : d_ij > window and e_ij <= window }        push  r_ij = w_i exp(eta d_ij)
        A_i = sum_{P_i} exp(s_ij)             B_i = sum_{N_i} r_ij exp(s_ij)
        l_i = w_i / |P_i| sum_{P_i} ( log(A_i + B_i) - s_ij )

    A row without positives or without negatives has loss 0. Forward and backward form no ``[N, N]`` tensor: the memory
    needed is that of the features, some numbers a row, and tiles (on the CPU, up to 1024 rows have all their scores in
    one, 4 MB).

    Beyond 512 rows, tiles of rows in the order of their labels are skipped where labels and predictions are all farther
    apart than the window: such pairs are neither positive nor negative. That pays as soon as predictions follow labels.
    Of 4096 rows on the CPU, with labels from 0 to 100 and a window of 1, 22 % of the tiles remain where predictions are
    off by 2 (root mean square), 37 % where by 4, 64 % where by 8 and 94 % where by 16; all remain where predictions are
    alike, as before training. Where in a tile that remains at most one pair in eight is positive or negative, the CPU
    makes scores and gradient pair by pair instead of by matrix products. ``bench/bench_conr.py`` times both kinds of
    predictions. On CUDA, where products are fast and sorting is not, tiles are skipped from ``N^2 D`` of 4e10 on in
    float32 and float64, 3e11 in TF32, 6e11 in 16 bits: at ``D = 512`` from 8,900, 24,300 and 34,300 rows; none without
    Triton and for ``group``.

    Args:
        features: ``[N, D]``, or ``[N, ...]``, which is flattened to it; float64, float32, bfloat16 or float16.
        targets, preds: labels and their predictions, ``[N]``, ``[N, 1]`` or ``[N, K]``, floating or integers; constants
            here: a prediction's gradient comes from the loss that ConR is added to.
        window: how far apart labels of positives, and predictions of negatives, may be; at least 0.
        temperature: above 0.
        eta: how much farther labels push more; at least 0.
        weights: ``[N]`` or ``[N, 1]``, at least 0, such as inverse label densities; all 1 by default.
        variant: ``"paper"``, as above; ``"agedb"``, the code released for AgeDB and IMDB-WIKI, where ``A_i`` gains
            ``N - |P_i|``; ``"nyud2"``, that for NYUD2-DIR, where it does so too, targets, preds and weights
            ``[N, ...]`` are averaged to one value a sample, the push is ``w_i eta d_ij``, the sum is divided by
            ``|P_i| + 1``, and the outer ``w_i`` is left out. Both obey ``temperature`` (the released code for AgeDB
            overwrites it with 0.07), and rows without positives give 0 (there NaN).
        label_norm: the norm of label differences for ``K > 1``: 1, 2 or ``math.inf``.
        reduction: ``"mean"`` over all N rows, those of loss 0 too, ``"sum"`` or ``"none"``.
        group: a process group of :mod:`torch.distributed`, or True for the default one: the loss is that of the rows of
            all ranks, the same number on each (for ``"none"``, the rank's own rows of it). The gradient is that of the
            global loss times the number of ranks, right under DistributedDataParallel's averaging. Ranks may have
            different numbers of rows; finding them out waits for the GPU. Not for ``torch.compile``.

    Returns:
        The loss, ``[]``, or ``[N]`` for ``"none"``; of the features' dtype, float32 under autocast. Products are
        summed in float32, in float64 for float64. ``d``, ``e`` and their comparison with the window are float64 where
        features, targets or preds are, and for integer labels, else float32. 0 for ``N = 0`` and ``N = 1``.

    Gradient:
        With respect to ``features`` alone; none flows through labels, predictions, weights and masks. For features
        shorter than 1e-12, which the loss divides by 1e-12, too. To any order: under ``create_graph`` and in
        ``torch.func`` it is the plain formula's, which has ``[N, N]`` tensors; of ``group`` the first order alone.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, options that do not fit; the message says what was expected.
        ValueError: NaN or infinity in targets or preds; a weight that is negative, NaN or infinite. These are looked
            for on the CPU in eager calls, and on CUDA where ``PYREG_CHECKS=1`` in the environment asks for it, at the
            price of waiting for the GPU. Where nobody looks, a NaN in targets and such a weight take their row out of
            all pairs, a NaN in preds takes it out of those of negatives, and infinite labels give infinity or NaN.

    Source: Keramati, Meng, Evans, "ConR: Contrastive Regularizer for Deep Imbalanced Regression", ICLR 2024, arXiv
    2309.06651.

    Example:
        >>> features, preds = torch.randn(64, 32, requires_grad=True), torch.rand(64, 1)
        >>> ages = torch.randint(100, (64, 1))
        >>> pyreg.functional.conr_loss(features, ages, 100 * preds, window=1.0).backward()
    """
    code = _library.reduction_code(_NAME, reduction)
    variant_code = _code("variant", variant, _pairs.VARIANTS, "'paper', 'agedb' or 'nyud2'")
    norm_code = _code("label_norm", label_norm, _pairs.LABEL_NORMS, "1, 2 or math.inf")
    window = _checks.check_number(_NAME, "window", window, 0, or_equal=True)
    temperature = _contrastive.check_temperature(_NAME, temperature)
    eta = _checks.check_number(_NAME, "eta", eta, 0, or_equal=True)
    rows = _contrastive.feature_rows(_NAME, "features", features)
    for name, labels in (("targets", targets), ("preds", preds)):
        _contrastive.check_real(_NAME, name, labels, features)
    dtype = reference.label_dtype(features, targets, preds)
    targets, preds = (
        _sample_labels(name, labels, rows, variant, dtype) for name, labels in (("targets", targets), ("preds", preds))
    )
    if preds.shape != targets.shape:
        raise ValueError(
            f"{_NAME}: expected preds with as many values a sample as targets, {targets.shape[1]}, got {preds.shape[1]}"
        )
    if weights is not None:
        targets, weights = _weighted(targets, weights, rows, variant)
    ranks = None if group is None else _ranks.process_group(_NAME, group, rows)

    if not _library.has_kernel(features):
        dense = (rows, targets, preds, window, temperature, eta, weights, variant, label_norm, reduction)
        return reference.conr_loss(*dense).to(_contrastive.loss_dtype(rows))
    numbers = (window, temperature, eta, variant_code, norm_code)
    if ranks is not None:
        return _loss.of_all_ranks(_NAME, ranks, rows, (targets, preds, weights), numbers, code)
    if rows.shape[0] == 0:
        return _contrastive.loss_of_no_rows(rows, code)
    return _loss(rows, (targets, preds, weights), numbers, code)


# ---- argument checks ----


def _code(name: str, value: Any, codes: dict[Any, int], expected: str) -> int:
    """The schema's integer for an option."""
    try:
        return codes[value]
    except (KeyError, TypeError):
        raise ValueError(f"{_NAME}: expected {name} to be {expected}, got {value!r}") from None


def _sample_labels(name: str, labels: Tensor, rows: Tensor, variant: str, dtype: torch.dtype) -> Tensor:
    """``[N, K]``, contiguous, constant."""
    count, averaged = rows.shape[0], variant == "nyud2"
    if labels.dim() == 0 or labels.shape[0] != count or (labels.dim() > 2 and not averaged) or 0 in labels.shape[1:]:
        expected = "[N, ...]" if averaged else "[N], [N, 1] or [N, K]"
        raise ValueError(f"{_NAME}: expected {name} of shape {expected} with N = {count}, got {list(labels.shape)}")
    labels = reference.sample_labels(labels.detach().to(dtype), variant).contiguous()
    if _checks.reads_values(labels):
        _checks.check_finite(_NAME, name, labels)
    return labels


def _weighted(targets: Tensor, weights: Tensor, rows: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """The weights, ``[N]``, contiguous, in the dtype in which the operator sums; and targets, NaN where a bad weight
    has not been an error."""
    _contrastive.check_real(_NAME, "weights", weights, rows)
    _checks.check_constant(_NAME, "weights", weights)
    count, averaged = rows.shape[0], variant == "nyud2"
    fits = weights.shape in ((count,), (count, 1)) or (averaged and weights.dim() > 0 and weights.shape[0] == count)
    if not fits or 0 in weights.shape[1:]:
        expected = "[N, ...]" if averaged else "[N] or [N, 1]"
        raise ValueError(f"{_NAME}: expected weights of shape {expected} with N = {count}, got {list(weights.shape)}")
    weights = weights.to(_library.accumulate_dtype(rows.dtype))
    weights = reference.sample_labels(weights, variant).squeeze(1).contiguous()
    if _checks.reads_values(weights):
        _checks.check_finite(_NAME, "weights", weights)
        if count > 0 and (least := weights.min().item()) < 0:
            raise ValueError(f"{_NAME}: expected weights to be at least 0, got {least}")
        return targets, weights
    is_bad = ~((weights >= 0) & (weights < torch.inf))
    return targets.masked_fill(is_bad.unsqueeze(1), torch.nan), weights.masked_fill(is_bad, 0)


# ---- the operator ----


_library.implement("conr", _contrastive.on_cuda("conr", row_count=-2), ["CUDA"])
_library.implement("conr_backward", _contrastive.on_cuda("conr_backward", row_count=-1), ["CUDA"])


def _dense(
    features: Tensor,
    targets: Tensor,
    preds: Tensor,
    weights: Tensor | None,
    window: float,
    temperature: float,
    eta: float,
    variant: int,
    label_norm: int,
    reduction: int,
) -> Tensor:
    """The reference, by the operator's arguments."""
    return reference.conr_loss(
        *(features, targets, preds, window, temperature, eta, weights),
        variant=_contrastive.name_of(_pairs.VARIANTS, variant),
        label_norm=_contrastive.name_of(_pairs.LABEL_NORMS, label_norm),
        reduction=_contrastive.name_of(_library.REDUCTIONS, reduction),
    )


def _divisor(statistics: Tensor) -> int:
    return statistics.shape[1]


_loss = _contrastive.SymmetricLoss(
    "conr", tensors=("features", "targets", "preds", "weights"), numbers=5, reference=_dense, divisor=_divisor
)
