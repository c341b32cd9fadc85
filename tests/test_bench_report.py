"""What is made of measurements: rows, fits, tables, figures, the page. All numbers are made up."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from bench import figures, floor, markdown, page, plot, report, rows, scaling, tables, targets
from tests.bench_rows import judge, measurement, target, write_rows

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if markdown.BLOCK.search(path.read_text())
]


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    """Two runs of two operators."""
    first = [
        "alpha 8x8 ours 0.25",
        "alpha 8x8 other 0.5",
        "alpha 8x8 floor 0.2",
        "alpha 9x9 ours 1",
        "beta 7 ours 0.003",
    ]
    second = ["beta 7 ours 0.002", "beta 7 rival 0.005", "beta 7 floor 0.001"]
    swept = [f"beta N={n} {name} {seconds}" for n in (1, 2, 4) for name, seconds in (("ours", n), ("rival", n * n))]
    return [
        write_rows(tmp_path / "first.csv", "2026-01-01", first),
        write_rows(tmp_path / "second.csv", "2026-02-02", second + swept),
    ]


class TestRows:
    def test_csv_has_a_header_once_and_a_row_a_contender(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "results.csv"
        measured = [
            measurement("ours", [0.25, 0.25], peak_bytes=10),
            measurement("floor", [0.125]),
            measurement("other", [], error="boom"),
        ]
        rows.write(path, measured)
        rows.write(path, measured)
        with path.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert list(found[0]) == rows.COLUMNS
        assert len(found) == 6
        assert found[0]["contender"] == "ours"
        assert float(found[0]["median_s"]) == float(found[0]["p20_s"]) == 0.25
        assert {row["floor_s"] for row in found} == {"0.125"}
        assert found[0]["peak_bytes"] == "10"
        assert found[1]["peak_bytes"] == ""
        assert found[2]["median_s"] == ""
        assert found[2]["error"] == "boom"
        assert all(found[0][column] for column in ("date", "machine", "cores", "torch", "commit", "load", "device"))

    def test_rows_are_added_to_no_file_with_other_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "old.csv"
        path.write_text("date,operator\n")
        with pytest.raises(ValueError, match="has other columns than the rows to be added; name another file"):
            rows.write(path, [measurement("ours", [1.0])])

    def test_rows_are_what_was_measured(self, tmp_path: Path) -> None:
        measured = [measurement("ours", [1.0, 2.0, 3.0], sweep="N", size=8), measurement("other", [4.0])]
        rows.write(tmp_path / "rows.csv", measured)
        first, second = rows.read([tmp_path / "rows.csv"])
        assert (first.median, first.p20, first.p80, first.samples) == (2.0, 1.4, 2.6, 3)
        assert (first.sweep, first.size, first.peak_bytes) == ("N", 8, None)
        assert (second.contender, second.sweep, second.size) == ("other", "", None)

    def test_of_several_runs_the_last_one_of_each_workload_and_each_sweep(self, tmp_path: Path) -> None:
        old, new = (
            write_rows(tmp_path / f"{date}.csv", date, found)
            for date, found in (
                ("2026-01-01", ["a 8x8 ours 3", "a 8x8 other 6", "a 9x9 ours 1", "a N=1 ours 1", "a N=2 ours 2"]),
                ("2026-02-02", ["a 8x8 ours 2", "b 8x8 ours 7", "a N=1 ours 5"]),
            )
        )
        for paths in ([old, new], [new, old]):
            found = [(row.operator, row.workload, row.size, row.contender, row.median) for row in rows.read(paths)]
            assert found == [
                ("a", "9x9", None, "ours", 1.0),
                ("a", "8x8", None, "ours", 2.0),  # and not the other's 6 s, which were measured in another run
                ("a", "N=1", 1, "ours", 5.0),
                ("b", "8x8", None, "ours", 7.0),
            ]

    def test_a_run_that_had_no_time_for_a_workload_leaves_it_to_an_older_one(self, tmp_path: Path) -> None:
        old = write_rows(tmp_path / "old.csv", "2026-01-01", ["a 8x8 ours 3", "a 9x9 ours 3"])
        new = write_rows(tmp_path / "new.csv", "2026-02-02", ["a 8x8 ours 2", "a 9x9 ours 2"])
        lines = new.read_text().splitlines()
        new.write_text("\n".join([*lines[:2], lines[2].replace("2,2,2,3", ",,,0") + "left out: no time"]) + "\n")
        assert [row.median for row in rows.read([new])] == [2.0, None]
        assert [(row.workload, row.median) for row in rows.read([old, new])] == [("9x9", 3.0), ("8x8", 2.0)]

    def test_files_of_all_ages_can_be_read(self) -> None:
        paths = sorted((Path(rows.__file__).parent / "results").glob("*.csv"))
        assert len(rows.read(paths)) > 150
        for path in paths:
            lines = len(path.read_text().splitlines()) - 1
            found = rows.read([path])
            assert len(found) == lines
            assert all(row.median or row.error for row in found)
            assert {row.conditions.source for row in found} == {f"bench/results/{path.name}"}

    def test_the_best_rival_is_neither_ours_nor_the_floor(self) -> None:
        names = {"ours": 2.0, "ours in place": 1.0, "logits + ours": 1.0, "op": 1.0, "floor": 1.0, "a": 5.0, "b": 3.0}
        (one,) = rows.comparisons(rows.of([measurement(name, [seconds]) for name, seconds in names.items()]))
        assert one.best_rival is not None
        assert one.best_rival.contender == "b"
        assert one.ratio(one.best_rival) == 1.5
        assert one.over_floor == 2.0


class TestScaling:
    def test_the_exponent_of_a_power(self) -> None:
        sizes = [1, 2, 4, 8, 16, 32]
        line = scaling.fit(sizes, [5 + 3.0 * size**2 if size < 8 else 3.0 * size**2 for size in sizes])
        assert line is not None
        assert (line.count, line.first) == (3, 8)
        assert line.exponent == pytest.approx(2)
        assert line.factor == pytest.approx(3)
        assert line.residual == pytest.approx(0, abs=1e-9)
        assert line(10) == pytest.approx(300)
        assert str(line) == "2.00 (± 0 %)"

    def test_the_residual_of_scattered_points(self) -> None:
        """Logarithms off the line by +d, -2d, +d: of the parabola d x^2 - 2d/3 over -1, 0, 1, their mean taken."""
        d = math.log(1.1)
        line = scaling.fit([1, math.e, math.e**2], [math.exp(d), math.exp(-2 * d), math.exp(d)])
        assert line is not None
        assert line.exponent == pytest.approx(0, abs=1e-12)
        assert line.residual == pytest.approx(1.1 ** math.sqrt(2) - 1)

    def test_points_far_off_any_line_have_no_exponent(self) -> None:
        line = scaling.fit([1, 2, 4], [1, 8, 1])
        assert line is not None
        assert str(line) == "none (± 167 %)"  # off by ln 8 sqrt(2) / 3

    def test_half_of_many_points_and_none_of_two(self) -> None:
        line = scaling.fit(range(1, 10), range(1, 10))
        assert line is not None
        assert (line.count, line.first) == (5, 5)
        assert scaling.fit([1, 2], [1, 2]) is None

    def test_points_without_a_logarithm_are_left_out(self) -> None:
        line = scaling.fit([1, 2, 4, 8, 16, 32], [9, 0, 4, 8, 16, 32])
        assert line is not None
        assert line.first == 8
        assert line.exponent == pytest.approx(1)
        assert scaling.fit([1, 2, 4], [0, 1, 2]) is None


class TestReport:
    def test_table_shows_ratios_and_verdicts(self) -> None:
        measured = [measurement("ours", [2.0]), measurement("other", [5.0]), measurement("floor", [1.6])]
        verdicts = judge([target(against="other", faster=2.0)], measured)
        table = report.table(rows.of(measured), verdicts)
        columns = {column.header: list(column.cells) for column in table.columns}
        assert columns["ratio"] == ["1.00", "2.50", "0.80"]
        assert columns["ours / floor"] == ["1.25", "", ""]
        assert "2 x faster: 2.5, met" in columns["target"][1]

    def test_what_was_left_out_is_named_with_its_reason(self) -> None:
        measured = [measurement("ours", [2.0])]
        measured += [measurement(name, [], error="left out: no time") for name in ("other", "third")]
        console = Console(width=200, record=True, file=io.StringIO())
        points = [measurement("other", [], error="left out: long", sweep="N, of N", size=size) for size in (2, 4)]
        assert report.left_out(rows.of([*measured, *points])) == {
            "left out: no time": ["op 8x8 float32, other", "op 8x8 float32, third"],
            "left out: long": ["op, N, of N, other at 2, 4"],
        }
        report.show(console, rows.of(measured), [])
        assert "left out: no time: op 8x8 float32, other; op 8x8 float32, third\n" in console.export_text()

    @pytest.mark.parametrize(
        ("value", "text"),
        [(12.4, "12.4 s"), (0.0482, "48.2 ms"), (51e-6, "51 us"), (999.7e-6, "1 ms"), (7200, "7200 s")],
    )
    def test_seconds(self, value: float, text: str) -> None:
        assert tables.seconds(value) == text

    @pytest.mark.parametrize(("value", "text"), [(524_288_000, "524 MB"), (0, "0 B"), (57_900, "57.9 kB")])
    def test_bytes(self, value: int, text: str) -> None:
        assert tables.size(value) == text

    def test_the_rate_of_a_floor(self) -> None:
        for work, text in (
            (floor.Work(bytes=3 * 10**9), "6 GB/s"),
            (floor.Work(bytes=10, flops=10**11), "200 GFLOP/s"),
            (floor.Work(exponentials=10**9), "2 Gexp/s"),
            (floor.Work(), ""),
        ):
            (row,) = rows.of([measurement("floor", [0.5], work=work)])
            assert tables.rate(row) == text


class TestFigures:
    def test_a_panel_a_workload_and_a_bar_a_contender(self) -> None:
        measured = [measurement("ours", [0.25]), measurement("other", [0.5, 0.75, 1.0]), measurement("floor", [0.125])]
        (axis,) = figures.bars(rows.comparisons(rows.of(measured))).axes
        assert axis.get_title(loc="left") == "op, 8x8, float32"
        assert [label.get_text() for label in axis.get_yticklabels()] == ["other", "ours", "floor"]
        assert [bar.get_width() for bar in axis.containers[-1]] == [750, 250, 125]

    def test_a_sweep_has_points_and_fitted_lines(self, results: list[Path]) -> None:
        time_axis, memory_axis = figures.scaling(rows.read(results), "beta").axes
        points, line, rivals, rivals_line = time_axis.get_lines()
        assert [list(points.get_xdata()), list(points.get_ydata())] == [[1, 2, 4], [1, 2, 4]]
        assert list(rivals.get_ydata()) == [1, 4, 16]
        assert list(line.get_ydata()) == pytest.approx([1, 4])
        assert list(rivals_line.get_ydata()) == pytest.approx([1, 16])
        assert [text.get_text() for text in time_axis.get_legend().get_texts()] == ["ours: 1.00", "rival: 2.00"]
        assert list(memory_axis.get_lines()[0].get_ydata()) == [1000, 2000, 4000]

    def test_rivals_and_floors_over_ours(self, results: list[Path]) -> None:
        (axis,) = figures.summary(rows.read(results)).axes
        drawn = {line.get_label(): list(line.get_xdata()) for line in axis.get_lines()}
        assert drawn == {"ours": [1.0, 1.0], "best rival": [2.0, 2.5], "floor": [pytest.approx(0.8), 0.5]}
        assert [text.get_text() for text in axis.texts] == ["2.00 x  other", "2.50 x  rival"]

    def test_distance_from_the_floor(self, results: list[Path]) -> None:
        (axis,) = figures.roofline(rows.read(results)).axes
        assert [label.get_text() for label in axis.get_yticklabels()] == ["", "8x8, fp32", "", "7, fp32"]
        assert [text.get_text().strip() for text in axis.texts] == ["alpha", "0.80", "beta", "0.50"]
        assert list(axis.get_lines()[0].get_xdata()) == [pytest.approx(0.8), 0.5]
        assert list(axis.get_lines()[0].get_ydata()) == [1, 3]

    def test_files_of_operators_are_the_same_each_time(self, results: list[Path], tmp_path: Path) -> None:
        texts = []
        for folder in ("a", "b"):
            assert plot.main([*map(str, results), str(tmp_path / folder), "--per-operator"]) == 0
            texts.append({path.name: path.read_text() for path in (tmp_path / folder).iterdir()})
        assert sorted(texts[0]) == ["alpha.svg", "beta.svg", "beta_scaling.svg"]
        assert texts[0] == texts[1]
        assert "rival" in texts[0]["beta.svg"]

    def test_nothing_to_draw(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_rows(tmp_path / "none.csv", "2026-01-01", [])
        assert plot.main([str(path), str(tmp_path / "none.png")]) == 2
        assert f"nothing to draw in {path}" in capsys.readouterr().err


class Page(HTMLParser):
    """The words of a page, what it refers to, and the elements that it leaves open."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.resources, self.anchors, self.open = "", list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors += [str(values["href"])] if tag == "a" else []
        self.resources += [
            str(values[name]) for name in ("src", "href", "data", "srcset") if name in values and tag != "a"
        ]
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


