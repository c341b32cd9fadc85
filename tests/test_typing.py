"""What a type checker finds out about a program that uses pyreg."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = Path("tests") / "typing_program.py"


def test_mypy_knows_types_and_finds_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """``# -> T`` in the program: the type revealed there; ``# !``: the error; nothing else is found."""
    pytest.importorskip("mypy", reason="needs mypy, of the extra lint")
    from mypy import api

    lines = (ROOT / PROGRAM).read_text().splitlines()
    expected = {number: line.split("  # ")[1] for number, line in enumerate(lines, 1) if re.search("  # (->|!) ", line)}
    assert len(expected) > 20

    # With the options and the cache of `make lint`.
    monkeypatch.chdir(ROOT)
    output, failure, _ = api.run([str(PROGRAM)])
    assert failure == ""
    told = re.findall(rf"^{re.escape(str(PROGRAM))}:(\d+): (?:error|note): (.*)", output, flags=re.MULTILINE)
    found = {int(number): said for number, said in told}

    def agrees(wanted: str, said: str) -> bool:
        kind, text = wanted.split(" ", 1)
        revealed = re.sub(r"\b(\w+\.)+", "", said.removeprefix("Revealed type is ").strip('"'))
        return text == revealed if kind == "->" else text in said

    assert sorted(found) == sorted(expected), output
    assert {number: said for number, said in found.items() if not agrees(expected[number], said)} == {}
