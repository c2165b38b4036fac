import json

import pytest
import torch

from domainbed_ext import train
from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.results import Results
from domainbed_ext.runs import arguments as options
from domainbed_ext.runs import feed
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.folder import RunFolder, State


def run(args):
    shares = []
    code = train.run(args, shares.append)
    return RunFolder(args.output_dir), code, shares


def test_a_run_writes_domainbeds_files_and_fields(make_args):
    folder, code, shares = run(make_args(checkpoint_freq=2, steps=4, trial_seed=1))
    assert (code, folder.state, shares) == (0, State.DONE, [0.25, 0.5, 0.75, 1.0])
    names = {"results.jsonl", "out.txt", "err.txt", "done", "selected", "attempt_1.json"}
    names.add("predictions_selected.safetensors")
    assert names == {p.name for p in folder.path.iterdir()}
    records = folder.records()
    assert [record["step"] for record in records] == [0, 2, 3]
    accuracies = {f"env{i}_{split}_acc" for i in range(4) for split in ("in", "out")}
    assert accuracies | {"args", "hparams", "epoch", "loss", "step_time", "mem_gb"} <= set(records[-1])
    assert all(0 <= records[-1][name] <= 1 for name in accuracies)
    assert records[-1]["args"]["test_envs"] == [0] and records[-1]["args"]["hparams"] is None
    assert records[-1]["environments"] == ["blended", "plain", "rotated", "sketched"]
    assert records[-1]["epoch"] == pytest.approx(3 / (359 / 16), rel=0.02)


def test_options_that_change_numbers_are_in_every_record(make_args):
    folder, *_ = run(make_args(input_stats="imagenet", steps=1))
    record = folder.records()[0]
    assert set(options.NUMBERS) <= set(record["args"])
    assert record["args"]["input_stats"] == "imagenet"
    assert (record["args"]["protocol"], record["args"]["test_on"]) == ("leave_one_out", "in")
    assert record["split_sizes"]["env0_in"] == 360 and record["split_sizes"]["env3_out"] == 89
    assert record["precision"] in ("bf16", "float32")
    assert {"backbone", "weights", "batch_size", "lr"} <= set(record["hparams"])
    assert record["versions"]["torch"] == torch.__version__


def stripped(folder):
    return [{k: v for k, v in r.items() if k not in ("args", "step_time", "run")} for r in folder.records()]


def test_the_same_seed_gives_the_same_records_and_adapter(make_args, tmp_path):
    first, *_ = run(make_args(algorithm="BA", output_dir=str(tmp_path / "1")))
    torch.rand(7)  # whatever the process did in between
    second, *_ = run(make_args(algorithm="BA", output_dir=str(tmp_path / "2"), workers=1))
    assert stripped(first) == stripped(second)
    files = [sorted((f.path / "selected").iterdir()) for f in (first, second)]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_a_single_source_run_trains_on_one_environment(make_args):
    setup = run_setup.set_up(make_args(protocol="single_source", source_envs=["plain"]))
    assert (setup.train_envs, setup.args.test_envs, setup.args.source_envs) == ([1], [0, 2, 3], [1])
    folder, *_ = run(make_args(protocol="single_source", source_envs=["plain"], test_on="all", sampling="epochs"))
    record = folder.records()[-1]
    assert record["args"]["test_envs"] == [0, 2, 3] and record["args"]["protocol"] == "single_source"
    score = Results(folder.records()).single_source.comparison("DigitsShift", 1).scores("BOnly")[0]
    size = record["split_sizes"]
    correct = record["env0_in_acc"] * size["env0_in"] + record["env0_out_acc"] * size["env0_out"]
    assert score.value("out_of_domain", 0) == pytest.approx(correct / len(setup.dataset[0]))


def test_lean_runs_record_less_and_the_same(make_args, tmp_path):
    options = {"steps": 6, "checkpoint_freq": 1, "algorithm": "LP", "test_envs": [2], "hparams": '{"lr": 0.3}'}
    whole, *_ = run(make_args(**options, evaluate="all", output_dir=str(tmp_path / "all")))
    part, *_ = run(make_args(**options, output_dir=str(tmp_path / "lean")))
    saved = [f.path / "selected" / "trained.safetensors" for f in (whole, part)]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    shorter = 0
    for full, lean in zip(whole.records(), part.records(), strict=True):
        accuracies = {name for name in lean if name.endswith("_acc")}
        assert all(lean[name] == full[name] for name in accuracies)
        assert {"env0_out_acc", "env1_out_acc", "env3_out_acc"} <= accuracies
        shorter += len(accuracies) == 3
    assert shorter and len(accuracies) == 8
    tables = [Results(f.records()).tidy() for f in (whole, part)]
    assert tables[0].equals(tables[1])


