"""`--import` brings in methods and data sets of one's own, and says what is wrong with a file."""

import pickle
import sys

import pytest

from domainbed_ext.algorithms.names import describe
from domainbed_ext.algorithms.registry import ALGORITHMS, METHODS
from domainbed_ext.datasets.registry import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import imports

pytestmark = pytest.mark.usefixtures("registries")

METHOD = """\
from domainbed_ext import Algorithm, register_algorithm

@register_algorithm("Norms", label="{label}")
class Norms(Algorithm):
    pass
"""
DATASET = """\
from domainbed_ext import register_dataset
from domainbed_ext.datasets.folders import ImageFolderDomains

@register_dataset("Seasons")
class Seasons(ImageFolderDomains):
    pass
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the current folder."""
    monkeypatch.chdir(tmp_path)

    def to(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return name

    return to


def test_a_file_registers_what_it_has_and_its_digest_is_told(write):
    name = write("mine.py", METHOD.format(label="norms"))
    told = imports.load([name])
    assert list(told) == ["mine.py"] and describe("Norms").label == "norms"
    assert imports.load([name]) == told  # once is enough
    assert pickle.loads(pickle.dumps(ALGORITHMS["Norms"])) is ALGORITHMS["Norms"]  # for processes that find it by name
    assert imports.load(None) == {}


def test_a_file_that_changed_is_imported_again(write):
    before = imports.load([write("mine.py", METHOD.format(label="one"))])
    after = imports.load([write("mine.py", METHOD.format(label="two"))])
    assert before["mine.py"] != after["mine.py"] and describe("Norms").label == "two"


def test_several_files_and_modules_may_be_imported(write):
    write("their_package/__init__.py", "from their_package import seasons")
    write("their_package/seasons.py", DATASET)
    write("helpers_of_mine.py", "LABEL = 'with help'")
    write("mine.py", "from helpers_of_mine import LABEL\n" + METHOD.replace('"{label}"', "LABEL"))
    assert set(imports.load(["mine.py", "their_package"])) == {"mine.py", "their_package"}
    assert describe("Norms").label == "with help" and "Seasons" in DATASETS


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"--import mine.py: cannot read that file \(No such file or directory\)"),
        ("x = 1\n", r"--import mine.py registers nothing: .*@register_algorithm\(.Name.\)"),
        ("x = 1\n\ny = x / 0\n", r"--import mine.py: ZeroDivisionError: division by zero \(mine.py line 3\)"),
        ("import sys\nsys.exit(3)\n", r"--import mine.py: SystemExit: 3 \(mine.py line 2\)"),
        ("x = 1\nif x\n", r"--import mine.py: SyntaxError: .* \(mine.py line 2\)"),
        ("import nothing_there\n", r"--import mine.py: ModuleNotFoundError: No module .*nothing_there.*mine.py line 1"),
        (METHOD.replace("Norms", "BOnly"), r"--import mine.py: 'BOnly' is an algorithm already, .*mine.py line 3"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_sentence(write, content, sentence):
    if content is not None:
        write("mine.py", content)
    before = METHODS.registered()
    with pytest.raises(BenchmarkError, match=sentence):
        imports.load(["mine.py"])
    assert METHODS.registered() == before and "mine" not in sys.modules


def test_a_file_that_fails_registers_nothing_of_what_is_in_it(write):
    with pytest.raises(BenchmarkError, match="NameError: name 'y' is not defined"):
        imports.load([write("mine.py", METHOD + "y\n")])
    assert "Norms" not in ALGORITHMS


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mine_that_is_not_there", "there is no module mine_that_is_not_there: give"),
        ("domainbed_ext.nothing", "there is no module domainbed_ext.nothing: give"),
    ],
)
def test_a_module_that_is_not_there_gets_a_sentence(name, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        imports.load([name])


def test_a_file_with_the_name_of_another_module_is_refused(write):
    with pytest.raises(BenchmarkError, match="--import random.py: there is another module random .*: rename the file"):
        imports.load([write("random.py", METHOD)])


def test_two_files_cannot_have_one_name(write):
    imports.load([write("mine.py", METHOD)])
    with pytest.raises(BenchmarkError, match="'Norms' is an algorithm already, Norms .mine:Norms.: give mine2:N"):
        imports.load([write("mine2.py", METHOD)])
