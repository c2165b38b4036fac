"""The analyses of a small sweep, against numbers computed from the files of its runs."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.linalg import subspace_angles

from domainbed_ext import train
from domainbed_ext.analyse import energy, inits, lemmas, similarity, stored
from domainbed_ext.analyse.command import main
from domainbed_ext.analyse.registry import ANALYSES
from domainbed_ext.analyse.runs import ChosenRun, Factors, read_adapter
from domainbed_ext.analyse.weights import layers_of, read_full
from domainbed_ext.data.splits import Split
from domainbed_ext.errors import BenchmarkError, warn_once
from domainbed_ext.models import backbones
from domainbed_ext.runs.arguments import RunArguments
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.saved import Moved
from domainbed_ext.runs.setup import Setup
from vitlorafa import adapter_layers

pytestmark = pytest.mark.slow

RANK, LAST = 4, 3
LORA = {"lr": 0.02, "rank": RANK, "targets": "q,fc1"}
TRIALS = (0, 1)
METHODS = ("BA", "BA@adapter_seed=0", "BOnly", "BOnly@init_A=singular", "AOnly", "FullFT")
RUNS = [
    *((method, trial, LAST) for method in METHODS for trial in TRIALS),
    *((method, 0, 0) for method in METHODS if method.startswith("BA")),
]
SMALL = ("--images", "24", "--draws", "2", "--ranks", "1", "4")


def name_of(method, trial, env):
    return f"{method}-{trial}-{env}".replace("@", "_").replace("=", "_")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two trials of several methods with one domain left out, and some runs with another one left out."""
    root, whole = tmp_path_factory.mktemp("sweep") / "runs", Setup.evaluated
    with pytest.MonkeyPatch.context() as patched:

        def evaluated(setup, name):
            split = whole(setup, name)
            return Split(split.environment, split.keys[:8])

        patched.setattr(Setup, "evaluated", evaluated)
        for method, trial, env in RUNS:
            args = RunArguments(
                algorithm=method,
                trial_seed=trial,
                seed=10 * trial + env,
                test_envs=[env],
                hparams=json.dumps({"lr": 0.001} if method == "FullFT" else LORA),
                steps=3,
                checkpoint_freq=0,
                output_dir=str(root / name_of(method, trial, env)),
            )
            assert train.run(args, lambda share: None) == 0
    return root


@pytest.fixture(scope="module")
def analysed(sweep):
    """The rows of each analysis of the sweep, and what the command printed."""
    results = {}
    for name in ANALYSES:
        assert main([name, "--input_dir", str(sweep), *(SMALL if name == "lemmas" else ())]) == 0
        results[name] = stored.read(stored.path_of(sweep, name)).rows
    return results


