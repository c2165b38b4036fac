"""A run that finished on other data is not done, and what else has changed since is told."""

import json
import shutil

import pytest

from domainbed_ext import algorithms, train
from domainbed_ext.algorithms.probe import LP
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import backbones
from domainbed_ext.runs import checkpoint, provenance, training
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep import finished, states
from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep.arguments import parse
from tests.domainbed_ext import run_states as standing
from tests.domainbed_ext.conftest import make_domains

DOMAINS = ("art", "photo", "sketch")
HPARAMS = '{"batch_size": 2, "image_size": 48}'


@pytest.fixture
def data(tmp_path):
    return make_domains(tmp_path / "data", DOMAINS, images=3, side=8)


def words(tmp_path, data, *more, command="launch", dataset="ImageFolderDomains"):
    model = ("--backbone", "test_vit", "--weights", "none", "--hparams", HPARAMS)
    return standing.words(tmp_path, "--datasets", dataset, "--data_dir", str(data), *model, *more, command=command)


def make_jobs(*args, **options):
    return sweep_jobs.make_jobs(parse(words(*args, **options)))


def done(job, **changes):
    """A finished run with the record that it would have, but for changes; None takes a fact out."""
    standing.done(job)
    facts = {**run_setup.collect_facts(run_setup.set_up(job.args)), "step": 1, **changes}
    facts |= {name: 0.5 for i in range(len(DOMAINS)) for name in (f"env{i}_in_acc", f"env{i}_out_acc")}
    record = {name: value for name, value in facts.items() if value is not None}
    (job.folder.path / "results.jsonl").write_text(json.dumps(record) + "\n")


@pytest.fixture
def half_done(tmp_path, data):
    """The jobs of a sweep whose first two runs are done."""
    jobs = make_jobs(tmp_path, data)
    for job in jobs[:2]:
        done(job)
    return jobs


def warnings(capsys):
    """Those printed since the last look, and all that was printed on stdout."""
    said = capsys.readouterr()
    return [line for line in said.err.splitlines() if line.startswith("warning: ")], said.out


def replace(data):
    """Another data set at the same place: other images of the same classes and domains."""
    shutil.rmtree(data)
    make_domains(data, DOMAINS, images=3, side=9)


def test_every_record_holds_the_digest_of_its_data(tmp_path, data):
    job = make_jobs(tmp_path, data)[0]
    assert train.run(job.args, lambda share: None) == 0
    setup = run_setup.set_up(job.args)
    assert len(setup.data_digest) == 3
    assert [record["data_digest"] for record in job.folder.records()] == [setup.data_digest]


@pytest.mark.parametrize("command", ["launch", "retry", "validate", "status"])
def test_runs_that_finished_on_other_data_are_not_taken_for_done(tmp_path, data, half_done, command):
    replace(data)
    with pytest.raises(BenchmarkError) as error:
        sweep.main(words(tmp_path, data, command=command))
    assert str(error.value) == (
        f"{tmp_path / 'sweep'} holds 2 runs of ImageFolderDomains on other data than {data} (environments art, photo, "
        f"sketch: names, sizes or labels of images, or names of classes; {half_done[0].name} first): give another "
        "--output_dir, or the data that the runs had"
    )
    assert [each.state for each in states.read_statuses(half_done, tmp_path / "sweep")].count(State.NOT_LAUNCHED) == 1


def test_status_is_shown_all_the_same(tmp_path, data, half_done, capsys):
    replace(data)
    for more in ([], ["--json"]):
        with pytest.raises(BenchmarkError):
            sweep.main(words(tmp_path, data, *more, command="status"))
        assert "2 done" in (said := capsys.readouterr().out) or '"done": 2' in said


