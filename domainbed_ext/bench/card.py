"""All that this project asks of a GPU, in one command: correctness, speed, memory and accuracy, part by part.

Each part is a list of commands, each in a process of its own, within a limit of time. A part that fails does not stop
the next one. The report is written after each part, so that nothing is lost with the machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import IO

import torch

from domainbed_ext.bench.card_findings import Findings
from domainbed_ext.bench.card_parts import PARTS, ROOT, Command, Part, Plan
from domainbed_ext.bench.report import NEEDS_CARD
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.provenance import provenance
from domainbed_ext.system import strict_json
from domainbed_ext.system.files import write_atomically
from vitlorafa.bench.tables import Row, table

_TICK = 20.0  # seconds between lines of progress
_GRACE = 5.0  # seconds from the request to stop to the kill
_LARGEST_LOG = 4 * 2**20  # bytes


class Status(str, Enum):
    """How a part ended."""

    FINISHED = "finished"
    FAILED = "failed"
    OVER_LIMIT = "over its limit"
    LEFT_OUT = "left out"


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
            else:
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
def _started(command: Command, output: IO[bytes], rehearse: bool) -> Iterator["subprocess.Popen[bytes]"]:
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
        stdout=output,
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
