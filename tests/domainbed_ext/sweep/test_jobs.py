import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from domainbed_ext import errors
from domainbed_ext.algorithms.hyperparameters import Hyperparameter
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import vit_pico
from domainbed_ext.runs import arguments, identity
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.folder import State
from domainbed_ext.seeds import seed_hash
from domainbed_ext.sweep import jobs as jobs_module
from domainbed_ext.sweep import jobs as sweep_jobs
from domainbed_ext.sweep.arguments import parse
from tests.domainbed_ext.conftest import make_domains
from tests.domainbed_ext.run_states import make_jobs


def names(tmp_path, *more, **options):
    return [job.name for job in make_jobs(tmp_path, *more, **options)]


def test_domainbeds_hash_is_at_hand(tmp_path):
    """Golden value measured from facebookresearch/DomainBed @ b93c22a."""
    train_args = {
        "algorithm": "ERM", "data_dir": "/checkpoint/dlp/datasets_new", "dataset": "VLCS", "holdout_fraction": 0.2,
        "hparams_seed": 1, "seed": 360234358, "steps": 1001, "task": "domain_generalization", "test_envs": [1, 2],
        "trial_seed": 0,
    }  # fmt: skip
    assert sweep_jobs.Job(train_args, tmp_path, {}, {}).domainbed_hash == "0657090f9a83ff76efe083a104fde93a"


def test_a_name_never_changes_by_accident(tmp_path):
    """Whoever changes what makes a run's identity has every user's finished runs run again."""
    args = parse(["launch", "--datasets", "PACS", "--algorithms", "BOnly", "--n_hparams", "1", "--n_trials", "1",
                        "--single_test_envs", "--output_dir", str(tmp_path)])  # fmt: skip
    job = sweep_jobs.make_jobs(args)[0]
    later = {name: kind.default for name, kind in METHODS["BOnly"].hyperparameters.items() if kind.later}
    assert json.loads(json.dumps(job.computation)) == {
        "args": {
            **{"dataset": "PACS", "algorithm": "BOnly", "task": "domain_generalization", "test_envs": [0]},
            **{"trial_seed": 0, "hparams_seed": 0, "seed": seed_hash("PACS", "BOnly", [0], 0, 0), "steps": 5001},
            **{"holdout_fraction": 0.2, "uda_holdout_fraction": 0.0, "protocol": "leave_one_out"},
            **{"validation_images": "plain", "input_stats": "backbone", "sampling": "replacement", "test_on": "in"},
            **{
                "evaluate": "lean",
                "training_images": "exact",
                **{"split_by": "images", "evaluations": None, "early_stopping": None},  # of a later version, in no name
                "checkpoint_freq": 300,
                "train_eval_share": 1.0,
                "threads": 1,
            },
        },
        "hparams": {
            **{"backbone": "vit_base_patch16_224.augreg_in21k", "precision": "auto", "image_size": None},
            **{"data_augmentation": True, "class_balanced": False, "lr": 0.001},
            **{"weight_decay": 0.0, "batch_size": 32, "rank": 8, "alpha": None, "targets": "q,v"},
            **{"adapter_dropout": 0.0, "compute": "folded", "gradient_correction": False},
            **later,
        },
        "weights": "pretrained",
    }
    assert job.name == "f0fe1fa092d9637ac2d3e3dfc22cbba5"


def test_a_later_hyperparameter_at_its_default_changes_no_name(tmp_path, monkeypatch):
    before = names(tmp_path, "--algorithms", "BOnly", "LP")
    bonly = METHODS["BOnly"]
    later = {**bonly.hyperparameters, "extra": Hyperparameter(1.0, later=True)}
    monkeypatch.setitem(METHODS._things, "BOnly", dataclasses.replace(bonly, hyperparameters=later))
    assert names(tmp_path, "--algorithms", "BOnly", "LP") == before
    assert names(tmp_path, "--algorithms", "BOnly", "LP", "--hparams", '{"extra": 1.0}') == before
    changed = names(tmp_path, "--algorithms", "BOnly", "LP", "--hparams", '{"extra": 2.0}')
    assert len({*changed, *before}) == len(before) * 3 // 2