def part_of(sweep, tmp_path, *methods, trials=TRIALS):
    """A copy of some methods' runs."""
    for method in methods:
        for trial in trials:
            name = name_of(method, trial, LAST)
            shutil.copytree(sweep / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


def chosen(sweep, method, trial=0):
    return ChosenRun(RunFolder(sweep / name_of(method, trial, LAST)), "best", Moved())


def factor(sweep, method, trial, env, which, layer=0):
    """A factor of q in a block, as the run's file has it: q is the first of the stacked projections."""
    tensors = load_file(sweep / name_of(method, trial, env) / "selected" / "adapter.safetensors")
    (name,) = [name for name in tensors if f"blocks.{layer}.attn.qkv" in name and name.endswith(f"lora_{which}")]
    return tensors[name][0].astype(np.float64)


def pick(rows, **values):
    return [row for row in rows if all(getattr(row, name) == value for name, value in values.items())]


def test_similarity_is_that_of_the_saved_factors(sweep, analysed):
    rows = analysed["similarity"]
    for which, turn in (("A", np.transpose), ("B", np.asarray)):
        (row,) = pick(rows, algorithm="BA", factor=which, pairing=similarity.NEITHER, projection="q", depth=1)
        angles = []
        first, again = "BA", "BA@adapter_seed=0"
        for methods in ((first, first), (first, again), (again, first)):
            for trial in TRIALS:
                places = zip(methods, (0, trial), (0, LAST), strict=True)
                spans = [turn(factor(sweep, *place, which, layer=1)) for place in places]
                angles.append(np.mean(np.cos(subspace_angles(*spans)) ** 2))
        assert row.pairs == len(angles) and row.similarity == pytest.approx(np.mean(angles), abs=1e-5)
        assert row.low <= row.similarity <= row.high


def test_each_pairing_has_its_starts(analysed):
    rows = pick(analysed["similarity"], algorithm="BA", factor="A", layer="all", projection="all")
    assert {row.pairing: row.pairs for row in rows} == {
        similarity.SAME_TASK: 3,
        similarity.SAME_START: 2,
        similarity.NEITHER: 6,
        similarity.BOTH: 1,
    }  # 12 of 15: three differ in `adapter_seed` alone
    starts = {row.pairing: row.start for row in rows}
    assert starts[similarity.SAME_START] == pytest.approx(1) == starts[similarity.BOTH]
    for pairing in (similarity.SAME_TASK, similarity.NEITHER):
        assert starts[pairing] == pytest.approx(rows[0].chance, abs=0.03)
    learned = {row.pairing: row.similarity for row in rows}
    assert learned[similarity.SAME_TASK] + 0.2 < learned[similarity.SAME_START] < 1


def test_factors_that_do_not_train_are_not_compared(analysed):
    there = {(row.algorithm, row.factor) for row in analysed["similarity"]}
    assert there == {("BA", "A"), ("BA", "B"), ("BOnly", "B"), ("BOnly@init_A=singular", "B"), ("AOnly", "A")}
    assert all(math.isnan(row.start) for row in pick(analysed["similarity"], factor="B"))
    # Singular vectors are the same start in each trial.
    assert {row.pairing for row in pick(analysed["similarity"], algorithm="BOnly@init_A=singular")} == {similarity.BOTH}


def test_the_change_of_full_fine_tuning_and_the_inputs_are_those_of_the_pretrained_model(sweep):
    adapter = read_adapter(chosen(sweep, "BOnly"))
    full = read_full(chosen(sweep, "FullFT"), layers_of([adapter]), images=24)
    run = chosen(sweep, "FullFT").load()
    hparams = run.setup.hparams
    pretrained = backbones.create(hparams["backbone"], hparams["weights"], 10, image_size=hparams["image_size"])
    trained = load_file(sweep / name_of("FullFT", 0, LAST) / "selected" / "trained.safetensors")
    name = "blocks.1.mlp.fc1"
    before = pretrained.get_submodule(name).weight.detach().numpy()
    assert full.changes[name] == pytest.approx(trained[f"{name}.weight"] - before, abs=1e-7)
    width = before.shape[1]
    before = pretrained.get_submodule("blocks.0.attn.qkv").weight.detach().numpy()[:width]
    assert full.changes["blocks.0.attn.qkv.q"] == pytest.approx(
        trained["blocks.0.attn.qkv.weight"][:width] - before, abs=1e-7
    )
    images = torch.cat(list(run.feed.training_images(24)))
    assert len(images) == 24
    with torch.no_grad():
        tokens = pretrained.norm_pre(pretrained._pos_embed(pretrained.patch_embed(images)))
        inputs = pretrained.blocks[0].norm1(tokens).flatten(0, 1).double().numpy()
    root = full.roots["blocks.0.attn.qkv"]
    moments = inputs.T @ inputs / len(inputs)
    assert root @ root == pytest.approx(moments, abs=0.02 * np.abs(moments).max())  # the run may compute in bf16


def test_lemmas_are_of_all_layers_ranks_and_methods(sweep, analysed):
    rows = analysed["lemmas"]
    random, trained = (pick(rows, kind=kind) for kind in (lemmas.RANDOM, lemmas.TRAINED))
    layers = {row.layer for row in rows}
    assert {row.projection for row in rows} == {"q", "fc1"}
    assert len(random) == len(layers) * 2 * len(TRIALS) and {row.rank for row in random} == {1, 4}
    for row in random:
        assert 0 <= row.best <= min(row.best_A, row.best_B) and max(row.best_A, row.best_B) <= 1
    assert np.mean([row.best_A for row in random]) == pytest.approx(np.mean([row.chance for row in random]), abs=0.02)
    methods = {row.algorithm for row in trained}
    assert methods == {method for method in METHODS if method not in ("FullFT", "BA@adapter_seed=0")}
    for row in trained:
        assert row.scaled <= row.reached + 1e-9 and row.scaled >= row.best - 1e-9
        assert math.isnan(row.best_B) is (not row.algorithm.startswith("BOnly"))
        assert math.isnan(row.best_A) is (row.algorithm != "AOnly")
        if row.algorithm.startswith("BOnly"):
            assert row.scaled >= row.best_B - 1e-9
        if row.algorithm.startswith("BA"):
            assert 0 < row.own_start < row.other_start <= 1 and row.own_start_weighted > 0
        else:
            assert math.isnan(row.own_start)


def test_a_loss_is_that_of_the_saved_update(sweep, analysed):
    adapter = read_adapter(chosen(sweep, "BOnly"))
    full = read_full(chosen(sweep, "FullFT"), layers_of([adapter]), images=24)
    A, B = (factor(sweep, "BOnly", 0, LAST, which) for which in "AB")
    scale = json.loads((sweep / name_of("BOnly", 0, LAST) / "selected" / "adapter.json").read_text())["config"]["alpha"]
    change, root = full.changes["blocks.0.attn.qkv.q"], full.roots["blocks.0.attn.qkv"]
    expected = np.square((change - scale / RANK * B @ A) @ root).sum() / np.square(change @ root).sum()
    (row,) = [
        row
        for row in pick(analysed["lemmas"], algorithm="BOnly", layer="blocks.0.attn.qkv.q")
        if row.runs[0][0] == name_of("BOnly", 0, LAST)
    ]
    assert row.reached == pytest.approx(expected, rel=1e-4)


def test_inits_have_accuracies_and_entries(sweep, analysed):
    rows = analysed["inits"]
    accuracies = {row.algorithm: row for row in pick(rows, kind=inits.ACCURACY)}
    assert (accuracies["BA"].init_A, accuracies["BA"].init_B) == ("kaiming_uniform", "zero")
    assert (accuracies["AOnly"].init_A, accuracies["AOnly"].init_B) == ("zero", "orthonormal")
    singular = accuracies["BOnly@init_A=singular"]
    assert (singular.init_A, singular.reference) == ("singular", "BOnly")
    of = {
        method: [
            json.loads((sweep / name_of(method, trial, LAST) / "results.jsonl").read_text())[f"env{LAST}_in_acc"]
            for trial in TRIALS
        ]
        for method in ("BOnly", "BOnly@init_A=singular")
    }
    assert singular.accuracies[0][0] == pytest.approx(100 * np.mean(of["BOnly@init_A=singular"]))
    difference = 100 * (np.mean(of["BOnly@init_A=singular"]) - np.mean(of["BOnly"]))
    assert singular.differences[0][0] == pytest.approx(difference)
    entries = pick(rows, kind=inits.ENTRIES)
    assert {row.algorithm for row in entries} == {"BA", "BA@adapter_seed=0", "AOnly"}
    for row in pick(entries, algorithm="BA"):
        assert row.kurtosis_before == pytest.approx(-1.2, abs=0.1)  # uniform
        assert row.size_before == pytest.approx(math.sqrt(1 / 3), abs=0.03) and row.moved > 0
        assert sum(row.before) == pytest.approx(1) and sum(row.after) == pytest.approx(1, abs=0.01)
    for row in pick(entries, algorithm="AOnly"):
        assert row.size_before == 0 and math.isnan(row.moved) and row.before == [] and row.size_after > 0


def test_the_start_is_what_training_started_from(sweep):
    """A frozen A is its own start, and a step of AdamW moves no entry by much more than the learning rate."""
    drawn = [
        layer.lora_A[0].detach().numpy()
        for name, layer in adapter_layers(chosen(sweep, "BOnly").load().setup.make_algorithm().backbone)
        if name == "blocks.0.attn.qkv"
    ]
    assert np.array_equal(drawn[0], factor(sweep, "BOnly", 0, LAST, "A"))
    layer: Factors = read_adapter(chosen(sweep, "BA")).layers["blocks.0.attn.qkv.q"]
    assert 0 < np.abs(layer.A - layer.start_A).max() <= 3 * 1.2 * LORA["lr"]
    assert np.linalg.norm(layer.A - layer.start_A) < np.linalg.norm(layer.start_A)
    assert not layer.start_B.any() and layer.B.any()
    shared = [read_adapter(chosen(sweep, "BA@adapter_seed=0", trial)) for trial in TRIALS]
    assert shared[0].start == shared[1].start


def test_energies_are_those_of_updates_and_spans(sweep, analysed):
    rows = analysed["energy"]
    (row,) = [
        row
        for row in pick(rows, algorithm="BOnly", layer="blocks.0.attn.qkv.q")
        if row.run[0] == name_of("BOnly", 0, LAST)
    ]
    A, B = (factor(sweep, "BOnly", 0, LAST, which) for which in "AB")
    values = np.square(np.linalg.svd(B @ A, compute_uv=False))
    assert row.shares[:3] == pytest.approx([values[:k].sum() / values.sum() for k in (1, 2, 4)], abs=1e-5)
    assert row.spans == ["A frozen", "B trained"]
    change = read_full(chosen(sweep, "FullFT"), layers_of([read_adapter(chosen(sweep, "BOnly"))])).changes[row.layer]
    P = A.T @ np.linalg.inv(A @ A.T) @ A
    assert row.inside[0] == pytest.approx(np.square(change @ P).sum() / np.square(change).sum(), abs=1e-5)
    P = B @ np.linalg.inv(B.T @ B) @ B.T
    assert row.inside[1] == pytest.approx(np.square(P @ change).sum() / np.square(change).sum(), abs=1e-4)
    assert {name for row in pick(rows, algorithm="BA") for name in row.spans} == {"A trained", "A start", "B trained"}
    for row in pick(rows, algorithm="FullFT"):
        assert row.spans == [] and row.shares[-1] == pytest.approx(1) and row.shares == sorted(row.shares)


@pytest.mark.parametrize("name", ANALYSES)
def test_the_same_runs_give_the_same_files(sweep, analysed, tmp_path, name):
    runs = part_of(sweep, tmp_path, "BA", "BOnly", "FullFT")
    files = []
    for _ in range(2):
        assert main([name, "--input_dir", str(runs), *(SMALL if name == "lemmas" else ())]) == 0
        files.append({path.name: path.read_bytes() for path in (runs / stored.FOLDER).iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {f"{name}.{ending}" for ending in ("json", "txt", "md", "svg")}


@pytest.mark.parametrize("name", ANALYSES)
def test_what_is_stored_is_what_was_computed(sweep, analysed, name):
    found = stored.read(stored.path_of(sweep, name))
    assert found.to_json() == stored.path_of(sweep, name).read_text(encoding="utf-8")
    for table in found.tables():
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)
        assert all(run in {path.name for path in sweep.iterdir()} for each in table.origins.values() for run, _ in each)
        assert all(row < len(table.rows) and column < len(table.columns) for row, column in table.origins)
    assert any(axes.has_data() for axes in found.figure().axes)


def test_a_dry_run_computes_nothing(sweep, tmp_path, capsys):
    runs = part_of(sweep, tmp_path, "BA", "FullFT")
    assert main(["similarity", "--input_dir", str(runs), "--dry_run"]) == 0
    assert "would analyse 2 runs with adapters: " in capsys.readouterr().out
    assert not (runs / stored.FOLDER).exists()


def test_without_full_fine_tuning_spectra_remain(sweep, tmp_path, capsys):
    runs = part_of(sweep, tmp_path, "BOnly", "AOnly", trials=(0,))
    warn_once.cache_clear()  # or it may have been printed by an earlier test
    assert main(["energy", "--input_dir", str(runs), "--algorithms", "BOnly"]) == 0
    assert "nothing is said of the change" in capsys.readouterr().err
    rows = stored.read(stored.path_of(runs, "energy")).rows
    assert {row.algorithm for row in rows} == {"BOnly"} and all(math.isnan(x) for row in rows for x in row.inside)
    assert len(stored.read(stored.path_of(runs, "energy")).tables()) == 1


def test_a_run_without_full_fine_tuning_beside_it_has_no_numbers_in_the_table_of_spans():
    known = energy.Row("g", "BA", "b.q", "q", 0, [1, 2], [0.5, 1.0], ["r1", 1], ["A trained"], [0.3], [0.1])
    other = energy.Row("g", "BOnly", "b.q", "q", 0, [1, 2], [0.5, 1.0], ["r2", 1], ["A frozen"], [math.nan], [0.1])
    spans = energy.tables([known, other])[1]
    assert [row[2:] for row in spans.rows] == [["0.300", "0.300", "0.100", "3.00"], ["-", "-", "0.100", "-"]]


@pytest.mark.parametrize("trained", ["AB", "A", "B"])
@pytest.mark.parametrize("is_residual", [True, False])
def test_no_update_has_a_rank_above_the_one_of_its_bound(trained, is_residual):
    random = np.random.default_rng(0)
    A, B = random.standard_normal((3, 12)), random.standard_normal((16, 3))
    start_A = random.standard_normal(A.shape) if "A" in trained else A
    start_B = random.standard_normal(B.shape) if "B" in trained else B
    factors = Factors("m", "q", 0, 2.0, trained, A, B, start_A, start_B, is_residual)
    assert factors.update_rank == np.linalg.matrix_rank(factors.update)


def test_theorem_4_3_holds_up_to_rounding_where_both_losses_are_0():
    random = np.random.default_rng(0)
    A, B = random.standard_normal((8, 8)), random.standard_normal((8, 8))
    factors = Factors("m", "q", 0, 1.0, "AB", A, B, A, B, False)
    root = random.standard_normal((8, 8))
    for change, holds in ((random.standard_normal((8, 8)), 1.0), (np.zeros((8, 8)), math.nan)):
        layer = lemmas._Layer("g", factors, 0, change, root @ root.T, ["r", 1], draws=20)
        assert [row.holds for row in lemmas._random_rows(layer, [8])] == pytest.approx([holds], nan_ok=True)


@pytest.mark.parametrize("analysis", ["energy", "similarity", "lemmas", "inits"])
def test_diverged_runs_are_left_out_with_a_warning(sweep, tmp_path, capsys, analysis):
    runs = part_of(sweep, tmp_path, "BA", "BOnly", "FullFT")
    lost = runs / name_of("BA", 0, LAST)
    records = [json.loads(line) for line in (lost / "results.jsonl").read_text().splitlines()]
    records[-1] |= {"diverged": True, "first_nonfinite_step": 1}
    (lost / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in lost.rglob("*.safetensors"):
        path.write_bytes(b"no weights that anything could read")
    warn_once.cache_clear()
    assert main([analysis, "--input_dir", str(runs), *(SMALL if analysis == "lemmas" else ())]) == 0
    assert (
        f"1 of {len(list(runs.glob('*/done')))} selected runs diverged: they are not analysed"
        in capsys.readouterr().err
    )
    for path in runs.glob("*/done"):
        if path.parent != lost:
            shutil.rmtree(path.parent)
    with pytest.raises(BenchmarkError, match="all selected runs in .* diverged: launch the sweep with other"):
        main([analysis, "--input_dir", str(runs)])
