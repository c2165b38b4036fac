import math

import pytest

from domainbed_ext.models.adapted_shapes import adapted_shapes
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.bounds import Bounds, bound, columns, lemma_4_5, of_record
from tests.domainbed_ext.fabricated_records import single_source_run


def test_the_lemma_by_hand():
    shapes = [(768, 768), (768, 3072)]
    # 2 r q σ² ln 2 / n = 2 · 8 · 32 · 0.25 · ln 2 / 1000, times 768 + 3072 outputs.
    expected = math.sqrt(2 * 8 * 32 * 0.25 * math.log(2) / 1000 * 3840)
    assert lemma_4_5("B", 8, shapes, 1000) == pytest.approx(expected)
    assert lemma_4_5("A", 8, shapes, 1000) == pytest.approx(expected * math.sqrt(1536 / 3840))
    assert lemma_4_5("BA", 8, shapes, 1000) ** 2 == pytest.approx(
        lemma_4_5("B", 8, shapes, 1000) ** 2 + lemma_4_5("A", 8, shapes, 1000) ** 2
    )


def test_one_factor_at_twice_the_rank_has_loras_bound():
    """What the paper concludes from the lemma where d_in = d_out."""
    square = [(192, 192)] * 24
    assert lemma_4_5("BA", 8, square, 500) == pytest.approx(math.sqrt(2) * lemma_4_5("B", 8, square, 500))
    assert lemma_4_5("BA", 8, square, 500) == pytest.approx(lemma_4_5("B", 16, square, 500))


@pytest.mark.parametrize("change", [{"bits": 16}, {"sigma": 0.25}, {"samples": 4000}])
def test_what_makes_it_smaller(change):
    assert bound(**{"parameters": 10, "samples": 1000, **change}) < bound(10, 1000)


def test_layers_of_a_backbone():
    q_v = adapted_shapes("vit_tiny_patch16_224", "q,v")
    assert q_v == ((192, 192),) * 24  # 12 blocks, each third of the fused layer apart
    every = adapted_shapes("vit_tiny_patch16_224", "all")
    assert len(every) == 12 * 6 and {(192, 768), (768, 192)} <= set(every)
    assert adapted_shapes("vit_pico_patch8_32", "all")
    assert adapted_shapes("vit_tiny_patch16_224", "q,v", "0,last2") == q_v[:6] and len(q_v) == 24
    assert adapted_shapes("vit_tiny_patch16_224", "q,v", "12") == ()
    assert adapted_shapes("no_such_model", "all") == () == adapted_shapes("vit_tiny_patch16_224", "nose")


def test_bounds_of_a_run():
    (record,) = single_source_run(
        "BOnly@rank=8", steps=(9,), parameters=38_151, rank=8, targets="q,v", backbone="vit_tiny_patch16_224"
    )
    samples = 2344 - 2344 // 5
    found = of_record(record, adapted_shapes)
    assert found.lemma == pytest.approx(bound(8 * 24 * 192, samples))
    assert found.trained == pytest.approx(bound(38_151, samples)) and found.trained > found.lemma
    probe = {**record, "args": {**record["args"], "algorithm": "LP"}}
    assert of_record(probe, adapted_shapes) == Bounds(None, found.trained) == of_record(record)
    assert of_record({**record, "hparams": {}}, adapted_shapes).lemma is None
    assert of_record({**record, "split_sizes": {}}, adapted_shapes) == Bounds(None, None)


def test_cells_are_means_over_runs():
    runs = [
        single_source_run("BOnly", trial, steps=(9,), parameters=38_151 + trial, rank=8, targets="q,v")[0]
        for trial in (0, 1)
    ]

    def cells():
        comparison = Results(runs).single_source.comparison("PACS", 1)
        return [column.text("BOnly") for column in columns(comparison, lambda *_: [(192, 192)])]

    bounds = [of_record(run, lambda *_: [(192, 192)]) for run in runs]
    assert cells() == [f"{50 * sum(values):,.0f}" for values in zip(*bounds, strict=True)]
    del runs[0]["split_sizes"]
    assert cells() == []  # not the mean of some


def test_the_lemma_counts_the_trained_factors():
    """r Σ d of the lemma is the number of parameters that the adapter trains."""
    import timm

    from vitlorafa import AdapterConfig, count_parameters, inject

    shapes = adapted_shapes("vit_pico_patch8_32", "q,v,fc1")
    for train in ("BA", "B", "A"):
        model = inject(timm.create_model("vit_pico_patch8_32"), AdapterConfig(4, train=train, targets="q,v,fc1"))
        trained, _ = count_parameters(model)
        assert lemma_4_5(train, 4, shapes, 100) == pytest.approx(bound(trained, 100))
