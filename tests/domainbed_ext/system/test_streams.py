import ast
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import domainbed_ext
import vitlorafa
from domainbed_ext import collect_results
from domainbed_ext.runs import log as run_log
from domainbed_ext.system import streams as output
from tests.domainbed_ext.test_collect_results import two_algorithms, write

COLLECT = [sys.executable, "-m", "domainbed_ext.collect_results", "--input_dir"]
FILES = {"results.txt", "results.md", "results.tex", "results.csv", "selected.csv", "index.html", "plot.png"}


@pytest.fixture
def folder(tmp_path):
    runs = two_algorithms()
    for records in runs.values():
        records[:] = [{**record, "data_digest": ["0", "1", "2"]} for record in records]
    return write(tmp_path / "sweep", runs)


def environment(**more):
    gone = ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL", "LANG", "LC_CTYPE")
    return {**{name: value for name, value in os.environ.items() if name not in gone}, **more}


@pytest.mark.parametrize(
    "settings",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=lambda settings: next(iter(settings.values())),
)
def test_a_console_of_any_encoding_costs_no_results(folder, settings):
    process = subprocess.run([*COLLECT, str(folder)], env=environment(**settings), capture_output=True)
    assert (process.returncode, process.stderr) == (0, b"")
    text = process.stdout.decode("cp1252")
    assert "BOnly" in text and "73.0 +/- 2.1" in text
    assert re.search(r"In-domain.*\n.*\n.*\d\.\d(±|\+/-)\d\.\d", text)
    assert {path.name for path in (folder / "tables").iterdir()} >= FILES


def test_a_pipe_that_is_closed_ends_nothing(folder):
    process = subprocess.Popen([*COLLECT, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 0
    assert {path.name for path in (folder / "tables").iterdir()} >= FILES


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_output_that_cannot_be_written_is_told_by_sentence_and_exit_code(folder):
    with open("/dev/full", "w") as full:
        process = subprocess.run([*COLLECT, str(folder)], stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: standard output could not be written (No space left on device)")
    assert {path.name for path in (folder / "tables").iterdir()} >= FILES


def test_tables_are_written_before_they_are_printed(folder, monkeypatch):
    def fail(*args):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "it cannot be")

    print_tables = collect_results.print_tables
    monkeypatch.setattr(
        collect_results,
        "print_tables",
        lambda console, *more: (fail if console.file is sys.stdout else print_tables)(console, *more),
    )
    with pytest.raises(UnicodeEncodeError):
        collect_results.collect(folder)
    assert {path.name for path in (folder / "tables").iterdir()} >= FILES


def spelled(text, encoding):
    return text.encode(encoding, "domainbed_ext.spelled")


def test_what_an_encoding_lacks_is_spelled_out():
    assert spelled("61.7±1.0 − 3 × é ☃", "ascii") == b"61.7+/-1.0 - 3 x ? ?"
    assert spelled("61.7±1.0", "latin-1") == b"61.7\xb11.0"
    assert spelled(os.fsdecode(b"caf\xe9"), "utf-8") == b"caf\xe9"  # a name keeps its bytes


def test_streams_that_were_closed_or_are_somebody_elses_are_left_alone(monkeypatch):
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    monkeypatch.setattr(sys, "stderr", None)
    with output.unfailing():
        print("±", "±", file=sys.stderr)
        print("out")
    assert (sys.stdout, sys.stderr, own.getvalue()) == (own, None, "out\n")


def test_a_console_that_cannot_show_what_a_run_prints_does_not_end_it(tmp_path, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    with run_log.copied(tmp_path / "out.txt", tmp_path / "err.txt"):
        print("61.7±1.0")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "61.7±1.0\n"


def test_a_pipe_that_is_closed_does_not_end_a_run(tmp_path):
    words = ["--algorithm", "LP", "--steps", "2", "--train_eval_share", "0.1", "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-m", "domainbed_ext.train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONUNBUFFERED="1"),
    )
    process.stdout.close()
    with process.stderr:
        assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 0
    assert (tmp_path / "run" / "done").exists() and "step" in (tmp_path / "run" / "out.txt").read_text()


def test_every_text_file_is_opened_in_an_encoding_of_its_own():
    bare = []
    for package in (domainbed_ext, vitlorafa):
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
                    continue
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                modes = [each.value for each in node.args if isinstance(each, ast.Constant)]
                is_open = name == "open" and any(mode in ("r", "w", "a", "x") for mode in modes)
                if name in ("read_text", "write_text") or is_open:
                    bare.append(f"{path.name}:{node.lineno}")
    assert bare == []


def test_lines_are_printed_at_once_where_python_does_not_buffer():
    code = (
        "import os\n"
        "from domainbed_ext.system.streams import unfailing\n"
        "with unfailing():\n"
        "    print('first')\n"
        "    os.write(1, b'second')\n"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "first\nsecond", "")
