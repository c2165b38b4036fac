import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.folder import RunFolder, State, load_records

ARGS = {"dataset": "PACS", "algorithm": "BA", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0}
RECORD = {"args": ARGS, "step": 0}


def make_run(path, done=True, records=(RECORD,)):
    folder = RunFolder(path)
    folder.start()
    for record in records:
        folder.append(record)
    if done:
        folder.finish()
    return folder


def test_states_are_read_from_the_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.state is State.NOT_LAUNCHED
    with folder.claim() as claim:
        assert folder.state is State.RUNNING
        folder.start()
    assert folder.state is State.INTERRUPTED
    with folder.claim() as claim:
        folder.fail("the disk is full", exit_code=1)
        claim.ended = "failed"
    assert folder.state is State.FAILED
    assert folder.failure() == "the disk is full"
    reason = json.loads((folder.path / "failed").read_text())
    assert reason == {
        "error": "the disk is full", "exit_code": 1, "log": str(folder.path / "err.txt"), "attempt": 2
    }  # fmt: skip
    with folder.claim():
        folder.start()
        folder.finish()
        assert folder.state is State.DONE
    assert folder.state is State.DONE


def test_a_fresh_start_drops_what_an_attempt_left(tmp_path):
    folder = make_run(tmp_path / "run", done=False)
    (folder.path / "selected").mkdir()
    (folder.path / "checkpoint_00000003.safetensors").touch()
    (folder.path / "out.txt").touch()
    folder.start()
    assert [path.name for path in folder.path.iterdir()] == ["out.txt"]  # the logs of all attempts are kept


def test_a_run_that_goes_on_has_the_records_it_had(tmp_path):
    folder = make_run(tmp_path / "run", done=False, records=[{**RECORD, "step": step} for step in range(3)])
    folder.fail("the disk is full")
    (folder.path / "selected").mkdir()
    folder.start(folder.lines()[:2])
    assert [record["step"] for record in folder.records()] == [0, 1]
    assert folder.state is State.INTERRUPTED and (folder.path / "selected").is_dir()


def test_a_record_is_seen_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", done=False)
    before = folder.lines()

    def torn(path, data):
        with path.open("wb") as file:
            file.write(data[:-10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(OSError, match="No space left"):
        folder.append({**RECORD, "step": 1})
    assert folder.lines() == before
    assert sorted(path.name for path in folder.path.iterdir()) == ["results.jsonl"]


def test_records_are_sorted_json_lines(tmp_path):
    folder = make_run(tmp_path / "run", records=[{"step": 1, "args": {**ARGS, "a": 2}}])
    line = (folder.path / "results.jsonl").read_text()
    assert line == (
        '{"args": {"a": 2, "algorithm": "BA", "dataset": "PACS", "hparams_seed": 0, "test_envs": [0], '
        '"trial_seed": 0}, "step": 1}\n'
    )
    assert folder.records() == [{**json.loads(line), "run": "run"}]


def test_records_that_cannot_be_opened_are_named_and_the_others_read(tmp_path):
    make_run(tmp_path / "a")
    path = make_run(tmp_path / "b").path / "results.jsonl"
    path.write_text("")
    with pytest.raises(BenchmarkError, match="results.jsonl is empty: delete the run's folder and launch"):
        load_records(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(BenchmarkError, match=r"results.jsonl cannot be read \(.+\)"):
        load_records(tmp_path)
    unreadable = []
    assert [record["run"] for record in load_records(tmp_path, unreadable=unreadable)] == ["a"]
    assert len(unreadable) == 1


def test_unfinished_runs_are_left_out_unless_asked_for(tmp_path):
    make_run(tmp_path / "b")
    make_run(tmp_path / "a", done=False)
    assert [record["run"] for record in load_records(tmp_path)] == ["b"]
    assert [record["run"] for record in load_records(tmp_path, unfinished=True)] == ["a", "b"]


def test_what_is_printed_goes_to_the_log_as_well(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    with folder.log():
        print("trained")
        print("careful", file=sys.stderr)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("trained\n", "careful\n")
    assert (folder.path / "out.txt").read_text() == "trained\n"
    assert (folder.path / "err.txt").read_text() == "careful\n"


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"step": 1}', '"step"', '{"step": 1, "args": {"test_envs": [0]}}', "\x00"]
)
def test_a_line_that_is_no_record_gets_a_sentence(tmp_path, line):
    folder = make_run(tmp_path / "run")
    with (folder.path / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(BenchmarkError, match=r"results.jsonl line 2 is not a record"):
        load_records(tmp_path)


def test_runs_that_cannot_be_read_are_left_out_and_named_where_that_is_asked_for(tmp_path):
    for name in "abc":
        make_run(tmp_path / name)
    (tmp_path / "b" / "results.jsonl").write_bytes(b'{"args": {"test_\xff')
    unreadable = []
    assert [record["run"] for record in load_records(tmp_path, unreadable=unreadable)] == ["a", "c"]
    assert len(unreadable) == 1 and "b/results.jsonl line 1 is not a record" in unreadable[0]
    for name in "ac":
        (tmp_path / name / "results.jsonl").write_text("[]")
    with pytest.raises(BenchmarkError, match=r"no run in .* can be read: .* is not a record"):
        load_records(tmp_path, unreadable=[])


def test_a_log_that_cannot_be_written_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    folder = make_run(tmp_path / "run")
    with folder.log():
        monkeypatch.setattr(sys.stdout.file, "write", lambda text: (_ for _ in ()).throw(OSError(28, "full")))
        print("trained")
    assert capsys.readouterr().out == "trained\n"


def test_logs_are_as_a_terminal_would_be_left(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    with folder.log():
        print("\x1b[1mbold\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07")
        for share in (0, 50, 100):
            print(f"\r{share} %\x1b[K", end="", file=sys.stderr)
        print("\nsaved\r", file=sys.stderr)
        print("\x1b[3", end="")
        print("1mhalf a code", end="")
    assert (folder.path / "out.txt").read_text() == "bold link\nhalf a code\n"
    assert (folder.path / "err.txt").read_text() == "100 %\nsaved\n"
    assert capsys.readouterr().out.startswith("\x1b[1mbold")  # the terminal has it all


def test_a_console_that_is_made_within_a_log_draws_beneath_it(tmp_path, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    folder = make_run(tmp_path / "run")
    with Progress(console=Console(file=screen, force_terminal=True)) as outer, folder.log():
        inner = Console(stderr=True, force_terminal=True)
        inner.print("drawn")  # each would call the other without end
        outer.add_task("bar")
        print("careful", file=sys.stderr)
    assert "drawn" in screen.getvalue() and "careful" in screen.getvalue()
    assert (folder.path / "err.txt").read_text() == "careful\n"


def test_nothing_to_load_gets_a_sentence(tmp_path):
    with pytest.raises(BenchmarkError, match="no folder"):
        load_records(tmp_path / "none")
    with pytest.raises(BenchmarkError, match="no run in"):
        load_records(tmp_path)
    make_run(tmp_path / "run", done=False)
    with pytest.raises(BenchmarkError, match="run is itself a run: give --input_dir the folder that holds it"):
        load_records(tmp_path / "run")
    with pytest.raises(BenchmarkError, match="none of the 1 runs in .* is finished"):
        load_records(tmp_path)


def test_an_unwritable_place_gets_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="cannot write to .* give another --output_dir"):
        RunFolder(tmp_path / "file" / "run").start()
