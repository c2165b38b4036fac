"""`python -m domainbed_ext.cache`, and where the cache lies."""

import subprocess
import sys
from pathlib import Path

import pytest

from domainbed_ext.cache.command import main
from domainbed_ext.cache.entries import Entries, find_default_folder
from domainbed_ext.errors import BenchmarkError
from tests.domainbed_ext.conftest import PACS_DOMAINS, make_domains


def test_the_command_line(tmp_path, capsys, monkeypatch):
    make_domains(tmp_path / "data" / "PACS", images=2)
    place = ["--cache_dir", str(tmp_path / "cache")]
    build = ["build", "--dataset", "PACS", "--data_dir", str(tmp_path / "data"), "--image_size", "14", "--workers", "1"]
    assert main([*build, *place]) == 0
    assert main([*build, *place, "--training_images", "resized"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["list", *place, "--cache_gb", "0.5"]) == 0
    out = capsys.readouterr().out
    for domain in PACS_DOMAINS:
        assert all(f"PACS/{domain}, {variant} " in out for variant in ("14x14", "decoded", "shorter16"))
    assert "12 entries, " in out and " of 500.0 MB" in out
    keys = [entry.key for entry in Entries(tmp_path / "cache", 1).list()]
    with pytest.raises(BenchmarkError, match="unknown entry 'PACs': did you mean 'PACS'"):
        main(["remove", "PACs", *place])
    with pytest.raises(BenchmarkError, match="did you mean 'PACS/sketch'"):
        main(["remove", "PACS/sketsch", *place])
    main(["remove", keys[0], "PACS/sketch", *place])
    assert [entry.key for entry in Entries(tmp_path / "cache", 1).list()] == keys[1:-3]
    main(["remove", "PACS", *place])
    assert not Entries(tmp_path / "cache", 1).list()
    with pytest.raises(BenchmarkError, match="the cache is empty"):
        main(["remove", "PACS", *place])
    monkeypatch.setenv("DOMAINBED_EXT_CACHE", str(tmp_path / "cache"))
    main(build)
    assert len(Entries(find_default_folder(), 1).list()) == 8
    main(["remove", "--all"])
    assert not [path for path in find_default_folder().rglob("*") if path.is_file()]


def test_where_the_cache_lies_unless_told(monkeypatch, tmp_path):
    monkeypatch.delenv("DOMAINBED_EXT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find_default_folder() == tmp_path / "domainbed_ext"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert find_default_folder() == Path.home() / ".cache" / "domainbed_ext"


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (["build", "--dataset", "DigitsShift", "--data_dir", "x"], "DigitsShift has no image files"),
        (["build", "--dataset", "PACSS", "--data_dir", "x"], "did you mean 'PACS'"),
        (
            ["build", "--dataset", "PACS", "--data_dir", "x", "--image_size", "0"],
            "--image_size: 0 is too small, give 1 or more",
        ),
        (
            ["build", "--dataset", "PACS", "--data_dir", "x", "--workers", "0"],
            "--workers: 0 is too small, give 1 or more",
        ),
        (["list", "--cache_gb", "0"], "--cache_gb: 0 is too small, give a number above 0"),
        (["remove"], "or --all"),
        ([], "list|build|remove"),
    ],
)
def test_what_is_wrong_is_said(wrong, sentence):
    with pytest.raises(BenchmarkError) as caught:
        main(wrong)
    assert sentence in str(caught.value)


def test_the_exit_code_and_no_torch_for_a_list(tmp_path):
    command = [sys.executable, "-m", "domainbed_ext.cache", "remove", "x", "--cache_dir", str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr == "error: no entry 'x': the cache is empty\n"
    modules = "import sys, domainbed_ext.cache.command; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", modules], capture_output=True, text=True).stdout == "False\n"
