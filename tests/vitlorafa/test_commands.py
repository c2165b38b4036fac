"""`vitlorafa` and `python -m vitlorafa` list the commands and run them."""

import configparser
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import vitlorafa
from vitlorafa import commands

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_the_commands_are_listed(words, code, capsys):
    assert commands.main(words) == code
    output = capsys.readouterr()
    assert output.err == "" and all(f"vitlorafa {name}" in output.out for name in commands.COMMANDS)


def test_a_command_is_run_by_its_name(capsys):
    sizes = ["--models", "test_vit", "--resolution", "32", "--depth", "1"]
    assert commands.main(["bench", "--dry_run", *sizes, "--methods", "LoRA-FA"]) == 0
    assert "| LoRA-FA |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        commands.main(["bench", "--help"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("usage: vitlorafa bench ")
    assert commands.main(["bench", "--batch", "x"]) == 2
    assert "see vitlorafa bench --help" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys):
    assert commands.main(["bensh"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "'bensh'" in error and "'bench'" in error and "--help" in error


def test_its_version(capsys):
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vitlorafa {vitlorafa.__version__}\n"


def test_the_console_script_is_this_command():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    scripts = dict(line.split(" = ") for line in config["options.entry_points"]["console_scripts"].split("\n") if line)
    module, _, function = scripts["vitlorafa"].partition(":")
    assert getattr(import_module(module), function) is commands.main


def test_python_m_does_the_same():
    words = [sys.executable, "-m", "vitlorafa", "bensh"]
    process = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and "'bench'" in process.stderr and "Traceback" not in process.stderr
