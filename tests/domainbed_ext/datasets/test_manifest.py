import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from domainbed_ext.datasets.folders import PACS
from domainbed_ext.datasets.manifest import Manifest
from domainbed_ext.datasets.manifest_file import read_manifest
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import setup as run_setup
from tests.domainbed_ext.conftest import CLASSES, PACS_DOMAINS


def rows(data_dir):
    files = sorted((data_dir / "PACS").glob("*/*/*.png"))
    return pd.DataFrame(
        {
            "path": [str(file.relative_to(data_dir)) for file in files],
            "label": [file.parts[-2] for file in files],
            "domain": [file.parts[-3] for file in files],
        }
    )


@pytest.fixture
def manifest(pacs_like):
    def write(change=lambda table: table):
        change(rows(pacs_like)).to_csv(pacs_like / "list.csv", index=False)
        return pacs_like / "list.csv"

    return write


def test_a_manifest_of_pacs_is_pacs(manifest, pacs_like):
    ours, pacs = Manifest(manifest(), [0], {}), PACS(pacs_like, [0], {})
    assert ours.environments == PACS_DOMAINS and tuple(ours.classes) == CLASSES
    assert (len(ours), ours.input_shape, ours.CHECKPOINT_FREQ) == (4, (3, 224, 224), 300)
    for mine, theirs in zip(ours.datasets, pacs.datasets, strict=True):
        assert list(mine.targets) == list(theirs.targets) and mine.name == theirs.name
        assert np.array_equal(np.asarray(mine[13][0]), np.asarray(theirs[13][0]))
        assert mine.verify() == {}


def test_the_files_order_is_kept_within_a_domain(manifest):
    table = pd.read_csv(manifest(lambda table: table.iloc[::-1]))
    dataset = Manifest(manifest(lambda table: table.iloc[::-1]), [0], {})
    listed = table["path"][table["domain"] == "photo"]
    assert [path[-len(name) :] for path, name in zip(dataset[2].paths, listed, strict=True)] == list(listed)


def test_whole_numbers_are_classes_in_order_of_value(manifest):
    numbers = {"dog": 10, "house": 9}
    dataset = Manifest(manifest(lambda table: table.assign(label=table["label"].map(numbers))), [0], {})
    assert dataset.classes == ["9", "10"]
    assert dataset[0].targets[0] == 1  # a dog
    odd = {"dog": "007", "house": "NA"}
    dataset = Manifest(manifest(lambda table: table.assign(label=table["label"].map(odd))), [0], {})
    assert dataset.classes == ["007", "NA"]


def test_a_run(manifest, make_args):
    hparams = '{"batch_size": 4, "image_size": 32}'
    args = make_args(
        dataset="Manifest", data_dir=str(manifest()), backbone="vit_tiny_patch16_224", weights="none", hparams=hparams
    )
    assert run_setup.set_up(args).dataset.environments == PACS_DOMAINS


def test_concepts(manifest, make_args, pacs_like):
    """The same numbers of the files are held out of every domain; of a folder there are none to hold out."""

    def named(table):
        return table.assign(Concept=[f" {path[-7:-4]} " for path in table["path"]])

    dataset = Manifest(manifest(named), [0], {})
    assert [each.concepts[13] for each in dataset.datasets] == ["003"] * 4
    assert not any(each.concepts for each in Manifest(manifest(), [0], {}).datasets)
    assert not any(each.concepts for each in PACS(pacs_like, [0], {}).datasets)
    args = make_args(
        dataset="Manifest",
        data_dir=str(manifest(named)),
        backbone="vit_tiny_patch16_224",
        weights="none",
        hparams='{"batch_size": 4, "image_size": 32}',
        split_by="concepts",
    )
    setup = run_setup.set_up(args)
    held_out = [{setup.dataset[i].concepts[key] for key in setup.splits[f"env{i}_out"].keys} for i in range(4)]
    assert held_out == [held_out[0]] * 4 and len(held_out[0]) == 2 and len(setup.splits["env0_out"]) == 4
    some = manifest(lambda table: named(table).assign(Concept=lambda table: table["Concept"].where(table.index != 45)))
    with pytest.raises(BenchmarkError, match="1 of 20 images of photo in Manifest carry no concept"):
        run_setup.set_up(replace(args, data_dir=str(some)))


def test_parquet(manifest, pacs_like, monkeypatch):
    path = pacs_like / "list.parquet"
    path.write_bytes(b"PAR1")
    table = rows(pacs_like).assign(label=lambda table: (table["label"] == "dog").astype(int))
    monkeypatch.setattr(pd, "read_parquet", lambda given: table if given == path else None)
    assert Manifest(path, [0], {}).classes == ["0", "1"]


