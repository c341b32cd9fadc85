"""Extensions that are missing, broken or of another build: importing pyreg goes well, and the first operator that needs
one says what was built for what, what is here, and what to do. Each case is made by damaging a copy of the package.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyreg

LIBRARY = Path(importlib.util.find_spec("pyreg._C").origin or "")
CUDA_NAME = LIBRARY.name.replace("_C.", "_C_cuda.", 1)
FOUND = f"found here: pyreg {pyreg.__version__}, Python {platform.python_version()}, torch {torch.__version__}"
BUILT = f"It was built for pyreg {pyreg.__version__}, Python "

FIRST_USE = """
import json, sys
import torch
if len(sys.argv) > 1:
    torch.version.cuda = sys.argv[1]
import pyreg
from pyreg import _extension, env
from pyreg.ops import _library

def error_of(call):
    try:
        call()
    except ImportError as error:
        return str(error)

class OnGpu:
    is_cuda, is_cpu, is_meta = True, False, False

x, y = torch.ones(3, 2), torch.arange(3)
parameter = torch.nn.Parameter(x.clone())
parameter.grad = x.clone()
calls = {
    "stablemax": lambda: pyreg.functional.stablemax(x),
    "stablemax again": lambda: pyreg.functional.stablemax(x),
    "log_stablemax": lambda: pyreg.functional.log_stablemax(x),
    "stablemax_cross_entropy": lambda: pyreg.functional.stablemax_cross_entropy(x, y % 2),
    "linear": lambda: pyreg.functional.linear_stablemax_cross_entropy(x, torch.ones(4, 2), y),
    "conr_loss": lambda: pyreg.functional.conr_loss(x, x[:, :1], x[:, :1]),
    "info_nce": lambda: pyreg.functional.info_nce(x, x),
    "supcon_loss": lambda: pyreg.functional.supcon_loss(x, y),
    "sinkhorn": lambda: pyreg.functional.sinkhorn(x, epsilon=1.0),
    "sinkhorn_points": lambda: pyreg.functional.sinkhorn_points(x, x, epsilon=1.0),
    "sinkhorn_divergence": lambda: pyreg.functional.sinkhorn_divergence(x, x, epsilon=1.0),
    "monge_gap": lambda: pyreg.functional.monge_gap(x, x, epsilon=1.0),
    "weight_compander": lambda: pyreg.functional.weight_compander(x, 1.0, 1.0),
    "orthograd": lambda: pyreg.optim.orthogonalize_gradients_(parameter),
    "on a GPU": lambda: _library.has_kernel(OnGpu()),
}
print(json.dumps({
    "states": [_extension.CPU.state, _extension.CUDA.state],
    "errors": {name: error_of(call) for name, call in calls.items()},
    "report": env._text(env.report()),
}))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, with its CPU extension and without CUDA's."""
    hidden = shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels")
    folder = Path(shutil.copytree(Path(pyreg.__file__).parent, tmp_path / "pyreg", ignore=hidden))
    shutil.copy(LIBRARY, folder)
    return folder


