import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from domainbed_ext.algorithms.registry import ALGORITHMS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import default_hparams
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.arguments import CompleteArguments, RunArguments
from domainbed_ext.sweep import check as validate
from domainbed_ext.sweep import command as sweep
from domainbed_ext.sweep import cost
from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep.arguments import parse
from tests.domainbed_ext.run_states import done, make_jobs, words

PACS = ["--weights", "none", "--backbone", "vit_pico_patch8_32", "--hparams", '{"batch_size": 4, "image_size": 32}']


def pacs(tmp_path, *more, command="validate", algorithms=("LP",)):
    data = ["--datasets", "PACS", "--data_dir", str(tmp_path / "data")]
    return words(tmp_path, *data, *PACS, *more, command=command, algorithms=algorithms)


def set_ups(monkeypatch):
    """The arguments of every run that is set up."""
    made = []
    set_up = run_setup.set_up
    monkeypatch.setattr(validate, "set_up", lambda args: (made.append(args), set_up(args))[1])
    return made


def test_every_kind_and_every_source_is_set_up_and_no_more(tmp_path, pacs_like, monkeypatch):
    made = set_ups(monkeypatch)
    single = pacs(tmp_path, "--protocol", "single_source", "--source_envs", "A", "C", "P", "S", "--n_trials", "3",
                  algorithms=["LP", "BA"])  # fmt: skip
    checked = validate.check_runs(sweep_jobs.make_jobs(parse(single)))
    assert list(checked) == [("PACS", "LP"), ("PACS", "BA")]
    sources = [next(i for i in range(4) if i not in args.test_envs) for args in made]
    assert sorted(set(sources)) == [0, 1, 2, 3] and {args.algorithm for args in made} == {"LP", "BA"}
    assert len(made) <= 5
    made.clear()
    validate.check_runs(sweep_jobs.make_jobs(parse(pacs(tmp_path, "--n_hparams", "5", algorithms=["LP", "BA", "ERM"]))))
    assert len(made) <= 4


@pytest.mark.parametrize("source", ["art_painting", "sketch"])
def test_a_single_sources_missing_folder_is_named_before_the_start(tmp_path, pacs_like, source):
    shutil.rmtree(pacs_like / "PACS" / source)
    words = pacs(tmp_path, "--protocol", "single_source", "--source_envs", source)
    for command in ("validate", "launch"):
        with pytest.raises(BenchmarkError, match=rf"missing domain folder\(s\) {source} in .*/PACS; add them"):
            sweep.main([command, *words[1:]])
    assert not (tmp_path / "sweep").exists()


def test_a_single_source_that_is_too_small_is_named_before_the_start(tmp_path, pacs_like):
    for path in list((pacs_like / "PACS" / "sketch").rglob("*.png"))[3:]:
        path.unlink()
    for label in ("dog", "house"):  # ten of each were there
        folder = pacs_like / "PACS" / "sketch" / label
        if not list(folder.iterdir()):
            shutil.copy(next((pacs_like / "PACS" / "photo" / label).iterdir()), folder)
    words = pacs(tmp_path, "--protocol", "single_source", "--source_envs", "A", "S", "--holdout_fraction", "0.3")
    with pytest.raises(BenchmarkError, match="larger than the . training images of environment sketch"):
        sweep.main(words)


def test_images_are_verified_once_a_data_set(tmp_path, pacs_like, monkeypatch):
    made = set_ups(monkeypatch)
    argv = pacs(tmp_path, "--verify_images", algorithms=["LP", "BA"])
    validate.check_runs(sweep_jobs.make_jobs(parse(argv)))
    assert [args.verify_images for args in made] == [True, *[False] * (len(made) - 1)] and len(made) > 1
    next((pacs_like / "PACS" / "photo" / "dog").iterdir()).write_bytes(b"no image")
    with pytest.raises(BenchmarkError, match="not a readable image"):
        sweep.main(argv)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--hparams", '{"lr": -1}'], "lr -1 should be above 0"),
        (["--hparams", '{"lr": "high"}'], "hyperparameter lr in --hparams should be of type float"),
        (["--hparams", '{"batch_size": "8"}'], "hyperparameter batch_size in --hparams should be of type int"),
        (["--hparams", '{"lrr": 1}'], "did you mean 'lr'?"),
        # Only the random draws of some run are wrong.
        (["--n_hparams", "9", "--algorithms", "ERM"], "batch_size 372 is larger than the 360 training images"),
        (
            ["--n_hparams", "3", "--algorithms", "FullFT", "BOnly@rank=300"],
            "rank 300 is larger than the layer's width 128",
        ),
    ],
)
def test_hyperparameters_are_checked(tmp_path, more, sentence):
    with pytest.raises(BenchmarkError) as error:
        sweep.main(words(tmp_path, *more, command="validate"))
    assert sentence in str(error.value)


