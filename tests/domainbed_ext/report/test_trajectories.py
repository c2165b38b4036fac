import math

from domainbed_ext.report.trajectories import Moment, mean_trajectory, trajectory
from tests.domainbed_ext.fabricated_records import single_source_run


def test_trajectory_of_a_run():
    records = single_source_run("BA", accuracies=(0.6, 0.8, 0.7, 0.5), train=0.9)
    moments = trajectory(reversed(records))
    assert [moment.step for moment in moments] == [0, 100, 200, 299]
    step, loss, *accuracies = moments[-1]
    assert (step, round(loss, 3)) == (299, 0.1)
    assert [round(value, 6) for value in accuracies] == [90, 80, 60]


def test_what_was_not_measured_is_nan():
    records = single_source_run("BA", steps=(0, 10))
    del records[0]["env0_in_acc"], records[0]["loss"]
    first, last = trajectory(records)
    assert math.isnan(first.outside) and math.isnan(first.loss) and first.train > 0
    assert not math.isnan(last.outside)


def test_mean_of_runs_at_the_steps_they_share():
    one = [Moment(0, 2, 10, 10, 10), Moment(5, 1, 20, 20, 20), Moment(7, 1, 20, 20, 20)]
    other = [Moment(0, 4, 20, 20, 20), Moment(5, 2, 40, 40, 40)]
    assert mean_trajectory([one, other]) == [Moment(0, 3, 15, 15, 15), Moment(5, 1.5, 30, 30, 30)]
    assert mean_trajectory([]) == []