def test_other_domains_at_another_place_are_other_data(tmp_path, data, half_done):
    other = make_domains(tmp_path / "other", ("clipart", "paint", "quick"), images=3, side=8)
    with pytest.raises(BenchmarkError, match=r"environments art, photo, sketch there, clipart, paint, quick here"):
        sweep.main(words(tmp_path, other))
    for job in half_done[:2]:  # also where the records are from before they had a digest
        done(job, data_digest=None)
    with pytest.raises(BenchmarkError, match=r"environments art, photo, sketch there, clipart"):
        sweep.main(words(tmp_path, other))


def test_the_same_data_at_another_place_are_the_same(tmp_path, data, half_done, capsys):
    shutil.move(data, tmp_path / "moved")
    assert sweep.main(words(tmp_path, tmp_path / "moved", "--dry_run")) == 0
    told, out = warnings(capsys)
    assert "1 not launched, 2 done" in out and told == []


def test_an_edited_manifest_is_other_data(tmp_path, data):
    rows = [f"{path.relative_to(data)},{path.parent.name},{path.parts[-3]}" for path in sorted(data.rglob("*.png"))]
    manifest = data / "list.csv"
    manifest.write_text("\n".join(["path,label,domain", *rows]))
    done(make_jobs(tmp_path, manifest, dataset="Manifest")[0])
    assert sweep.main(words(tmp_path, manifest, "--dry_run", dataset="Manifest")) == 0
    manifest.write_text("\n".join(["path,label,domain", *rows[:-1]]))
    with pytest.raises(BenchmarkError, match=r"other data than .*list.csv \(environment sketch: names, sizes"):
        sweep.main(words(tmp_path, manifest, dataset="Manifest"))


def test_records_without_a_digest_are_accepted_with_one_warning(tmp_path, data, half_done, capsys):
    for job in half_done[:2]:
        done(job, data_digest=None)
    assert sweep.main(words(tmp_path, data, "--dry_run")) == 0
    assert warnings(capsys)[0] == [
        "warning: 2 runs finished before records held a digest of their data: assumed to be of the data here"
    ]


def test_data_that_are_not_at_hand_are_not_compared(tmp_path, half_done, data):
    jobs = [job for job in half_done[:2] if job.train_args.update(data_dir=str(tmp_path / "nowhere")) is None]
    assert finished.compare_records(jobs) == []


def test_a_data_set_is_listed_once_for_all_runs_and_each_run_read_once(tmp_path, data, monkeypatch):
    jobs = make_jobs(tmp_path, data, "--n_trials", "4")
    done(jobs[0])
    for job in jobs[1:]:
        standing.done(job)
        shutil.copy(jobs[0].folder.path / "results.jsonl", job.folder.path)
    listed, read = [], []
    digest, first_record = finished.digest, RunFolder.first_record
    monkeypatch.setattr(finished, "digest", lambda dataset: listed.append(dataset) or digest(dataset))
    monkeypatch.setattr(RunFolder, "first_record", lambda folder: read.append(folder.path) or first_record(folder))
    assert finished.compare_records(jobs) == []
    assert len(listed) == 1 and len(jobs) == 12 and sorted(read) == sorted(job.folder.path for job in jobs)


def test_other_versions_and_another_precision_are_counted(tmp_path, data, half_done, capsys):
    done(half_done[0], versions={**provenance.versions(), "torch": "1.0"})
    done(half_done[1], versions={**provenance.versions(), "torch": "1.0"}, precision="float8")
    assert sweep.main(words(tmp_path, data, "--dry_run")) == 0
    here = provenance.versions()["torch"]
    told, _ = warnings(capsys)
    assert told[0] == (
        f"warning: 2 of 2 finished runs are of other versions (torch 1.0 then, {here} now) and are accepted: other "
        "versions may round differently"
    )
    assert len(told) == 2 and "1 of 2 finished runs are of other precision (precision float8 then," in told[1]


