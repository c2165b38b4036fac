"""What a plain `pip install .` installs."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import domainbed_ext
import vitlorafa

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    for name in ("vitlorafa", "domainbed_ext", "sweeps", "results"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def packaged(folder, pattern, package):
    files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).glob(pattern)]
    assert files
    return {f"{package}/{path.as_posix()}" for path in files}


def test_every_package_is_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    folders = {path.parent for name in ("vitlorafa", "domainbed_ext") for path in (ROOT / name).rglob("*.py")}
    code = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    data = {line.partition(" = ")[0] for line in setup["options"]["package_dir"].strip().splitlines()}
    assert set(setup["options"]["packages"].split()) == code | data


@pytest.mark.slow
def test_code_sweeps_weights_and_tables_are_in_the_wheel(wheel):
    wheel_names = set(wheel.namelist())
    for package in ("vitlorafa", "domainbed_ext"):
        assert packaged(package, "**/*.py", package) <= wheel_names
        assert f"{package}/py.typed" in wheel_names
    assert packaged("sweeps", "*", "domainbed_ext/sweeps") <= wheel_names
    assert packaged("results/paper", "*", "domainbed_ext/results/paper") <= wheel_names
    assert packaged("domainbed_ext/report/page/assets", "*", "domainbed_ext/report/page/assets") <= wheel_names
    assert packaged("domainbed_ext/models/assets", "*", "domainbed_ext/models/assets") <= wheel_names
    assert not [name for name in wheel_names if name.startswith(("tests", "scratch", "runs"))]


@pytest.mark.slow
def test_the_quickstart_is_found_without_a_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    process = subprocess.run(
        [sys.executable, "-m", "domainbed_ext.sweep", "launch", "--dry_run"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("60 runs in runs/quickstart: 60 not launched")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_console_script_runs_commands_without_a_checkout(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, wheel.filename], check=True)
    script = [sys.executable, str(tmp_path / "bin" / "domainbed-ext")]
    for words, code, text in (
        ([], 2, "domainbed-ext sweep "),
        (["train", "--help"], 0, "usage: domainbed-ext train"),
        (["sweep", "launch", "--dry_run"], 0, "60 runs in runs/quickstart: 60 not launched"),
    ):
        process = subprocess.run(
            [*script, *words], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
        )
        assert (process.returncode, process.stderr) == (code, "") and text in process.stdout


def test_the_adapters_need_nothing_of_the_benchmark():
    blocked = ["pandas", "sklearn", "domainbed_ext", "matplotlib", "rich", "yaml"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import vitlorafa"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_version_is_the_same_everywhere():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    version = setup["metadata"]["version"]
    assert version == vitlorafa.__version__ == domainbed_ext.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert f"version = {{{version}}}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_oldest_versions_are_printed_as_constraints():
    printed = subprocess.run(
        [sys.executable, ROOT / ".ci" / "oldest.py"], check=True, capture_output=True, text=True
    ).stdout.split()
    lines = (ROOT / "setup.cfg").read_text(encoding="utf-8").splitlines()
    promised = {re.sub(r"\[\w+]", "", line.split(" = ")[-1].strip()) for line in lines if ">=" in line}
    assert {line.replace("==", ">=") for line in printed} == promised - {">=3.10"}
