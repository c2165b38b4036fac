"""Names that are no text, and a user without a home folder."""

import os
import pwd
import sys

import pytest
from PIL import Image

from domainbed_ext import evaluate, train
from domainbed_ext.collect_results import collect
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import arguments as options
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.system.files import write_atomically

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
LATIN = os.fsdecode(b"d\xe9sert")  # the name of a folder from a system of another encoding


@pytest.fixture
def odd_domains(tmp_path):
    for number, domain in enumerate((LATIN, "night")):
        for label in (os.fsdecode(b"cha\xee"), "dog"):
            folder = tmp_path / "data" / domain / label
            folder.mkdir(parents=True)
            for image in range(8):
                colour = (80 * number, 10 * image, 200 if label == "dog" else 20)
                with open(folder / os.fsdecode(b"im\xff_%d.png" % image), "wb") as file:
                    Image.new("RGB", (40, 40), colour).save(file, "PNG")
    return tmp_path / "data"


@pytest.fixture
def run_of_odd_domains(odd_domains, tmp_path):
    words = ["--dataset", "ImageFolderDomains", "--data_dir", str(odd_domains), "--algorithm", "LP", "--steps", "1"]
    words += ["--backbone", "vit_pico_patch8_32", "--checkpoint_freq", "0", "--hparams", '{"batch_size": 2}']
    words += ["--output_dir", str(tmp_path / "sweep" / "run"), "--cache_dir", str(tmp_path / "cache")]
    args = options.parse(words)
    return RunFolder(args.output_dir), train.run(args)


def test_file_names_that_are_not_utf_8_are_names_like_others(run_of_odd_domains):
    folder, code = run_of_odd_domains
    assert (code, folder.state) == (0, State.DONE)
    assert folder.records()[0]["environments"] == [LATIN, "night"]
    assert evaluate.evaluate(folder)[1]
    for path in collect(folder.path.parent):
        if path.suffix in (".txt", ".md", ".tex", ".csv", ".html", ".svg"):
            path.read_text(encoding="utf-8")
    tables = folder.path.parent / "tables"
    assert "d\ufffdsert" in (tables / "results.md").read_text(encoding="utf-8")
    assert "d?sert" in (tables / "results.tex").read_text(encoding="utf-8")


def test_text_keeps_the_bytes_of_names(tmp_path):
    write_atomically(tmp_path / "file", f"cd {LATIN}")
    assert (tmp_path / "file").read_bytes() == b"cd d\xe9sert"


@pytest.mark.parametrize("name", ["output_dir", "cache_dir", "weights"])
def test_where_tensors_lie_the_name_must_be_utf_8(tmp_path, name):
    with pytest.raises(BenchmarkError, match=f"--{name}: .*not UTF-8.*safetensors"):
        options.parse([f"--{name}", str(tmp_path / LATIN)])
    assert options.parse(["--data_dir", str(tmp_path / LATIN)])


@pytest.fixture
def homeless(monkeypatch):
    def no_entry(*_):
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "DOMAINBED_EXT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)


def test_without_a_home_folder_what_needs_no_cache_runs(homeless, make_args):
    assert train.run(make_args(algorithm="LP", steps=1)) == 0


def test_without_a_home_folder_a_run_on_files_names_cache_dir(homeless, pacs_like, make_args):
    hparams = '{"batch_size": 2, "backbone": "vit_pico_patch8_32"}'
    args = make_args(dataset="PACS", data_dir=str(pacs_like), hparams=hparams, algorithm="LP", steps=1)
    assert train.run(args) == 2
    assert "home folder" in (failure := RunFolder(args.output_dir).failure()) and "--cache_dir" in failure


def test_without_a_home_folder_a_tilde_gets_a_sentence(homeless):
    with pytest.raises(BenchmarkError, match="no home folder of ~ is known; write the path without ~"):
        options.parse(["--data_dir", "~/data"])