def run(arguments: list[str], folder: Path, *paths: str) -> str:
    """Without site: it would put an editable installation before the folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *paths]), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-S", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}{done.stderr}"
    assert done.stderr == ""
    return done.stdout


def first_use(package: Path, *arguments: str) -> dict[str, Any]:
    found = run(["-c", FIRST_USE, *arguments], package.parent, *sys.path)
    return json.loads(found)  # type: ignore[no-any-return]


def assert_all_fail(found: dict[str, Any], *parts: str) -> None:
    """All operators on the CPU give one and the same error, which the report tells with the same remedy."""
    errors = dict(found["errors"])
    assert errors.pop("on a GPU") is None
    (error,) = set(errors.values())
    assert error is not None, errors
    reason, remedy = error.split(" Remedy: ")
    for part in parts:
        assert part in reason
    assert "pip install --no-build-isolation ." in remedy
    assert f"pyreg._C: {reason}\n  remedy: {remedy}" in found["report"]


# ---- the CPU's ----


def test_a_whole_package_has_no_error(package: Path) -> None:
    found = first_use(package)
    assert found["states"][0] == "loaded"
    found["errors"].pop("on a GPU")  # there torch may need the CUDA kernels, which are not in the copy
    assert set(found["errors"].values()) == {None}


def test_an_extension_that_was_not_built(package: Path) -> None:
    (package / LIBRARY.name).unlink()
    found = first_use(package)
    assert found["states"] == ["not built", "not built"]
    assert_all_fail(found, "pyreg._C was not built.")


def cut_off_in_code(content: bytes) -> bytes:
    return content[: len(content) // 2]


def cut_off_in_header(content: bytes) -> bytes:
    return content[:50]


def not_a_library(content: bytes) -> bytes:
    return b"not a library"


def of_newer_torch(content: bytes) -> bytes:
    """It asks torch for a function that this one lacks, as an older one lacks those that were added since."""
    name = b"aoti_torch_empty_strided"
    assert name in content
    return content.replace(name, name[:-1] + b"z")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_off_in_code, "pyreg._C was built, but its file is incomplete: "),
        (cut_off_in_header, "pyreg._C was built, but its file is incomplete: "),
        (not_a_library, "pyreg._C was built, but it does not load: "),
        (of_newer_torch, "undefined symbol: aoti_torch_empty_stridez"),
    ],
)
def test_an_extension_that_does_not_load(package: Path, damage: Callable[[bytes], bytes], reason: str) -> None:
    path = package / LIBRARY.name
    path.write_bytes(damage(path.read_bytes()))
    found = first_use(package)
    assert found["states"][0] == "failed to load"
    built = (
        [f"{BUILT}{platform.python_version().rpartition('.')[0]}, torch >= 2.10"] if damage is of_newer_torch else []
    )
    assert_all_fail(found, reason, FOUND, *built)


def test_an_extension_for_another_python(package: Path) -> None:
    (package / LIBRARY.name).rename(package / "_C.cpython-399-x86_64-linux-gnu.so")
    found = first_use(package)
    assert found["states"][0] == "failed to load"
    taken = importlib.machinery.EXTENSION_SUFFIXES[0]
    there = f"for another Python: there is _C.cpython-399-x86_64-linux-gnu.so, and this Python loads _C{taken}"
    assert_all_fail(found, there, BUILT, FOUND)


def test_an_extension_of_another_version(package: Path) -> None:
    path = package / "__init__.py"
    path.write_text(path.read_text().replace(f'"{pyreg.__version__}"', '"99.0"'))
    found = first_use(package)
    assert found["states"][0] == "failed to load"
    differs = f"it is of pyreg {pyreg.__version__}, its Python files are of 99.0"
    assert_all_fail(found, differs, BUILT, "found here: pyreg 99.0, ")


def test_an_extension_that_lacks_an_operator(package: Path) -> None:
    path = package / LIBRARY.name
    schema, other = b"\0stablemax(Tensor input", b"\0stablemaz(Tensor input"
    content = path.read_bytes()
    assert content.count(schema) == 1
    path.write_bytes(content.replace(schema, other))
    found = first_use(package)
    errors = found["errors"]
    failed = {name for name, error in errors.items() if error is not None and name != "on a GPU"}
    assert failed == {"stablemax", "stablemax again"}
    assert errors["stablemax"].startswith("pyreg._C lacks the operator pyreg::stablemax, which the Python files need")
    assert "pyreg._C: it lacks stablemax, which the Python files need" in found["report"]


# ---- CUDA's ----


def test_cuda_kernels_are_left_alone_where_torch_has_no_cuda(package: Path) -> None:
    if torch.version.cuda is not None:
        pytest.skip("needs a torch without CUDA")
    (package / CUDA_NAME).write_bytes(b"not a library")
    found = first_use(package)
    assert found["states"] == ["loaded", "not needed here"]
    assert set(found["errors"].values()) == {None}
    assert f"pyreg._C_cuda    not needed here (torch {torch.__version__} has no CUDA)" in found["report"]


@pytest.mark.parametrize("is_there", [True, False])
def test_cuda_kernels_that_torch_needs(package: Path, is_there: bool) -> None:
    """The operators run on the CPU, and refuse tensors on a GPU."""
    if is_there:
        (package / CUDA_NAME).write_bytes(b"not a library")
    found = first_use(package, "13.0")
    assert found["states"] == ["loaded", "failed to load" if is_there else "not built"]
    error = found["errors"].pop("on a GPU")
    assert set(found["errors"].values()) == {None}
    reason, remedy = error.split(" Remedy: ")
    assert reason.startswith(
        "pyreg._C_cuda was built, but it does not load" if is_there else "pyreg._C_cuda was not built."
    )
    assert "(CUDA 13.0)" in reason or not is_there
    assert "nvcc" in remedy
    assert f"pyreg._C_cuda: {reason}\n  remedy: {remedy}" in found["report"]


# ---- torch ----


def test_no_torch(package: Path) -> None:
    told = run(["-m", "pyreg.env"], package.parent)
    assert "torch            not installed\n" in told
    assert "torch: pyreg needs torch >= 2.10, and none is installed; install it: pip install 'torch>=2.10'\n" in told
    found = json.loads(run(["-m", "pyreg.env", "--json"], package.parent))
    assert found["pyreg"] == pyreg.__version__
    assert found["torch"] is None
    assert found["extensions"]["pyreg._C"]["state"] == "not needed here"


def test_an_old_torch(package: Path) -> None:
    (package.parent / "torch.py").write_text("__version__ = '2.9.1+cu128'")
    expected = "pyreg needs torch >= 2.10, found 2.9.1+cu128; update it: pip install 'torch>=2.10'"
    told = run(["-m", "pyreg.env"], package.parent)
    assert "torch            2.9.1+cu128, without CUDA\n" in told
    assert f"torch: {expected}\n" in told
    script = """
import pyreg
for use in ("pyreg.functional", "from pyreg import nn", "import pyreg.functional", "pyreg.compand"):
    try:
        exec(use)
    except ImportError as error:
        print(error)
"""
    assert run(["-c", script], package.parent).splitlines() == [expected] * 4
