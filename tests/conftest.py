"""Where operators run in the tests, and what a run did not check.

``--backend`` chooses the kernels that the ``device`` fixture stands for:

- ``cpu`` (always run) and ``cuda`` (run where torch sees a GPU);
- ``cuda_on_cpu``: the project's CUDA kernels, compiled for the emulation in ``tests/cuda_on_cpu``, take the place of
  the CPU kernels of the same operators, so that the same test bodies run them without a GPU.

Triton kernels are tested on the ``triton_device``: a GPU where torch sees one, and with ``--backend=triton_on_cpu`` the
CPU, where Triton's interpreter runs them. A test file may make it the ``device`` of test bodies that it imports.

Tests marked ``needs_compiler`` compile C++ while they run (torch.compile's inductor on the CPU, the benchmarks' floors,
builds of the package) or read binaries with its companions; they are skipped where no compiler is found.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", default="auto", choices=("auto", "cpu", "cuda", "cuda_on_cpu", "triton_on_cpu"))
    parser.addoption("--extension", type=Path, help="a folder whose pyreg._C takes the place of the installed one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: too big for emulated and interpreted kernels, and deselected with them")
    config.addinivalue_line("markers", "cpu_only: about the CPU kernels alone")
    config.addinivalue_line("markers", "sanitized: of the build with sanitizers that --extension names")
    config.addinivalue_line("markers", "not_emulated: of operators without CUDA C++ kernels: on the CPU and on a GPU")
    config.addinivalue_line("markers", "needs_compiler: compiles C++ while it runs; skipped without a compiler")
    if (folder := config.getoption("--extension")) is not None:
        sys.meta_path.insert(0, _ExtensionFrom(folder.resolve()))
    if config.getoption("--backend") == "triton_on_cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported


class _ExtensionFrom(MetaPathFinder):
    """Finds ``pyreg._C`` in a folder, and nowhere else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "pyreg._C":
            return None
        spec = PathFinder.find_spec("_C", [str(self.folder)])
        if spec is None or spec.origin is None:
            raise pytest.UsageError(f"--extension: {self.folder} has no _C; make sanitize builds one")
        return spec_from_file_location(name, spec.origin)


def _backends(config: pytest.Config) -> list[str]:
    chosen = config.getoption("--backend")
    if chosen != "auto":
        return [chosen]
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _device_of(fixtures: Iterable[str]) -> str | None:
    """The fixture that says where a test runs."""
    return next((name for name in ("triton_device", "device") if name in fixtures), None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kinds = {"device": ("cpu", "cuda", "cuda_on_cpu"), "triton_device": ("cuda", "triton_on_cpu")}
    only_cpu = metafunc.definition.get_closest_marker("cpu_only")
    chosen = ["cpu"] if only_cpu else _backends(metafunc.config)
    if metafunc.definition.get_closest_marker("not_emulated"):
        chosen = [name for name in chosen if name != "cuda_on_cpu"]
    for fixture, kind in kinds.items():
        backends = [name for name in chosen if name in kind]
        if fixture == _device_of(metafunc.fixturenames) and backends:
            metafunc.parametrize(fixture, backends, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A chosen backend runs the tests that take a device, on that device; the emulated ones not the large ones."""
    backend = config.getoption("--backend")

    def runs(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        too_large = backend.endswith("_on_cpu") and item.get_closest_marker("large") is not None
        if item.get_closest_marker("sanitized") is not None and config.getoption("--extension") is None:
            return False
        fixture = _device_of(getattr(item, "fixturenames", ()))
        if fixture is None:
            return backend in ("auto", "cpu")
        return fixture in parameters and backend in ("auto", parameters[fixture]) and not too_large

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = [item for item in items if runs(item)]
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        for item in items:
            if item.get_closest_marker("needs_compiler") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a C++ compiler"))


@pytest.fixture(scope="session")
def _emulated_kernels() -> Iterator[None]:
    from tests.cuda_on_cpu.operators import load_operators

    names = load_operators()
    library = torch.library.Library("pyreg", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding a previously registered kernel.*")
        for name in names:
            library.impl(name, getattr(torch.ops.pyreg_cuda_on_cpu, name).default, allow_override=True)
    yield
    library._destroy()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device whose kernels the test runs; ``cpu`` for emulated CUDA kernels."""
    if request.param == "cuda_on_cpu":
        request.getfixturevalue("_emulated_kernels")
        return torch.device("cpu")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def triton_device(request: pytest.FixtureRequest) -> torch.device:
    """The device whose tensors Triton kernels take."""
    pytest.importorskip("triton")
    return torch.device("cpu" if request.param == "triton_on_cpu" else request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small networks, on which several threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how much was skipped, and why, in one place; and which package was tested."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in skipped
    )
    terminalreporter.write_sep("-", f"{len(skipped)} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} x {reason}")
    pyreg = sys.modules.get("pyreg")
    if pyreg is not None:
        terminalreporter.write_line(f"torch {torch.__version__}, pyreg {pyreg.__version__} of {pyreg.__file__}")