def method_of(path, code="pass"):
    """A method whose source is a file."""
    path.write_text(f"from domainbed_ext.algorithms.probe import LP\n\n\nclass Mine(LP):\n    {code}\n")
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("mine_of_a_test", path)
    sys.modules["mine_of_a_test"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Mine


def test_a_changed_source_file_of_ones_own_is_told(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(algorithms.ALGORITHMS, "Mine", method_of(tmp_path / "mine.py"))
    job = make_jobs(tmp_path, data, "--algorithms", "Mine")[0]
    done(job)
    sources = job.folder.first_record()["sources"]
    assert list(sources) == ["Mine"] and not provenance.own_sources(LP, algorithms.Algorithm)
    assert sweep.main(words(tmp_path, data, "--algorithms", "Mine", "--dry_run")) == 0
    assert warnings(capsys)[0] == []
    monkeypatch.setitem(algorithms.ALGORITHMS, "Mine", method_of(tmp_path / "mine.py", "steps = 7"))
    assert sweep.main(words(tmp_path, data, "--algorithms", "Mine", "--dry_run")) == 0
    assert "1 of 1 finished runs are of other source files (the source file of Mine has" in warnings(capsys)[0][0]


# One run.


def test_a_finished_run_of_other_data_is_not_done(tmp_path, data, half_done, capsys):
    assert train.run(half_done[0].args, print) == 0 and "is done already" in capsys.readouterr().out
    replace(data)
    with pytest.raises(BenchmarkError, match=r"holds a finished run of other data \(environments art, photo, sketch: "):
        train.run(half_done[0].args, print)


def test_a_finished_run_of_other_versions_is_done(half_done, capsys):
    done(half_done[0], versions={**provenance.versions(), "torch": "1.0"}, data_digest=None)
    assert train.run(half_done[0].args, print) == 0
    said = capsys.readouterr()
    assert "is done already" in said.out and "of other versions (torch 1.0 then" in said.err
    assert "does not record its data" in said.err


def test_what_was_loaded_is_recorded_and_other_weights_of_the_same_name_are_told(make_args, monkeypatch):
    args = make_args(algorithm="LP", steps=1)  # on the embedded backbone, "pretrained"
    assert train.run(args) == 0
    recorded = RunFolder(args.output_dir).first_record()["backbone_digest"]
    setup = run_setup.set_up(make_args(algorithm="BA", steps=1, seed=7))
    assert run_setup.collect_facts(setup)["backbone_digest"] == recorded  # the head starts at random, and is not loaded
    random = run_setup.set_up(make_args(weights="none"))
    assert run_setup.collect_facts(random)["backbone_digest"] is None
    create = backbones.create

    def other(*args, **options):
        model = create(*args, **options)
        model.norm.bias.data += 1
        return model

    monkeypatch.setattr(backbones, "create", other)
    with pytest.raises(
        BenchmarkError, match="holds a finished run of other weights .loaded from the same place, but diff"
    ):
        train.run(args)


def test_a_checkpoint_of_other_data_is_not_resumed(tmp_path, data, capsys):
    job = make_jobs(tmp_path, data)[0]
    facts = run_setup.collect_facts(run_setup.set_up(job.args))
    job.folder.path.mkdir(parents=True)
    checkpoint.save(job.folder.path, 1, {"facts": facts})
    replace(data)
    assert train.run(job.args, lambda share: None) == 0
    assert "the checkpoint is of other data (environments art, photo, sketch: names" in capsys.readouterr().err
    assert job.folder.first_record()["data_digest"] != facts["data_digest"]


def test_a_checkpoint_that_does_not_say_of_which_data_is_resumed_with_a_warning(tmp_path, data, capsys):
    job = make_jobs(tmp_path, data)[0]
    with job.folder.claim() as claim:
        training.Training(run_setup.set_up(job.args), job.folder, claim, lambda: None)._save()
    state, _ = checkpoint.load(job.folder.path)
    del state["facts"]["data_digest"]
    checkpoint.save(job.folder.path, 0, state)
    assert train.run(job.args) == 0
    said = capsys.readouterr().err
    assert "the checkpoint does not record its data: taken as the data here" in said
    assert "starts again" not in said
