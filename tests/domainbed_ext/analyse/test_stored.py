"""Results of analyses in tables, plots and page, and what the command says of a sweep that lacks something."""

import json
import math
import shutil

import pytest
from markupsafe import escape

from domainbed_ext import collect_results
from domainbed_ext.analyse import energy, inits, lemmas, similarity, stored
from domainbed_ext.analyse.command import main, make_parser
from domainbed_ext.analyse.registry import ANALYSES
from domainbed_ext.analyse.stored import Stored
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.tables.latex import render_table
from tests.domainbed_ext.fabricated_records import left_out_run, single_source_run, write_runs

RUN = ["BOnly-1-0", 10]
SHARED = {"group": "PACS", "algorithm": "BOnly"}
LAYER = {"layer": "blocks.0.attn.qkv.q", "projection": "q", "depth": 0}
COMPARED = {"factor": "B", "pairing": similarity.SAME_TASK, "pairs": 1, "low": math.nan, "high": math.nan}
STARTS = {"trained": "B", "init_A": "orthonormal", "init_B": "zero", "reference": "", "trials": 1, "runs": [RUN]}
ROWS = {
    "similarity": [
        similarity.Row(**SHARED, **COMPARED, **place, similarity=0.25, start=math.nan, chance=0.125, runs=[RUN])
        for place in (LAYER, LAYER | {"layer": "all", "depth": -1}, {"layer": "all", "projection": "all", "depth": -1})
    ],
    "lemmas": [
        lemmas.Row("PACS", lemmas.RANDOM, "", **LAYER, rank=8, runs=[RUN], best=0.1, best_B=0.3125, best_A=0.9),
        lemmas.Row("PACS", lemmas.TRAINED, "BOnly", **LAYER, rank=8, runs=[RUN], best=0.1, best_B=0.3, reached=1.0625),
        lemmas.Row("PACS", lemmas.TRAINED, "BA", **LAYER, rank=8, runs=[RUN], reached=0.9, own_start=0.4375),
    ],
    "inits": [
        inits.Row(**SHARED, kind=inits.ACCURACY, **STARTS, accuracies=[[71.5, math.nan, math.nan]] * 2),
        inits.Row(**SHARED, kind=inits.ENTRIES, **STARTS, projection="q", size_after=0.5625, after=[0.0] * 20 + [1.0]),
    ],
    "energy": [
        energy.Row(
            **SHARED,
            **LAYER,
            counts=[1, 2],
            shares=[0.6875, 1.0],
            run=RUN,
            spans=["A frozen"],
            inside=[0.2],
            chance=[0.1],
        )
    ],
}
ROWS["inits"][1].after.extend([0.0] * (len(inits.EDGES) - 1 - len(ROWS["inits"][1].after)))
SHOWN = {"similarity": "0.250", "lemmas": "1.062", "inits": "71.5", "energy": "0.688"}


def write_all(folder, finished_runs):
    for name, rows in ROWS.items():
        result = Stored(ANALYSES[name], finished_runs, {"step": "best"}, rows)
        stored.write(folder, {f"{name}.json": result.to_json()})


def fabricated(folder, algorithms=("BOnly",), trials=(0,), weights=True):
    """A sweep of runs that left one domain out; those of adapters look as if they had saved one."""
    records = [record for name in algorithms for trial in trials for record in left_out_run(name, trial, 1, 0.5)]
    write_runs(folder, records)
    for path in folder.iterdir() if weights else ():
        (path / "selected").mkdir()
        file = "trained.safetensors" if path.name.startswith("FullFT") else "adapter.json"
        (path / "selected" / file).write_text("{}")
    return folder


def test_every_analysis_is_declared_whole():
    (commands,) = (action for action in make_parser()._actions if action.choices)
    assert list(commands.choices) == list(ANALYSES) == list(ROWS)
    for name, analysis in ANALYSES.items():
        assert analysis.name == name and analysis.title and analysis.summary
        known = vars(make_parser().parse_args([name, "--input_dir", "x"]))
        assert set(analysis.options) <= set(known)


@pytest.mark.parametrize("name", ANALYSES)
def test_results_survive_their_file(tmp_path, name):
    write_all(tmp_path, 1)
    found = stored.read(stored.path_of(tmp_path, name))
    assert (found.finished_runs, found.options) == (1, {"step": "best"})
    assert repr(found.rows) == repr(ROWS[name])  # NaN is not equal to itself
    assert found.to_json() == stored.path_of(tmp_path, name).read_text(encoding="utf-8")
    assert "NaN" not in found.to_json() and found.to_json().count("\n") == len(found.rows) + 2
    for table in found.tables():
        assert table.rows and all(len(row) == len(table.columns) for row in table.rows)


