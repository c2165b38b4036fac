import csv
import io
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from domainbed_ext.report.leave_one_out import domain_table
from domainbed_ext.report.results import Results
from domainbed_ext.report.single_source import accuracy_table, gap_table
from domainbed_ext.report.summary import Summary
from domainbed_ext.report.tables.bounds import bounds_tables, no_shapes
from domainbed_ext.report.tables.columns import narrow, ranked
from domainbed_ext.report.tables.latex import render_document, render_fragment, render_table
from domainbed_ext.report.tables.table import Table, print_tables, render_markdown, signed
from tests.domainbed_ext.fabricated_records import left_out, paper_like


def summary(mean, complete=True):
    return Summary(mean, 0.5, 3, complete)


def test_best_and_second():
    grid = [[summary(50.04), summary(1)], [summary(49.96), summary(2)], [summary(40), None]]
    best, second = ranked(grid)
    assert best == {(0, 1), (1, 1), (1, 2)}  # 50.0 both, as printed
    assert second == {(2, 1), (0, 2)}
    assert ranked([[summary(1)], [summary(2, complete=False)]]) == (set(), set())
    assert ranked([[summary(float("nan"))], [summary(2)]]) == (set(), set())


def test_second_is_underlined_in_latex_and_nowhere_else():
    table = Table("t", ["a", "b"], [["x", "2.0"], ["y", "1.0"]], "c", {(0, 1)}, {(1, 1)})
    assert r"y & \underline{1.0} \\" in render_table(table) and r"x & \textbf{2.0} \\" in render_table(table)
    assert "| x | **2.0** |\n| y | 1.0 |" in table.to_markdown()


def test_latex_has_minus_signs_and_keeps_hyphens():
    table = Table("t", ["a", "b"], [["LoRA-FA", "-0.5±0.2"], ["-90%", "-5.0 to -4.1"]], "In-domain 1-2.")
    assert [line for line in render_table(table).splitlines() if "&" in line][1:] == [
        r"LoRA-FA & $-$0.5 $\pm$ 0.2 \\",
        r"$-$90\% & $-$5.0 to $-$4.1 \\",
    ]
    assert "In-domain 1-2." in render_table(table) and "| LoRA-FA | -0.5±0.2 |" in table.to_markdown()


def test_latex_sets_methods_by_their_labels():
    comparison = Results(paper_like(2)).single_source.comparison("PACS", 1)
    latex = render_table(accuracy_table(comparison))
    rows = [line.partition(" & ")[0] for line in latex.splitlines() if line.startswith(r"\method")]
    assert (
        rows[1:3] == [r"\method{LoRA-FA}{rank 8}", r"\method{LoRA-FA}{rank 16}"]
        and rows[-2] == r"\method{linear probe}{}"
    )
    assert r"\caption{PACS, single source C: accuracy. Bold: best, underlined: second best.}" in latex
    assert r"\label{tab:pacs-single-source-c-accuracy}" in latex
    assert latex.index(r"\end{tabular}") < latex.index("Trained on C alone.")  # what columns are is below the table


def test_latex_prints_the_error_of_the_average():
    comparison = Results(left_out(["BA", "LP"], trials=3)).leave_one_out.main[0]
    table, summary = domain_table(comparison), comparison.summary("BA", "out_of_domain")
    assert "+/-" not in table.rows[0][-1]  # as DomainBed prints it
    average = next(line for line in render_table(table).splitlines() if line.startswith(r"\method{LoRA}"))
    assert rf"{summary.mean:.1f} $\pm$ {summary.err:.1f}" in average.rpartition("&")[2]


def test_words_wrap_where_a_table_is_wide():
    wide = Table("t", ["Claim", "Comparison", "n"], [["word " * 20, "other " * 10, "1"]], "c", texts=2)
    assert "p{0.16" in render_table(wide) and "footnotesize\\setlength" in render_table(wide)
    narrow = render_table(Table("t", ["a", "b"], [["x", "1"]], "c"))
    assert "p{0.16" not in narrow and "footnotesize\\setlength" not in narrow


def test_a_fragment_is_the_document_without_its_frame(document):
    comparison = Results(paper_like(2)).single_source.comparison("PACS", 1)
    tables = [accuracy_table(comparison), gap_table(comparison), *bounds_tables(comparison, "PACS", no_shapes)]
    fragment = render_fragment(tables)
    assert "document" not in fragment and fragment.count(r"\begin{table}") == 3
    assert all(render_table(table) in fragment and render_table(table) in document for table in tables)
    assert r"\providecommand{\method}" in fragment


def test_csv_can_be_read_back():
    table = Table("t", ["a", "b"], [['x, "y"', "1.0±0.1"]], "c")
    assert list(csv.reader(io.StringIO(table.to_csv()))) == [["a", "b"], ['x, "y"', "1.0±0.1"]]


def test_without_rows_there_are_words():
    table = Table("Title", ["a"], [], "Why not.")
    text = io.StringIO()
    print_tables(Console(file=text, width=200), [table], "8 runs", "Mind.")
    assert text.getvalue() == "8 runs\nNote: Mind.\n\nTitle\nWhy not.\n"
    assert render_markdown([table], "Mind.") == "# Results\n\nNote: Mind.\n\n## Title\n\nWhy not.\n"
    latex = render_table(table)
    assert "tabular" not in latex and r"\caption{Title.}" in latex and "Why not." in latex


def test_numbers():
    assert narrow(None) == "X" and narrow(summary(1.25)) == "1.2±0.5"
    assert narrow(Summary(1.0, float("nan"), 1)) == "1.0"
    assert [signed(value) for value in (0.26, -0.04, -1)] == ["+0.3", "+0.0", "-1.0"]


@pytest.fixture
def document():
    comparison = Results(paper_like(2)).single_source.comparison("PACS", 1)
    tables = [accuracy_table(comparison), gap_table(comparison), *bounds_tables(comparison, "PACS", no_shapes)]
    heads = ["Class", "Predicted as", *(f"FullFT@lr=0.000{n} (full fine-tuning)" for n in range(4))]
    tables.append(Table("Wide heads", heads, [["horse", "dog", "1.0", "2.0", "3.0", "4.0"]] * 7, "c", texts=2))
    return render_document(tables)


def test_latex_is_well_formed(document):
    assert document.isascii() or not re.search(r"[^\x00-\x7F±]", document)
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", document) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended) and "tabular" in begun
    bare = document.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}")
    for tabular in re.findall(r"\\begin\{tabular\}\{([lr]+)\}(.*?)\\end\{tabular\}", document, re.DOTALL):
        rows = [line for line in tabular[1].splitlines() if line.endswith(r"\\")]
        assert len(rows) == 8
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(tabular[0]) - 1}


def test_latex_compiles(document, tmp_path):
    engine = shutil.which("pdflatex") or shutil.which("tectonic")
    if engine is None:
        pytest.skip("needs a LaTeX engine")
    if shutil.which("kpsewhich") and not subprocess.run(["kpsewhich", "adjustbox.sty"], capture_output=True).stdout:
        pytest.skip("needs LaTeX's adjustbox")
    options = ["-interaction=nonstopmode", "-halt-on-error"] if "pdflatex" in engine else []
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    run = subprocess.run([engine, *options, "t.tex"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "Overfull" not in run.stdout + run.stderr