def test_augmented_validation_and_epochs_do_not_depend_on_workers(make_args, tmp_path):
    options = {"validation_images": "augmented", "sampling": "epochs", "algorithm": "LP", "steps": 2}
    alone, *_ = run(make_args(**options, output_dir=str(tmp_path / "0")))
    shared, *_ = run(make_args(**options, workers=2, output_dir=str(tmp_path / "2")))
    assert stripped(alone) == stripped(shared)
    plain, *_ = run(make_args(**{**options, "validation_images": "plain"}, output_dir=str(tmp_path / "plain")))
    a, b = alone.records()[-1], plain.records()[-1]
    assert a["loss"] == b["loss"]  # training is the same, and so is the test environment's evaluation
    assert {name for name in a if name.endswith("_acc") and a[name] != b[name]} >= {"env1_out_acc", "env2_out_acc"}
    assert (a["env0_in_acc"], a["env0_out_acc"]) == (b["env0_in_acc"], b["env0_out_acc"])


def test_the_domainbed_protocol_is_in_the_record(make_args):
    folder, *_ = run(make_args(protocol="domainbed", steps=1, train_eval_share=0.05))
    record = folder.records()[0]
    args = record["args"]
    assert (args["protocol"], args["validation_images"], args["input_stats"]) == ("domainbed", "augmented", "imagenet")
    assert record["precision"] == record["hparams"]["precision"] == "float32"


def test_what_a_name_says_holds_whatever_is_given_for_all(make_args):
    args = make_args(
        algorithm="BOnly@rank=4,precision=bf16", hparams='{"rank": 16, "lr": 0.5}', protocol="domainbed", backbone=None
    )
    hparams = run_setup.set_up(args).hparams
    assert (hparams["rank"], hparams["precision"], hparams["lr"]) == (4, "bf16", 0.5)
    assert run_setup.set_up(make_args(algorithm="BOnly", hparams='{"rank": 16}')).hparams["rank"] == 16


def test_every_checkpoint_or_none_is_saved_when_asked(make_args, tmp_path):
    folder, *_ = run(make_args(checkpoint_freq=2, save_model_every_checkpoint=True, output_dir=str(tmp_path / "1")))
    assert (folder.path / "step_0").is_dir() and (folder.path / "step_2").is_dir()
    folder, *_ = run(make_args(skip_model_save=True, output_dir=str(tmp_path / "2")))
    assert not (folder.path / "selected").exists()


def test_train_accuracy_is_measured_on_a_fixed_share(make_args, monkeypatch):
    sizes = []
    evaluated = feed.Feed._evaluated

    def record(*words):
        part = evaluated(*words)
        sizes.append(len(part.split))
        return part

    monkeypatch.setattr(feed.Feed, "_evaluated", record)
    run(make_args(train_eval_share=0.1, steps=1))
    # env 0 is held out and measured whole; the others' `in` at a tenth, their `out` whole
    assert sorted(sizes) == [36, 36, 36, 89, 89, 89, 90, 360]


def test_splits_are_domainbeds(make_args):
    setup = run_setup.set_up(make_args(test_envs=[1], uda_holdout_fraction=0.5))
    sizes = {name: len(split) for name, split in setup.splits.items()}
    total = len(setup.dataset[1])
    assert sizes["env1_out"] == int(0.2 * total)
    assert sizes["env1_uda"] == int(0.5 * (total - sizes["env1_out"]))
    parts = [set(setup.splits[f"env1_{name}"].keys) for name in ("in", "out", "uda")]
    assert set.union(*parts) == set(range(total)) and sum(map(len, parts)) == total


