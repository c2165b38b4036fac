"""The parts of a card's measurement: what is asked of a GPU, and in a rehearsal, at tiny sizes, of the CPU."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from domainbed_ext.bench.card_findings import (
    Findings,
    read_nothing,
    read_quickstart,
    read_runs,
    read_steps,
    read_tables,
    read_tests,
)
from domainbed_ext.bench.invented_data import invent_data
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.system import resources
from domainbed_ext.system.machine import count_available_cores

ROOT = Path(__file__).resolve().parents[2]
_ON_DEVICE = "test_on_device.py"  # tests whose device is a parameter


@dataclass(frozen=True)
class Command:
    """A command of a part.

    Attributes:
        words: Arguments of Python.
        environment: Variables that only this command gets.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        name: Name, of its log too.
        answers: What it answers, in a line.
        seconds: Limit of its time, beside what earlier parts left.
        commands: Commands, the most important first.
        read: Function of the folder that its commands write into, and of their output.
    """

    name: str
    answers: str
    seconds: float
    commands: tuple[Command, ...]
    read: Callable[[Path, str], Findings]


@dataclass(frozen=True)
class Plan:
    """What the parts are made for.

    Attributes:
        small: Whether it is a rehearsal on the CPU.
        data_dir: Folder that contains PACS; None for invented images.
        folder: Folder for what the commands write, with a folder of each part's name.
    """

    small: bool
    data_dir: str | None
    folder: Path

    def bench(self, part: str, what: str, *words: str) -> Command:
        """A command of `domainbed_ext.bench` that writes into the folder of a part."""
        return Command(("-m", "domainbed_ext.bench", what, "--output_dir", str(self.folder / part), *words))

    @cached_property
    def images(self) -> tuple[str, ...]:
        """The options of a run that name its images; these are invented if none are given."""
        data = self.data_dir or str(invent_data(self.folder / "data", *((2, 40) if self.small else (30,))))
        return ("--data_dir", data, "--cache_dir", str(self.folder / "cache"))


def plan_tests(plan: Plan) -> Part:
    """The tests of a GPU: only their files, since others may need packages that are not there."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path.name == _ON_DEVICE or not plan.small]
    marked = [path for path in files if path.name == _ON_DEVICE or "mark.gpu" in path.read_text(encoding="utf-8")]
    if not marked:
        raise BenchmarkError(
            f"no tests of a GPU in {ROOT / 'tests'}: run this in a checkout, or leave tests out of --parts"
        )
    report = str(plan.folder / "tests" / "tests.xml")
    words = ["-m", "pytest", *(str(path.relative_to(ROOT)) for path in sorted(marked)), "-p", "no:cacheprovider"]
    if plan.small:  # those of a GPU, which are skipped, and a few of the same on the CPU: `make test` runs the others
        words += ["-m", "not slow", "-k", "cuda or gpu or pinned or (wait and eager)"]
    else:
        words += ["-m", "gpu", "-vv", *_in_parallel()]  # the log names each test, should time run out
    command = Command((*words, "--junitxml", report))
    return Part("tests", "whether results on the GPU are right", 110, (command,), read_tests)


def _in_parallel() -> list[str]:
    """Options of pytest for several processes, since compiling takes most of the time."""
    has_xdist = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True, check=False).returncode == 0
    return ["-n", str(max(1, min(14, count_available_cores() - 2))), "--dist", "worksteal"] if has_xdist else []


