r"""Tables in LaTeX: a fragment for `\input` in a paper, or a whole document.

Methods are set by their labels, as `\method{LoRA-FA}{rank 16}`, which a paper may redefine.
"""

import re
from collections.abc import Iterable

from domainbed_ext.algorithms.names import describe
from domainbed_ext.report.methods import settings_of
from domainbed_ext.report.tables.table import NEGATIVE, Table

PACKAGES = ("booktabs", "adjustbox", "array")
METHOD = r"\providecommand{\method}[2]{#1\if\relax\detokenize{#2}\relax\else, #2\fi}"
WIDE = 110  # characters of the widest rows, beyond which words wrap
WORDS = 0.16  # width of a column of words that wrap, of the text's
_ESCAPES = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"�": "?", "−": "$-$", "≥": r"$\geq$", "×": r"$\times$", "²": r"$^2$", "√": r"$\surd$", "σ": r"$\sigma$"}
    | {"‖": r"$\|$", "Δ": r"$\Delta$", "ᵀ": r"$^\top$", "₀": "$_0$", "₁": "$_1$", "₂": "$_2$"}
)


def render_fragment(tables: Iterable[Table]) -> str:
    r"""Renders tables for `\input` in a paper.

    Args:
        tables: Tables in order.
    """
    needed = "\n".join(rf"% needs \usepackage{{{name}}}" for name in PACKAGES)
    return "\n\n".join([needed, METHOD, *map(render_table, tables)]) + "\n"


def render_document(tables: Iterable[Table]) -> str:
    """Renders tables as a whole document, which compiles.

    Args:
        tables: Tables in order.
    """
    preamble = [
        r"\documentclass{article}",
        r"\usepackage[T1]{fontenc}",
        *(rf"\usepackage{{{name}}}" for name in PACKAGES),
        METHOD,
        r"\begin{document}",
    ]
    return "\n\n".join(["\n".join(preamble), *map(render_table, tables), r"\end{document}"]) + "\n"


def render_table(table: Table) -> str:
    r"""Renders a table environment: best in bold and second best underlined, what the columns are below it.

    Args:
        table: Table; without rows, its title and caption stand alone.

    Returns:
        Lines with a `\label` of the table's title.
    """
    marks = [*(["bold: best"] if table.best else []), *(["underlined: second best"] if table.second else [])]
    legend = f" {', '.join(marks).capitalize()}." if marks and table.rows else ""
    return "\n".join(
        [
            r"\begin{table}[htb]",
            r"\centering",
            rf"\caption{{{escape(table.title)}.{legend}}}",
            rf"\label{{tab:{table.slug}}}",
            r"\smallskip",
            *(_grid(table) if table.rows else []),
            rf"\par\smallskip{{\footnotesize\raggedright {escape(table.caption)}\par}}",
            r"\end{table}",
        ]
    )


def escape(text: str) -> str:
    """Text that LaTeX shows as it is.

    Args:
        text: Text with signs as tables have them.
    """
    text = re.sub(r" ?(\+/-|±) ?", r" $\\pm$ ", text.translate(_ESCAPES))
    return re.sub(NEGATIVE, "$-$", text)


def _grid(table: Table) -> list[str]:
    width = sum(max(len(row[column]) for row in [table.columns, *table.rows]) for column in range(len(table.columns)))
    wraps = width > WIDE and table.texts > 1
    words = rf">{{\raggedright\arraybackslash}}p{{{WORDS}\textwidth}}" if wraps else "l"
    head, *rows = (" & ".join(line) + r" \\" for line in [list(map(escape, table.columns)), *_rows(table)])
    tabular = [
        rf"\begin{{tabular}}{{{words * table.texts}{'r' * (len(table.columns) - table.texts)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *(rf"\addlinespace{chr(10)}{row}" if r in table.breaks else row for r, row in enumerate(rows)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    scaled = [r"\adjustbox{max width=\linewidth}{%", *tabular[:-1], tabular[-1] + "}"]
    # Words that do not wrap would be scaled down until they are too small to read.
    return [r"{\footnotesize\setlength{\tabcolsep}{3pt}%", *scaled[:-1], scaled[-1] + "}"] if wraps else scaled


def _rows(table: Table) -> list[list[str]]:
    return [[_cell(table, r, c, cell) for c, cell in enumerate(row)] for r, row in enumerate(table.rows)]


def _cell(table: Table, row: int, column: int, cell: str) -> str:
    if column == 0 and table.algorithms:
        return _method(table.algorithms[row], table.lacks[row] if table.lacks else "")
    error = table.errors.get((row, column))
    text = escape(f"{cell}±{error}" if error else cell)
    form = r"\textbf{{{}}}" if (row, column) in table.best else r"\underline{{{}}}"
    return form.format(text) if (row, column) in table.best | table.second else text


def _method(algorithm: str, lack: str) -> str:
    settings = ", ".join(settings_of(algorithm))
    name = rf"\method{{{escape(describe(algorithm).label)}}}{{{escape(settings)}}}"
    return f"{name} ({escape(lack)})" if lack else name