def test_tables_plots_and_page_show_them(tmp_path, capsys):
    folder = fabricated(tmp_path / "runs")
    write_all(folder, 1)
    paths = {path.name: path for path in collect_results.collect(folder)}
    page, text = (paths[name].read_text(encoding="utf-8") for name in ("index.html", "results.txt"))
    for name, analysis in ANALYSES.items():
        assert f"{name}.svg" in paths
        assert f"<figcaption>{analysis.title} " in page
        for table in analysis.tables(ROWS[name]):
            assert table.title in text and escape(table.title) in page
        assert SHOWN[name] in text
    assert "warning" not in capsys.readouterr().err


def test_outdated_and_broken_results_are_named(tmp_path, capsys):
    folder = fabricated(tmp_path / "runs", trials=(0, 1))
    write_all(folder, 1)
    (folder / stored.FOLDER / "energy.json").write_text("{}\n")
    paths = {path.name for path in collect_results.collect(folder)}
    errors = capsys.readouterr().err
    assert "similarity.json was made of 1 finished runs, and now there are 2: run " in errors
    assert "left out: " in errors and "energy.json holds no results of an analysis: run " in errors
    assert "energy.svg" not in paths and "similarity.svg" in paths


def test_without_analyses_nothing_is_added(tmp_path):
    paths = {path.name for path in collect_results.collect(fabricated(tmp_path / "runs"))}
    assert not paths & {f"{name}.{ending}" for name in ANALYSES for ending in ("json", "svg")}


def test_a_dry_run_computes_nothing(tmp_path, capsys):
    folder = fabricated(tmp_path / "runs", ("BOnly", "FullFT"), (0, 1))
    assert main(["similarity", "--input_dir", str(folder), "--dry_run"]) == 0
    assert "would analyse 2 runs with adapters: BOnly-1-0, BOnly-1-1" in capsys.readouterr().out
    assert not (folder / stored.FOLDER).exists()


@pytest.mark.parametrize(
    ("words", "runs", "sentence"),
    [
        (["similarity"], {}, "similarity compares two runs of one method, and .* has one of each: launch"),
        (["lemmas"], {}, "change of a weight from a run of FullFT in .*, and there is none: launch"),
        (["energy"], {"algorithms": ("FullFT",)}, "has no run of a method with factors A and B: launch"),
        (
            ["inits"],
            {"weights": False},
            "1 of 1 selected runs cannot be analysed, e.g. .* saved no model: run it again",
        ),
        (["energy", "--algorithms", "BA"], {}, "unknown algorithm of --algorithms 'BA'"),
        (["lemmas", "--ranks", "0"], {}, "--ranks: 0 is too small"),
        (["energy", "--step", "77"], {}, "--step 77: .* saved "),
    ],
)
def test_a_lack_is_one_sentence(tmp_path, words, runs, sentence):
    folder = fabricated(tmp_path / "runs", **runs)
    with pytest.raises(BenchmarkError, match=sentence):
        main([*words, "--input_dir", str(folder)])
    assert not (folder / stored.FOLDER).exists()


def test_full_fine_tuning_on_other_images_is_of_no_use(tmp_path):
    folder = fabricated(tmp_path / "runs", ("BOnly", "FullFT"), (0, 1))
    shutil.rmtree(folder / "FullFT-1-0")
    shutil.rmtree(folder / "BOnly-1-1")
    with pytest.raises(BenchmarkError, match="none of its runs is on the same images as those with adapters"):
        main(["lemmas", "--input_dir", str(folder)])


def test_there_have_to_be_selected_runs(tmp_path):
    with pytest.raises(BenchmarkError, match="no folder"):
        main(["energy", "--input_dir", str(tmp_path / "nowhere")])
    records = left_out_run("BOnly", 0, 1, 0.5)
    for record in records:
        record["args"]["test_envs"] = [0, 1]
    with pytest.raises(BenchmarkError, match="has no run that is tested on a single environment"):
        main(["energy", "--input_dir", str(write_runs(tmp_path / "pairs", records))])


def test_single_source_runs_are_apart(tmp_path):
    from domainbed_ext.analyse.runs import Sweep

    records = [record for source in (0, 1) for record in single_source_run("BOnly", 0, source=source)]
    folder = write_runs(tmp_path / "runs", records)
    for path in folder.iterdir():
        (path / "selected").mkdir()
        (path / "selected" / "adapter.json").write_text(json.dumps({}))
    runs = Sweep(folder).adapted()
    assert [each.sources for each in runs] == [(0,), (1,)]
    assert {each.group for each in runs} == {"PACS, single source"}


def test_latex_has_no_letters_that_it_lacks():
    for name, rows in ROWS.items():
        for table in ANALYSES[name].tables(rows):
            assert set(filter(lambda letter: ord(letter) > 127, render_table(table))) <= {"·"}, table.title