def test_real_parquet(pacs_like):
    pytest.importorskip("pyarrow")
    rows(pacs_like).to_parquet(pacs_like / "list.parquet")
    assert len(Manifest(pacs_like / "list.parquet", [0], {})[3]) == 20
    (pacs_like / "list.parquet").write_bytes(b"PAR1")
    with pytest.raises(BenchmarkError, match="is no readable parquet table"):
        Manifest(pacs_like / "list.parquet", [0], {})


def test_parquet_without_pyarrow_gets_a_sentence(pacs_like, monkeypatch):
    for name in ("pyarrow", "fastparquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (pacs_like / "list.parquet").write_bytes(b"PAR1")
    with pytest.raises(BenchmarkError, match="takes pyarrow: pip install pyarrow, or save the manifest as .csv"):
        Manifest(pacs_like / "list.parquet", [0], {})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda table: table.drop(columns="domain"), "has no column domain: name its columns path, label, domain"),
        (lambda table: table[table["domain"] == "photo"], "lists one domain, photo: it takes at least two"),
        (lambda table: table.iloc[:0], "lists no image"),
        (
            lambda table: table[(table["domain"] != "photo") | (table["label"] != "dog")],
            "domain photo has no image of dog: give every domain the same classes",
        ),
        (lambda table: pd.concat([table, table[5:6]]), "lists PACS/art_painting/dog/pic_005.png twice"),
        (lambda table: table.assign(label=table["label"].where(table.index != 3)), "row 4 has an empty cell"),
        (
            lambda table: table.assign(path=table["path"].where(table.index != 3, "gone.png")),
            "lists 1 image.s. that are not there, .*gone.png first",
        ),
    ],
)
def test_a_spoilt_list_gets_a_sentence(manifest, change, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        Manifest(manifest(change), [0], {})


def test_a_file_that_is_none_gets_a_sentence(tmp_path):
    with pytest.raises(BenchmarkError, match="add --data_dir with a .csv, .tsv or .parquet file"):
        Manifest(None, [0], {})
    with pytest.raises(BenchmarkError, match="no file .*nothing.csv"):
        Manifest(tmp_path / "nothing.csv", [0], {})
    (tmp_path / "list.txt").write_text("path,label,domain\n")
    with pytest.raises(BenchmarkError, match="ends in .txt: a manifest is a .csv, .tsv or .parquet file"):
        Manifest(tmp_path / "list.txt", [0], {})
    for content in (b"", b'a,b\n"\xff\xfe', b"a\nb,c,d\n"):
        (tmp_path / "list.csv").write_bytes(content)
        with pytest.raises(BenchmarkError, match="is not UTF-8|has no column"):
            Manifest(tmp_path / "list.csv", [0], {})


def same(one, other):
    """Whether two manifests list the same images, classes and domains in the same order."""
    ours = [Manifest(path, [0], {}) for path in (one, other)]
    assert ours[0].classes == ours[1].classes and ours[0].environments == ours[1].environments
    for mine, theirs in zip(*ours, strict=True):
        assert (mine.paths, mine.targets) == (theirs.paths, theirs.targets)


def spoken(separator=",", header="path,label,domain", end="\n", encoding="utf-8", cell=lambda text: text, before=""):
    """How a spreadsheet or a script writes a table."""

    def write(path, table):
        lines = [header.split(","), *table.to_numpy().tolist()]
        text = "".join(separator.join(map(cell, line)) + end for line in lines)
        path.write_bytes((before + text).encode(encoding))

    return write


WRITTEN = {
    "semicolons.csv": spoken(";"),
    "tabs.tsv": spoken("\t"),
    "tabs.csv": spoken("\t"),
    "commas.tsv": spoken(),
    "bars.CSV": spoken("|"),
    "header_case.csv": spoken(header=" Path,LABEL ,Domain"),
    "spaces.csv": spoken(cell=lambda text: f"  {text} "),
    "quoted.csv": spoken(";", cell=lambda text: f'"{text}"'),
    "windows.csv": spoken(end="\r\n"),
    "old_mac.csv": spoken(end="\r"),
    "mark.csv": spoken(encoding="utf-8-sig"),
    "utf16.csv": spoken("\t", encoding="utf-16"),
    "utf16_be.csv": spoken(before="\ufeff", encoding="utf-16-be"),
    "utf32.csv": spoken(encoding="utf-32"),
    "told.csv": spoken(";", before="sep=;\r\n"),
    "blank_lines.csv": spoken(before="\n\n", end="\n\n,,\n"),
    "backslashes.csv": spoken(cell=lambda text: text.replace("/", "\\")),
    "variable.csv": spoken(cell=lambda text: f"$IMAGES/{text}" if "/" in text else text),
    "home.csv": spoken(cell=lambda text: f"~/{text}" if "/" in text else text),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_manifest_as_spreadsheets_and_scripts_write_it(manifest, pacs_like, monkeypatch, name):
    monkeypatch.setenv("HOME", str(pacs_like))
    monkeypatch.setenv("IMAGES", str(pacs_like))
    WRITTEN[name](pacs_like / name, rows(pacs_like))
    same(manifest(), pacs_like / name)


def test_columns_may_stand_in_any_order_beside_others(manifest, pacs_like):
    table = rows(pacs_like).assign(bytes=7, Path="x")[["bytes", "domain", "path", "Path", "label"]]
    table.to_csv(pacs_like / "other.csv", index=False)
    same(manifest(), pacs_like / "other.csv")


def test_cells_in_quotation_marks_hold_anything(pacs_like):
    odd = ["a, b;c.png", 'say "x".png', "two\nlines.png", "caf\u00e9\u2028\x1c.png"]
    table = pd.DataFrame({"path": odd, "label": ["\u00e9t\u00e9, x", "b"] * 2, "domain": ["1", "1", "2", "2"]})
    table.to_csv(pacs_like / "odd.csv", index=False)
    found = read_manifest(pacs_like / "odd.csv")
    assert [row.path for row in found] == odd and found[0].label == "\u00e9t\u00e9, x"


def test_a_path_is_first_of_all_what_it_says(manifest, pacs_like):
    """A file whose name holds a backslash, a tilde, a dollar or a space at its end is found before any other."""
    names = ["PACS\\x.png", "~.png", "$HOME.png", "space.png "]
    for name in names:
        (pacs_like / name).write_bytes((pacs_like / "PACS/photo/dog/pic_000.png").read_bytes())
    (pacs_like / "PACS/x.png").touch()
    table = rows(pacs_like)
    found = Manifest(manifest(lambda _: table.assign(path=[*names, *table["path"][4:]])), [0], {})
    assert found[0].paths[:4] == [str(pacs_like / name) for name in names]


def test_labels_that_differ_by_spaces_are_one(manifest):
    found = Manifest(
        manifest(lambda table: table.assign(label=table["label"] + " " * 3, domain=table["domain"])), [0], {}
    )
    assert found.classes == list(CLASSES)


def text_is(content):
    return lambda path, table: path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (spoken(";", header="path,class,domain"), "no column label: name its .*; it has path, class, domain, of which"),
        (spoken(header="image,label,env"), "no column path, domain.*of which image may be path, env may be domain"),
        (spoken(":"), "it has 'path:label:domain' there; cells are separated by commas, semicolons or tabs"),
        (text_is("a/x.png,cat,photo\n"), "its first line, a/x.png, cat, photo, should be these names and not an image"),
        (text_is(""), "has no column path, label, domain: .*; it has nothing there"),
        (spoken(header="Path,label,domain,PATH"), "has 2 columns path: leave one of them"),
        (spoken(encoding="utf-16-le"), "is no text in UTF-8: save it as CSV in UTF-8"),
        (
            text_is("path,label,domain\na.png,\u00e9,x\n".encode("latin-1")),
            r"line 2 is not UTF-8 .byte 0xe9.: save it in",
        ),
        (text_is("path,label,domain\na,b.png,cat,photo\n"), "row 1 has 4 cells and the header has 3: put cells that"),
        (text_is("path,label,domain\na.png,cat\n"), "row 1 has an empty cell .domain.: fill it"),
        (
            text_is('path,label,domain\na.png,"cat,photo\n'),
            "is no readable table .*: look for a quotation mark left open",
        ),
        (
            spoken(cell=lambda text: f"C:\\data\\{text}" if "/" in text else text),
            "not there, .*: a path of another machine",
        ),
        (spoken(cell=lambda text: text if "/" not in text else text * 9), "lists 80 image.s. that are not there"),
    ],
)
def test_what_is_wrong_with_a_list_is_named(pacs_like, write, sentence):
    write(pacs_like / "list.csv", rows(pacs_like))
    with pytest.raises(BenchmarkError, match=sentence):
        Manifest(pacs_like / "list.csv", [0], {})


def test_a_csv_needs_no_pandas(manifest, monkeypatch):
    path = manifest()
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert len(Manifest(path, [0], {})) == 4
