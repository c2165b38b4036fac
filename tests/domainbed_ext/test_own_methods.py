"""A method in a file of one's own, in a sweep and out of it."""

import pytest

from domainbed_ext import collect_results, evaluate, train
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers import execute
from domainbed_ext.runs import arguments, imports
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep.arguments import parse
from tests.domainbed_ext import run_states

METHOD = """\
from domainbed_ext import register_algorithm
from domainbed_ext.algorithms.probe import LP

@register_algorithm("Mine", aliases=("my-own",), hyperparameters={"my_share": 0.5})
class Mine(LP):
    pass
"""


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch, registries):
    """The file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(METHOD)
    return path


def words(tmp_path, *more, command="launch"):
    methods = ("--algorithms", "my_own@my_share=0.25", "LP", "--import", "mine.py")
    return run_states.words(tmp_path, *methods, *more, command=command)


def make_jobs(*args):
    return sweep_jobs.make_jobs(parse(words(*args)))


def test_runs_of_a_sweep_import_it_too(tmp_path):
    runs = make_jobs(tmp_path)
    assert {job.train_args["algorithm"] for job in runs} == {"Mine@my_share=0.25", "LP"}
    assert all(arguments.parse(job.argv).imports == ["mine.py"] for job in runs)
    plain = sweep_jobs.make_jobs(parse(run_states.words(tmp_path, "--algorithms", "LP")))
    assert {job.name for job in plain} <= {job.name for job in runs}  # a built-in method's runs are what they were


def test_a_definition_names_one_file_or_several(tmp_path):
    definition = tmp_path / "mine.yaml"
    (tmp_path / "mine_too.py").write_text(METHOD.replace("Mine", "MineToo").replace("my-own", "own"))
    for value in ("mine.py", "[mine.py, mine_too.py]"):
        definition.write_text(f"import: {value}\ndatasets: [DigitsShift]\nalgorithms: [Mine]\noutput_dir: o\n")
        (first, *others) = arguments.parse(
            sweep_jobs.make_jobs(parse(["launch", "--sweep", "mine.yaml"]))[0].argv
        ).imports
        assert first == "mine.py" and len(others) == value.count(",")


def test_one_hparams_serves_it_and_others(tmp_path):
    runs = make_jobs(tmp_path, "--hparams", '{"my_share": 0.75, "rank": 2}')
    assert {job.computation["hparams"].get("my_share") for job in runs} == {0.25, None}
    with pytest.raises(BenchmarkError, match="hyperparameter in --hparams: 'my_shape': did you mean 'my_share'"):
        make_jobs(tmp_path, "--hparams", '{"my_shape": 0.75}')


def test_the_file_is_recorded_and_status_warns_when_it_has_changed(tmp_path, own_file, capsys):
    job = next(job for job in make_jobs(tmp_path, "--steps", "1") if "Mine" in job.train_args["algorithm"])
    assert train.run(job.args) == 0
    record = job.folder.first_record()
    assert list(record["imports"]) == ["mine.py"] and record["args"]["imports"] == ["mine.py"]
    status = words(tmp_path, "--steps", "1", command="status")
    assert sweep.main(status) == 0 and "warning" not in capsys.readouterr().err
    own_file.write_text(METHOD + "    # changed\n")
    assert sweep.main(status) == 0
    warning = "warning: 1 of 1 finished runs are of other source files (the source file of Mine has changed)"
    assert warning in capsys.readouterr().err


def test_a_worker_of_any_launcher_imports_it_from_its_command(tmp_path, registries, monkeypatch):
    job = make_jobs(tmp_path, "--steps", "1")[0]
    assert " --import mine.py " in job.command.text  # which Slurm's and Ray's tasks run
    del METHODS["Mine"]  # as in a process that starts
    monkeypatch.setattr(imports, "_loaded", {})
    assert execute.run(job.command) == 0
    assert list(job.folder.first_record()["sources"]) == ["Mine"]


def test_what_is_wrong_with_it_ends_a_sweep_before_any_run(tmp_path, own_file):
    own_file.write_text("x = 1 / 0\n")
    for command in ("launch", "status", "retry", "validate", "delete_incomplete"):
        with pytest.raises(BenchmarkError, match="--import mine.py: ZeroDivisionError: .* .mine.py line 1"):
            sweep.main(words(tmp_path, command=command))
    assert sweep.main(words(tmp_path, command="cancel")) == 0  # which looks at no method


def test_a_run_is_evaluated_with_it_and_not_without(tmp_path, capsys):
    run = ["--algorithm", "Mine", "--steps", "1", "--train_eval_share", "0.1", "--output_dir", "run"]
    assert train.main([*run, "--import", "mine.py"]) == 0
    assert evaluate.main(["--run", "run", "--import", "mine.py"]) == 0
    del METHODS["Mine"]
    with pytest.raises(BenchmarkError, match="run is of Mine, which it imported: add --import mine.py"):
        evaluate.evaluate(RunFolder("run"))
    capsys.readouterr()
    assert collect_results.main(["--input_dir", "."]) == 0
    assert "warning: Mine is shown without its label and colour: add --import mine.py\n" in capsys.readouterr().err
    with pytest.raises(BenchmarkError, match="'Quite different': choose one of .*, or add --import with the file"):
        METHODS.find("Quite different")