def test_splits_by_concepts_are_in_the_name_and_those_by_images_in_none(tmp_path):
    before = names(tmp_path)
    assert names(tmp_path, "--split_by", "images") == before
    by_concepts = make_jobs(tmp_path, "--split_by", "concepts")
    assert not {job.name for job in by_concepts} & set(before)
    assert all(job.args.split_by == "concepts" for job in by_concepts)
    # A record from before the option is one of images.
    record = {"args": {**make_jobs(tmp_path)[0].train_args}, "hparams": {}}
    assert not identity.contradicts(make_jobs(tmp_path)[0].computation, record)
    assert identity.contradicts(by_concepts[0].computation, record)
    record["args"]["split_by"] = "concepts"
    assert identity.contradicts(make_jobs(tmp_path)[0].computation, record)
    assert not identity.contradicts(by_concepts[0].computation, record)


def test_jobs_come_in_domainbeds_order(tmp_path):
    args = parse(["launch", "--datasets", "PACS", "--algorithms", "ERM", "BA", "--n_hparams", "2",
                        "--n_trials", "2", "--output_dir", str(tmp_path), "--data_dir", "d"])  # fmt: skip
    jobs = [job.train_args for job in sweep_jobs.make_jobs(args)]
    assert len(jobs) == 2 * 2 * 10 * 2
    assert [(j["trial_seed"], j["algorithm"], j["test_envs"], j["hparams_seed"]) for j in jobs[:5]] == [
        (0, "ERM", [0], 0), (0, "ERM", [0], 1), (0, "ERM", [0, 1], 0), (0, "ERM", [0, 1], 1), (0, "ERM", [0, 2], 0),
    ]  # fmt: skip
    assert jobs[20]["algorithm"] == "BA" and jobs[40]["trial_seed"] == 1
    assert set(jobs[0]) == {"dataset", "algorithm", "test_envs", "holdout_fraction", "hparams_seed", "data_dir",
                            "task", "trial_seed", "seed", "evaluate"}  # fmt: skip
    assert {j["evaluate"] for j in jobs} == {"all"}  # for leave-one-domain-out cross-validation


def test_a_jobs_command_is_a_run_with_its_arguments(tmp_path):
    words = ["--workers", "1", "--save_minutes", "7", "--track", "csv", "tensorboard"]
    job = make_jobs(tmp_path, *words, algorithms=["BOnly@rank=16"])[2]
    parsed = job.args
    assert (parsed.algorithm, parsed.test_envs, parsed.steps, parsed.workers) == ("BOnly@rank=16", [2], 2, 1)
    assert parsed.train_eval_share == 0.05 and parsed.skip_model_save
    assert (parsed.save_minutes, parsed.save_steps, parsed.time_limit) == (7.0, 0, None)
    assert parsed.output_dir == str(job.folder.path) and parsed.track == ["csv", "tensorboard"]


@pytest.mark.parametrize(
    "words",
    [
        "--workers 3 --verify_images --jobs 7 --jobs_per_gpu 2",
        "--save_minutes 1 --save_steps 9 --time_limit 60",
        "--data_dir /moved",
        "--command_launcher slurm",
        "--track csv tensorboard",
        # What holds anyhow, said:
        "--protocol leave_one_out --validation_images plain --sampling replacement --threads 1",
        "--hparams {}",
        "--backbone vit_pico_patch8_32 --weights pretrained",
    ],
)
def test_what_changes_no_number_changes_no_name(tmp_path, words):
    assert names(tmp_path, *words.split()) == names(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "--steps 3",
        "--checkpoint_freq 1",
        "--early_stopping 3",
        "--precision float32",
        "--weights none",
        "--protocol domainbed",
        "--input_stats imagenet",
        "--sampling epochs",
        "--evaluate all",
        "--training_images resized",
        "--threads 2",
        "--train_eval_share 0.1",
        "--holdout_fraction 0.3",
        '--hparams {"lr":0.5}',
        '--hparams {"weights":"none"}',
        "--n_hparams_from 1 --n_hparams 2",
    ],
)
def test_what_changes_numbers_changes_the_name(tmp_path, words):
    assert not set(names(tmp_path, *words.split())) & set(names(tmp_path))


def test_names_of_hyperparameters_are_rows_and_folders_of_their_own(tmp_path):
    found = names(tmp_path, algorithms=["BOnly", "BOnly@rank=8", "BOnly@rank=8,alpha=16"])
    assert len(set(found)) == len(found) == 12
    assert len(make_jobs(tmp_path, algorithms=["LP", "BA", "LP"])) == 8  # but a name given twice is one


