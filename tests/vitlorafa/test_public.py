"""What `import vitlorafa` offers, and what it needs."""

import ast
import subprocess
import sys
from pathlib import Path

import vitlorafa

ROOT = Path(__file__).parents[2]
HEAVY = {"pandas", "sklearn", "matplotlib", "domainbed_ext", "peft"}


def test_import_loads_neither_the_benchmark_nor_its_dependencies():
    # rich counts if vitlorafa loads it: where it is installed, some versions of timm's own dependencies do too.
    code = (
        "import sys, timm; before = {*sys.modules}; import vitlorafa\n"
        f"print(*sorted({HEAVY!r} & {{*sys.modules}} | {{'rich'}} & ({{*sys.modules}} - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_every_public_name_exists_and_is_documented():
    for name in vitlorafa.__all__:
        assert getattr(vitlorafa, name).__doc__, name
    assert callable(vitlorafa.summary) and callable(vitlorafa.matrices) and callable(vitlorafa.tensor_bytes)


def imports_of_vitlorafa(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vitlorafa":
            yield node.module, [alias.name for alias in node.names]


def test_the_benchmark_uses_public_names_only():
    """Of modules it uses two: the tables of `vitlorafa.bench`, and `vitlorafa.peft_methods`."""
    found = 0
    for path in (ROOT / "domainbed_ext").rglob("*.py"):
        for module, names in imports_of_vitlorafa(path):
            found += 1
            assert module.startswith(("vitlorafa.bench.", "vitlorafa.peft_methods")) or (
                module == "vitlorafa" and set(names) <= set(vitlorafa.__all__)
            ), path
    assert found > 5


def entries(path):
    """The entries under "Args:", "Attributes:" and the like of all docstrings of a file: line, name and text."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or not ast.get_docstring(node):
            continue
        lines = ast.get_docstring(node).splitlines()
        heads = [i for i, line in enumerate(lines) if line in ("Args:", "Attributes:", "Raises:", "Warns:")]
        for head in heads:
            text = ""
            for line in [*lines[head + 1 :], ""]:
                if text and not line.startswith(" " * 8):
                    name, _, words = text.partition(": ")
                    yield node.lineno, name, words
                    text = ""
                if not line.startswith("    "):
                    break
                text += f" {line.strip()}" if text else line.strip()


def test_entries_of_docstrings_start_with_a_capital_and_end_with_a_full_stop():
    found = [(path, *entry) for path in (ROOT / "vitlorafa").rglob("*.py") for entry in entries(path)]
    assert len(found) > 200
    plain = ("x ", "x̃", '"', "`", "g_", "y ")  # symbols keep their case
    wrong = [
        f"{path.name}:{line} {name}: {words}"
        for path, line, name, words in found
        if not words.endswith(".") or (words[:1].islower() and not words.startswith(plain))
    ]
    assert wrong == []
