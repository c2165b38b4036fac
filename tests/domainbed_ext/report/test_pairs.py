"""Differences between pairs of methods, against plain NumPy, and which pairs are compared."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import t, ttest_1samp

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.report.differences import METRICS, Resampling
from domainbed_ext.report.inference.power import trials_needed
from domainbed_ext.report.inference.sign_test import Signs, sign_test
from domainbed_ext.report.pairs import against, all_pairs, best_method, compare_pairs, find_row, parse_pairs
from domainbed_ext.report.results import Results
from domainbed_ext.report.tables.differences import as_json, csv_rows, higher_in, pairs_table
from tests.domainbed_ext.fabricated_records import left_out, left_out_run, paper_like
from tests.domainbed_ext.images_of_runs import ENVIRONMENTS, IMAGES, runs_with_images

METHODS = {"BA": 0.6, "BOnly": 0.7}
T_95 = {2: 12.706205, 3: 4.302653}  # the 97.5 % quantile of Student's t, by the number of trials


def results_of(records, images, seed=3, resamples=60):
    return Results(
        records, resampling=Resampling(lambda each: images.get((each["run"], each["step"])), seed, resamples)
    )


def metrics_of(accuracy, env, single_source, test_on):
    """The metrics of a run, from a function of environment and split.

    In the single-source protocol `env` is the source, else the test domain.
    """
    others = [each for each in range(ENVIRONMENTS) if each != env]
    sources, tested = ([env], others) if single_source else (others, [env])

    def on_test(each):
        if test_on == "in":
            return accuracy(each, "in")
        return 0.75 * accuracy(each, "in") + 0.25 * accuracy(each, "out")

    out_of_domain = np.mean([on_test(each) for each in tested], axis=0)
    in_domain = np.mean([accuracy(each, "out") for each in sources], axis=0)
    train = np.mean([accuracy(each, "in") for each in sources], axis=0)
    return {
        "out_of_domain": out_of_domain,
        "in_domain": in_domain,
        "gap_source": train - in_domain,
        "gap_target": train - out_of_domain,
    }


def draws_of(images, seed, resamples):
    """How often each image of each environment is drawn."""
    drawn = {}
    for env in range(ENVIRONMENTS):
        random = np.random.default_rng((seed, env))
        places = random.integers(0, IMAGES, (resamples, IMAGES))
        # The order of names: 0.png, 1.png, 10.png, ...
        names = sorted(f"{number}.png" for number in range(IMAGES))
        drawn[env] = [[names[place] for place in row] for row in places]
    return drawn


def drawn_accuracy(images, drawn):
    """Accuracy in each draw, by counting."""
    known = dict(zip(images.names, images.is_right, strict=True))
    shares = []
    for names in drawn:
        answers = [known[name] for name in names if name in known]
        shares.append(np.mean(answers) if answers else images.is_right.mean())
    return np.array(shares)


@pytest.mark.parametrize(("single_source", "trials", "test_on"), [(False, 3, "in"), (False, 2, "all"), (True, 3, "in")])
def test_means_and_intervals_are_those_of_plain_numpy(single_source, trials, test_on):
    records, images = runs_with_images(METHODS, trials, single_source=single_source, test_on=test_on)
    by_run = {record["run"]: record for record in records}
    drawn = draws_of(images, 3, 60)
    for place, comparison in enumerate(results_of(records, images).panels):
        envs = [place] if single_source else range(ENVIRONMENTS)
        for metric in METRICS:
            observed, resampled = [], []
            for trial in range(trials):
                values, values_drawn = [], []
                for env in envs:
                    both, both_drawn = [], []
                    for method in ("BOnly", "BA"):
                        run = f"{method}-{env}-{trial}"
                        both.append(
                            metrics_of(
                                lambda e, s, run=run: by_run[run][f"env{e}_{s}_acc"], env, single_source, test_on
                            )[metric]
                        )
                        both_drawn.append(
                            metrics_of(
                                lambda e, s, run=run: drawn_accuracy(images[run, 5][f"env{e}_{s}_acc"], drawn[e]),
                                env,
                                single_source,
                                test_on,
                            )[metric]
                        )
                    values.append(both[0] - both[1])
                    values_drawn.append(both_drawn[0] - both_drawn[1])
                observed.append(100 * np.mean(values))
                resampled.append(100 * np.mean(values_drawn, axis=0))
            resampled = np.stack(resampled)
            shared = np.mean([np.cov(*pair)[0, 1] for pair in itertools.combinations(resampled, 2)])
            error = math.sqrt(np.var(observed, ddof=1) / trials + max(0, shared))
            half = T_95[trials] * error
            difference = comparison.differences.between("BOnly", "BA", metric)
            assert difference.over_images and difference.trials == trials
            assert difference.mean == pytest.approx(np.mean(observed), abs=1e-9)
            assert difference.interval == pytest.approx((np.mean(observed) - half, np.mean(observed) + half), abs=1e-3)
            assert difference.deviation == pytest.approx(np.std(observed, ddof=1), abs=1e-9)
            assert difference.p_value == pytest.approx(2 * t.sf(abs(np.mean(observed)) / error, trials - 1), abs=1e-3)
            needed = trials_needed(np.mean(observed), np.std(observed, ddof=1), math.sqrt(max(0, shared)))
            assert difference.trials_needed == needed


def test_the_same_seed_gives_the_same_intervals_whatever_else_is_compared():
    records, images = runs_with_images({**METHODS, "LP": 0.5}, 3)

    def interval(records, seed):
        (comparison,) = results_of(records, images, seed).panels
        return comparison.differences.between("BOnly", "BA", "out_of_domain").interval

    without = [record for record in records if record["args"]["algorithm"] != "LP"]
    assert interval(records, 1) == interval(records[::-1], 1) == interval(without, 1) != interval(records, 2)


def test_without_all_images_intervals_are_over_trials_alone():
    records, images = runs_with_images({**METHODS, "LP": 0.5}, 3)
    missing = {key: value for key, value in images.items() if key[0] != "LP-1-2"}
    (comparison,) = results_of(records, missing).panels
    (alone,) = Results(records).panels
    with_images, without = (comparison.differences.between("BA", name, "in_domain") for name in ("BOnly", "LP"))
    assert with_images.over_images and not without.over_images
    assert without == alone.differences.between("BA", "LP", "in_domain")
    caption = pairs_table(compare_pairs(comparison, all_pairs(comparison))).caption
    assert "Intervals: hierarchical bootstrap over trials and images (60 draws of images, seed 3)." in caption
    assert "Intervals of BA minus LP, BOnly minus LP: over trials alone (Student's t)" in caption
    assert "evaluate --input_dir DIR --predictions adds." in caption
    assert "hierarchical" not in pairs_table(compare_pairs(alone, all_pairs(alone))).caption


def leads(differences, **more):
    """Runs in which BOnly leads by so much, by trial and test domain."""
    return [
        record
        for trial, of_trial in enumerate(differences)
        for env, lead in enumerate(of_trial)
        for record in [
            *left_out_run("BA", trial, env, 0.5 + 0.1 * env, **more),
            *left_out_run("BOnly", trial, env, 0.5 + 0.1 * env + lead, **more),
        ]
    ]


def test_trials_have_signs():
    # Runs of a trial share images, so that they are one observation.
    (comparison,) = Results(leads([(0.01, 0.02, -0.01, 0), (0.03, 0.01, 0.01, 0.02), (0.01, -0.01, 0, 0)])).panels
    difference = comparison.differences.between("BOnly", "BA", "out_of_domain")
    assert difference.by_trial == pytest.approx([0.5, 1.75, 0])
    assert difference.signs == (2, 0, 1) and difference.p_signs == sign_test(2, 0)
    assert difference.p_value == pytest.approx(ttest_1samp([0.5, 1.75, 0], 0).pvalue)
    backwards = comparison.differences.between("BA", "BOnly", "out_of_domain")
    assert backwards.signs == (0, 2, 1) and backwards.mean == pytest.approx(-difference.mean)
    assert pairs_table(compare_pairs(comparison, [("BOnly", "BA")])).rows[0][6] == "2 of 3, 1 equal"


def test_test_domains_of_one_run_have_one_sign():
    (comparison,) = Results(paper_like(3)).panels
    difference = comparison.differences.between("BA@rank=8", "AOnly@rank=8", "out_of_domain")
    assert len(difference.cells) == 9 and difference.signs == (3, 0, 0)
    assert len(comparison.differences.between("BA@rank=8", "AOnly@rank=8", "in_domain").cells) == 3


def test_holm_is_over_the_pairs_of_a_metric():
    (comparison,) = Results(left_out(["BA", "BOnly", "AOnly", "LP"], trials=5)).panels
    few, many = (compare_pairs(comparison, pairs) for pairs in ([("BOnly", "BA")], all_pairs(comparison)))
    assert [row.p_holm for row in few.rows] == [row.difference.p_value for row in few.rows]
    for metric in METRICS:
        rows = sorted((row for row in many.rows if row.metric == metric), key=lambda row: row.difference.p_value)
        assert len(rows) == 6
        assert rows[0].p_holm == pytest.approx(min(1, 6 * rows[0].difference.p_value))


def test_a_table_of_one_reference_names_it_in_the_title():
    (comparison,) = Results(leads([(0.01,) * 4, (0.03,) * 4, (0.02,) * 4])).panels
    table = pairs_table(compare_pairs(comparison, [("BOnly", "BA")]))
    assert table.title == "PACS, difference to BA (LoRA)"
    assert table.columns[:3] == ["Metric", "Method", "Difference"]
    assert table.rows[0] == [
        "Out-of-domain",
        "BOnly (LoRA-FA)",
        "+2.0 (-0.5 to +4.5)",
        "3",
        "0.074",
        "0.074",
        "3 of 3",
        "0.250",
        str(trials_needed(2, 1)),
    ]
    assert table.rows[1][2:] == ["+0.0 (+0.0 to +0.0)", "3", "1.000", "1.000", "0 of 3, 3 equal", "1.000", ">10,000"]
    assert table.breaks == {1, 2, 3}
    both = pairs_table(compare_pairs(comparison, [("BOnly", "BA"), ("BA", "BOnly")]))
    assert both.title == "PACS, paired differences"
    assert both.rows[1][:3] == ["Out-of-domain", "BA", "BOnly"]


def test_one_trial_has_no_interval():
    (comparison,) = Results(leads([(0.01, 0.02, 0.03, 0.04)])).panels
    table = pairs_table(compare_pairs(comparison, [("BOnly", "BA")]))
    assert table.rows[0][2:] == ["+2.5", "1", "-", "-", "1 of 1", "1.000", "-"]
    assert "One trial, so no interval." in table.caption


def test_a_diverged_run_has_no_difference():
    records = leads([(0.01,) * 4, (0.02,) * 4])
    for record in records:
        if record["run"] == "BOnly-2-1":
            record["env2_in_acc"] = None
    (comparison,) = Results(records).panels
    compared = compare_pairs(comparison, [("BOnly", "BA")])
    assert pairs_table(compared).rows[0][2:] == ["-", "2", "-", "-", "1 of 1", "-", "-"]
    assert math.isnan(compared.rows[0].p_holm) and not math.isnan(compared.rows[1].p_holm)


def test_a_pair_without_a_p_is_of_no_family():
    records = [*leads([(0.01,) * 4, (0.02,) * 4, (0.04,) * 4]), *left_out_run("LP", 0, 0, 0.5)]
    (comparison,) = Results(records).panels
    rows = [row for row in compare_pairs(comparison, all_pairs(comparison)).rows if row.metric == "out_of_domain"]
    assert [math.isnan(row.difference.p_value) for row in rows] == [False, True, True]
    assert rows[0].p_holm == rows[0].difference.p_value


def test_where_nothing_was_measured_no_trial_is_counted():
    assert higher_in(Signs(0, 0, 0)) == "-"
    assert higher_in(Signs(2, 1, 0)) == "2 of 3" and higher_in(Signs(2, 0, 1)) == "2 of 3, 1 equal"


def test_of_many_pairs_over_trials_alone_their_number_is_said():
    methods = [f"BOnly@rank={rank}" for rank in range(1, 6)]
    records, images = runs_with_images(dict.fromkeys(methods, 0.6), 3)
    without = {key: value for key, value in images.items() if not key[0].startswith(("BOnly@rank=1", "BOnly@rank=2"))}
    (comparison,) = results_of(records, without).panels
    caption = pairs_table(compare_pairs(comparison, all_pairs(comparison))).caption
    assert "Intervals of 7 of 10 pairs: over trials alone" in caption


def test_files_have_every_number():
    (comparison,) = Results(leads([(0.01, 0.02, -0.01, 0), (0.03, 0.01, 0.01, 0.02)])).panels
    compared = compare_pairs(comparison, [("BOnly", "BA")])
    (row, *_) = csv_rows(compared)
    assert (row["algorithm"], row["reference"], row["metric"]) == ("BOnly", "BA", "out_of_domain")
    assert (row["higher"], row["lower"], row["equal"], row["trials"]) == (2, 0, 0, 2)
    p = ttest_1samp([0.5, 1.75], 0).pvalue
    assert (row["mean"], row["p"], row["p_holm"], row["p_signs"]) == pytest.approx((1.125, p, p, 0.5))
    (of_json, *_) = as_json(compared)
    cells = of_json.pop("by_trial_and_environment")
    assert of_json == row
    assert cells[2] == {"trials": [0], "environment": "P", "difference": pytest.approx(-1)} and len(cells) == 8


def test_the_best_is_that_of_validation():
    records = [
        record
        for trial in range(2)
        for env in range(4)
        for record in [
            *left_out_run("BA", trial, env, 0.9, in_domain=0.7),
            *left_out_run("LP", trial, env, 0.5, in_domain=0.8),
            *left_out_run("BOnly", trial, env, 0.6, in_domain=0.75),
        ]
    ]
    (comparison,) = Results(records).panels
    assert best_method(comparison) == "LP"
    assert against()(comparison) == [("BA", "LP"), ("BOnly", "LP")]
    assert against("BA")(comparison) == [("BOnly", "BA"), ("LP", "BA")]
    incomplete = [record for record in records if record["run"] != "LP-0-0"]
    assert best_method(Results(incomplete).panels[0]) == "BOnly"
    derived = [{**record, "derived": {"trials": [0, 1]}} for record in left_out_run("LP soup(trials)", 0, 0, 0.5, 0.99)]
    assert best_method(Results([*records, *derived]).panels[0]) == "LP"


def test_pairs_are_named_in_any_spelling():
    rows = ["BA", "BOnly@rank=16", "LP", "BOnly soup(trials)", "Own@x=a:b"]
    words = ["LoRA-FA:lora", "LP:BA", "BOnly soup(trials):LP", "BA:Own@x=a:b", "lp:LoRA"]
    assert parse_pairs(words, rows) == [
        ("BOnly@rank=16", "BA"),
        ("LP", "BA"),
        ("BOnly soup(trials)", "LP"),
        ("BA", "Own@x=a:b"),
    ]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("BA", "--pairs BA is not two rows: give two names with a colon between, as in BOnly:BA"),
        ("BA:", "--pairs BA: is not two rows"),
        (":", "--pairs : is not two rows"),
        (
            "BA:Nothing",
            "--pairs BA:Nothing: there are no runs of Nothing: choose one of BA, BOnly@rank=8, BOnly@rank=16",
        ),
        ("BA:BOnly", "--pairs BA:BOnly: there are no runs of BOnly: choose one of"),
        ("BA:FullFT", "--pairs BA:FullFT: there are no runs of FullFT: choose"),
        ("BA:LoRA", "--pairs BA:LoRA compares BA with itself: give two rows"),
    ],
)
def test_pairs_that_are_none(word, sentence):
    with pytest.raises(BenchmarkError) as error:
        parse_pairs([word], ["BA", "BOnly@rank=8", "BOnly@rank=16"])
    assert str(error.value).startswith(sentence)
    assert find_row("--reference LoRA", "LoRA", ["BA"]) == "BA"


def test_pairs_without_a_common_trial_are_said():
    records = [*leads([(0.01,) * 4, (0.02,) * 4]), *left_out_run("LP", 5, 0, 0.5)]
    (comparison,) = Results(records).panels
    compared = compare_pairs(comparison, all_pairs(comparison))
    assert compared.apart == [("BA", "LP"), ("BOnly", "LP")] and compared.pairs == [("BA", "BOnly")]
    assert "No common trial: BA and LP, BOnly and LP." in pairs_table(compared).caption


def test_a_reference_of_the_best_in_domain_accuracy_is_said_to_be():
    records = [
        record
        for trial in range(2)
        for env in range(4)
        for name, in_domain in (("BA", 0.7), ("LP", 0.6), ("BOnly", 0.8))
        for record in left_out_run(name, trial, env, 0.5 + 0.01 * trial, in_domain=in_domain)
    ]
    (comparison,) = Results(records).panels
    sentence = "BOnly has the best in-domain accuracy of the trained methods"
    assert sentence in pairs_table(compare_pairs(comparison, against()(comparison))).caption
    for others in (against("LP")(comparison), all_pairs(comparison), [("BA", "BOnly")]):
        assert "has the best in-domain" not in pairs_table(compare_pairs(comparison, others)).caption
