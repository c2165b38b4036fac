import sys

import numpy as np
import pandas as pd
import pytest

from domainbed_ext import train
from domainbed_ext.datasets.folders import PACS
from domainbed_ext.datasets.manifest import Manifest
from domainbed_ext.errors import BenchmarkError

from .conftest import CLASSES, PACS_DOMAINS


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
    assert train.set_up(args).dataset.environments == PACS_DOMAINS


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
    with pytest.raises(BenchmarkError, match="add --data_dir with a .csv or .parquet file"):
        Manifest(None, [0], {})
    with pytest.raises(BenchmarkError, match="no file .*nothing.csv"):
        Manifest(tmp_path / "nothing.csv", [0], {})
    (tmp_path / "list.txt").write_text("path,label,domain\n")
    with pytest.raises(BenchmarkError, match="ends in .txt: a manifest is a .csv or a .parquet file"):
        Manifest(tmp_path / "list.txt", [0], {})
    for content in (b"", b'a,b\n"\xff\xfe', b"a\nb,c,d\n"):
        (tmp_path / "list.csv").write_bytes(content)
        with pytest.raises(BenchmarkError, match="is no readable csv table|has no column"):
            Manifest(tmp_path / "list.csv", [0], {})
