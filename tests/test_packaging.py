"""What a plain `pip install .` installs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """The files of a wheel built from a copy of the sources, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "runs", "scratch", "tests", "__pycache__", "*.egg-info", "build")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(folder / "source")], check=True)
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def packaged(folder, pattern, package):
    files = [path.relative_to(ROOT / folder) for path in (ROOT / folder).glob(pattern)]
    assert files
    return {f"{package}/{path.as_posix()}" for path in files}


@pytest.mark.slow
def test_code_sweeps_weights_and_tables_are_in_the_wheel(wheel_names):
    for package in ("vitlorafa", "domainbed_ext"):
        assert packaged(package, "**/*.py", package) <= wheel_names
        assert f"{package}/py.typed" in wheel_names
    assert packaged("sweeps", "*.yaml", "domainbed_ext/sweeps") <= wheel_names
    assert packaged("results/paper", "*", "domainbed_ext/results/paper") <= wheel_names
    assert packaged("domainbed_ext/datasets/assets", "*", "domainbed_ext/datasets/assets") <= wheel_names
    assert not [name for name in wheel_names if name.startswith(("tests", "scratch", "runs"))]


def test_the_adapters_need_nothing_of_the_benchmark():
    blocked = ["pandas", "sklearn", "domainbed_ext", "matplotlib", "rich", "yaml"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import vitlorafa"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
