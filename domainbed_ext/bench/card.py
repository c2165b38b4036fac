"""All that this project asks of a GPU, in one command: correctness, speed, memory and accuracy, part by part.

Each part is a list of commands, each in a process of its own, within a limit of time. A part that fails does not stop
the next one. The report is written after each part, so that nothing is lost with the machine.
"""

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import cached_property
from math import sqrt
from pathlib import Path
from xml.etree import ElementTree

import torch

from domainbed_ext.bench.invented_data import invent_data
from domainbed_ext.bench.report import NEEDS_CARD
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.provenance import provenance
from domainbed_ext.system import resources, strict_json
from domainbed_ext.system.files import write_atomically
from domainbed_ext.system.machine import count_available_cores
from vitlorafa.bench.tables import Row, table

ROOT = Path(__file__).resolve().parents[2]
_TICK = 20.0  # seconds between lines of progress
_GRACE = 5.0  # seconds from the request to stop to the kill
_LARGEST_LOG = 4 * 2**20  # bytes
_ON_DEVICE = "test_on_device.py"  # tests whose device is a parameter
_ENDED = re.compile(r"%\] (PASSED|FAILED|ERROR|SKIPPED) (tests/\S+)")  # lines of pytest's log, with and without xdist
_ENDED_ALONE = re.compile(r"^(tests/\S+) (PASSED|FAILED|ERROR|SKIPPED)\b")
_SKIPPED = "needs a CUDA device"  # why tests/conftest.py skips a test


class Status(str, Enum):
    """How a part ended."""

    FINISHED = "finished"
    FAILED = "failed"
    OVER_LIMIT = "over its limit"
    LEFT_OUT = "left out"


