"""Packed runs: what a file of them has, and that unpacked runs give the same tables and comparisons."""

import io
import itertools
import json
import lzma
import re
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from domainbed_ext import collect_results, compare, evaluate, train
from domainbed_ext import pack as packing
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.packed_predictions import decode, encode
from domainbed_ext.runs.predictions import Part, Predictions, find_predictions, load_predictions, save_predictions
from domainbed_ext.sweep import command

CLASSES = 7


def make_predictions(n=500, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    names = (*(f"dog/{number}.png" for number in range(n - 1)), "dog/ü\udcff.png")

    def part():
        return Part(
            names,
            (scale * torch.randn(n, CLASSES, generator=generator)).half().float(),
            torch.randint(CLASSES, (n,), generator=generator),
            torch.rand(n, generator=generator) < 0.2,
        )

    return Predictions(7, "best", {"A": part(), "C": part()}, tuple("abcdefg"))


RUNS = [f"{number:032x}" for number in range(4)]
OPTIONS = ["--protocol", "single_source", "--source_envs", "blended", "--hparams", "batch_size=4", "--steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a sweep of two methods and two trials on DigitsShift."""
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    for number, (trial, algorithm) in enumerate(itertools.product("01", ("BOnly", "LP"))):
        words = ["--algorithm", algorithm, "--trial_seed", trial, "--output_dir", str(folder / RUNS[number])]
        assert train.main([*OPTIONS, "--checkpoint_freq", "0", "--train_eval_share", "0.1", *words]) == 0
    return folder


def launch(folder):
    """The same runs, launched as a sweep."""
    options = [*OPTIONS, "--datasets", "DigitsShift", "--algorithms", "BOnly", "LP", "--n_hparams", "1", "--jobs", "1"]
    return command.main(["launch", *options, "--n_trials", "2", "--output_dir", str(folder)])


def pack(folder, tmp_path):
    return packing.pack(folder, tmp_path / "packed")


def unpack(tmp_path, to="new"):
    return packing.unpack(tmp_path / "packed", tmp_path / to)


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, 3.0, 30.0])
def test_of_predictions_everything_but_the_logits_stays(scale):
    before = make_predictions(scale=scale)
    after = decode(encode(before))
    assert after.accuracies() == before.accuracies()
    assert (after.step, after.selection, after.classes) == (before.step, before.selection, before.classes)
    for label, part in before.parts.items():
        other = after.parts[label]
        assert other.names == part.names
        for name in ("labels", "is_held_out", "predicted"):
            assert torch.equal(getattr(other, name), getattr(part, name))
        difference = other.logits.softmax(1).max(1).values - part.logits.softmax(1).max(1).values
        assert difference.abs().max() < 0.0105  # half a point; a little more where another class would be higher
        assert torch.equal(other.logits.softmax(1).sum(1).round(), torch.ones(len(part)))


def test_outputs_that_are_not_finite_stay_wrong():
    before = make_predictions()
    before.parts["A"].logits[3] = torch.nan
    after = decode(encode(before))
    assert after.parts["A"].is_right.isnan().nonzero().tolist() == [[3]]


def test_a_file_is_much_smaller_than_that_of_the_run(folder, tmp_path):
    packed = pack(folder, tmp_path)
    logits = sum(find_predictions(RunFolder(path.parent)).stat().st_size for path in folder.glob("*/done"))
    assert packed.size < logits / 4 and packed.n_runs == 4 and packed.n_without_predictions == 0
    assert [path.name for path in packed.paths] == ["DigitsShift_trial_0.tar.xz", "DigitsShift_trial_1.tar.xz"]


