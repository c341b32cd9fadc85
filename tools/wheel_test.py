"""Runs the test suite against a wheel, as a user has it: installed, without compilers, in a folder of its own.

    python tools/wheel_test.py WHEEL ENVIRONMENT [--python PYTHON] [--torch VERSION] [ARGUMENTS OF PYTEST ...]

ENVIRONMENT is a folder for the environment, which is made with that Python and torch if it is not there; the wheel is
installed anew. The tests are copied out of the checkout, with what they import beside pyreg: what they find as pyreg
can only be what was installed. The PATH holds the environment's own commands and nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("tests", "bench", "examples", "tools", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md", "LICENSE")
EXTRAS = "test,bench,examples,triton"
COMPILERS = ("c++", "g++", "clang++", "cc", "gcc", "clang", "nvcc")
REMOVED = ("CC", "CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH", "PYTHONSAFEPATH", "LD_LIBRARY_PATH")
PIP = ("-m", "pip", "--disable-pip-version-check", "install", "-q")

# In the environment: which package is imported, and that no compiler is found.
PROBE = f"""
import shutil, sys, sysconfig
from pathlib import Path
found = [path for name in {COMPILERS} if (path := shutil.which(name))]
if found:
    sys.exit(f"wheel_test: compilers are on the PATH: {{', '.join(found)}}")
import pyreg
if not Path(pyreg.__file__).is_relative_to(sysconfig.get_path("platlib")):
    sys.exit(f"wheel_test: pyreg is not the installed package: {{pyreg.__file__}}")
print("no compiler on the PATH; pyreg is", pyreg.__file__, flush=True)
"""


def prepare(environment: Path, python: str, torch: str | None, wheel: Path) -> str:
    """The environment's python, with torch and the wheel installed."""
    interpreter = str(environment / "bin" / "python")
    if not Path(interpreter).exists():
        subprocess.run([python, "-m", "venv", str(environment)], check=True)
    if torch is not None:
        subprocess.run([interpreter, *PIP, f"torch=={torch}"], check=True)
    subprocess.run([interpreter, *PIP, f"{wheel}[{EXTRAS}]"], check=True)
    subprocess.run([interpreter, *PIP, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    return interpreter


def without_compilers(environment: Path) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in REMOVED}
    return variables | {"PATH": str(environment / "bin")}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the test suite against an installed wheel.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--torch", help="the version of torch that the environment gets; by default what is there")
    options, arguments = parser.parse_known_args()
    environment = options.environment.absolute()
    interpreter = prepare(environment, options.python, options.torch, options.wheel.absolute())
    with tempfile.TemporaryDirectory(prefix="pyreg-wheel-test-") as folder:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, folder)
        variables = without_compilers(environment)
        subprocess.run([interpreter, "-c", PROBE], cwd=folder, env=variables, check=True)
        subprocess.run([interpreter, "-m", "pyreg.env"], cwd=folder, env=variables, check=True)
        tests = [interpreter, "-m", "pytest", "-p", "no:cacheprovider", *(arguments or ["tests"])]
        sys.exit(subprocess.run(tests, cwd=folder, env=variables, check=False).returncode)


if __name__ == "__main__":
    main()
