"""Commands end with the right exit code; other modules refuse to run and name the command."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import domainbed_ext
import vitlorafa
from domainbed_ext.__main__ import main
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system import commands, exit_codes
from domainbed_ext.system.command_line import as_command
from vitlorafa import commands as vitlorafas

ROOT = Path(__file__).parents[1]


def modules(package):
    """Names of all modules of a package, each with its source."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        path = ROOT / info.name.replace(".", "/")
        yield info.name, (path / "__main__.py" if info.ispkg else path.with_suffix(".py"))


def does_something(path):
    return path.exists() and "\nif __name__ ==" in path.read_text(encoding="utf-8")


def test_every_module_that_does_nothing_as_a_command_says_so():
    found = [
        (name, path) for name, path in modules(domainbed_ext) if name.partition(".")[2] not in ("sweeps", "results")
    ]
    assert len(found) > 100
    for name, path in found:
        of_a_command = path.name == "__main__.py" and name.endswith(".__main__")
        refused = commands.explain_refusal(name) is not None
        assert refused is not does_something(path) or of_a_command, name


def test_every_module_of_vitlorafa_too():
    found = list(modules(vitlorafa))
    assert len(found) > 20
    for name, path in found:
        for words in (["-m", name], [f"-m{name}"]):
            refused = vitlorafas.refusal(["-m", "--x"], ["python", *words, "--x"]) is not None
            assert refused is not does_something(path), name
    assert vitlorafas.refusal(["run.py"], ["python", "run.py"]) is None


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("status", "run python -m domainbed_ext.sweep status"),
        ("sweep.launch", "run python -m domainbed_ext.sweep launch"),
        ("validate", "run python -m domainbed_ext.sweep validate"),
        ("profile", "run python -m domainbed_ext.train --profile"),
        ("cache.command", "run python -m domainbed_ext.cache"),
        ("sweeps", "run python -m domainbed_ext.sweep"),
        ("trian", "run python -m domainbed_ext.train"),
        ("zzz", "python -m domainbed_ext lists the commands"),
    ],
)
def test_a_refusal_names_what_is_meant(name, hint):
    assert commands.explain_refusal(f"domainbed_ext.{name}") == f"domainbed_ext.{name} is not a command: {hint}"


@pytest.mark.parametrize(
    ("argv", "original", "name"),
    [
        (["-m"], ["python", "-m", "a.b"], "a.b"),
        (["-m", "x", "-m"], ["python", "-W", "ignore", "-m", "a.b", "x", "-m"], "a.b"),
        (["-m", "x"], ["python", "-Ima.b", "x"], "a.b"),
        (["/usr/bin/pytest", "-m"], ["python", "-m", "pytest", "-m"], None),
        (["-c"], ["python", "-c", "import a"], None),
        ([], [], None),
    ],
)
def test_the_module_that_is_run_is_read_from_the_command_line(argv, original, name):
    assert commands.find_module_to_run(argv, original) == name


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["domainbed_ext.sweep.status", "--watch"], 2, "error: domainbed_ext.sweep.status is not a command: run"),
        (["domainbed_ext"], 2, "python -m domainbed_ext.sweep "),
        (["domainbed_ext", "--help"], 0, "python -m domainbed_ext.evaluate "),
        (["domainbed_ext", "sweep", "lunch"], 2, "error: unknown sub-command 'lunch': did you mean 'launch'?"),
        (["domainbed_ext", "launch"], 2, "did you mean python -m domainbed_ext.sweep launch?"),
        (["domainbed_ext", "sweeps"], 2, "error: unknown command 'sweeps': did you mean 'sweep'?"),
        (["vitlorafa"], 2, "python -m vitlorafa.bench"),
        (["vitlorafa.inject"], 2, "error: vitlorafa.inject is not a command"),
    ],
)
def test_it_is_so_in_a_process(words, code, said):
    process = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == code
    assert said in process.stdout + process.stderr and "Traceback" not in process.stderr


def test_every_command_that_is_listed_has_a_main_that_ends_the_process():
    for name in commands.COMMANDS:
        assert commands.load_main(name).__wrapped__, name
        assert f"domainbed_ext.{name}" in commands.list_commands()


@pytest.mark.parametrize(
    ("program", "name"), [("/usr/bin/domainbed-ext", "domainbed-ext sweep"), ("-m", "python -m domainbed_ext.sweep")]
)
def test_help_and_errors_name_the_command_as_it_was_started(program, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(BenchmarkError, match=f"see {name} launch --help"):
        main(["sweep", "launch", "--stepz", "3"])
    for words, usage in (([], f"usage: {name} COMMAND"), (["status"], f"usage: {name} status")):
        with pytest.raises(SystemExit):
            main(["sweep", *words, "--help"])
        text = capsys.readouterr().out
        assert text.startswith(usage) and f"\n  {name} status --sweep" in text
    assert main([]) == exit_codes.ExitCode.BAD_INPUT
    assert f"  {name} " in capsys.readouterr().out


def test_a_command_that_is_run_by_its_name_reads_the_rest_of_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["domainbed-ext", "sweep", "launch", "--n_trials", "x"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == exit_codes.ExitCode.BAD_INPUT
    assert capsys.readouterr().err.startswith(
        "error: argument --n_trials: 'x' is not a whole number; see domainbed-ext"
    )


@pytest.mark.parametrize(
    ("end", "code"), [(0, 0), (None, 0), (3, 3), (BenchmarkError("no"), 2), (KeyboardInterrupt(), 130)]
)
def test_without_arguments_a_main_ends_the_process_with_its_code(end, code, capsys):
    def act(argv):
        assert argv is None
        if isinstance(end, BaseException):
            raise end
        return end

    with pytest.raises(SystemExit) as ended:
        as_command()(act)()
    assert ended.value.code == code
    assert "Traceback" not in capsys.readouterr().err


def test_with_arguments_it_returns_the_code_and_raises():
    assert as_command()(lambda argv: len(argv))(["a", "b"]) == 2 and as_command()(lambda argv: None)([]) == 0
    with pytest.raises(BenchmarkError):
        main(["sweep"])
    assert main(["--help"]) == exit_codes.ExitCode.DONE