class TestPage:
    def test_it_is_whole_and_needs_nothing_else(self, results: list[Path], tmp_path: Path) -> None:
        path = tmp_path / "report.html"
        assert page.main([*map(str, results), str(path)]) == 0
        text = path.read_text()
        shown = Page(text)
        assert shown.open == []
        assert len(shown.resources) == 5  # the summary, the floors, alpha, beta, beta's sweep
        assert all(resource.startswith("data:image/svg+xml;base64,") for resource in shown.resources)
        assert set(shown.anchors) == {"#alpha", "#beta"}
        assert all(f'id="{anchor[1:]}"' in text for anchor in shown.anchors)
        assert not re.search(r"@import|url\(", text)
        for resource in shown.resources:
            picture = base64.b64decode(resource.partition(",")[2]).decode()
            ElementTree.fromstring(picture)
            assert not re.search(r'(href|src)="(?!#)', picture)

    def test_it_has_all_numbers(self, results: list[Path]) -> None:
        words = Page(page.page(rows.read(results))).words
        # Two times and a peak, ours / floor, the rivals' ratios, exponents, where it was measured.
        for number in (
            "250 ms",
            "500 ms",
            "2 MB",
            "1.25",
            "2.00",
            "2.50",
            "1.00 (± 0 %)",
            "2.00 (± 0 %)",
            "Abacus",
            "c0ffee",
        ):
            assert number in words
        assert "3 ms" not in words  # of the older run
        assert "first.csv" in words
        assert "second.csv" in words

    def test_it_tells_targets_and_what_was_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = [target(against="other", faster=2.0), target(against="gone", faster=2.0), target(megabytes=1)]
        monkeypatch.setattr(targets, "load", lambda: wanted)
        measured = [measurement("ours", [2.0], peak_bytes=3_000_000), measurement("other", [5.0])]
        measured += [measurement("gone", [], error="left out: no time")]
        words = Page(page.page(rows.of(measured))).words
        assert re.findall(r"(met|missed|not measured): (\d+)", words) == [
            ("met", "1"),
            ("missed", "1"),
            ("not measured", "1"),
        ]
        assert "left out: no time: op 8x8 float32, gone" in words


