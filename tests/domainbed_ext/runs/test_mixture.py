"""Runs that do not belong in one table are refused, or told."""

import pytest

from domainbed_ext import collect_results
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs.mixture import check
from tests.domainbed_ext.fabricated_records import single_source_run, write_runs


def run(algorithm="LP", source=0, **changes):
    records = single_source_run(algorithm, source=source, steps=(0, 9))
    return [{**record, **changes} for record in records]


def test_runs_on_different_data_make_no_table(tmp_path, capsys):
    other = ["1" * 16, *run()[0]["data_digest"][1:]]
    write_runs(tmp_path, [*run(), *run(source=1), *run(source=2, data_digest=other)])
    with pytest.raises(BenchmarkError) as error:
        collect_results.main(["--input_dir", str(tmp_path)])
    assert str(error.value) == (
        f"{tmp_path} mixes runs of PACS on different data (environment A: names, sizes or labels of images, or names "
        "of classes): 1 like PACS-LP-2-0, 2 like PACS-LP-0-0; move those that you do not mean to another folder"
    )
    assert not (tmp_path / "tables").exists()


def test_the_same_images_as_other_environments_are_different_data():
    with pytest.raises(BenchmarkError, match=r"environments A, P there, A, C, P, S here\): 1 like"):
        check([*run(), *run(source=1), *run(source=2, environments=["A", "P"])], "runs")


def test_runs_that_do_not_say_of_which_data_are_accepted_with_one_warning(tmp_path, capsys):
    silent = [{name: value for name, value in record.items() if name != "data_digest"} for record in run(source=2)]
    write_runs(tmp_path, [*run(), *silent])
    assert collect_results.main(["--input_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ("warning: 1 of 2 runs do not record their data: taken as the same data\n")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {"python": "3.11.2", "torch": "2.8"}}, "torch 2.9.0 in 2, 2.8 in 1"),
        ({"precision": "float32"}, "precision None of LP on PACS bfloat16 in 2, float32 in 1"),
        (
            {"backbone_digest": "b"},
            "loaded weights of vit_base_patch16_224.augreg_in21k None None a in 2, b in 1",
        ),
        ({"sources": {"LP": "b"}}, "source file of LP a in 2, b in 1"),
    ],
)
def test_what_is_mixed_is_told_with_its_counts(changes, words):
    common = {"backbone_digest": "a", "sources": {"LP": "a"}}
    records = [*run(**common), *run(source=1, **common), *run(source=2, **common | changes)]
    assert check(records, "runs") == [f"the tables mix runs: {words}"]
    assert check(records[:4], "runs") == []


def test_other_algorithms_may_have_another_precision():
    assert check([*run(), *run("BA", precision="float32")], "runs") == []
