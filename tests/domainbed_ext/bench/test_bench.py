import argparse
import contextlib
import csv
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from domainbed_ext import train
from domainbed_ext.bench import __main__ as bench
from domainbed_ext.bench import (
    accuracy,
    decoders,
    gpu,
    lower_bound,
    plain,
    report,
    runs,
    steps,
    subprocesses,
    sweeps,
    targets,
    timing,
    watching,
)
from domainbed_ext.bench.small_data import link_part
from domainbed_ext.data.augmentation import AUGMENTATIONS
from domainbed_ext.datasets.folders import PACS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.runs.arguments import parse
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.images import Augmented, Uncached
from domainbed_ext.runs.setup import set_up
from tests import forked


@pytest.mark.slow
def test_a_sweep_is_measured_against_its_runs_own_work(tmp_path, monkeypatch, capsys):
    words = sweeps._words
    monkeypatch.setattr(sweeps, "_words", lambda *args: [*words(*args), "--algorithms", "LP"])
    monkeypatch.setattr(sweeps, "TICK", 0.2)
    bench.main(["sweep", "--runs", "20", "--steps", "2", "--jobs", "2", "--output_dir", str(tmp_path)])
    (path,) = tmp_path.glob("sweep_local_*.csv")
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["launcher"], row["runs"], row["attempts"], row["at once"]) == ("local", "4", "4", "2")
    assert float(row["work a run (s)"]) > 0 and float(row["set-up a run (s)"]) > 0
    # The launch's own import of torch alone is more than the work of these runs.
    assert float(row["over the work (%)"]) > float(row["outside the runs (%)"]) > 0
    assert "runs a minute" in capsys.readouterr().out


def test_growth_compares_the_quarters_when_all_is_warm():
    assert sweeps._growth("MiB", [1, 5, 3, 4]) == {"MiB, third quarter": 5, "MiB, last quarter": 4}


def test_an_unknown_word_gets_a_sentence():
    with pytest.raises(BenchmarkError, match="invalid choice: 'nothing'"):
        bench.main(["nothing"])


def rows_of(tmp_path, name):
    (path,) = tmp_path.glob(f"{name}_*.csv")
    assert path.with_suffix(".md").exists()
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def forked_runs(monkeypatch):
    """The runs that are measured are forked processes, which import nothing."""
    monkeypatch.setattr(subprocesses, "subprocess", SimpleNamespace(run=forked.run))


@pytest.fixture
def runs_here(monkeypatch):
    """The runs that are measured are runs of this process."""

    def run(name, words):
        module, arguments = words[2], words[3:]
        if module == "domainbed_ext.bench.plain":
            plain.run(parse(arguments), workers=0)
        else:
            assert module == "domainbed_ext.train" and train.main(arguments) == 0

    monkeypatch.setattr(subprocesses, "run", run)


@pytest.fixture(autouse=True)
def on_one_core(monkeypatch):
    """Tests share cores with each other, and need no exact rates."""
    monkeypatch.setattr(lower_bound, "_SECONDS", 0.0)
    for module in (accuracy, runs):
        monkeypatch.setattr(module, "count_available_cores", lambda: 1)


