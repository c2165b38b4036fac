"""Archives: what a published file of a sweep's runs has; that unpacked runs give the same tables and comparisons."""

import io
import json
import lzma
import re
import tarfile

import pytest
import torch

from domainbed_ext import archive, collect_results, compare, evaluate
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.archived_predictions import decode, encode
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.predictions import Part, Predictions, find_predictions, load_predictions
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


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a sweep of two methods and two trials on the invented data set."""
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    arguments = ["--datasets", "DigitsShift", "--algorithms", "BOnly", "LP"]
    arguments += ["--hparams", "batch_size=4", "--steps", "2", "--n_hparams", "1", "--n_trials", "2"]
    arguments += ["--protocol", "single_source", "--source_envs", "blended", "--output_dir", str(folder), "--jobs", "1"]
    assert command.main(["launch", *arguments]) == 0
    return folder, arguments


def pack(folder, tmp_path):
    return archive.pack(folder, tmp_path / "archive")


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
        assert difference.abs().max() < 0.0105  # half a percent; a little more where the class would not be the highest
        assert torch.equal(other.logits.softmax(1).sum(1).round(), torch.ones(len(part)))


def test_outputs_that_are_not_finite_stay_wrong():
    before = make_predictions()
    before.parts["A"].logits[3] = torch.nan
    after = decode(encode(before))
    assert after.parts["A"].is_right.isnan().nonzero().tolist() == [[3]]


def test_a_file_is_much_smaller_than_that_of_the_run(sweep, tmp_path):
    folder, _ = sweep
    packed = pack(folder, tmp_path)
    logits = sum(find_predictions(RunFolder(path.parent)).stat().st_size for path in folder.glob("*/done"))
    assert packed.size < logits / 4 and packed.n_runs == 4 and packed.without_predictions == 0
    assert [path.name for path in packed.paths] == ["trial_0.tar.xz", "trial_1.tar.xz"]


def test_unpacked_runs_are_finished_and_give_the_same_comparison(sweep, tmp_path, capsys):
    folder, arguments = sweep
    packed = pack(folder, tmp_path)
    assert archive.unpack(tmp_path / "archive", tmp_path / "new") == archive.Unpacked(4, 0)
    assert archive.unpack(tmp_path / "archive", tmp_path / "new") == archive.Unpacked(0, 4)
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
    again = archive.pack(tmp_path / "new", tmp_path / "again")
    assert [path.read_bytes() for path in again.paths] == [path.read_bytes() for path in packed.paths]
    arguments = [*arguments[: arguments.index("--output_dir")], "--output_dir", str(tmp_path / "new"), "--jobs", "1"]
    capsys.readouterr()
    assert command.main(["launch", *arguments]) == 0
    assert "4 of 4" not in capsys.readouterr().out  # nothing ran
    assert not list((tmp_path / "new").glob("*/attempt_*"))


def test_a_launch_runs_what_the_archive_has_not(sweep, tmp_path):
    folder, arguments = sweep
    pack(folder, tmp_path)
    (tmp_path / "archive" / "trial_1.tar.xz").unlink()
    archive.unpack(tmp_path / "archive", tmp_path / "new")
    arguments = [*arguments[: arguments.index("--output_dir")], "--output_dir", str(tmp_path / "new"), "--jobs", "1"]
    assert command.main(["launch", *arguments]) == 0
    assert len(list((tmp_path / "new").glob("*/done"))) == 4
    assert len(list((tmp_path / "new").glob("*/attempt_1.json"))) == 2
    for path in folder.glob("*/done"):  # the same run, here and there
        here, there = load_predictions(path.parent), load_predictions(tmp_path / "new" / path.parent.name)
        assert here.accuracies() == there.accuracies()


def test_no_path_of_the_machine_is_packed(sweep, tmp_path):
    folder, _ = sweep
    for path in pack(folder, tmp_path).paths:
        content = lzma.decompress(path.read_bytes())
        assert str(folder.parent).encode() not in content and str(tmp_path).encode() not in content
        with tarfile.open(path) as tar:
            assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}


def test_the_same_runs_give_the_same_bytes(sweep, tmp_path):
    folder, _ = sweep
    first = [path.read_bytes() for path in pack(folder, tmp_path).paths]
    assert [path.read_bytes() for path in pack(folder, tmp_path).paths] == first


def test_runs_that_would_be_lost_are_refused(sweep, tmp_path):
    folder, _ = sweep
    pack(folder, tmp_path)
    archive.unpack(tmp_path / "archive", tmp_path / "new")
    lost = sorted(path.parent.name for path in (tmp_path / "new").glob("*/done"))[0]
    (tmp_path / "new" / lost / "done").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "archive").iterdir()}
    with pytest.raises(BenchmarkError, match=f"has 1 runs that .* has not \\({lost} first\\): unpack it into"):
        archive.pack(tmp_path / "new", tmp_path / "archive")
    assert {path: path.read_bytes() for path in (tmp_path / "archive").iterdir()} == before


def test_runs_without_predictions_are_packed_with_their_records(sweep, tmp_path, capsys):
    folder, _ = sweep
    pack(folder, tmp_path)
    archive.unpack(tmp_path / "archive", tmp_path / "new")
    for path in (tmp_path / "new").glob("*/predictions_selected.safetensors"):
        path.unlink()
    assert archive.main(["pack", "--input_dir", str(tmp_path / "new"), "--output_dir", str(tmp_path / "small")]) == 0
    assert "4 of them keep no predictions" in capsys.readouterr().out
    archive.unpack(tmp_path / "small", tmp_path / "smaller")
    assert all(RunFolder(path.parent).state is State.DONE for path in (tmp_path / "smaller").glob("*/results.jsonl"))


def test_unpacked_runs_have_no_model(sweep, tmp_path, capsys):
    folder, _ = sweep
    pack(folder, tmp_path)
    archive.unpack(tmp_path / "archive", tmp_path / "new")
    run = next((tmp_path / "new").glob("*/done")).parent
    with pytest.raises(BenchmarkError, match="saved no model: run it again"):
        evaluate.main(["--run", str(run)])


def _tar(names, content=b"{}"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


RUN = "0" * 32


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not compressed", ""),
        (_tar(["../evil"]), "'../evil' is no file of a run"),
        (_tar([f"{RUN}/../../evil"]), "is no file of a run"),
        (_tar([f"{RUN}/done"]), "is no file of a run"),
        (_tar([f"{RUN}/predictions.safetensors"]), "has no records"),
        (_tar([f"{RUN}/results.jsonl", f"{RUN}/predictions.safetensors"]), ""),
        (_tar([f"{RUN}/results.jsonl"])[:-30], ""),
    ],
)
def test_a_file_that_is_none_is_refused_and_writes_nothing(tmp_path, content, why):
    (tmp_path / "trial_0.tar.xz").write_bytes(content)
    with pytest.raises(BenchmarkError, match=f"trial_0.tar.xz cannot be read \\(.*{re.escape(why)}.*: get it again"):
        archive.unpack(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path.parent / "evil").exists()


def test_a_folder_without_an_archive_is_named(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no trial_\*.tar.xz in .*: give --input_dir the folder of an archive"):
        archive.unpack(tmp_path, tmp_path / "new")


def test_paths_in_records_keep_their_last_part(sweep, tmp_path):
    folder, _ = sweep
    pack(folder, tmp_path)
    archive.unpack(tmp_path / "archive", tmp_path / "new")
    for path in (tmp_path / "new").glob("*/results.jsonl"):
        record = json.loads(path.read_text().splitlines()[-1])
        assert record["args"]["output_dir"] == path.parent.name