class TestMarkdown:
    TEXT = "# Title\n\n<!-- bench: summary -->\nold\n<!-- /bench -->\n\nText, `<!-- bench: beta -->` in a line.\n"

    def test_a_block_has_the_numbers_and_their_source(self, results: list[Path]) -> None:
        lines = markdown.fill(self.TEXT, rows.read(results)).splitlines()
        about = "2 cores of Abacus, torch 2.99, commit c0ffee, load 0.10 at the start"
        assert lines[:4] == ["# Title", "", "<!-- bench: summary -->", ""]
        assert lines[6:] == [
            "| `alpha` | 8x8, float32 | 250 ms | other | 2.00 | 1.25 | 2 MB | 2 MB |",
            "| `beta` | 7, float32 | 2 ms | rival | 2.50 | 2.00 | 2 MB | 2 MB |",
            "",
            f"- `alpha`: {about}, 2026-01-01, `first.csv`",
            f"- `beta`: {about}, 2026-02-02, `second.csv`",
            "",
            "<!-- /bench -->",
            "",
            "Text, `<!-- bench: beta -->` in a line.",
        ]

    def test_each_device_has_a_row(self, results: list[Path], tmp_path: Path) -> None:
        path = tmp_path / "third.csv"
        path.write_text(results[1].read_text().replace(",cpu,", ",cuda,"))
        lines = markdown.block("summary", rows.read([*results, path])).splitlines()
        assert [line.split(" | ")[1] for line in lines[2:5]] == ["8x8, float32", "7, float32", "7, float32, cuda"]

    def test_an_operator_and_its_exponents(self, results: list[Path]) -> None:
        found = rows.read(results)
        one = markdown.block("beta", found).splitlines()
        assert one[2:5] == [
            "| 7, float32 | **ours** | 2 ms | 2 ms - 2 ms | 1.00 | 2.00 | 2 MB |",
            "|  | rival | 5 ms | 5 ms - 5 ms | 2.50 |  | 2 MB |",
            "|  | floor | 1 ms | 1 ms - 1 ms | 0.50 |  |  |",
        ]
        assert "first.csv" not in markdown.block("beta", found)
        both = markdown.block("scaling", found)
        assert both == markdown.block("beta scaling", found)
        assert "| `beta` | N | rival | 1 - 4 | 2.00 (± 0 %) | 1.00 (± 0 %) |" in both

    def test_filling_again_changes_nothing(self, results: list[Path], tmp_path: Path) -> None:
        path = tmp_path / "page.md"
        path.write_text(self.TEXT)
        assert markdown.main([*map(str, results), str(path)]) == 0
        filled = path.read_text()
        assert filled != self.TEXT
        assert markdown.main([*map(str, results), "--check", str(path)]) == 0
        path.write_text(filled.replace("250 ms", "249 ms"))
        assert markdown.main([*map(str, results), "--check", str(path)]) == 1
        assert markdown.main([*map(str, results), str(path)]) == 0
        assert path.read_text() == filled

    def test_an_unknown_block_names_the_known_ones(
        self, results: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "page.md"
        path.write_text("<!-- bench: gamma -->\n<!-- /bench -->\n")
        assert markdown.main([*map(str, results), str(path)]) == 2
        expected = "no block is named 'gamma'; the rows have: summary, alpha, beta, scaling, beta scaling"
        assert expected in capsys.readouterr().err

    def test_a_block_without_its_files(self) -> None:
        with pytest.raises(ValueError, match="block 'summary' names no CSV file; fill it with: make tables RESULTS="):
            markdown.fill(self.TEXT)
        with pytest.raises(ValueError, match=r"names .*gone\.csv, which is not there"):
            markdown.fill(self.TEXT.replace("old", "`bench/results/gone.csv`"))

    @pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
    def test_tables_in_the_documentation_are_what_their_csv_gives(self, path: Path) -> None:
        text = path.read_text()
        assert markdown.fill(text) == text, f"python -m bench.markdown {path.name}"
