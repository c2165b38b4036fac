import json
import sys

import pytest

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.records import RunFolder, State, load_records

RECORD = {"args": {"test_envs": [0]}, "step": 0}


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
    folder.start()
    assert folder.state is State.INCOMPLETE
    folder.fail("the disk is full", exit_code=1)
    assert folder.state is State.FAILED
    assert folder.failure() == "the disk is full"
    folder.start()
    assert folder.state is State.INCOMPLETE
    folder.finish()
    assert folder.state is State.DONE


def test_a_fresh_start_drops_what_an_attempt_left(tmp_path):
    folder = make_run(tmp_path / "run", done=False)
    (folder.path / "selected").mkdir()
    folder.start()
    assert sorted(path.name for path in folder.path.iterdir()) == ["out.txt"]


def test_records_are_sorted_json_lines(tmp_path):
    folder = make_run(tmp_path / "run", records=[{"step": 1, "args": {"test_envs": [1], "a": 2}}])
    line = (folder.path / "results.jsonl").read_text()
    assert line == '{"args": {"a": 2, "test_envs": [1]}, "step": 1}\n'
    assert folder.records() == [{**json.loads(line), "run": "run"}]


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


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', '"step"'])
def test_a_line_that_is_no_record_gets_a_sentence(tmp_path, line):
    folder = make_run(tmp_path / "run")
    with (folder.path / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(BenchmarkError, match=r"results.jsonl line 2 is not a record"):
        load_records(tmp_path)


def test_nothing_to_load_gets_a_sentence(tmp_path):
    with pytest.raises(BenchmarkError, match="no folder"):
        load_records(tmp_path / "none")
    with pytest.raises(BenchmarkError, match="no run in"):
        load_records(tmp_path)
    make_run(tmp_path / "run", done=False)
    with pytest.raises(BenchmarkError, match="none of the 1 runs in .* is finished"):
        load_records(tmp_path)


def test_an_unwritable_place_gets_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchmarkError, match="cannot write to .* give another --output_dir"):
        RunFolder(tmp_path / "file" / "run").start()