@dataclass(frozen=True)
class Command:
    """A command of a part.

    Attributes:
        words: Arguments of Python.
        environment: Variables that only this command gets.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Findings:
    """What a part found.

    Attributes:
        tables: Rows by title.
        needs_card: What could not be done without a GPU.
        failures: What is wrong, each in a sentence.
    """

    tables: dict[str, list[Row]] = field(default_factory=dict)
    needs_card: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


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


@dataclass
class Outcome:
    """A part that ended.

    Attributes:
        name: Name of the part.
        answers: What it answers.
        status: How it ended.
        seconds: Time that it took.
        findings: What it found.
        log: Name of the file with the output of its commands; empty if none ran.
    """

    name: str
    answers: str
    status: Status
    seconds: float
    findings: Findings
    log: str = ""


def measure(args: Namespace, output_dir: Path) -> None:
    """Runs the parts, and writes `card.json`, `card.md` and a log for each part.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the report.

    Raises:
        BenchmarkError: There is no GPU and no rehearsal is asked for, or parts failed.
    """
    if not (args.rehearse or torch.cuda.is_available()):
        raise BenchmarkError("torch sees no GPU here: --rehearse (make gpu REHEARSE=1) tries all parts on the CPU")
    output_dir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    outcomes: list[Outcome] = []
    unused = 0.0  # seconds that earlier parts left to later ones
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = Plan(args.rehearse, args.data_dir, folder)
        chosen = [name for name in PARTS if name in args.parts]
        for number, name in enumerate(chosen, 1):
            try:
                part = PARTS[name](plan)
            except BenchmarkError as error:
                outcomes.append(Outcome(name, "", Status.FAILED, 0.0, Findings(failures=[str(error)])))
                print(f"{number} of {len(chosen)}  {name}: {_describe(outcomes[-1])}", flush=True)
                continue
            limit = max(0.0, min(part.seconds + unused, end - time.monotonic()))
            print(f"{number} of {len(chosen)}  {name}: {part.answers} (at most {limit:.0f} s)", flush=True)
            outcomes.append(_run(part, folder / name, output_dir, limit, args.rehearse))
            unused = max(0.0, unused + part.seconds - outcomes[-1].seconds)
            print(f"        {_describe(outcomes[-1])}", flush=True)
            _write(outcomes, args, output_dir)
    print(f"written: {output_dir / 'card.md'}, {output_dir / 'card.json'}")
    if bad := [each for each in outcomes if each.status is not Status.FINISHED]:
        listed = ", ".join(f"{each.name} ({each.status.value})" for each in bad)
        raise BenchmarkError(f"{len(bad)} of {len(outcomes)} parts did not finish: {listed}; see {output_dir}/card.md")


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
    return Part("tests", "whether results on the GPU are right", 90, (command,), _read_tests)


def _in_parallel() -> list[str]:
    """Options of pytest for several processes, since compiling takes most of the time."""
    has_xdist = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True, check=False).returncode == 0
    return ["-n", str(min(8, max(1, count_available_cores() // 2)))] if has_xdist else []


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
    return Part("steps", "time and memory of a step beside PEFT's", 120, tuple(commands), _read_steps)


def plan_questions(plan: Plan) -> Part:
    """All questions about defaults."""
    command = plan.bench("questions", "questions", *(_SMALL_QUESTIONS if plan.small else ()))
    return Part("questions", "which defaults are fastest on this GPU", 70, (command,), _read_tables)


def plan_runs(plan: Plan) -> Part:
    """Images per second, and a whole run."""
    command = plan.bench("runs", "gpu", *plan.images, *(_SMALL_RATES if plan.small else ()))
    return Part("runs", "images per second, and a whole run", 120, (command,), _read_runs)


def plan_side_by_side(plan: Plan) -> Part:
    """Parallel runs; the image cache is filled by the part before."""
    words = (*plan.images, "--weights", "none", "--no_warm_up", "--rounds", "1")
    command = plan.bench("side_by_side", "side_by_side", *words, *(_SMALL_SIDE if plan.small else _SIDE))
    return Part("side_by_side", "how many parallel runs fill the GPU", 60, (command,), _read_tables)


def plan_quickstart(plan: Plan) -> Part:
    """The quickstart, whose accuracies on a CPU are known."""
    words = ("--sweep", str(resources.sweeps() / "quickstart.yaml"), "--output_dir", str(plan.folder / "quickstart"))
    command = Command(("-m", "domainbed_ext.sweep", "launch", *words, *(_SMALL_SWEEP if plan.small else _SWEEP)))
    answers = "whether the quickstart's accuracies are those of the CPU"
    return Part("quickstart", answers, 70, (command,), _read_nothing if plan.small else _read_quickstart)


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
_SIDE = ("--at_once", "1", "2", "4", "--steps", "600", "--hparams", '{"batch_size": 32}')
_SMALL_SIDE = (
    *("--at_once", "2", "--steps", "2", "--backbone", "vit_pico_patch8_32"),
    *("--hparams", '{"batch_size": 4}'),
)
_SWEEP = ("--launcher_options", '{"jobs_per_gpu": 4}')
_SMALL_SWEEP = ("--algorithms", "BOnly", "--n_trials", "1", "--steps", "2", "--checkpoint_freq", "0")


def _run(part: Part, folder: Path, output_dir: Path, limit: float, rehearse: bool) -> Outcome:
    """Runs the commands of a part one after the other, as long as there is time."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    end = start + limit
    log = output_dir / f"card_{part.name}.log"
    failures, is_late, count = [], False, 0
    with log.open("wb") as output:
        for command in part.commands:
            if time.monotonic() >= end:
                is_late = True
                break
            count += 1
            output.write(f"$ python {' '.join(command.words)}\n".encode())
            output.flush()
            with _started(command, output, rehearse) as process:
                code = _wait(process, part, start, end)
            is_late = is_late or code is None
            if code:
                failures.append(f"exit code {code} of python {' '.join(command.words[:4])}")
    text = _shorten(log)
    if not count:
        log.unlink()
        return Outcome(part.name, part.answers, Status.LEFT_OUT, 0.0, Findings())
    findings = _read(part, folder, text)
    findings.failures[:0] = failures
    findings.needs_card += [
        line.removeprefix(NEEDS_CARD).strip() for line in text.splitlines() if line.startswith(NEEDS_CARD)
    ]
    status = Status.FAILED if findings.failures else Status.FINISHED
    if is_late:
        status = Status.OVER_LIMIT
    return Outcome(part.name, part.answers, status, time.monotonic() - start, findings, log.name)


def _read(part: Part, folder: Path, text: str) -> Findings:
    try:
        return part.read(folder, text)
    except Exception as error:  # what a command left half written must not cost the report
        return Findings(failures=[f"its results cannot be read ({type(error).__name__}: {error})"])