def test_a_default_that_changed_makes_another_run(tmp_path, monkeypatch):
    before, probe = names(tmp_path), METHODS["LP"]
    changed = {**probe.hyperparameters, "lr": Hyperparameter(0.123)}
    monkeypatch.setitem(METHODS._things, "LP", dataclasses.replace(probe, hyperparameters=changed))
    assert not set(names(tmp_path)) & set(before)


def test_other_spellings_of_a_name_are_the_same_runs(tmp_path):
    runs = make_jobs(tmp_path, "--hparams", '{"lr": 0.01}', algorithms=["BOnly@rank=16", "BA"])
    spelled = ["LoRA-FA@r=16", "BOnly@rank=16", "lora"]
    others = make_jobs(tmp_path, "--hparams", '{"learning_rate": 0.01}', algorithms=spelled)
    assert [job.name for job in others] == [job.name for job in runs]
    assert [job.train_args["algorithm"] for job in others] == [job.train_args["algorithm"] for job in runs]
    assert {job.train_args["seed"] for job in others} == {job.train_args["seed"] for job in runs}


def test_what_is_given_is_a_default_said_differently(tmp_path):
    assert names(tmp_path, "--hparams", '{"lr": 0.003}') == names(tmp_path)
    assert names(tmp_path, "--hparams", '{"rank": 4}') == names(tmp_path)  # LP has none


@pytest.fixture
def weights(tmp_path):
    return shutil.copy(vit_pico.WEIGHTS, tmp_path / "weights.safetensors")


def test_weights_count_by_what_is_in_them(tmp_path, weights, monkeypatch):
    from domainbed_ext.models import backbones

    read = []
    digest = backbones.digest
    monkeypatch.setattr(backbones, "digest", lambda *args: (read.append(args), digest(*args))[1])
    before = names(tmp_path, "--weights", str(weights), "--n_trials", "3")
    assert len(read) == 1  # once for all runs
    moved = shutil.move(weights, tmp_path / "moved.safetensors")
    assert names(tmp_path, "--weights", str(moved), "--n_trials", "3") == before
    tensors = load_file(moved)
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, moved)
    assert not set(names(tmp_path, "--weights", str(moved), "--n_trials", "3")) & set(before)


def test_weights_that_are_not_there_are_told(tmp_path):
    with pytest.raises(BenchmarkError, match=r"no weights file nowhere.safetensors: .*--weights a .safetensors"):
        make_jobs(tmp_path, "--weights", "nowhere.safetensors")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--hparams {\"lr\":0.5,\"rank\":4,\"batch_size\":4}",
        "--protocol domainbed --n_hparams_from 2 --n_hparams 3 --n_trials 2",
        "--backbone vit_pico_patch8_32 --weights none --precision float32 --checkpoint_freq 1",
        "--protocol single_source --source_envs plain",
    ],
)  # fmt: skip
def test_the_identity_is_of_what_a_run_would_compute(tmp_path, words):
    for job in make_jobs(tmp_path, *words.split(), algorithms=["BOnly", "LP@lr=0.2"])[::3]:
        setup = run_setup.set_up(job.args)
        hparams = dict(setup.hparams)
        assert job.computation["weights"] == hparams.pop("weights")
        assert job.computation["hparams"] == hparams
        assert job.computation["args"] == {name: getattr(setup.args, name) for name in job.computation["args"]} | {
            "steps": setup.steps, "checkpoint_freq": setup.checkpoint_freq,
        }  # fmt: skip
        assert not identity.contradicts(job.computation, run_setup.collect_facts(setup))


def held_out(tmp_path, *words):
    args = parse(["launch", "--algorithms", "BA", "--n_hparams", "1", "--n_trials", "1", "--output_dir",
                        str(tmp_path), *words])  # fmt: skip
    return [(job.train_args["dataset"], job.train_args["test_envs"]) for job in sweep_jobs.make_jobs(args)]


def test_single_source_sweeps_train_on_the_papers_sources_or_those_given(tmp_path):
    single = ("--protocol", "single_source", "--datasets")
    paper = held_out(tmp_path, *single, "PACS", "TerraIncognita")
    assert paper == [("PACS", [0, 2, 3]), ("TerraIncognita", [0, 2, 3])]
    assert held_out(tmp_path, *single, "DigitsShift") == [
        ("DigitsShift", [env for env in range(4) if env != source]) for source in range(4)
    ]
    given = held_out(tmp_path, *single, "PACS", "VLCS", "--source_envs", "LabelMe", "sketch", "0")
    assert given == [("PACS", [1, 2, 3]), ("PACS", [0, 1, 2]), ("VLCS", [1, 2, 3]), ("VLCS", [0, 2, 3])]