def test_unpacked_runs_are_finished_and_give_the_same_comparison(folder, tmp_path, capsys):
    packed = pack(folder, tmp_path)
    assert unpack(tmp_path) == packing.Unpacked(4, 0, [])
    assert unpack(tmp_path) == packing.Unpacked(0, 4, [])
    tables = []
    for root in (folder, tmp_path / "new"):
        compare.main(["--input_dir", str(root), "--pairs", "BOnly:LP", "--images", "required"])
        collect_results.main(["--input_dir", str(root)])
        tables.append(
            [
                (root / "tables" / name).read_bytes()
                for name in ("pairs.csv", "results.csv", "confusion.csv", "agreement.csv")
            ]
        )
    assert tables[0] == tables[1]
    again = packing.pack(tmp_path / "new", tmp_path / "again")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in packed.paths]


@pytest.mark.slow
def test_a_launch_runs_what_was_not_packed(tmp_path):
    assert launch(tmp_path / "here") == 0
    packing.pack(tmp_path / "here", tmp_path / "packed")
    (tmp_path / "packed" / "DigitsShift_trial_1.tar.xz").unlink()
    unpack(tmp_path, "there")
    assert launch(tmp_path / "there") == 0
    done = [path.parent.name for path in (tmp_path / "there").glob("*/done")]
    assert len(done) == 4 and len(list((tmp_path / "there").glob("*/attempt_1.json"))) == 2
    for name in done:  # the same run, here and there
        here, there = (load_predictions(tmp_path / place / name) for place in ("here", "there"))
        assert here.accuracies() == there.accuracies()


def test_no_path_of_the_machine_is_packed(folder, tmp_path):
    for path in pack(folder, tmp_path).paths:
        content = lzma.decompress(path.read_bytes())
        assert str(folder.parent).encode() not in content and str(tmp_path).encode() not in content
        with tarfile.open(path) as tar:
            assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}