SMALL = ["--backbone", "vit_pico_patch8_32", "--rounds", "1"]


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
def test_stages_are_measured_from_the_file_to_the_optimizer(pacs_like, tmp_path, monkeypatch, capsys):
    there = SimpleNamespace(
        imread=lambda path, mode: np.zeros((40, 40, 3), np.uint8), cvtColor=lambda pixels, _: pixels
    )
    there.__spec__, there.IMREAD_COLOR, there.COLOR_BGR2RGB = "there", 1, 4
    monkeypatch.setitem(sys.modules, "cv2", there)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    monkeypatch.setattr(decoders, "find_spec", sys.modules.get)
    words = ["stages", "--data_dir", str(pacs_like), "--images", "6", "--hparams", '{"batch_size": 4}']
    bench.main([*words, *SMALL, "--output_dir", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out", "stages")
    groups = {row["stage"] for row in rows}
    assert groups >= {"training images", "evaluation images", "training step, BOnly", "evaluation, LP"}
    assert all(float(row["images/s"]) > 0 for row in rows)
    assert all(float(row["× plain"]) == 1 for row in rows if row["way"].startswith("plain"))
    assert {row["way"] for row in rows if row["of the lower bound"]} == {"ours"}
    assert {"decode (torchvision.io)", "decode (opencv-python-headless)"} <= {row["way"] for row in rows}
    out = capsys.readouterr().out
    assert "other pixels: 0 of 6 by torchvision.io, 6 of 6 by opencv-python-headless." in out
    assert "Not installed and left out: simplejpeg." in out


RUN = ["run", *SMALL, "--steps", "3", "--checkpoint_freq", "2", "--per_class", "7", "--hparams", '{"batch_size": 4}']


def test_a_run_is_measured_against_the_plain_way(runs_here, pacs_like, tmp_path):
    bench.main([*RUN, "--data_dir", str(pacs_like), "--output_dir", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out", "run_fullft")
    assert [row["way"] for row in rows] == [
        "plain",
        "--protocol domainbed, float32",
        "--protocol domainbed --precision bf16",
        "defaults, the first of a sweep",
        "defaults",
    ]
    assert float(rows[0]["× plain"]) == 1 and all(float(row["seconds"]) > 0 for row in rows)
    assert all(float(row["× lower bound"]) > 1 for row in rows)


def test_only_the_ways_that_are_asked_for_are_measured(monkeypatch, pacs_like, tmp_path, capsys):
    ran = []
    monkeypatch.setattr(subprocesses, "run", lambda name, words: ran.append(name))
    words = [*RUN, "--data_dir", str(pacs_like), "--output_dir", str(tmp_path / "out")]
    bench.main([*words, "--ways", "defaults", "upstream", "--checkout", "C"])
    assert ran == ["filling the cache", "upstream", "defaults"]
    rows = rows_of(tmp_path / "out", "run_upstream_fullft")
    assert [row["way"] for row in rows] == ["upstream", "defaults"] and "× plain" not in rows[0]
    assert "Defaults over upstream: " in capsys.readouterr().out
    bench.main([*words, "--ways", "first"])
    assert ran[3:] == ["defaults, the first of a sweep"]
    (row,) = rows_of(tmp_path / "out", "run_fullft")
    assert not {"× plain", "× upstream"} & set(row)


def test_a_way_that_cannot_be_measured_gets_a_sentence(pacs_like):
    words = [*RUN, "--data_dir", str(pacs_like), "--ways"]
    with pytest.raises(BenchmarkError, match="unknown way in --ways 'default': did you mean 'defaults'"):
        bench.main([*words, "default"])
    with pytest.raises(BenchmarkError, match="add --checkout DIR"):
        bench.main([*words, "upstream"])


def test_a_measurement_that_fails_has_written_what_was_measured(monkeypatch, pacs_like, tmp_path, capsys):
    def run(name, words):
        if name == "defaults":
            raise BenchmarkError("killed")

    monkeypatch.setattr(subprocesses, "run", run)
    words = [*RUN, "--data_dir", str(pacs_like), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(BenchmarkError, match="killed"):
        bench.main([*words, "--ways", "plain", "first", "defaults"])
    assert [row["way"] for row in rows_of(tmp_path / "out", "run_fullft")] == ["plain", runs.WAYS["first"]]
    assert capsys.readouterr() == ("", "")  # silent where there is no terminal, until all is measured


def test_a_ratio_is_over_the_rounds_that_both_have_finished():
    assert timing.ratio({"ours": [1.0], "plain": [2.0, 50.0]}, "plain", "ours") == 2


def test_the_steps_of_a_run_are_shown_while_it_runs(monkeypatch, tmp_path):
    shown, seen = [], threading.Event()

    class Line:
        def reach(self, done):
            shown.append(done)

        def note(self, text):
            shown.append(text)
            seen.set()

    monkeypatch.setattr(watching, "bar", lambda *_: contextlib.nullcontext(Line()))
    folder = RunFolder(tmp_path)
    folder.append({"step": 4})
    with watching.watched("plain", tmp_path, 41):
        assert seen.wait(60)
    assert shown[:2] == [5, "0 s so far"]
    with folder.claim() as claim:
        claim.share = 0.5
        claim.beat()
        assert watching.steps_done(tmp_path, 40) == 20
    assert watching.steps_done(tmp_path / "none", 40) == 0
    (tmp_path / "results.jsonl").write_text('{"step": 30}\n{"st')  # upstream is just writing
    assert watching.steps_done(tmp_path, 40) == 20


RATES = {"float32": 1e9, "bf16": 4e9}


def make_setup(pacs_like, algorithm, precision="float32"):
    words = ["--dataset", "PACS", "--data_dir", str(pacs_like), "--algorithm", algorithm, "--test_envs", "0"]
    words += ["--steps", "5", "--checkpoint_freq", "2", "--threads", "1", "--precision", precision]
    return set_up(parse([*words, "--hparams", '{"backbone": "vit_pico_patch8_32", "batch_size": 4}']))


def test_the_lower_bound_is_that_of_the_matmuls_of_every_image(pacs_like, monkeypatch):
    monkeypatch.setattr(lower_bound, "product_rate", lambda algorithm: RATES[algorithm.precision])
    setup = make_setup(pacs_like, "FullFT")
    backbone = setup.make_algorithm().backbone
    width, blocks, tokens, patch = backbone.embed_dim, len(backbone.blocks), 17, 8
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    # After the projection to q, k and v, the last block computes only the class token.
    last = 2 * tokens * 3 * width**2 + 2 * 9 * width**2 + 4 * tokens * width
    head = 2 * width * 2
    forward = 2 * (tokens - 1) * 3 * patch**2 * width + (blocks - 1) * block + last + head
    bound = lower_bound.measure_lower_bound(setup)
    # 4 × 20 images at the last of three evaluations, and 3 × 4 held out ones at the others.
    assert (bound.work.trained, bound.work.evaluated) == (5 * 3 * 4, 80 + 2 * 12)
    assert bound.work.evaluation == forward and 2.5 * forward < bound.work.training < 3.2 * forward
    assert bound.seconds == (60 * bound.work.training + 104 * forward) / RATES["float32"]
    assert f"{bound.seconds / 4:.3g} s in bf16 at 4 GFLOP/s" in bound.describe()
    other = make_setup(pacs_like, "FullFT", "bf16")  # where attention may be other operations
    assert lower_bound.count_work(other, other.make_algorithm()).evaluation == forward
    probe = lower_bound.measure_lower_bound(make_setup(pacs_like, "LP")).work
    assert (probe.training, probe.evaluation) == (forward + head, head)  # it is evaluated on features


def test_targets_are_chosen_by_what_bf16_matmuls_are_worth():
    kinds = [targets.choose_targets({"float32": 1.0, "bf16": rate}).processor for rate in (10, 2.2, 0.2)]
    assert kinds == ["AMX", "AVX-512 bf16", "AVX2"]
    assert targets.choose_targets(RATES, "cuda") is None
    assert targets.judge(3.2, least=3) == {"target": "≥ 3", "met": "yes"}
    assert targets.judge(0.7, most=0.65) == {"target": "≤ 0.65", "met": "no"}


STEPS = ["steps", "--backbones", "vit_pico_patch8_32", "--image_size", "32", "--batch_size", "2", "--rounds", "1"]


def test_steps_are_measured_against_peft_and_timm(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(steps, "EVALUATED", 2)
    monkeypatch.setattr(steps, "measure_rates", lambda algorithm: RATES)
    bench.main([*STEPS, "--output_dir", str(tmp_path)])
    rows = rows_of(tmp_path, "steps")
    compared = {(row["stage"], row["way"].split(", ")[0], row["against"]) for row in rows}
    assert len(compared) == len(rows) == 13
    assert ("step, BOnly", "BOnly", "PEFT LoRA-FA, bf16") in compared
    assert ("evaluation, FullFT", "FullFT", "timm, float32") in compared
    # Of both precisions of a peer, the faster one has a target.
    with_target = [row["stage"] for row in rows if row["target"]]
    assert with_target == ["step, BOnly", "step, dropout 0.1 over none", "evaluation, BOnly", "evaluation, FullFT"]
    for row in rows:
        measured = float(row["ms"]) / float(row["its ms"])
        is_rate = row["stage"].startswith("evaluation")
        assert float(row["ratio"]) == pytest.approx(1 / measured if is_rate else measured, rel=0.2)


def test_peers_are_timed_in_the_precisions_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "EVALUATED", 2)
    monkeypatch.setattr(steps, "measure_rates", lambda algorithm: RATES)
    bench.main([*STEPS, "--peers", "float32", "--output_dir", str(tmp_path)])
    peers = {row["against"] for row in rows_of(tmp_path, "steps") if "BOnly" not in row["against"]}
    assert peers and all(peer.endswith(", float32") for peer in peers)


def test_without_peft_the_rest_is_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(steps, "measure_rates", lambda algorithm: RATES)
    monkeypatch.setattr(steps, "EVALUATED", 2)
    bench.main([*STEPS, "--targets", "q", "--output_dir", str(tmp_path)])  # which PEFT cannot adapt
    assert {row["against"].split(", ")[0] for row in rows_of(tmp_path, "steps")} == {"timm", "BOnly"}
    assert "PEFT LoRA-FA is left out: PEFT adapts a fused qkv as a whole" in capsys.readouterr().out


def test_a_table_names_the_instructions_and_what_limits_them(monkeypatch, tmp_path):
    has = {"avx512_bf16": True, "amx_bf16": False}
    monkeypatch.setattr(report, "machine", lambda: {"instructions": "AVX512"})
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MKL_NUM_THREADS", "1")  # which limits no instructions
    monkeypatch.setattr(report, "rounding", lambda: {"has": has})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert report.instructions() == "AVX512 avx512_bf16"
    report.write("one", "One", [{"way": "plain"}], tmp_path, show=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert report.instructions() == "AVX512 (ONEDNN_MAX_CPU_ISA=AVX2)"
    report.write("two", "Two", [{"way": "plain"}], tmp_path, show=False)
    one, two = sorted(path.stem for path in tmp_path.glob("*.md"))
    assert two == one.replace("one", "two") + "_avx512"  # so one machine's tables do not replace each other


def test_a_part_of_a_data_set_has_the_first_images_of_each_class_and_domain(pacs_like, tmp_path):
    folder = link_part("PACS", str(pacs_like), 3, tmp_path / "part")
    found = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    assert len(found) == 4 * 2 * 3 and str(found[0]) == "PACS/art_painting/dog/pic_000.png"
    with pytest.raises(BenchmarkError, match="DigitsShift does not consist of image folders"):
        link_part("DigitsShift", str(pacs_like), 3, tmp_path / "other")


def test_without_a_gpu_nothing_is_measured_and_that_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench.main(["gpu", "--output_dir", str(tmp_path)])
    assert "no CUDA device here" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_whole_run_is_timed_on_whatever_device_there_is(forked_runs, pacs_like, tmp_path):
    words = ["gpu", "--data_dir", str(pacs_like), "--cache_dir", str(tmp_path / "cache"), "--steps", "3"]
    args = bench.make_parser().parse_args(words)
    args.backbone, args.hparams = "vit_pico_patch8_32", '{"batch_size": 4}'
    gpu.whole_run(args, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out", f"run_{report.device()}")
    assert float(row["seconds, start to end"]) > float(row["of them in stages"]) > 0
    assert sum(float(value) for name, value in row.items() if name.endswith(", %")) == pytest.approx(100, abs=1)


def test_runs_side_by_side_are_measured_against_one(forked_runs, pacs_like, tmp_path):
    words = ["side_by_side", "--data_dir", str(pacs_like), "--cache_dir", str(tmp_path / "cache"), "--steps", "2"]
    bench.main([*words, *SMALL, "--hparams", '{"batch_size": 4}', "--output_dir", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out", "side_by_side")
    assert [row["runs at once"] for row in rows] == ["1", "2"]
    assert float(rows[0]["× 1 at once"]) == 1 and float(rows[1]["runs an hour"]) > 0


def test_rates_of_a_model_are_those_of_its_steps():
    args = argparse.Namespace(batch_sizes=[2, 3], images=4, image_size=32, rounds=1)
    rows = gpu.rates("vit_pico_patch8_32", "BOnly", args)
    assert [row["stage"] for row in rows] == ["training, batch 2", "training, batch 3", "evaluation, batch 4"]
    assert all(row["images/s"] > 0 and row["TFLOP/s"] >= 0 for row in rows)


def test_the_plain_way_trains_and_evaluates_everything(make_args, pacs_like):
    hparams = '{"backbone": "vit_pico_patch8_32", "batch_size": 4}'
    args = make_args(dataset="PACS", data_dir=str(pacs_like), hparams=hparams, checkpoint_freq=2, steps=4)
    records = plain.run(args, workers=0).records()
    assert [record["step"] for record in records] == [0, 2, 3]
    assert all(len([name for name in record if name.endswith("_acc")]) == 8 for record in records)
    assert all(record["precision"] == "float32" for record in records)


def test_the_plain_way_looks_at_a_share_and_computes_in_bf16_if_told_to(make_args, pacs_like):
    hparams = '{"backbone": "vit_pico_patch8_32", "batch_size": 4}'
    named = {"dataset": "PACS", "data_dir": str(pacs_like), "hparams": hparams, "checkpoint_freq": 0, "steps": 1}
    args = make_args(**named, train_eval_share=0.01, precision="bf16")
    (record,) = plain.run(args, workers=0).records()
    assert record["precision"] == "bf16"
    assert {record[f"env{env}_in_acc"] for env in (1, 2, 3)} <= {0, 1}  # of one image each


def test_plain_images_that_are_only_looked_at_are_ours_to_the_bit(pacs_like):
    environment, inputs = PACS(pacs_like, [0], {}).datasets[1], Inputs((24, 24))
    ours = inputs.ready(Augmented(Uncached(environment), AUGMENTATIONS["none"], inputs.size).batch([3], None))
    assert torch.equal(plain.transforms(inputs, augmented=False)(environment.load(3)), ours[0])


def test_accuracies_are_compared_trial_by_trial(runs_here, pacs_like, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "SMALL", 16)
    words = ["accuracy", "--data_dir", str(pacs_like), "--steps", "1", "--per_class", "0"]
    words += ["--first_trial", "1", "--trials", "1"]
    words += ["--backbone", "vit_pico_patch8_32", "--algorithm", "LP", "--hparams", '{"batch_size": 4}']
    bench.main([*words, "--output_dir", str(tmp_path / "out")])
    ways = {
        "all": ["plain, float32", "ours, float32", "ours, defaults"],
        "images": ["plain, bf16", "ours, bf16"],
        "resized": ["ours, images of 16 px", "ours, --training_images resized"],
    }
    for comparison, names in ways.items():
        rows = rows_of(tmp_path / "out", f"accuracy_{comparison}")
        assert [row["way"] for row in rows] == names
        assert [row["in domain, difference"] == "" for row in rows] == [True] + [False] * (len(names) - 1)
        assert all(0 <= float(row["out of domain"].split("±")[0]) <= 100 for row in rows)
        (text,) = (tmp_path / "out").glob(f"accuracy_{comparison}_*.md")
        assert "over 1 trial(s), from trial 1 on" in text.read_text()


def test_a_run_that_fails_in_a_measurement_is_named(forked_runs, pacs_like, tmp_path):
    words = ["accuracy", "--data_dir", str(pacs_like), "--test_env", "9", "--backbone", "vit_pico_patch8_32"]
    with pytest.raises(BenchmarkError, match="the run 'plain, float32' failed .*--test_envs 9: PACS has no"):
        bench.main([*words, "--hparams", '{"batch_size": 4}', "--output_dir", str(tmp_path / "out")])
