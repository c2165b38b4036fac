"""What the docs tell people to write and to run is there and works."""

import csv
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import vitlorafa
from domainbed_ext import collect_results, compare, evaluate, frontier, launchers, pack, predict, push, soup
from domainbed_ext.algorithms import ALGORITHMS
from domainbed_ext.algorithms.names import describe
from domainbed_ext.analyse import command as analyse
from domainbed_ext.bench import __main__ as bench
from domainbed_ext.cache import command as cache
from domainbed_ext.objectives import OBJECTIVES
from domainbed_ext.prepare import command as prepare
from domainbed_ext.runs import arguments as options
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.sweep import options as sweep_options
from domainbed_ext.sweep.arguments import parse
from tests import forked
from vitlorafa.bench import __main__ as adapters_bench
from vitlorafa.bench import growth, methods_table, tune

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")),
    *sorted((ROOT / "results").glob("*/findings.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
BENCHMARK = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", BENCHMARK, flags=re.DOTALL)


def run(code, tmp_path, *words, exit_code=0):
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    return run_python(tmp_path, str(script), *words, exit_code=exit_code)


def run_python(tmp_path, *words, exit_code=0):
    process = forked.run([sys.executable, *words], cwd=tmp_path, text=True)
    assert process.returncode == exit_code, process.stderr
    return process.stderr if exit_code else process.stdout


@pytest.mark.slow
def test_a_method_of_your_own_is_a_row_beside_ours(tmp_path):
    """The page's file and its sweep, but for fewer and shorter runs."""
    (code,) = [code for code in CODE if "# norms.py" in code]
    (tmp_path / "norms.py").write_text(code, encoding="utf-8")
    (words,) = [words for words in commands("domainbed_ext.sweep") if "norms.py" in words]
    fewer = "--protocol single_source --source_envs plain --steps 2 --train_eval_share 0.05 --jobs 1 --cache_dir none"
    said = run_python(tmp_path, "-m", "domainbed_ext.sweep", *words, *fewer.split())
    assert "BOnly (LoRA-FA)" in said and "Norms (layer norms)" in said
    with (tmp_path / "runs" / "norms" / "tables" / "results.csv").open(encoding="utf-8") as file:
        assert {row["algorithm"] for row in csv.DictReader(file)} == {"BOnly", "Norms"}


SCRIPT = """\
from domainbed_ext.algorithms import ALGORITHMS, Algorithm
from domainbed_ext.train import main


class Norms(Algorithm):
    def prepare(self, backbone, hparams):
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad = "norm" in name or "head" in name


ALGORITHMS["Norms"] = Norms
if __name__ == "__main__":
    main()
"""


def test_a_method_in_a_script_of_your_own_runs(tmp_path):
    words = "--algorithm Norms --steps 1 --train_eval_share 0.05 --output_dir out --test_envs 3"
    run(SCRIPT, tmp_path, *words.split())
    assert (tmp_path / "out" / "done").exists()
    words = "--algorithm Norms --steps 1 --test_envs 9 --output_dir bad"  # refused within the run
    assert run(SCRIPT, tmp_path, *words.split(), exit_code=2).startswith("error: --test_envs 9")
    assert run(SCRIPT, tmp_path, "--algorithm", "Norm", exit_code=2).startswith("error: unknown algorithm 'Norm'")


def test_a_data_set_of_your_own_is_one(tmp_path):
    from tests.domainbed_ext.conftest import make_domains

    (code,) = [code for code in CODE if "Seasons" in code]
    make_domains(tmp_path / "seasons", ("autumn", "spring", "summer", "winter"), images=2)
    said = run(code + "\nprint(Seasons('.', [0], {}).environments, len(Seasons('.', [0], {})[3]))\n", tmp_path)
    assert said == "('A', 'Sp', 'Su', 'W') 4\n"


def test_a_tracker_of_your_own_is_one(tmp_path):
    """The page's file and its run, but for fewer steps."""
    (code,) = [code for code in CODE if "# printed.py" in code]
    (tmp_path / "printed.py").write_text(code, encoding="utf-8")
    (words,) = [words for words in commands("domainbed_ext.train") if "printed.py" in words]
    said = run_python(tmp_path, "-m", "domainbed_ext.train", *words, "--steps", "1", "--train_eval_share", "0.02")
    assert re.search(r"^step 0: loss \d\.\d{3}$", said, flags=re.MULTILINE)


ADAPTERS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("word", ['init_A="uniform', 'init_A="pissa', "blocks=", "lr_B_ratio", "set_strength"])
def test_an_option_of_adapters_does_what_the_page_says(word):
    (code,) = [code for code in ADAPTERS if word in code]
    exec(code, {})


@pytest.mark.parametrize("word", ["Dinov2", "torchvision", "to_qkv"])
def test_models_of_other_libraries_are_adapted(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in ADAPTERS if word in code]
    if word == "Dinov2":
        pytest.importorskip("transformers")
    exec(code, {})


def test_an_adapter_of_a_wrapped_model_is_saved(tmp_path):
    (code,) = [code for code in ADAPTERS if "torch.compile" in code]
    load = "vitlorafa.load_adapter(timm.create_model('test_vit', num_classes=7), 'my_adapter')\n"
    run(code + load, tmp_path)
    assert (tmp_path / "my_adapter" / "adapter.json").exists()


def test_adapters_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in ADAPTERS if "add_adapter(" in code]
    exec(code, {})
    assert (tmp_path / "named" / "photo" / "adapter.json").exists()


def test_an_adapter_is_saved_for_peft_and_without_a(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in ADAPTERS if "only_trained" in code]
    exec(code, {})
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("small", "shared")
    ]
    assert (tmp_path / "shared" / "adapter_config.json").exists() and sizes[0] < sizes[1] / 2


