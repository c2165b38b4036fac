"""Which modules load no torch, which takes seconds: what only reads folders and checks arguments does without."""

import pkgutil
import subprocess
import sys

import pytest

import domainbed_ext
from domainbed_ext import analyse, cache, datasets, report, system

WITHOUT_TORCH = (
    *(
        module.name
        for package in (analyse, report, system)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ),
    *(f"domainbed_ext.algorithms.{name}" for name in ("hyperparameters", "methods", "peft_methods", "registry")),
    *(f"domainbed_ext.objectives.{name}" for name in ("declarations", "registry")),
    *(module.name for module in pkgutil.walk_packages(datasets.__path__, "domainbed_ext.datasets.")),
    *(f"{cache.__name__}.{name}" for name in ("command", "decode", "entries", "images")),
    *(
        f"domainbed_ext.{name}"
        for name in (
            "algorithms",
            "collect_results",
            "compare",
            "data",
            "datasets",
            "errors",
            "model_selection",
            "objectives",
        )
    ),
    *(
        f"domainbed_ext.{name}"
        for name in (
            "evaluate",
            "frontier",
            "hparams_registry",
            "predict",
            "protocols",
            "seeds",
            "soup",
            "sweep",
            "train",
        )
    ),
    *(
        f"domainbed_ext.runs.{name}"
        for name in (
            "along_strength",
            "arguments",
            "derived",
            "differences",
            "folder",
            "identity",
            "imports",
            "predicted_images",
            "predictions",
            "reading",
            "saved",
            "strengths",
        )
    ),
    *(f"domainbed_ext.sweep.{name}" for name in ("arguments", "cancel", "command", "delete_incomplete", "jobs")),
    *(f"domainbed_ext.sweep.{name}" for name in ("states", "status")),
    "domainbed_ext.prepare.command",
)


def test_no_torch_is_loaded():
    check = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", check, *WITHOUT_TORCH], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_run_examines_nothing_of_what_torch_has_made(tmp_path):
    check = (
        "import gc, sys\n"
        "from domainbed_ext import train\n"
        "from domainbed_ext.runs.arguments import parse\n"
        "assert train.run(parse(sys.argv[1:])) == 2\n"
        "assert 'torch' in sys.modules and gc.isenabled() and gc.get_freeze_count() > 200_000, gc.get_freeze_count()\n"
    )
    words = ["--dataset", "Debug28", "--hparams", '{"batch_size": 100000}', "--output_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", check, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_have_their_names_without_loading_them():
    for name in ("Algorithm", "ALGORITHMS"):
        assert name not in vars(domainbed_ext.algorithms)
        assert hasattr(domainbed_ext.algorithms, name)
    with pytest.raises(AttributeError, match="nothing_there"):
        domainbed_ext.algorithms.nothing_there  # noqa: B018