@pytest.mark.parametrize("dataset", ["../evil", "/evil", "C:evil", ".evil"])
def test_a_data_set_that_cannot_name_a_file_is_refused(tmp_path, dataset):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "done").touch()
    (run / "results.jsonl").write_bytes(RECORD.replace(b'"D"', json.dumps(dataset).encode()))
    with pytest.raises(BenchmarkError, match="a data set .*evil': it cannot name a file"):
        packing.pack(tmp_path / "runs", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_the_same_runs_give_the_same_bytes(folder, tmp_path):
    first = [path.read_bytes() for path in pack(folder, tmp_path).paths]
    assert [path.read_bytes() for path in pack(folder, tmp_path).paths] == first


@pytest.mark.parametrize("lost", ["done", "predictions_selected.safetensors"])
def test_what_would_be_lost_is_refused_and_no_file_is_replaced(folder, tmp_path, lost):
    pack(folder, tmp_path)
    unpack(tmp_path)
    (tmp_path / "new" / RUNS[-1] / lost).unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    name = "predictions_selected.safetensors"
    with pytest.raises(BenchmarkError, match=f"trial_1.tar.xz would lose {RUNS[-1]}/{name}, which .* has not"):
        packing.pack(tmp_path / "new", tmp_path / "packed")
    assert {path: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == before


def test_unfinished_runs_are_left_as_they_are_and_named(folder, tmp_path, capsys):
    pack(folder, tmp_path)
    (tmp_path / "new" / RUNS[0]).mkdir(parents=True)
    words = ["--unpack", "--input_dir", str(tmp_path / "packed"), "--output_dir", str(tmp_path / "new")]
    with pytest.raises(BenchmarkError, match=f"1 runs are unfinished in .* as they are \\({RUNS[0]} first\\): delete"):
        packing.main(words)
    assert "unpacked 3 runs" in capsys.readouterr().out
    assert not list((tmp_path / "new" / RUNS[0]).iterdir())
    (tmp_path / "new" / RUNS[0]).rmdir()
    assert packing.main(words) == 0
    assert "unpacked 1 runs" in (output := capsys.readouterr().out) and "3 were there already" in output
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == RUNS  # and nothing temporary


def test_a_run_that_a_launch_starts_meanwhile_is_left_alone(folder, tmp_path, monkeypatch):
    pack(folder, tmp_path)
    finish = RunFolder.finish

    def start(run):
        finish(run)
        target = tmp_path / "new" / run.path.name
        target.mkdir()
        (target / "attempt_1.json").write_text("{}")

    monkeypatch.setattr(RunFolder, "finish", start)
    unpacked = unpack(tmp_path)
    assert unpacked.n_new == 0 and sorted(unpacked.unfinished) == RUNS
    assert all([each.name for each in path.iterdir()] == ["attempt_1.json"] for path in (tmp_path / "new").iterdir())


def test_predictions_of_the_last_step_and_what_is_evaluated_later_are_packed(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder / RUNS[0], copy / RUNS[0])
    save_predictions(copy / RUNS[0], replace(make_predictions(), selection="last", step=9))
    (copy / RUNS[0] / "strengths.jsonl").write_text('{"step": 1, "strength": 0.5}\n')
    RunFolder(copy / RUNS[0]).diverge(1)
    pack(copy, tmp_path)
    unpack(tmp_path)
    there = RunFolder(tmp_path / "new" / RUNS[0])
    assert load_predictions(there, "last").accuracies() == make_predictions().accuracies()
    assert load_predictions(there, "last").step == 9 and load_predictions(there).step == 1
    assert there.diverged and (there.path / "strengths.jsonl").exists()


def test_derived_runs_are_left_out_with_a_line(folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copytree(folder / RUNS[0], copy / "derived" / "soup")
    assert packing.main(["--input_dir", str(copy), "--output_dir", str(tmp_path / "packed")]) == 0
    assert "left out: 1 runs that were derived from others" in capsys.readouterr().out
    assert unpack(tmp_path).n_new == 4


def test_runs_without_predictions_are_packed_with_their_records(folder, tmp_path, capsys):
    pack(folder, tmp_path)
    unpack(tmp_path)
    for path in (tmp_path / "new").glob("*/predictions_selected.safetensors"):
        path.unlink()
    assert packing.main(["--input_dir", str(tmp_path / "new"), "--output_dir", str(tmp_path / "small")]) == 0
    assert "4 of them keep no predictions" in capsys.readouterr().out
    packing.unpack(tmp_path / "small", tmp_path / "smaller")
    assert all(RunFolder(path.parent).state is State.DONE for path in (tmp_path / "smaller").glob("*/results.jsonl"))


def test_unpacked_runs_have_no_model(folder, tmp_path, capsys):
    pack(folder, tmp_path)
    unpack(tmp_path)
    run = next((tmp_path / "new").glob("*/done")).parent
    with pytest.raises(BenchmarkError, match="saved no model: run it again"):
        evaluate.main(["--run", str(run)])


def _tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _predictions(**facts):
    """The content of a file of predictions, some of whose facts were changed."""
    tensors = load(encode(make_predictions(n=5)))
    for name, value in facts.items():
        if name.startswith("env0"):
            tensors[name] = value
        else:
            changed = json.loads(tensors["facts"].numpy().tobytes()) | {name: value}
            tensors["facts"] = torch.frombuffer(bytearray(json.dumps(changed).encode()), dtype=torch.uint8)
    return save(tensors)


def _sparse():
    """A tar that claims to have a gigabyte of zeros in a file."""
    info = tarfile.TarInfo(f"{RUNS[0]}/results.jsonl")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (1 << 30)
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    return lzma.compress(bytes(header) + bytes(1024))


RECORDS, SELECTED = f"{RUNS[0]}/results.jsonl", f"{RUNS[0]}/predictions_selected.safetensors"
RECORD = (
    b'{"step": 1, "args": {"dataset": "D", "algorithm": "LP", "test_envs": [0], "trial_seed": 0, "hparams_seed": 0}}'
)


def _run(predictions):
    return _tar({RECORDS: RECORD, SELECTED: predictions})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not compressed", ""),
        (_tar({"../evil": b"{}"}), "'../evil' is not a file of a run"),
        (_tar({f"{RUNS[0]}/../../evil": b"{}"}), "is not a file of a run"),
        (_tar({".hidden/results.jsonl": b"{}"}), "is not a file of a run"),
        (_tar({"C:/results.jsonl": b"{}"}), "is not a file of a run"),
        (_tar({"a\n\x1b[31m/results.jsonl": b"{}"}), "is not a file of a run"),
        (_tar({"derived/results.jsonl": b"{}"}), "is not a file of a run"),
        (_tar({f"{'x' * 300}/results.jsonl": RECORD}), "is not a file of a run"),
        (_tar({f"{RUNS[0]}/done": b"{}"}), "is not a file of a run"),
        (_sparse(), "is not a file of a run"),
        (_tar({SELECTED: _predictions()}), "has no records"),
        (_tar({RECORDS: b""}), "has no records"),
        (_tar({RECORDS: b"{}"}), "is not a record"),
        (_tar({RECORDS: RECORD})[:-30], ""),
        (_run(b"{}"), ""),
        (_run(_predictions(format=2)), "needs a later version of domainbed_ext"),
        (_run(_predictions(selection="foo")), "neither the selected nor the last step"),
        (_run(_predictions(classes=[])), "no classes"),
        (_run(_predictions(classes=["one"])), "a class that is none of the data set's"),
        (_run(_predictions(environments=["A", "C", "P"])), "env2.predicted"),
        (_run(_predictions(**{"env0.labels": torch.zeros(4)})), "as many names as predictions"),
    ],
)
def test_a_file_that_is_damaged_is_refused_and_writes_nothing(tmp_path, content, why):
    (tmp_path / "D_trial_0.tar.xz").write_bytes(content)
    with pytest.raises(BenchmarkError, match=f"D_trial_0.tar.xz cannot be read \\(.*{re.escape(why)}.*: download it"):
        packing.unpack(tmp_path, tmp_path / "new")
    assert not list(tmp_path.glob("new/*")) and not list(tmp_path.glob("new/.*"))
    assert not (tmp_path.parent / "evil").exists()


def test_what_these_files_are_made_of_can_be_read(tmp_path):
    (tmp_path / "D_trial_0.tar.xz").write_bytes(_run(_predictions()))
    assert packing.unpack(tmp_path, tmp_path / "new").n_new == 1


def test_a_folder_without_packed_runs_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no \*_trial_\*.tar.xz in .*: give --input_dir a folder of packed runs"):
        packing.unpack(tmp_path, tmp_path / "new")


def test_a_file_that_would_be_too_large_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_LARGEST", 1000)
    with pytest.raises(BenchmarkError, match="would have more than 0 GiB before compression: pack fewer runs"):
        pack(folder, tmp_path)


def test_absolute_paths_keep_their_last_part_wherever_they_are(folder, tmp_path):
    copy, secret = tmp_path / "copy", "/home/me"
    shutil.copytree(folder / RUNS[0], copy / RUNS[0])
    path = copy / RUNS[0] / "results.jsonl"
    record = json.loads(path.read_text())
    record["args"] |= {
        "imports": [f"{secret}/mine.py"],
        "backbone": f"local-dir:{secret}/vit",
        "weights": "D:\\me\\vit.pt",
    }
    record["args"] |= {
        "hparams": json.dumps({"weights": f"{secret}/w.safetensors", "lr": 0.1}),
        "data_dir": "data/pacs",
    }
    record["sources"] = {f"{secret}/mine.py": "0123"}
    path.write_text(json.dumps(record))
    pack(copy, tmp_path)
    unpack(tmp_path)
    text = (tmp_path / "new" / RUNS[0] / "results.jsonl").read_text()
    assert "me" not in re.split(r"[^a-z]", text)
    there = json.loads(text)
    assert there["args"]["imports"] == ["mine.py"] and there["args"]["backbone"] == "local-dir:vit"
    assert there["args"]["weights"] == "vit.pt" and there["args"]["data_dir"] == "data/pacs"
    assert json.loads(there["args"]["hparams"]) == {"weights": "w.safetensors", "lr": 0.1}
    assert there["sources"] == {"mine.py": "0123"} and there["step"] == record["step"]
