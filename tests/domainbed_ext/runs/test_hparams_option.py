"""`--hparams name=value` is the same run as the JSON."""

import json

import pytest

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.runs import arguments
from domainbed_ext.runs.identity import Computations, name
from domainbed_ext.sweep.arguments import parse


@pytest.mark.parametrize(
    ("words", "hparams"),
    [
        (["rank=16", "lr=1e-3"], {"rank": 16, "lr": 0.001}),
        (["clip_grad=null", "class_balanced=true"], {"clip_grad": None, "class_balanced": True}),
        (["targets=q,v"], {"targets": "q,v"}),
        (["targets=q+v", "init_A=all=uniform"], {"targets": "q,v", "init_A": "all=uniform"}),
        (['{"rank": 16}'], {"rank": 16}),
        ([' {"a": "b=c"}'], {"a": "b=c"}),
    ],
)
def test_words_and_json_are_read_alike_in_runs_and_sweeps(words, hparams):
    assert json.loads(arguments.parse(["--hparams", *words]).hparams) == hparams
    assert json.loads(parse(["launch", "--hparams", *words]).hparams) == hparams


def test_json_stays_as_it_was_typed():
    for text in ('{"lr":  0.5}', "{rank: 8}", "3", ""):
        assert arguments.parse(["--hparams", text]).hparams == text


def test_both_spellings_are_one_run():
    spellings = [["--hparams", "r=4", "lr=0.01"], ["--hparams", '{"lr": 1e-2, "rank": 4}']]
    first, second = (name(Computations().of(arguments.parse(words))) for words in spellings)
    assert first == second != name(Computations().of(arguments.parse([])))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rank"], "argument --hparams: 'rank' is not NAME=VALUE: write them like rank=16 lr=0.001"),
        (["rank="], "'rank=' is not NAME=VALUE"),
        (["rank=1", "=2"], "'=2' is not NAME=VALUE"),
        (['{"rank": 1}', "lr=2"], "is not NAME=VALUE"),
        (["{lr:", "0.5}"], "'{lr:' is not NAME=VALUE"),
        (["rank=1", "rank=2"], "rank is given twice: give it once"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(words, sentence):
    for read in (lambda words: arguments.parse(words), lambda words: parse(["launch", *words])):
        with pytest.raises(BenchmarkError, match=sentence):
            read(["--hparams", *words])