def test_a_single_source_job_is_a_run_of_its_own(tmp_path):
    job = make_jobs(tmp_path, *["--protocol", "single_source", "--source_envs", "rotated", "--evaluate", "lean"])[0]
    parsed = arguments.parse(job.argv)
    assert (parsed.protocol, parsed.test_envs, parsed.evaluate) == ("single_source", [0, 1, 3], "lean")
    assert job.train_args["seed"] == seed_hash("DigitsShift", "LP", [0, 1, 3], 0, 0)


# Folders of DomainBed's name.


def old_run(job, **changes):
    """A folder as earlier versions made it, whose records say what they said, but for changes ("hparams.lr": 1)."""
    folder = job.sweep_dir / job.domainbed_hash
    folder.mkdir(parents=True)
    record = {
        "args": {**dataclasses.asdict(job.args.complete()), "output_dir": str(folder)},
        "hparams": {**job.computation["hparams"], "weights": "pretrained"},
        "step": 1,
    }
    for name, value in changes.items():
        *path, last = name.split(".")
        place = record[path[0]] if path else record
        if value is None:
            del place[last]
        else:
            place[last] = value
    (folder / "results.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "done").write_text("done")
    return folder


def test_a_folder_of_domainbeds_name_is_taken_for_the_run(tmp_path):
    jobs = make_jobs(tmp_path)
    folders = [old_run(jobs[0]), jobs[1].sweep_dir / jobs[1].domainbed_hash]
    folders[1].mkdir()  # stopped before its first record
    again = make_jobs(tmp_path)
    assert [job.folder.path for job in again[:2]] == folders
    assert [job.folder.state for job in again[:3]] == [State.DONE, State.INTERRUPTED, State.NOT_LAUNCHED]
    assert again[0].args.output_dir == str(folders[0])
    jobs[0].folder.path.mkdir()  # ours comes first
    assert make_jobs(tmp_path)[0].folder.path == jobs[0].folder.path


@pytest.mark.parametrize(
    "changes",
    [
        {"args.steps": 9},
        {"args.sampling": "epochs"},
        {"hparams.lr": 0.9},
        {"hparams.weights": "none"},
        {"weights_digest": "0" * 64},
    ],
)
def test_but_not_if_its_records_are_of_another_run(tmp_path, changes):
    job = make_jobs(tmp_path)[0]
    old_run(job, **changes)
    assert make_jobs(tmp_path)[0].name == job.name


@pytest.mark.parametrize(
    "changes",
    [
        {"args.protocol": None, "args.sampling": None, "hparams.backbone": None},  # upstream's say nothing of these
        {"hparams.resnet18": True, "args.unlabeled": 3},
    ],
)
def test_what_records_do_not_say_contradicts_nothing(tmp_path, changes):
    job = make_jobs(tmp_path)[0]
    folder = old_run(job, **changes)
    assert make_jobs(tmp_path)[0].folder.path == folder


def test_what_is_no_record_is_left_alone(tmp_path):
    job = make_jobs(tmp_path)[0]
    (old_run(job) / "results.jsonl").write_text("[]\n")
    assert make_jobs(tmp_path)[0].name == job.name


def two_domains(tmp_path, command, *more):
    make_domains(tmp_path / "two", domains=("day", "night"))
    words = ["--datasets", "ImageFolderDomains", "--algorithms", "LP", "--n_hparams", "1", "--n_trials", "1"]
    return [command, *words, "--data_dir", str(tmp_path / "two"), "--output_dir", str(tmp_path / "o"), *more]


def test_of_two_environments_each_is_left_out_alone_with_a_warning(tmp_path, capsys):
    errors.warn_once.cache_clear()
    jobs = sweep_jobs.make_jobs(parse(two_domains(tmp_path, "launch")))
    assert [job.train_args["test_envs"] for job in jobs] == [[0], [1]]
    said = capsys.readouterr().err
    assert "ImageFolderDomains has two environments" in said and "--single_test_envs" in said
    jobs = sweep_jobs.make_jobs(parse(two_domains(tmp_path / "single", "launch", "--single_test_envs")))
    assert len(jobs) == 2 and not capsys.readouterr().err


def test_of_one_environment_none_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "list_environments", lambda *_: [("day", "day")])
    with pytest.raises(BenchmarkError, match="ImageFolderDomains has 1 environment.*at least two"):
        sweep_jobs.make_jobs(parse(two_domains(tmp_path, "launch")))
