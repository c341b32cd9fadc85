"""The wheel installs and runs on its own, and its compiled parts keep what they promise to other builds of torch.

The Makefile's build folder serves all tests here. They leave the CUDA kernels out: `make cuda` builds them.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tools import ptxas, symbols

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "native"
PIP = ("-m", "pip", "--disable-pip-version-check")
CPU_ONLY = ("--config-settings", "build.targets=_C", "--config-settings", "install.components=cpu")
OPTIONS = ("--no-build-isolation", "--no-deps", "--config-settings", f"build-dir={BUILD}", *CPU_ONLY)

pytestmark = pytest.mark.needs_compiler

RUN = """
import torch, pyreg
from pyreg.functional import stablemax_cross_entropy
logits = torch.tensor([[1.0, 0.0]], requires_grad=True)  # s = [2, 1], S = 3
loss = stablemax_cross_entropy(logits, torch.tensor([0]))
loss.backward()
torch.testing.assert_close(loss, torch.tensor(1.5).log())
torch.testing.assert_close(logits.grad, torch.tensor([[1 / 3 - 1 / 2, 1 / 3]]))
print(pyreg.__file__)
"""


def run(command: list[str], cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def new_environment(folder: Path) -> str:
    """The python of a new environment that sees the packages of this one, but none that are installed in place."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    parents = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "parent.pth").write_text("\n".join(parents))
    return str(python)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, *PIP, "wheel", *OPTIONS, "-w", str(folder), str(ROOT)], folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The python of an environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    python = new_environment(folder / "venv")
    run([python, *PIP, "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)], folder)
    return python


# ---- wheels and environments ----


def test_the_wheel_runs_in_a_clean_environment(installed: str, tmp_path: Path):
    location = run([installed, "-c", RUN], tmp_path).strip()
    assert Path(location).is_relative_to(Path(installed).parents[1])


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"pyreg/{path.relative_to(ROOT / 'pyreg')}" for path in (ROOT / "pyreg").rglob("*.py")}
    assert sources <= set(names)
    assert "pyreg/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (library,) = (name for name in names if name.endswith(".so"))
    assert re.fullmatch(r"pyreg/_C\.cpython-[\w-]+\.so", library)
    others = set(names) - sources - {"pyreg/py.typed", library}
    assert {
        name for name in others if not re.match(r"pyreg-[^/]+\.dist-info/|pyreg/triton_kernels/\w+\.py$", name)
    } == set()


@pytest.mark.usefixtures("wheel")  # compiled there; a build folder is one Python's
def test_an_editable_installation_runs_from_the_sources(tmp_path: Path):
    run(
        [sys.executable, *PIP, "install", *OPTIONS, "--ignore-installed", "--prefix", str(tmp_path), "-e", str(ROOT)],
        tmp_path,
    )
    site = sysconfig.get_path("purelib", vars={"base": str(tmp_path), "platbase": str(tmp_path)})
    code = f"import site; site.addsitedir({site!r})\n{RUN}"
    assert (
        Path(run([new_environment(tmp_path / "venv"), "-c", code], tmp_path).strip()) == ROOT / "pyreg" / "__init__.py"
    )


def test_the_sources_hold_what_builds_and_tests_them(tmp_path: Path):
    run([sys.executable, "-c", f"from scikit_build_core.build import build_sdist as b; b({str(tmp_path)!r})"], ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    folders = ("csrc", "pyreg", "triton_kernels", "tests", "tools", "examples")
    wanted = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.*")}
    passing = re.compile(r".*(?:__pycache__|\.so$|\.png$|/pyreg/triton_kernels/|^pyreg/triton_kernels/).*")
    assert {name for name in wanted if not passing.match(name) and (ROOT / name).is_file()} <= names
    assert {"CMakeLists.txt", "pyproject.toml", "Makefile", "README.md", "LICENSE", "bench/floor.cpp"} <= names
    assert {name for name in names if re.match(r"(?:build|dist|\.venv|\.git|bench/results)/|.*\.so$", name)} == set()


# ---- symbols ----


def extensions(wheel: Path, folder: Path) -> list[Path]:
    """The extension in the wheel, and those that these tests run on."""
    with zipfile.ZipFile(wheel) as archive:
        unpacked = [Path(archive.extract(name, folder)) for name in archive.namelist() if name.endswith(".so")]
    specs = [importlib.util.find_spec(name) for name in ("pyreg._C", "pyreg._C_cuda")]
    return unpacked + [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]


def test_extensions_need_no_cpp_symbol_of_torch(wheel: Path, tmp_path: Path):
    libraries = extensions(wheel, tmp_path)
    assert len(libraries) >= 2
    assert {library.name: symbols.unstable_symbols(library) for library in libraries} == {
        library.name: [] for library in libraries
    }


def test_a_cpp_symbol_of_torch_would_be_seen():
    assert any(
        "at::" in name for name in symbols.unstable_symbols(Path(torch._C.__file__).parent / "lib/libtorch_python.so")
    )


def test_extensions_bring_neither_openmp_nor_a_search_path(wheel: Path, tmp_path: Path):
    for library in extensions(wheel, tmp_path):
        dynamic = run(["readelf", "--dynamic", str(library)], tmp_path)
        assert "libtorch.so" in dynamic
        assert re.findall(r".*(?:gomp|libomp|RPATH|RUNPATH).*", dynamic) == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set: nothing is compiled twice")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.usefixtures("wheel")  # compiled there
def test_code_for_one_instruction_set_is_never_merged_into_another(isa: str):
    objects = sorted((BUILD / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o"))
    assert len(objects) == len(list((ROOT / "csrc").glob("*/*_cpu.cpp")))
    assert {path.name: symbols.shared_definitions(path, isa) for path in objects} == {path.name: [] for path in objects}


def test_a_merged_definition_would_be_seen(tmp_path: Path):
    (tmp_path / "planted.cpp").write_text("""
        inline int shared() { return 1; }
        namespace pyreg::avx512 {
        inline int own() { return 2; }
        int kernel() { return shared() + own(); }
        }""")
    run([os.environ.get("CXX", "c++"), "-c", "planted.cpp", "-o", "planted.o"], tmp_path)
    assert symbols.shared_definitions(tmp_path / "planted.o", "avx512") == ["shared()"]


# ---- the report of `make cuda` ----

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5pyreg4cuda7forwardIfLi4EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN5pyreg4cuda7forwardIfLi4EEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN5pyreg4cuda7forwardIfLi4EEEvPKT_' for 'sm_120'
ptxas info    : Function properties for _ZN5pyreg4cuda7forwardIfLi4EEEvPKT_
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size
"""


def test_ptxas_output_is_read(capsys: pytest.CaptureFixture[str]):
    name = "_ZN5pyreg4cuda7forwardIfLi4EEEvPKT_"
    usages = ptxas.parse(PTXAS)
    assert usages == [
        ptxas.Usage(name, "sm_80", registers=40, shared=1024, stack=0, spills=0),
        ptxas.Usage(name, "sm_120", registers=255, shared=0, stack=16, spills=20),
    ]
    assert ptxas.short_names([name]) == {name: "forward<float, 4>"}
    assert ptxas.report("CUDA", usages[:1]) == 0
    assert ptxas.report("CUDA", usages) == 1
    assert "forward<float, 4> spills 20 bytes on sm_120" in capsys.readouterr().out


def test_ptxas_output_that_lost_a_line_is_refused():
    lines = PTXAS.splitlines()
    with pytest.raises(ValueError, match="no registers reported"):
        ptxas.parse("\n".join(line for line in lines if "Used 40" not in line))
    with pytest.raises(ValueError, match="unknown kernel"):
        ptxas.parse("\n".join(line for line in lines if "sm_80" not in line))


def test_ptxas_output_is_kept_beside_the_object_and_warnings_are_shown(tmp_path: Path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ncat >&2 <<'EOF'\n{PTXAS}\nkernel.cu(1): warning: odd\nEOF\nexit 3\n")
    compiler.chmod(0o755)
    command = [str(ROOT / "tools/ptxas_log.sh"), str(compiler), "-c", "kernel.cu", "-o", "kernel.cu.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.split("\n")[-2:] == ["kernel.cu(1): warning: odd", ""]
    assert "ptxas info" not in done.stderr
    assert ptxas.parse((tmp_path / "kernel.cu.o.ptxas").read_text()) == ptxas.parse(PTXAS)