def plan_steps(plan: Plan) -> Part:
    """Steps of `vitlorafa.bench`, the most important first."""

    def steps(name: str, *words: str, backend: str = "eager") -> Command:
        place = ("--output_dir", str(plan.folder / "steps" / name))
        sizes = _SMALL_STEPS if plan.small else ("--batch_size", "128", "--precision", "bf16", "--warmup", "3")
        return Command(("-m", "vitlorafa.bench", *words, *sizes, *place), {"VITLORAFA_BACKEND": backend})

    both = ("--models", "vit_small_patch16_224", "vit_base_patch16_224")
    ours, peft = ("lower_bound", "lora_fa", "lora"), ("peft_lora", "peft_lora_fa")
    with_dropout = (*both, "--dropout", "0.1", "--methods", "lower_bound", "lora_fa_separate", "lora_separate")
    every = (*ours, "full", "lora_fa_plain", *peft, "peft_dora", "peft_vera")
    commands = [
        plan.bench("steps", "questions", "--ask", "rate"),
        steps("rank 8", "step", *both, "--methods", *every),
        steps("rank 8, Triton", "step", *both, "--methods", *ours, backend="triton"),
        steps("dropout", "step", *with_dropout, "lora_fa_plain", *peft),
        steps("dropout, Triton", "step", *with_dropout, backend="triton"),
        steps("ranks", "step", "--ranks", "4", "16", "64", "128", "--methods", *ours, "peft_lora"),
        steps("memory", "memory", "--models", "vit_base_patch16_224", "--plot_ranks", "8", "--methods", *every),
    ]
    if plan.small:
        commands = [steps("rank 8", "step", "--methods", *ours)]
    return Part("steps", "time and memory of a step beside PEFT's", 120, tuple(commands), read_steps)


def plan_questions(plan: Plan) -> Part:
    """All questions about defaults."""
    command = plan.bench("questions", "questions", *(_SMALL_QUESTIONS if plan.small else ()))
    return Part("questions", "which defaults are fastest on this GPU", 70, (command,), read_tables)


def plan_runs(plan: Plan) -> Part:
    """Images per second, and a whole run."""
    command = plan.bench("runs", "gpu", *plan.images, *(_SMALL_RATES if plan.small else ("--steps", "1500")))
    return Part("runs", "images per second, and a whole run", 100, (command,), read_runs)


def plan_side_by_side(plan: Plan) -> Part:
    """Parallel runs; the image cache is filled by the part before."""
    words = (*plan.images, "--weights", "none", "--no_warm_up", "--rounds", "1")
    command = plan.bench("side_by_side", "side_by_side", *words, *(_SMALL_SIDE if plan.small else _SIDE))
    return Part("side_by_side", "how many parallel runs fill the GPU", 60, (command,), read_tables)


def plan_quickstart(plan: Plan) -> Part:
    """The quickstart, whose accuracies on a CPU are known."""
    words = ("--sweep", str(resources.sweeps() / "quickstart.yaml"), "--output_dir", str(plan.folder / "quickstart"))
    command = Command(("-m", "domainbed_ext.sweep", "launch", *words, *(_SMALL_SWEEP if plan.small else _SWEEP)))
    answers = "whether the quickstart's accuracies are those of the CPU"
    return Part("quickstart", answers, 70, (command,), read_nothing if plan.small else read_quickstart)


PARTS: dict[str, Callable[[Plan], Part]] = {
    "tests": plan_tests,
    "steps": plan_steps,
    "questions": plan_questions,
    "runs": plan_runs,
    "side_by_side": plan_side_by_side,
    "quickstart": plan_quickstart,
}

_SMALL_STEPS = (
    *("--models", "vit_tiny_patch16_224", "--depth", "1", "--resolution", "32", "--batch_size", "2"),
    *("--repeats", "1", "--warmup", "0", "--precision", "float32"),
)
_SMALL_QUESTIONS = ("--backbones", "vit_pico_patch8_32", "--image_size", "32", "--batch_size", "2", "--rounds", "1")
_SMALL_RATES = (
    *("--on_cpu", "--backbones", "vit_pico_patch8_32", "--methods", "BOnly", "--batch_sizes", "2", "--images", "2"),
    *("--image_size", "32", "--rounds", "1", "--steps", "2", "--backbone", "vit_pico_patch8_32"),
    *("--hparams", '{"batch_size": 4}'),
)
_SIDE = ("--at_once", "1", "2", "4", "--steps", "300", "--hparams", '{"batch_size": 32}')
_SMALL_SIDE = (
    *("--at_once", "2", "--steps", "2", "--backbone", "vit_pico_patch8_32"),
    *("--hparams", '{"batch_size": 4}'),
)
_SWEEP = ("--launcher_options", '{"jobs_per_gpu": 4}')
_SMALL_SWEEP = ("--algorithms", "BOnly", "--n_trials", "1", "--steps", "2", "--checkpoint_freq", "0")
