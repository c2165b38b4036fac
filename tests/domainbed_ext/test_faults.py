"""What is done to a run, and what comes of it: each ends in the folder of a run that nothing happened to."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.system.attempts import read_latest
from domainbed_ext.system.exit_codes import ExitCode
from tests.domainbed_ext import fault_injection as faults
from tests.domainbed_ext.conftest import make_domains
from tests.domainbed_ext.fault_injection import Run, kill_at_random, outcome


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert Run(folder).end() == 0
    return outcome(folder)


def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(tmp_path, undisturbed):
    killed = kill_at_random(tmp_path / "run", seed=1, kills=4)
    assert killed >= 3
    assert outcome(tmp_path / "run") == undisturbed


def test_killed_between_its_first_steps_it_keeps_the_checkpoint_it_came_from(tmp_path):
    folder = tmp_path / "run"
    words = ["--checkpoint_freq", "0", "--steps", "400", "--save_steps", "0"]
    run = Run(folder, *words)
    run.wait_for_step(2)
    assert run.kill(signal.SIGTERM) == ExitCode.INTERRUPTED
    kept = list(folder.glob("checkpoint_*"))
    run = Run(folder, *words)
    run.wait_for_step(1)
    run.kill()
    assert kept and list(folder.glob("checkpoint_*")) == kept


@pytest.mark.nightly
def test_fifty_kills(tmp_path, undisturbed):
    killed = runs = 0
    while killed < 50:
        killed += kill_at_random(tmp_path / str(runs), seed=runs)
        assert outcome(tmp_path / str(runs)) == undisturbed
        runs += 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_makes_it_checkpoint_and_leave_with_a_code_that_says_so(tmp_path, undisturbed, number):
    folder = tmp_path / "run"
    run = Run(folder, "--save_steps", "0", "--save_minutes", "0")
    run.wait_for_step(3)
    assert run.kill(number) == ExitCode.INTERRUPTED
    assert RunFolder(folder).state is State.INTERRUPTED and list(folder.glob("checkpoint_*"))
    assert read_latest(folder).ended == "interrupted" and read_latest(folder).share >= 0.25
    assert Run(folder, "--save_steps", "0", "--save_minutes", "0").end() == 0
    assert "resumes after" in (folder / "out.txt").read_text()
    assert outcome(folder) == undisturbed


def test_a_corrupt_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, undisturbed):
    folder = tmp_path / "run"
    run = Run(folder)
    run.wait_for_step(6)
    run.kill()
    newest = max(folder.glob("checkpoint_*"))
    newest.write_bytes(newest.read_bytes()[:-9])
    assert Run(folder).end() == 0
    assert f"{newest.name} cannot be read" in (folder / "err.txt").read_text()
    assert outcome(folder) == undisturbed


def test_a_corrupt_record_line_is_mended_from_the_checkpoint(tmp_path, undisturbed):
    folder = tmp_path / "run"
    run = Run(folder)
    run.wait_for_step(7)
    run.kill()
    (folder / "results.jsonl").write_text('{"args": {"test_en')
    assert Run(folder).end() == 0
    assert outcome(folder) == undisturbed


def test_a_checkpoint_of_another_computation_is_not_gone_on_from(tmp_path, undisturbed):
    folder = tmp_path / "run"
    run = Run(folder, "--hparams", '{"lr": 0.5}')
    run.wait_for_step(4)
    assert run.kill(signal.SIGTERM) == ExitCode.INTERRUPTED
    assert Run(folder).end() == 0
    assert outcome(folder) == undisturbed


def test_without_room_for_a_checkpoint_it_goes_on_without(tmp_path, undisturbed):
    folder = tmp_path / "run"
    assert Run(folder, "--skip_model_save", before=faults.allow_only_small_files).end() == 0
    records, _, names = outcome(folder)
    assert "no checkpoint after step 1 (" in (folder / "err.txt").read_text()
    for record in records:
        del record["args"]["skip_model_save"]
    expected = [{**r, "args": {k: v for k, v in r["args"].items() if k != "skip_model_save"}} for r in undisturbed[0]]
    assert records == expected and "selected" not in names and not [name for name in names if name.startswith(".")]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_fails_in_a_sentence_and_with_room_it_goes_on(small_disk, undisturbed):
    folder, ballast = small_disk / "run", small_disk / "ballast"
    run = Run(folder)
    run.wait_for_step(2)
    assert run.kill(signal.SIGTERM) == ExitCode.INTERRUPTED
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0" * 4096)
    assert Run(folder).end() in (ExitCode.FAILED, ExitCode.BAD_INPUT)
    assert len(list(folder.glob("checkpoint_*"))) >= 1, "what was there is still there"
    ballast.unlink()
    assert Run(folder).end() == 0
    assert outcome(folder) == undisturbed


def test_a_place_that_is_read_only_gets_a_sentence(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    words = ["--steps", "1", "--output_dir", str(small_disk / "run")]
    from domainbed_ext import train
    from domainbed_ext.errors import BenchmarkError
    from domainbed_ext.runs import arguments as options

    with pytest.raises(BenchmarkError, match=r"cannot write to .* \(Read-only file system\): give another"):
        train.run(options.parse(words), print)


def test_a_run_that_hangs_is_ended_by_its_time_limit(tmp_path, undisturbed):
    folder = tmp_path / "run"
    limit = ["--time_limit", "0.2"]
    assert Run(folder, *limit, before=faults.hang_at_step_3).end() == ExitCode.FAILED
    reason = json.loads((folder / "failed").read_text())
    assert "time limit of 0.2 minutes" in reason["error"] and reason["attempt"] == 1
    assert RunFolder(folder).state is State.FAILED
    assert Run(folder).end() == 0
    assert outcome(folder) == undisturbed


def test_a_run_taken_over_by_another_writes_nothing_more(tmp_path):
    folder = tmp_path / "run"
    run = Run(folder, "--steps", "400")
    run.wait_for_step(2)
    (folder / "attempt_2.json").write_text("{}")
    run.wait_for_step(3)
    assert run.end() == ExitCode.TAKEN
    assert not (folder / "done").exists() and not (folder / "failed").exists()


def test_two_at_once_are_one_run(tmp_path, undisturbed):
    folder = tmp_path / "run"
    first = Run(folder)
    first.wait_for_step(1)
    assert Run(folder).end() == ExitCode.TAKEN
    assert first.end() == 0
    assert Run(folder).end() == 0  # it is done
    assert outcome(folder) == undisturbed
    assert [path.name for path in folder.glob("attempt_*")] == ["attempt_1.json"]


def test_an_image_that_turns_unreadable_fails_the_run_and_mended_it_goes_on(tmp_path):
    make_domains(tmp_path / "PACS")
    words = ["--dataset", "PACS", "--data_dir", str(tmp_path), "--backbone", "test_vit", "--weights", "none",
             "--hparams", '{"batch_size": 4, "image_size": 48}']  # fmt: skip
    assert Run(tmp_path / "whole", *words).end() == 0
    folder = tmp_path / "run"
    run = Run(folder, *words)
    run.wait_for_step(6)
    run.kill(signal.SIGTERM)
    images = sorted((tmp_path / "PACS" / "photo").rglob("*.png"))
    contents = [path.read_bytes() for path in images]
    for path in images:
        path.write_bytes(b"no longer an image")
    assert Run(folder, *words).end() == ExitCode.BAD_INPUT
    assert "photo" in RunFolder(folder).failure() and len(RunFolder(folder).lines()) == 2
    for path, content in zip(images, contents, strict=True):
        path.write_bytes(content)
    assert Run(folder, *words).end() == 0
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_the_folder_holds_nothing_half_made(undisturbed):
    names = undisturbed[2]
    kept = "predictions_selected.safetensors"
    assert names == ["done", "err.txt", "out.txt", kept, "results.jsonl", "selected"]
    assert {Path(name).parent.name for name in undisturbed[1] if name != kept} == {"selected"}
