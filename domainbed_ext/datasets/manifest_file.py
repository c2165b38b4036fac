"""Reads a list of images: a table of paths, labels and domains, as spreadsheets and scripts write them."""

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_ext.datasets.listing import is_image
from domainbed_ext.errors import BenchmarkError

COLUMNS = ("path", "label", "domain")
CONCEPT = "concept"  # a column that a manifest may have
KINDS = ".csv, .tsv or .parquet file"

_SEPARATORS = ",;\t|"
_OTHER_NAMES = {  # that people give to columns
    "path": ("file", "filename", "filepath", "file_path", "image", "image_path", "img", "img_path", "paths", "name"),
    "label": ("class", "class_name", "classname", "category", "target", "labels", "y"),
    "domain": ("env", "environment", "domains", "style", "source", "site", "location"),
}
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as that of UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Row:
    """An image of a list.

    Attributes:
        path: As it is written.
        label: Name of its class, without spaces around it.
        domain: Name of its domain, likewise.
        concept: Name of what it shows, likewise; empty if there is none.
    """

    path: str
    label: str
    domain: str
    concept: str = ""


def read_manifest(path: Path) -> list[Row]:
    """Reads a list of images.

    Args:
        path: A `.csv`, `.tsv` or `.parquet` file. Text is in UTF-8, or begins with the mark of another Unicode
            encoding; its cells are separated by commas, semicolons, tabs or bars, whatever its name.

    Returns:
        Its rows, in the file's order.

    Raises:
        BenchmarkError: No such file, not a table with these columns, an empty cell, or a path listed twice.
    """
    if not path.is_file():
        raise BenchmarkError(f"no file {path}: Manifest takes a {KINDS} as --data_dir")
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise BenchmarkError(f"{path} ends in {suffix or 'nothing'}: a manifest is a {KINDS}")
    try:
        cells = _parquet(path) if suffix == ".parquet" else _text_table(path)
        rows = list(_rows(path, cells))
    except csv.Error as error:
        raise BenchmarkError(f"{path} is no readable table ({error}): look for a quotation mark left open") from error
    except (OSError, ValueError) as error:  # pandas' and Arrow's own kinds are ValueErrors
        raise BenchmarkError(f"{path} is no readable {suffix[1:]} table: write it again") from error
    if not rows:
        raise BenchmarkError(f"{path} lists no image: give it a line for each")
    listed: set[str] = set()
    for row in rows:
        if row.path in listed:
            raise BenchmarkError(
                f"{path} lists {row.path} twice: it could be trained on and held out at once; take one line out"
            )
        listed.add(row.path)
    return rows


def _parquet(path: Path) -> Iterator[list[str]]:
    import pandas as pd  # here because it takes seconds, and other data sets do not need it

    try:
        table = pd.read_parquet(path)
    except ImportError as error:
        raise BenchmarkError(
            f"{path}: reading Parquet takes pyarrow: pip install pyarrow, or save the manifest as .csv"
        ) from error
    yield list(map(str, table.columns))
    yield from table.astype(object).where(table.notna(), "").astype(str).to_numpy().tolist()


def _text_table(path: Path) -> Iterator[list[str]]:
    text = _decoded(path).replace("\r\n", "\n").replace("\r", "\n").lstrip("\n")
    header, _, rest = text.partition("\n")
    if separator_line := re.fullmatch(r'"?sep=(.)"?', header):  # a spreadsheet's own
        separator, text = separator_line[1], rest
    else:
        separator = max(_SEPARATORS, key=lambda each: _known_columns(next(csv.reader([header], delimiter=each), [])))
    return csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True, strict=True)


def _known_columns(header: Sequence[str]) -> tuple[int, int]:
    """Rank of a header: the number of expected columns, then of all columns."""
    return len(set(COLUMNS) & {_plain(name) for name in header}), len(header)


def _plain(name: str) -> str:
    return name.strip().lower()


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    encoding = next((encoding for mark, encoding in _BOMS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        raise BenchmarkError(f"{path} is no text in UTF-8: save it as CSV in UTF-8, not as a spreadsheet or in UTF-16")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise BenchmarkError(
            f"{path} line {line} is not {encoding.removesuffix('-sig').upper()} (byte 0x{content[error.start]:02x}): "
            "save it in UTF-8, which spreadsheets call CSV UTF-8"
        ) from error


def _rows(path: Path, cells: Iterator[list[str]]) -> Iterator[Row]:
    header = next(cells, [])
    places = _places(path, header)
    number = 0
    for row in cells:
        if not any(cell.strip() for cell in row):
            continue
        number += 1
        if any(cell.strip() for cell in row[len(header) :]):
            raise BenchmarkError(
                f"{path}: row {number} has {len(row)} cells and the header has {len(header)}: put cells that hold a "
                "separator in quotation marks"
            )
        values = {name: row[place] if place < len(row) else "" for name, place in places.items()}
        if empty := [name for name in COLUMNS if not values[name].strip()]:
            raise BenchmarkError(f"{path}: row {number} has an empty cell ({empty[0]}): fill it or take it out")
        yield Row(values["path"], *(values.get(name, "").strip() for name in ("label", "domain", CONCEPT)))


def _places(path: Path, header: Sequence[str]) -> dict[str, int]:
    """At which position of a row each of `COLUMNS` is, and the concept if there is one; case and spaces around names do
    not count."""
    places: dict[str, int] = {}
    lacking = []
    for column in (*COLUMNS, CONCEPT):
        alike = [i for i, name in enumerate(header) if _plain(name) == column]
        exact = [i for i in alike if header[i] == column]
        if len(alike) > 1 and len(exact) != 1:
            raise BenchmarkError(f"{path} has {len(alike)} columns {column}: leave one of them")
        if alike:
            places[column] = (exact or alike)[0]
        elif column in COLUMNS:
            lacking.append(column)
    if lacking:
        raise BenchmarkError(
            f"{path} has no column {', '.join(lacking)}: name its columns {', '.join(COLUMNS)}; {_why(header, lacking)}"
        )
    return places


def _why(header: Sequence[str], lacking: Sequence[str]) -> str:
    """What a header has instead, and what may be meant."""
    names = [name.strip() for name in header if name.strip()]
    if any(map(is_image, names)):
        return f"its first line, {', '.join(names)}, should be these names and not an image"
    if len(names) < 2:
        return (
            f"it has {repr(names[0]) if names else 'nothing'} there; cells are separated by commas, semicolons or tabs"
        )
    meant = [f"{name} may be {column}" for column in lacking for name in names if name.lower() in _OTHER_NAMES[column]]
    return f"it has {', '.join(names)}" + (f", of which {', '.join(meant)}" if meant else "")