def test_adapters_are_averaged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in ADAPTERS if "average(" in code]
    exec(code, {})
    assert (tmp_path / "soup" / "adapter.json").exists()


def test_adapters_are_stacked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = [code for code in ADAPTERS if "stack(" in code]
    found: dict = {}
    exec(code, found)
    assert found["ensemble"].shape == (4, 7) and (tmp_path / "experts" / "sketch" / "adapter.json").exists()


def test_a_saved_adapter_is_loaded_elsewhere(tmp_path):
    save = (
        "import timm\nfrom vitlorafa import AdapterConfig, inject, save_adapter\n"
        "model = timm.create_model('test_vit', num_classes=7)\n"
        "inject(model, AdapterConfig(rank=2, train='B'), train_head=True)\n"
        "save_adapter(model, 'runs/one/selected', head=True)\n"
    )
    (code,) = [code for code in CODE if "load_adapter" in code]
    run(save + code, tmp_path)


def test_a_launcher_of_your_own_is_one():
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["one_by_one"](["true", "exit 3"], None) == [0, 3]


def test_its_sweep_definition_is_understood(tmp_path):
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (definition,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(definition + "datasets: [PACS]\nalgorithms: [BA]\noutput_dir: o\n", encoding="utf-8")
    args = parse(["launch", "--sweep", str(path)])
    launchers.check_options(args.command_launcher, args.launcher_options)


def test_the_file_of_a_run_is_understood(tmp_path):
    (definition,) = re.findall(r"```yaml\n(.*?)```", BENCHMARK, flags=re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(definition, encoding="utf-8")
    args = options.parse(["--config", str(path)])
    assert (args.dataset, args.evaluations, args.early_stopping) == ("PACS", 10, 3)


def test_its_costs_of_many_runs_are_the_measured_ones():
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    shown = page.split("<!-- many -->")[1].split("<!-- /many -->")[0].splitlines()
    rows = []
    for path in sorted((ROOT / "results" / "bench").glob("sweep_*.csv")):
        with path.open(encoding="utf-8") as file:
            (row,) = csv.DictReader(file)
        largest, files = (
            [float(row[f"{what}, {quarter} quarter"]) for quarter in ("third", "last")]
            for what in ("largest process MiB", "open files")
        )
        rows.append(
            f"| {row['launcher']} | {row['runs']} | {float(row['work a run (s)']):.1f} s | {row['runs a minute']} | "
            f"{row['over the work (%)']} % | {largest[0]:.0f}, {largest[1]:.0f} MiB | {files[0]:.0f}, {files[1]:.0f} |"
        )
    assert rows and [line for line in shown if line.startswith("|")][2:] == rows


OBJECTIVES_PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_an_objective_of_your_own_is_one(tmp_path):
    """The page's file and its run, but for fewer steps."""
    (code,) = re.findall(r"```python\n(.*?)```", OBJECTIVES_PAGE, flags=re.DOTALL)
    (tmp_path / "spread.py").write_text(code, encoding="utf-8")
    (words,) = [words for words in commands("domainbed_ext.train") if "spread.py" in words]
    run_python(tmp_path, "-m", "domainbed_ext.train", *words, "--steps", "1", "--train_eval_share", "0.02")
    (record,) = RunFolder(tmp_path / "runs" / "spread").records()
    assert record["spread"] > 0 and record["args"]["algorithm"] == "BOnly+Spread@weight=0.5"
    assert record["hparams"]["weight"] == 0.5 and set(record["sources"]) == {"Spread"}


def test_the_page_of_objectives_has_all_with_what_a_probe_trains_on():
    def probe(kind):
        return "no" if kind.shapes_features else "images" if kind.reads_images else "features"

    shown = re.findall(r"^\| `(\w+)` \| [^|]+ \| (\w+) \|$", OBJECTIVES_PAGE, flags=re.MULTILINE)
    registered = OBJECTIVES.registered().items()
    assert shown == [(name, probe(declared.load())) for name, declared in registered]


def test_the_glossary_has_every_method_with_its_label():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").split("## Adapters")[0]
    shown = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, flags=re.MULTILINE)
    ours = [describe(name) for name in ALGORITHMS if describe(name).path.startswith("domainbed_ext.")]
    assert sorted(shown) == sorted((method.name, method.label) for method in ours)


def test_the_tables_of_methods_are_what_methods_declare():
    path = ROOT / "docs" / "methods_tables.py"
    names = {"__file__": str(path), "__name__": "methods_tables"}
    exec(path.read_text(encoding="utf-8"), names)
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert names["fill"](page) == page, "run `make format`"
    shown = re.findall(r"^\| `([\w@=]+)` \|.*\| *(\[[^]]+]\(https://[^)]+\))? *\|$", page, flags=re.MULTILINE)
    assert {name for name, _ in shown} >= {"BOnly", "FullFT", "CORAL"} and len(shown) > 10
    assert [name for name, link in shown if not link] == ["FullFT"]  # older than any paper
    assert {f"Peft@method={name}" for name in describe("Peft").variants} <= {name for name, _ in shown}


def test_tests_that_are_named_exist():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8"))}
    assert named and named <= {path.stem for path in (ROOT / "tests").rglob("test_*.py")} | {"test_vit"}


def commands(module):
    """The commands of a module that the pages show, as words, each with the page's name."""
    for page in PAGES:
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if words[:3] == ["python", "-m", module]:
                yield words[3:]


@pytest.mark.parametrize(
    ("module", "make_parser"),
    [
        ("domainbed_ext.train", options.make_parser),
        ("domainbed_ext.sweep", sweep_options.make_parser),
        ("domainbed_ext.evaluate", evaluate.make_parser),
        ("domainbed_ext.compare", compare.make_parser),
        ("domainbed_ext.frontier", frontier.make_parser),
        ("domainbed_ext.predict", predict.make_parser),
        ("domainbed_ext.push", push.make_parser),
        ("domainbed_ext.pack", pack.make_parser),
        ("domainbed_ext.soup", soup.make_parser),
        ("domainbed_ext.analyse", analyse.make_parser),
    ],
)
def test_commands_that_are_shown_are_understood(module, make_parser):
    shown = list(commands(module))
    assert shown
    for words in shown:
        make_parser().parse_args(words)


def test_options_that_are_named_exist():
    known = {
        option
        for module in (
            options,
            sweep_options,
            evaluate,
            frontier,
            pack,
            predict,
            push,
            soup,
            prepare,
            collect_results,
            compare,
            adapters_bench,
            growth,
            methods_table,
            tune,
        )
        for action in module.make_parser()._actions
        for option in action.option_strings
    }
    for module in (analyse, bench, cache):
        (commands,) = (action for action in module.make_parser()._actions if action.choices)
        known |= {option for each in commands.choices.values() for option in each._option_string_actions}
    known.add("--logdir")  # TensorBoard's
    for page in PAGES:
        named = set(re.findall(r"--[a-z_]+[a-z]", page.read_text(encoding="utf-8")))
        assert named <= known, page.name


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)


def test_public_names_are_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    shown_names = {name.rpartition(".")[2] for name in shown} | set(re.findall(r"`\w+\.([A-Z]+)`", page))
    assert set(vitlorafa.__all__) <= shown_names


def test_public_names_are_imported_from_where_the_api_page_says():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: ((vitlorafa|domainbed_ext\.\w+)\.[\w.]+)$", page, flags=re.MULTILINE)
    assert {"vitlorafa", "domainbed_ext.algorithms", "domainbed_ext.datasets"} <= {package for _, package in shown}
    for name, package in shown:
        module, _, attribute = name.rpartition(".")
        defined = getattr(importlib.import_module(module), attribute)
        assert getattr(importlib.import_module(package), attribute, None) is defined, (package, attribute)


@pytest.mark.slow
def test_the_site_loads_nothing_from_a_host(tmp_path):
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    subprocess.run(build, check=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|source|iframe)[^>]*\ssrc=[\"']?(?:https?:)?//", text)
        loaded += re.findall(r"<link[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|icon)[^>]*(?:https?:)?//", text)
        assert loaded == [], page.name
