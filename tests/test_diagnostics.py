"""The paper's two measurements, on numbers that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyreg.diagnostics import naive_loss_minimization_alignment, softmax_collapse_rate
from pyreg.reference.orthograd import orthogonalize_gradients_


def param(weight: list[float], grad: list[float] | None, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.tensor(weight, dtype=dtype))
    parameter.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
    return parameter


class TestSoftmaxCollapseRate:
    # 1 absorbs exp(-margin) beyond a margin of 36.7 in fp64 (2^-53) and of 16.6 in fp32 (2^-24); torch's CPU kernels
    # for bf16 and fp16 round before that, beyond about 6 and 8.
    MARGINS = (0.0, 10.0, 20.0, 40.0)

    def logits(self, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[margin, 0.0] for margin in self.MARGINS], dtype=dtype)

    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [(torch.float64, 0.25), (torch.float32, 0.5), (torch.bfloat16, 0.75), (torch.float16, 0.75)],
    )
    def test_counts_losses_that_are_exactly_zero(self, dtype, expected) -> None:
        rate = softmax_collapse_rate(self.logits(dtype), torch.zeros(4, dtype=torch.long))
        assert rate.shape == ()
        assert rate.dtype == torch.float32
        assert rate.item() == expected

    def test_a_wrong_sample_is_not_collapsed(self) -> None:
        target = torch.tensor([0, 0, 1, 1])
        assert softmax_collapse_rate(self.logits(torch.float32), target).item() == 0.0

    def test_ignored_rows_leave_both_counts(self) -> None:
        target = torch.tensor([0, 0, 0, -100])
        assert softmax_collapse_rate(self.logits(torch.float32), target).item() == pytest.approx(1 / 3)

    def test_no_row_gives_nan(self) -> None:
        logits = self.logits(torch.float32)
        assert math.isnan(softmax_collapse_rate(logits[:0], torch.zeros(0, dtype=torch.long)))
        assert math.isnan(softmax_collapse_rate(logits, torch.full((4,), -100)))

    def test_takes_no_part_in_autograd(self) -> None:
        logits = self.logits(torch.float32).requires_grad_()
        assert not softmax_collapse_rate(logits, torch.zeros(4, dtype=torch.long)).requires_grad

    LOGITS = torch.zeros(4, 3)
    LABELS = torch.zeros(4, dtype=torch.long)

    @pytest.mark.parametrize(
        ("logits", "target", "error", "message"),
        [
            (LOGITS.long(), LABELS, TypeError, r"logits should be floating \[N, C\], got torch.int64; .*float\(\)"),
            (LOGITS[0], LABELS[0], ValueError, r"logits should be \[N, C\], got \[3\]; .*flatten\(0, -2\)"),
            (LOGITS, LABELS[:3], ValueError, r"target should be \[N\] = \[4\] .*\[4, 3\], got \[3\]"),
            (LOGITS, LOGITS, ValueError, r"target should be \[N\] = \[4\] .*got \[4, 3\]; .*argmax\(1\)"),
            (LOGITS, LABELS.int(), TypeError, r"target should be int64 \[N\], got torch.int32; .*long\(\)"),
            (LOGITS, LABELS + 3, ValueError, r".*in \[0, C\) = \[0, 3\) or -100, got values from 3 to 3"),
            (LOGITS, LABELS - 1, ValueError, r".*in \[0, C\) = \[0, 3\) or -100, got values from -1 to -1"),
        ],
    )
    def test_bad_input(self, logits, target, error, message) -> None:
        with pytest.raises(error, match="^softmax_collapse_rate: " + message):
            softmax_collapse_rate(logits, target)


class TestNaiveLossMinimizationAlignment:
    def test_sign_and_size(self) -> None:
        """A gradient along -w makes the descent step scale w up: +1."""
        params = [
            param([3.0, 4.0], [-3.0, -4.0]),
            param([3.0, 4.0], [0.6, 0.8]),
            param([3.0, 4.0], [-8.0, 6.0]),
            param([1.0, 0.0], [-1.0, 1.0]),
        ]
        per_tensor, _ = naive_loss_minimization_alignment(params)
        assert [c.item() for c in per_tensor] == pytest.approx([1.0, -1.0, 0.0, math.sqrt(0.5)])

    def test_overall_is_the_cosine_of_one_vector(self) -> None:
        params = [param([3.0, 4.0], [-3.0, -4.0]), param([12.0], [5.0])]
        result = naive_loss_minimization_alignment(params)
        assert [c.item() for c in result.per_tensor] == pytest.approx([1.0, -1.0])
        # w = (3, 4, 12), -g = (3, 4, -5): (25 - 60) / (13 sqrt(50))
        assert result.overall.item() == pytest.approx(-35 / (13 * math.sqrt(50)))

    def test_parameters_without_gradient_are_skipped(self) -> None:
        params = [param([1.0], None), param([2.0, 0.0], [-1.0, 0.0])]
        result = naive_loss_minimization_alignment(params)
        assert result.per_tensor[0] is None
        assert result.per_tensor[1].item() == 1.0
        assert result.overall.item() == 1.0

    def test_zero_vectors_have_no_direction(self) -> None:
        params = [param([0.0, 0.0], [1.0, 2.0]), param([1.0, 2.0], [0.0, 0.0])]
        result = naive_loss_minimization_alignment(params)
        assert [c.item() for c in (*result.per_tensor, result.overall)] == [0.0, 0.0, 0.0]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype) -> None:
        """Sums of 300 x 300 are beyond fp16, so the half types compute in fp32."""
        single = param([300.0] * 4, [-300.0, -300.0, -300.0, 300.0], dtype)
        result = naive_loss_minimization_alignment(single)
        assert result.overall.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert result.overall.item() == pytest.approx(0.5)

    def test_nan_is_not_hidden(self) -> None:
        assert naive_loss_minimization_alignment(param([1.0, 2.0], [math.nan, 1.0])).overall.isnan()

    def test_orthograd_removes_it_from_a_network(self) -> None:
        """Scaling a linear classifier that is right everywhere lowers its loss, until OrthoGrad forbids it."""
        inputs, target = torch.eye(4, dtype=torch.float64), torch.arange(4)
        weight = torch.nn.Parameter(2 * torch.eye(4, dtype=torch.float64) - 1)
        torch.nn.functional.cross_entropy(inputs @ weight, target).backward()
        # The gradient is a multiple of 1 - 4 I by symmetry: w.(-g) is 24, |w| is 4 and |g| is sqrt(48) in that unit.
        assert naive_loss_minimization_alignment(weight).overall.item() == pytest.approx(0.5 * math.sqrt(3))
        orthogonalize_gradients_([weight])
        assert naive_loss_minimization_alignment([weight]).overall.item() == pytest.approx(0.0, abs=1e-15)

    def test_bad_input(self) -> None:
        name = "^naive_loss_minimization_alignment: params should "
        module = torch.nn.Linear(2, 2)
        with pytest.raises(TypeError, match=name + r"be tensors, got a module; pass module.parameters\(\)"):
            naive_loss_minimization_alignment(module)
        with pytest.raises(TypeError, match=name + r"be tensors, got tuple; pass model.parameters\(\)"):
            naive_loss_minimization_alignment(module.named_parameters())
        with pytest.raises(ValueError, match=name + r"hold at least one .*got 2 without; call it between .*backward"):
            naive_loss_minimization_alignment(module.parameters())
        with pytest.raises(ValueError, match=name + "hold at least one .*got 0 without"):
            naive_loss_minimization_alignment([])
        embedding = torch.nn.Embedding(3, 2, sparse=True)
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(ValueError, match=name + "have dense gradients, got a sparse one; .*sparse=False"):
            naive_loss_minimization_alignment(embedding.parameters())
