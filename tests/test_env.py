"""`python -m pyreg.env` says what is here, and advises on what is not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import pyreg
from pyreg import _extension, env
from pyreg._extension import Extension


def missing(name: str, state: str, message: str) -> Extension:
    return Extension(name, state, {}, ImportError(message))


def test_a_whole_installation_needs_no_advice():
    found = env.report()
    assert found["torch"] == torch.__version__
    assert found["pyreg"] == pyreg.__version__ == found["extensions"]["pyreg._C"]["version"]
    assert found["instruction_set"] in ("baseline", "avx2", "avx512")
    assert found["extensions"]["pyreg._C"]["state"] == "loaded"
    if torch.version.cuda is None and found["compiler"] is not None:
        assert found["advice"] == []


def test_the_command_prints_the_report():
    done = subprocess.run(
        [sys.executable, "-m", "pyreg.env"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYREG_ISA": "baseline"},
    )
    assert f"torch            {torch.__version__}" in done.stdout
    assert "instruction set  baseline" in done.stdout
    assert done.stderr == ""


def test_a_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_extension, "CPU", missing("pyreg._C", "failed to load", "undefined symbol: x"))
    found = env.report()
    assert found["instruction_set"] is None
    expected = {"state": "failed to load", "error": "undefined symbol: x", "reason": None}
    assert found["extensions"]["pyreg._C"] == expected
    (advice,) = (item for item in found["advice"] if item["what"] == "pyreg._C")
    assert advice["reason"] == "undefined symbol: x"
    assert "pip install --no-build-isolation ." in advice["remedy"]
    assert "nvcc" not in advice["remedy"]
    text = env._text(found)
    assert "pyreg._C         failed to load\n" in text
    assert "pyreg._C: undefined symbol: x\n  remedy: reinstall pyreg's wheel, or build it with: pip install" in text


def test_a_torch_with_cuda_needs_the_cuda_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_extension, "CUDA", missing("pyreg._C_cuda", "not built", "was not built"))
    (advice,) = (item for item in env.report()["advice"] if item["what"] == "pyreg._C_cuda")
    assert "nvcc" in advice["remedy"]


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYREG_ISA", "avx1024")
    (advice,) = (item for item in env.report()["advice"] if item["what"] == "instruction set")
    assert "avx1024" in advice["reason"]


@pytest.mark.parametrize(
    ("capability", "served"),
    [(75, False), (80, True), (86, True), (90, True), (103, True), (110, False), (120, True), (121, True), (130, True)],
)
def test_which_gpus_a_build_serves(capability: int, served: bool):
    assert env._is_served(capability, [80, 90, 100, 120]) is served


def test_a_gpu_without_code_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_extension, "CUDA", Extension("pyreg._C_cuda", "loaded", {"architectures": "80,90"}))
    advice = env._gpu_advice([("an old GPU", (7, 5))])
    assert [item["reason"] for item in advice if item["what"] == "CUDA kernels"] == [
        "an old GPU is sm_75; the CUDA kernels are built for 80, 90"
    ]
    assert env._gpu_advice([("a new GPU", (9, 0))]) == [item for item in advice if item["what"] == "triton"]


def test_a_driver_older_than_the_kernels_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    build = {"architectures": "80,90", "cuda": "13.0.88"}
    monkeypatch.setattr(_extension, "CUDA", Extension("pyreg._C_cuda", "loaded", build))
    (advice,) = (item for item in env._gpu_advice([("a GPU", (9, 0))], "12.8") if item["what"] == "driver")
    assert advice["reason"] == "the driver serves CUDA 12.8, the CUDA kernels are built with 13.0.88"
    assert "nvcc 12.8" in advice["remedy"]
    assert [item for item in env._gpu_advice([("a GPU", (9, 0))], "13.1") if item["what"] == "driver"] == []


def test_a_missing_compiler_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = env.report()
    assert found["compiler"] is None
    (advice,) = (item for item in found["advice"] if item["what"] == "compiler")
    assert "CXX" in advice["remedy"]
    assert "compiler         not found\n" in env._text(found)