@contextlib.contextmanager
def _started(command: Command, output: object, rehearse: bool) -> Iterator["subprocess.Popen[bytes]"]:
    """A command in a process group of its own, which has ended when the context does."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **command.environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if rehearse:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.Popen(
        [sys.executable, *command.words],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,  # type: ignore[call-overload]
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )
    try:
        yield process
    finally:
        # As by Ctrl-C: pytest then writes its report, and measurements keep what they have.
        for number in (signal.SIGINT, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)


def _heed_interrupts() -> None:
    """Undoes that a shell lets commands in its background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: "subprocess.Popen[bytes]", part: Part, start: float, end: float) -> int | None:
    """The exit code of a process; None if it did not end in time."""
    while (left := end - time.monotonic()) > 0:
        try:
            return process.wait(min(left, _TICK))
        except subprocess.TimeoutExpired:
            print(f"        {part.name}: {time.monotonic() - start:.0f} s", flush=True)
    return None


def _shorten(log: Path) -> str:
    """The text of a log, of which a very long one loses its beginning."""
    data = log.read_bytes()
    if len(data) > _LARGEST_LOG:
        data = data[-_LARGEST_LOG:]
        log.write_bytes(data)
    return data.decode("utf-8", "replace")


def _read_nothing(folder: Path, text: str) -> Findings:
    return Findings(needs_card=["comparing accuracies"])


def _read_tables(folder: Path, text: str) -> Findings:
    """Every CSV file that was written, by its folder and name."""
    tables: dict[str, list[Row]] = {}
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            title = str(path.relative_to(folder).with_suffix(""))
            tables[title] = [dict(row) for row in csv.DictReader(file)]
    return Findings(tables)


def _read_tests(folder: Path, text: str) -> Findings:
    """How many tests passed, and those that did not with the first line of their error."""
    if not (folder / "tests.xml").is_file():
        return _read_log_of_tests(text)
    cases = list(ElementTree.parse(folder / "tests.xml").getroot().iter("testcase"))
    failed = [(case, bad) for case in cases for bad in (*case.findall("failure"), *case.findall("error"))]
    skips = [skip.get("message", "") for case in cases for skip in case.findall("skipped")]
    on_cards = sum(_SKIPPED in reason for reason in skips)
    counts = {"passed": len(cases) - len(failed) - len(skips), "failed": len(failed), "skipped": len(skips)}
    findings = Findings({"tests": [counts]})
    if failed:
        first_lines = [
            {"test": f"{case.get('classname')}::{case.get('name')}", "error": bad.get("message", "").splitlines()[0]}
            for case, bad in failed
        ]
        findings.tables["failed tests"] = first_lines
    if on_cards:
        findings.needs_card.append(f"{on_cards} tests")
    return findings


def _read_log_of_tests(text: str) -> Findings:
    """The same of tests that were stopped before they wrote their report."""
    ended = [(word, name) for line in text.splitlines() for word, name in _ENDED.findall(line)]
    ended += [(word, name) for line in text.splitlines() for name, word in _ENDED_ALONE.findall(line)]
    words = [word for word, _ in ended]
    counts = {"passed": words.count("PASSED"), "failed": words.count("FAILED"), "skipped": words.count("SKIPPED")}
    findings = Findings({"tests that ended": [counts]}, failures=["the tests were stopped before their end"])
    if failed := [{"test": name} for word, name in ended if word in ("FAILED", "ERROR")]:
        findings.tables["failed tests"] = failed
    return findings


def _read_steps(folder: Path, text: str) -> Findings:
    """The main columns of the tables of `vitlorafa.bench`, and the share of the matmul rate that was measured."""
    findings = _read_tables(folder, text)
    rate = next((float(row["value"]) for rows in findings.tables.values() for row in rows if _is_rate(row)), None)
    for title, rows in findings.tables.items():
        if rows and "step_ms" in rows[0]:
            findings.tables[title] = [_main_columns(row, rate) for row in rows]
    return findings


def _is_rate(row: Row) -> bool:
    return row.get("question") == "rate" and row.get("variant") == "bf16"


def _main_columns(row: Row, rate: float | None) -> Row:
    names = ("model", "rank", "dropout", "method", "step_ms", "ratio_to_lower_bound", "images_per_s", "gflop_per_s")
    of_rate = float(row["gflop_per_s"]) / 1e3 / rate if rate and row["gflop_per_s"] else None
    return {**{name: row[name] for name in names}, "of the matmul rate": None if of_rate is None else f"{of_rate:.2f}"}


