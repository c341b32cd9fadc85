"""What the documentation says holds: its code runs, its site builds, and it leaves nothing of the library out."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import inspect
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pyreg
from pyreg import diagnostics, functional, nn, optim, transport

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OPERATORS = sorted((DOCS / "operators").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", *sorted(DOCS.rglob("*.md"))]

# Beyond what pyreg itself needs: a page whose packages are missing is skipped, and the summary of the run says so.
NEEDS = {
    "hugging_face.md": ("transformers", "accelerate"),
    "lightning.md": ("lightning",),
    "samples_loss.md": ("geomloss",),
    "sinkhorn.md": ("ot",),
    "supcon.md": ("pytorch_metric_learning",),
}

SECTIONS = ["Formula", "Before and after", "Options", "Numerics", "Second order", "Performance", "Limits"]
NO_CODE = {"sh", "text", "{eval-rst}", "{include}", "{literalinclude}", "{toctree}"}

MODULES = {
    "pyreg.functional": functional,
    "pyreg.nn": nn,
    "pyreg.optim": optim,
    "pyreg.diagnostics": diagnostics,
    "pyreg.transport": transport,
    "pyreg": pyreg,
}
PUBLIC = {
    f"{module}.{name}": getattr(where, name)
    for module, where in MODULES.items()
    for name in where.__all__
    if not inspect.ismodule(getattr(where, name))
}
FUNCTIONS = [name for name, public in PUBLIC.items() if inspect.isfunction(public)]
CLASSES = [name for name in PUBLIC if name.startswith(("pyreg.nn.", "pyreg.optim.")) and name not in FUNCTIONS]


def need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}, of the extras docs and bench")


def run(command: list[str], folder: Path, **environment: str) -> None:
    """In a process that finds the pyreg that is tested."""
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": search_path} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- code ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_of_a_page_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its blocks run in their order, in one namespace of their own."""
    need("sybil", *NEEDS.get(page.name, ()))
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    document = Sybil([PythonCodeBlockParser()]).parse(page)
    with warnings.catch_warnings():
        warnings.simplefilter("error", transport.ConvergenceWarning)
        for example in document.examples():
            example.evaluate()


@pytest.mark.parametrize("script", sorted((DOCS / "recipes").glob("*.py")), ids=lambda script: script.name)
def test_script_of_two_processes_runs(script: Path, tmp_path: Path) -> None:
    """Processes end with the script: torch keeps gloo's threads of a DistributedDataParallel, and one that lets go of a
    backward pass while Python is taken down aborts the process."""
    launched = tmp_path / script.name
    launched.write_text(f"import os, runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')\nos._exit(0)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(launched)]
    run(command, tmp_path, OMP_NUM_THREADS="1")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_is_python_that_runs_or_no_code(page: Path) -> None:
    fences = re.findall(r"^ *(?:`{3,}|:{3,})([^\s`:]+)", page.read_text(), flags=re.MULTILINE)
    assert set(fences) <= {"python"} | NO_CODE


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_of_a_docstring_run(name: str) -> None:
    finder, output = doctest.DocTestFinder(), io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    public = PUBLIC[name]
    with contextlib.redirect_stdout(output):
        for test in finder.find(public, name, module=False, globs={"torch": torch, "pyreg": pyreg}):
            runner.run(test)
    assert runner.failures == 0, output.getvalue()


@pytest.mark.parametrize("page", [page for page in PAGES if DOCS not in page.parents], ids=lambda page: page.name)
def test_links_of_a_file_outside_of_the_site_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


# ---- completeness ----


def sections(docstring: str) -> set[str]:
    """The sections that a docstring has; "formula" for its block of one."""
    found = set(re.findall(r"^ *(Args|Shape|Returns|Gradient|Raises|Source|Example|Attributes):", docstring, re.M))
    return found | ({"formula"} if ".. code-block:: text" in docstring else set())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_of_a_function_has_every_section(name: str) -> None:
    wanted = {"Args", "Raises", "Source", "Example"}
    if name not in ("pyreg.compand", "pyreg.decompand"):
        wanted |= {"formula", "Gradient"}
    if inspect.signature(PUBLIC[name]).return_annotation != "None":
        wanted |= {"Returns"}
    assert sections(inspect.getdoc(PUBLIC[name])) >= wanted


@pytest.mark.parametrize("name", CLASSES)
def test_docstring_of_a_class_has_every_section(name: str) -> None:
    """Or says which function has the formula and the rest, and shows how it is called."""
    docstring = inspect.getdoc(PUBLIC[name])
    refers = re.search(r"^Formula.*:\s+:func:`pyreg\.functional\.\w+`", docstring, re.M | re.S) is not None
    wanted = {"Example"} if refers else {"formula", "Args", "Raises", "Source", "Example"}
    assert sections(docstring) >= wanted


@pytest.mark.parametrize("page", OPERATORS, ids=lambda page: page.stem)
def test_page_of_an_operator_has_every_section(page: Path) -> None:
    headings = re.findall(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS


def test_every_benchmark_has_its_place_in_a_page() -> None:
    found = [re.findall(r"<!-- bench: (\w+) -->.*?<!-- /bench -->", page.read_text(), re.S) for page in OPERATORS]
    sources = (ROOT / "bench").glob("bench_*.py")
    measured = {name for source in sources for name in re.findall(r'^OPERATOR = "(\w+)"', source.read_text(), re.M)}
    assert {name for names in found for name in names} == measured


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: what leads nowhere, or is in no list of pages, is an error."""
    need("sphinx", "myst_parser", "furo", "sphinx_copybutton")
    folder = tmp_path_factory.mktemp("site")
    run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), "."], folder)
    return folder


def test_every_public_name_is_documented(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    documented = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    assert set(PUBLIC) - documented == set()


def test_formulas_are_in_the_page(site: Path) -> None:
    """Without a script, and without a look-up of one."""
    page = (site / "operators" / "stablemax.html").read_text()
    assert "<math" in page
    assert re.findall(r'<script[^>]+src="https?:', page) == []
