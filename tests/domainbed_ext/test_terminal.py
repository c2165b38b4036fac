"""Every command as a person types it: on a terminal, it ends, shows how far it is, and hears Ctrl-C."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.domainbed_ext.conftest import make_domains
from tests.domainbed_ext.launched_processes import ENDLESS, FAST
from tests.domainbed_ext.run_states import SMALL
from tests.terminal import Terminal, assert_clean, interrupted, run

pytestmark = pytest.mark.slow

TRAIN = ("domainbed_ext.train", *FAST.split())
RESUME = "interrupted[^\n]*: run the same command again to resume\n"
AGAIN = "interrupted: run the same command again\n"


def assert_stopped(ended, code, sentence):
    """One sentence, the exit code, no traceback, and the cursor is there again."""
    assert ended.code == code, ended.screen[-3000:]
    assert "Traceback" not in ended.screen and "KeyboardInterrupt" not in ended.screen, ended.screen[-3000:]
    assert len(re.findall(sentence, ended.screen)) == 1, ended.screen[-3000:]
    assert ended.raw.count("\x1b[?25l") == ended.raw.count("\x1b[?25h")


def test_train_ends_and_leaves_clean_logs(tmp_path):
    ended = run(*TRAIN, "--output_dir", tmp_path / "run", "--workers", "1")
    assert ended.code == 0
    assert "setting up" in ended.screen and "2/2 steps" in ended.screen and "evaluating" in ended.screen
    out, err = tmp_path / "run" / "out.txt", tmp_path / "run" / "err.txt"
    assert_clean(out, err)
    lines = out.read_text().splitlines()
    assert lines[0] == "DigitsShift: tests on blended; trains on plain, rotated, sketched"
    assert [line.split("  ")[0] for line in lines[4:-1]] == ["step 1"] and "blended (test) in 0." in lines[4]
    assert lines[-1].startswith("done: tested on blended: ") and lines[-1].endswith("the model was not saved")
    assert err.read_text() == ""
    assert "evaluating" not in out.read_text() and lines[0] in ended.screen


@pytest.mark.parametrize("workers", ["0", "1"])
def test_train_hears_ctrl_c_between_two_steps(tmp_path, workers):
    words = (*TRAIN, "--output_dir", tmp_path / "run", *ENDLESS, "--workers", workers)
    ended = interrupted(*words, at=r"[1-9]\d*/1,000,000 steps")
    assert_stopped(ended, 75, RESUME)
    assert list((tmp_path / "run").glob("checkpoint_*")) and not (tmp_path / "run" / "failed").exists()
    assert_clean(tmp_path / "run" / "out.txt", tmp_path / "run" / "err.txt")


def test_train_hears_sigterm_on_a_terminal(tmp_path):
    words = (*TRAIN, "--output_dir", tmp_path / "run", *ENDLESS)
    started = Terminal(*words, out=tmp_path / "piped").wait_for(r"[1-9]\d*/1,000,000 steps")
    os.kill(started.process.pid, signal.SIGTERM)
    assert_stopped(started.end(), 75, RESUME)
    assert_clean(tmp_path / "piped")  # what is piped stays piped, whatever the terminal shows
    assert (tmp_path / "piped").read_text() == (tmp_path / "run" / "out.txt").read_text() != ""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("command", "option", "code", "sentence"),
    [("pretrain", "--out", -signal.SIGINT, AGAIN), ("train", "--output_dir", 130, RESUME)],
)
def test_ctrl_c_while_torch_is_imported_is_no_error(tmp_path, command, option, code, sentence):
    def imports(terminal):
        return "libtorch" in Path(f"/proc/{terminal.process.pid}/maps").read_text()

    ended = interrupted(f"domainbed_ext.{command}", option, tmp_path / "out", at=imports, fresh=True)
    assert_stopped(ended, code, sentence)


SWEEP = ("--protocol", "single_source", "--source_envs", "plain", "--algorithms", "LP", "--jobs", "1")


def sweep(command, tmp_path, *words, **options):
    """A sweep of one run."""
    named = [word for word in SMALL if word not in ("--skip_model_save", "--single_test_envs")]
    return Terminal(
        "domainbed_ext.sweep", command, *named, *SWEEP, "--output_dir", tmp_path / "sweep", *words, **options
    )


def test_a_sweep_from_its_launch_to_its_tables(tmp_path):
    validated = sweep("validate", tmp_path).end()
    assert validated.code == 0 and "checking" in validated.screen and "timing" in validated.screen
    launched = sweep("launch", tmp_path).end()
    assert launched.code == 0
    assert re.search(
        r"1 of 1 run: dataset=DigitsShift .*: done in \d+ s, tested on blended: ", unwrapped(launched.screen)
    )
    assert "1/1 runs" in launched.screen and "index.html" in launched.screen
    (folder,) = (path.parent for path in (tmp_path / "sweep").glob("*/done"))
    assert_clean(folder / "out.txt", folder / "err.txt", *(tmp_path / "sweep" / "tables").glob("results.*"))
    for command in ("status", "retry", "delete_incomplete", "cancel"):
        assert sweep(command, tmp_path).end().code == 0, command
    watched = sweep("status", tmp_path, "--watch").end()
    assert watched.code == 0 and "100.0 %" in watched.screen
    evaluated = run("domainbed_ext.evaluate", "--run", folder)
    assert evaluated.code == 0 and "evaluating" in evaluated.screen and "as recorded" in evaluated.screen
    collected = run("domainbed_ext.collect_results", "--input_dir", tmp_path / "sweep", out=tmp_path / "piped")
    assert collected.code == 0
    assert_clean(tmp_path / "piped")
    assert_hear_ctrl_c_while_they_read(folder, tmp_path)


def assert_hear_ctrl_c_while_they_read(folder, tmp_path):
    """Commands on a finished run, whose records never come: they are a pipe that somebody holds open."""
    records = folder / "results.jsonl"
    records.unlink()
    os.mkfifo(records)
    for start in (
        *(lambda command=command: sweep(command, tmp_path) for command in ("status", "validate", "retry", "launch")),
        lambda: Terminal("domainbed_ext.evaluate", "--run", folder),
        lambda: Terminal("domainbed_ext.collect_results", "--input_dir", tmp_path / "sweep"),
    ):
        held = []

        def reads(_, held=held):
            with contextlib.suppress(OSError):  # nobody has opened it yet
                held.append(os.open(records, os.O_WRONLY | os.O_NONBLOCK))
            return held

        started = start().wait_for(reads)
        started.type("\x03")
        started.wait(10)
        os.close(held[0])  # a read that began just after the signal came ends only now, as one of a file would
        assert_stopped(started.end(), 130, "interrupted: run the same command again")


def test_a_question_is_seen_wherever_output_goes_and_ctrl_d_is_no(tmp_path):
    words = [word for word in SMALL if word != "--skip_confirmation"]
    place = ("--algorithms", "LP", "--output_dir", tmp_path / "sweep")
    asked = Terminal("domainbed_ext.sweep", "launch", *words, *place, out=tmp_path / "piped")
    asked.wait_for(r"Launch 4 runs\? \(y/n\) ").type("\x04")
    ended = asked.end()
    assert ended.code == 0 and "Traceback" not in ended.screen
    assert (tmp_path / "piped").read_text().endswith("Nothing launched.\n")


def unwrapped(screen):
    """Lines that were broken where the terminal ends, as one."""
    return re.sub(r"(?<=\S)\n(?=\S)| \n", " ", screen)


def test_a_launch_hears_ctrl_c_and_so_does_a_watch(tmp_path):
    launched = sweep("launch", tmp_path, *ENDLESS, "--save_steps", "5", out=tmp_path / "piped")
    (job,) = (path.parent for path in wait_for_some((tmp_path / "sweep"), "*/checkpoint_*", launched))
    watched = sweep("status", tmp_path, *ENDLESS, "--watch").wait_for("1 running")
    watched.type("\x03")
    assert_stopped(watched.end(), 130, "stopped watching: the runs continue\n")
    launched.type("\x03")
    sentence = "interrupted: 1 interrupted; run the same command again to resume\n"
    assert_stopped(launched.end(), 130, sentence)
    assert_clean(tmp_path / "piped", job / "out.txt", job / "err.txt")


def wait_for_some(folder, pattern, terminal):
    terminal.wait_for(lambda _: list(folder.glob(pattern)))
    return list(folder.glob(pattern))[:1]


@pytest.fixture
def many_images(tmp_path):
    """A folder of domains whose images take minutes to decode: a file under many names."""
    first = tmp_path / "first.png"
    Image.new("RGB", (6000, 6000)).save(first)
    for domain in "ab":
        for label in ("dog", "house"):
            folder = tmp_path / "data" / domain / label
            folder.mkdir(parents=True)
            for number in range(500):
                os.link(first, folder / f"{number}.png")
    return tmp_path / "data"


def busy(terminal):
    """Whether its helpers have been started; from then on Ctrl-C reaches them too."""
    return len(psutil.Process(terminal.process.pid).children()) >= 2


CACHE = ("domainbed_ext.cache", "build", "--dataset", "ImageFolderDomains", "--data_dir")
PREPARE = ("domainbed_ext.prepare", "ImageFolderDomains", "--verify", "--decode", "--data_dir")


@pytest.mark.parametrize(
    ("words", "at"),
    [
        ((*CACHE, "{}", "--cache_dir", "{}/cache", "--workers", "1"), "decoding"),
        ((*CACHE, "{}", "--cache_dir", "{}/cache", "--workers", "2"), busy),
        ((*PREPARE, "{}", "--workers", "2"), busy),
    ],
)
def test_reading_images_hears_ctrl_c(many_images, words, at):
    assert_stopped(interrupted(*(word.format(many_images) for word in words), at=at), 130, RESUME)


def test_images_are_read_with_a_bar(tmp_path):
    make_domains(tmp_path / "data", ("a", "b"), images=4)
    words = (tmp_path / "data", "--cache_dir", tmp_path / "cache", "--workers", "2", "--image_size", "14")
    built = run(*CACHE, *words)
    assert built.code == 0 and "16/16 images" in built.screen
    again = run(*CACHE, *words)
    assert again.code == 0 and "images/s" not in again.screen and "16/16" not in again.screen  # nothing was decoded
    verified = run(*PREPARE, tmp_path / "data", out=tmp_path / "piped")
    assert verified.code == 0 and "16/16 images" in verified.screen
    assert_clean(tmp_path / "piped")
    listed = run("domainbed_ext.cache", "list", "--cache_dir", tmp_path / "cache", out=tmp_path / "listed")
    assert listed.code == 0
    assert_clean(tmp_path / "listed")


STAGES = ("domainbed_ext.bench", "stages", "--backbone", "test_vit", "--weights", "none", "--images", "8")
PRETRAIN = ("domainbed_ext.pretrain", "--batch_size", "8")
KERNELS = (
    "vitlorafa.bench",
    "step",
    "--models",
    "test_vit",
    "--methods",
    "floor",
    "B-folded",
    "--batch_size",
    "2",
    "--warmup",
    "0",
)


def test_measuring_ends_and_hears_ctrl_c(pacs_like, tmp_path):
    place = ("--data_dir", pacs_like, "--output_dir", tmp_path / "out", "--rounds")
    ended = run(*STAGES, *place, "1")
    assert ended.code == 0 and "calls" in ended.screen and "written: " in ended.screen
    assert_clean(*(tmp_path / "out").iterdir())
    assert_stopped(interrupted(*STAGES, *place, "1000000", at=r"[1-9]\d*/\d[\d,]* calls"), 130, AGAIN)


def test_pretraining_ends_and_hears_ctrl_c(tmp_path):
    ended = run(*PRETRAIN, "--steps", "2", "--out", tmp_path / "ended.safetensors")
    assert ended.code == 0 and "2/2 steps" in ended.screen and "glyph accuracy" in ended.screen
    words = (*PRETRAIN, "--steps", "100000", "--out", tmp_path / "stopped.safetensors")
    assert_stopped(interrupted(*words, at=r"[1-9]\d*/100,000 steps"), 130, AGAIN)
    assert not (tmp_path / "stopped.safetensors").exists()


def test_the_librarys_measurements_end_and_hear_ctrl_c(tmp_path):
    words = (*KERNELS, "--output_dir", tmp_path / "out", "--repeats")
    ended = run(*words, "1")
    assert ended.code == 0 and "bench" not in ended.screen.splitlines()[0] and "written to " in ended.screen
    assert_clean(*(path for path in (tmp_path / "out").iterdir() if path.suffix != ".png"))
    stopped = interrupted(*words, "1000000", at=r"[1-9]\d*/\d+")
    assert_stopped(stopped, 130, "interrupted: finished measurements are in ")