def test_every_random_draw_is_checked(tmp_path, monkeypatch):
    jobs = make_jobs(tmp_path, "--n_hparams", "6")
    jobs[17].computation["hparams"]["weight_decay"] = -1.0
    with pytest.raises(BenchmarkError) as error:
        validate.check_runs(jobs)
    assert str(error.value) == f"{jobs[17]}: weight_decay -1.0 should be 0 or more"


def test_the_largest_rank_is_tried(tmp_path, monkeypatch):
    made = []
    prepare = ALGORITHMS["BA"].prepare
    monkeypatch.setattr(ALGORITHMS["BA"], "prepare", lambda *a: (made.append(a[2]["rank"]), prepare(*a))[1])
    jobs = make_jobs(tmp_path, "--n_hparams", "8", algorithms=["BA"])
    validate.check_runs(jobs)
    assert made == [max(job.computation["hparams"]["rank"] for job in jobs)]


def test_weights_that_do_not_fit_are_told(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(BenchmarkError, match=r"broken.safetensors is not a complete .safetensors file"):
        sweep.main(words(tmp_path, "--weights", str(tmp_path / "broken.safetensors"), command="validate"))


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    args = parse(words(tmp_path, "--n_trials", "9", algorithms=["FullFT"]))
    args = replace(args, skip_model_save=False)
    with pytest.raises(BenchmarkError) as error:
        validate.check_runs(sweep_jobs.make_jobs(args))
    assert str(error.value) == (
        f"{tmp_path / 'sweep'} has 1.0 MB free, and 36 runs would save 120.0 MB: make room, give another "
        "--output_dir, or add --skip_model_save"
    )


def setup_of(steps, freq, **hparams):
    """The lengths of a run."""
    return run_setup.Setup(CompleteArguments(), [0], hparams, None, None, {}, steps, freq)


def test_room_is_for_models_records_and_checkpoints(tmp_path):
    jobs = make_jobs(tmp_path, "--steps", "100", "--checkpoint_freq", "30")
    found = {jobs[0].kind: validate.Checked(setup_of(100, 30), 1000)}
    text = 5 * validate._RECORD + validate._LOGS  # steps 0, 30, 60, 90, 99
    assert validate.estimate_disk(jobs, found, 2) == (4 * text, 4 * text + 2 * 3 * 4 * 1000)
    saving = [sweep_jobs.Job(j.train_args, j.sweep_dir, {**j.extra_args, "skip_model_save": False}, {}) for j in jobs]
    assert validate.estimate_disk(saving, found) == (4 * (text + 1000), 4 * (text + 2000) + 3 * 4 * 1000)
    found = {jobs[0].kind: replace(found[jobs[0].kind], predicted=10)}
    assert validate.estimate_disk(saving, found)[0] == 4 * (text + 1010)
    without = [replace(j, extra_args={**j.extra_args, "skip_predictions": True}) for j in saving]
    assert validate.estimate_disk(without, found)[0] == 4 * (text + 1000)


def test_predictions_take_room_for_the_images_that_are_evaluated(tmp_path):
    small, whole = (
        validate.count_prediction_bytes(run_setup.set_up(RunArguments(train_eval_share=share))) for share in (0.1, 1.0)
    )
    assert whole == 1797 * (2 * 10 + 11) and whole // 4 < small < whole // 2


@pytest.mark.parametrize(
    ("steps", "freq", "count"), [(100, 30, 5), (91, 30, 4), (5001, 300, 18), (1, 0, 1), (9, 0, 1), (1, 5, 1)]
)
def test_records_are_counted_as_a_run_writes_them(steps, freq, count):
    written = [step for step in range(steps) if step == steps - 1 or (freq and step % freq == 0)]
    assert validate.count_records(setup_of(steps, freq)) == count == len(written)


def test_a_run_that_is_averaged_over_a_valley_has_one_record():
    assert validate.count_records(setup_of(100, 30, **default_hparams("LP", "PACS") | {"average": "swad"})) == 1


@pytest.fixture
def rates(monkeypatch):
    monkeypatch.setattr(cost, "measure_rates", lambda setup: cost.Rates(start=1.0, step=0.5, image=0.01))


def test_validate_says_what_it_will_cost_and_leaves_no_trace(tmp_path, capsys, rates):
    assert sweep.main(words(tmp_path, "--jobs", "2", command="validate", algorithms=["LP", "BA"])) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [f"8 runs in {tmp_path / 'sweep'}: 8 not launched", "Nothing found that would stop a run."]
    # 1 s to start, 2 steps of 0.5 s, and one evaluation: 90 images of 3 holdouts, 5 % of 360 of the same 3, and 449.
    assert "DigitsShift LP 4 500 ms 10.0 ms 10 s 39 s 0 bytes" in lines
    assert lines[-1].startswith("8 runs: 1.3 core minutes at the speed just measured: 39 s at 2 at once; up to ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_costs_nothing(tmp_path, capsys, rates):
    jobs = make_jobs(tmp_path)
    for job in jobs[:3]:
        done(job)
    assert sweep.main(words(tmp_path, command="validate")) == 0
    assert "\n1 run: " in capsys.readouterr().out
    done(jobs[3])
    assert sweep.main(words(tmp_path, command="validate")) == 0
    assert "Nothing is left to run." in capsys.readouterr().out


def test_a_run_is_as_long_as_its_batches_and_evaluations(tmp_path):
    rates = cost.Rates(start=1.0, step=0.5, image=0.01)

    def seconds(*more):
        job = make_jobs(tmp_path, "--steps", "100", "--train_eval_share", "1", "--evaluate", "all", *more)[0]
        return job, cost.estimate_seconds(job, run_setup.set_up(job.args), rates)

    job, once = seconds()
    sizes = [len(environment) for environment in run_setup.set_up(job.args).dataset.datasets]
    assert once == pytest.approx(1 + 50 + 0.01 * sum(sizes))
    _, often = seconds("--checkpoint_freq", "10")  # 11 records
    assert often == pytest.approx(1 + 50 + 0.01 * 11 * sum(sizes))
    _, lean = seconds("--checkpoint_freq", "10", "--evaluate", "lean")
    assert 1 + 50 + 0.01 * 2 * sum(sizes) < lean < 0.6 * often
    small, setup = make_jobs(tmp_path, "--hparams", '{"batch_size": 4}')[0], run_setup.set_up(job.args)
    assert cost.estimate_seconds(small, setup, rates) == pytest.approx(once - 50 * 12 / 16)
    parted = make_jobs(tmp_path, "--hparams", '{"batch_size": 4, "accumulate": 5}')[0]
    assert cost.estimate_seconds(parted, setup, rates) == pytest.approx(once + 50 * 4 / 16)


def test_rates_are_measured_on_real_steps(tmp_path):
    job = make_jobs(tmp_path)[0]
    rates = cost.measure_rates(run_setup.set_up(job.args))
    assert 0 < rates.image < rates.step < 60 and rates.start > 0


def test_an_engine_decides_how_many_runs_go_at_once(tmp_path):
    jobs = make_jobs(tmp_path)
    args = parse(words(tmp_path, "--command_launcher", "slurm"))
    assert cost.count_runs_at_once(args, jobs) is None
    assert cost.count_runs_at_once(replace(args, jobs=7), jobs) == 7
    assert cost.count_runs_at_once(replace(args, command_launcher="local", jobs=3), jobs) == 3


def test_what_is_checked_is_json_free_of_paths(tmp_path):
    job = make_jobs(tmp_path, "--data_dir", "/somewhere")[0]
    assert "somewhere" not in json.dumps(job.computation) and "sweep" not in json.dumps(job.computation)