def _read_runs(folder: Path, text: str) -> Findings:
    """The tables of `bench gpu`, and whether the whole run met its bars."""
    findings = _read_tables(folder, text)
    whole = [rows[0] for title, rows in findings.tables.items() if title.startswith("run_cuda")]
    if whole:
        seconds, waits = float(whole[0]["seconds, start to end"]), float(whole[0]["data wait, %"])
        findings.tables["bars of the whole run"] = [
            {"bar": "under 180 s", "measured": seconds, "met": "yes" if seconds < 180 else "no"},
            {"bar": "waits for data under 5 %", "measured": waits, "met": "yes" if waits < 5 else "no"},
        ]
    else:
        findings.needs_card.append("the bars of the whole run")
    return findings


def _read_quickstart(folder: Path, text: str) -> Findings:
    """The averages of the quickstart's methods beside the committed ones, which a CPU gave."""
    here, there = (_averages(path) for path in (folder / "tables" / "results.csv", _committed()))
    rows: list[Row] = []
    for metric in sorted({metric for _, metric in there}):
        errors = [err for results in (here, there) for (_, name), (_, err) in results.items() if name == metric]
        noise = 3 * sqrt(2 * sum(err**2 for err in errors) / len(errors))  # standard errors of three trials are rough
        for (method, name), (mean, _) in there.items():
            if name != metric or (method, name) not in here:
                continue
            difference = here[method, name][0] - mean
            within = "yes" if abs(difference) <= noise else "no"
            numbers = {"CPU": f"{mean:.1f}", "GPU": f"{mean + difference:.1f}", "noise": f"{noise:.1f}"}
            rows.append({"method": method, "metric": metric, **numbers, "within": within})
    missing = there.keys() - here.keys()
    failures = [f"{len(missing)} accuracies of the quickstart are missing"] if missing else []
    if beyond := sum(row["within"] == "no" for row in rows):
        failures.append(f"{beyond} accuracies of the quickstart differ from the CPU's by more than noise")
    return Findings({"accuracies of the quickstart in %, beside the CPU's": rows}, failures=failures)


def _committed() -> Path:
    return resources.results() / "quickstart" / "results.csv"


def _averages(path: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and standard error of each method's average by method and metric, selected by validation."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["environment"] == "Avg" and row["err"]]
    return {
        (row["algorithm"], row["metric"]): (float(row["mean"]), float(row["err"]))
        for row in rows
        if row["selection"] == "training-domain" and row["metric"] in ("in_domain", "out_of_domain")
    }


def _describe(outcome: Outcome) -> str:
    findings = outcome.findings
    said = [f"{outcome.status.value} in {outcome.seconds:.0f} s", *findings.failures]
    if findings.needs_card:
        said.append(f"{NEEDS_CARD}{', '.join(findings.needs_card)}")
    return "; ".join(said)


def _write(outcomes: Sequence[Outcome], args: Namespace, output_dir: Path) -> None:
    """Writes the report of the parts so far."""
    words = ["card", *(["--rehearse"] if args.rehearse else [])]
    where = provenance("domainbed_ext.bench", words)
    facts = {**where, "rehearsal": args.rehearse, "images": "real" if args.data_dir else "invented"}
    parts = [asdict(each) for each in outcomes]
    write_atomically(output_dir / "card.json", strict_json.dumps({**facts, "parts": parts}, indent=1) + "\n")
    device = "the CPU" if args.rehearse else where["machine"]["gpu"]
    title = "Rehearsal on the CPU: no measurement of a GPU" if args.rehearse else f"Measured on {device}"
    images = "" if args.data_dir else " Images are invented: their accuracies mean nothing."
    used = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    overview = table([_overview(each) for each in outcomes])
    text = [f"# {title}", f"{where['date']}; {where['machine']['cpu']}; {used}.{images}", overview]
    for each in outcomes:
        sentences = filter(None, (each.answers, _describe(each)))
        text += [f"## {each.name}", " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences)]
        for name, rows in each.findings.tables.items():
            text += [f"**{name}**", table(rows)] if rows else []
    write_atomically(output_dir / "card.md", "\n\n".join(text) + "\n")


def _overview(outcome: Outcome) -> Row:
    needs = ", ".join(outcome.findings.needs_card)
    return {
        "part": outcome.name,
        "answers": outcome.answers,
        "status": outcome.status.value,
        "seconds": f"{outcome.seconds:.0f}",
        "needs a card": needs or None,
        "log": outcome.log or None,
    }