def test_learning_happens(make_args):
    folder, *_ = run(make_args(steps=60, test_envs=[3], algorithm="BA"))
    record = folder.records()[-1]
    assert record["env1_out_acc"] > 0.6


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"test_envs": [4]}, "--test_envs 4: DigitsShift has no such environment: .* 0 blended, 1 plain"),
        ({"test_envs": [0, 1, 2, 3]}, "names all 4 environments"),
        (
            {"hparams": '{"batch_size": 512}'},
            "batch_size 512 is larger than the 3[0-9]+ training images of environment",
        ),
        ({"algorithm": "BOnli"}, "did you mean .BOnly."),
        ({"dataset": "DigitShift"}, "did you mean 'DigitsShift'"),
        ({"backbone": "vit_pico"}, "unknown backbone 'vit_pico': did you mean"),
        ({"holdout_fraction": 0.001}, "too few for a holdout"),
        (
            {"split_by": "concepts"},
            "--split_by concepts: [0-9]+ of [0-9]+ images of blended in DigitsShift carry no con",
        ),
        ({"test_envs": [0, 0]}, "--test_envs names environment 0 blended twice"),
        ({"evaluate": "lean", "test_envs": [0, 1]}, "--evaluate lean leaves out what leave-one-domain-out"),
        ({"protocol": "single_source", "source_envs": ["plian"]}, "did you mean 'plain'"),
        ({"task": "domain_adaptation"}, "no algorithm here uses unlabelled images"),
        ({"dataset": "PACS"}, "PACS needs its images: add --data_dir"),
    ],
)
def test_bad_input_gets_a_sentence(make_args, overrides, sentence):
    with pytest.raises(BenchmarkError, match=sentence):
        run_setup.set_up(make_args(**overrides))


def test_a_mistake_marks_the_run_failed_and_exits_with_2(make_args, capsys):
    folder, code, _ = run(make_args(algorithm="BOnly@rank=4096"))
    assert (code, folder.state) == (2, State.FAILED)
    assert "rank 4096" in folder.failure()
    assert "Traceback" not in (folder.path / "err.txt").read_text()
    assert capsys.readouterr().err.startswith("error: ")


def test_a_crash_is_logged_with_its_traceback(make_args, monkeypatch):
    def crash(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(get_algorithm_class("BOnly"), "update", crash)
    folder, code, _ = run(make_args())
    assert (code, folder.failure()) == (1, "RuntimeError: out of memory")
    assert "Traceback" in (folder.path / "err.txt").read_text()
    assert json.loads((folder.path / "failed").read_text())["log"].endswith("err.txt")


def test_a_finished_run_is_not_overwritten(make_args, capsys):
    folder, *_ = run(make_args(steps=1))
    before = {path.name: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    _, code, shares = run(make_args(steps=1, workers=1))
    assert (code, shares) == (0, []) and "is done already" in capsys.readouterr().out
    with pytest.raises(BenchmarkError, match="holds a finished run of other arguments"):
        run(make_args(steps=2))
    assert {path.name: path.stat().st_mtime_ns for path in folder.path.iterdir()} == before


def test_verify_images_names_the_broken_before_the_start(make_args, pacs_like):
    (pacs_like / "PACS" / "photo" / "dog" / "pic_003.png").write_text("hello")
    args = make_args(
        dataset="PACS",
        data_dir=str(pacs_like),
        backbone="test_vit",
        weights="none",
        hparams='{"batch_size": 4}',
        verify_images=True,
    )
    with pytest.raises(BenchmarkError, match="not a readable image: .*pic_003.png"):
        run_setup.set_up(args)


def test_a_run_on_image_folders(make_args, pacs_like):
    folder, code, _ = run(
        make_args(
            dataset="PACS",
            data_dir=str(pacs_like),
            backbone="test_vit",
            weights="none",
            hparams='{"batch_size": 4, "image_size": 48}',
            algorithm="BOnly@rank=2",
        )
    )
    assert (code, folder.state) == (0, State.DONE)
    assert folder.records()[-1]["environments"] == ["A", "C", "P", "S"]


@pytest.mark.parametrize("test_envs", (["sketch"], ["S"], [3]))
def test_test_environments_by_name_are_recorded_as_indices(make_args, pacs_like, test_envs):
    hparams = {"backbone": "vit_pico_patch8_32", "batch_size": 4}
    named = {"dataset": "PACS", "data_dir": str(pacs_like), "hparams": json.dumps(hparams), "test_envs": test_envs}
    setup = run_setup.set_up(make_args(**named))
    assert (setup.args.test_envs, setup.train_envs) == ([3], [0, 1, 2])


def test_a_data_set_whose_environments_are_folders_takes_their_names(make_args, pacs_like):
    hparams = json.dumps({"backbone": "vit_pico_patch8_32", "batch_size": 4})
    named = {"dataset": "ImageFolderDomains", "data_dir": str(pacs_like / "PACS"), "hparams": hparams}
    assert run_setup.set_up(make_args(**named, test_envs=["photo"])).test_envs == [2]
    with pytest.raises(BenchmarkError, match="--test_envs photos: ImageFolderDomains has no such .* 2 photo, 3 sketch"):
        run_setup.set_up(make_args(**named, test_envs=["photos"]))
