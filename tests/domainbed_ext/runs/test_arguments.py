"""A run's arguments as a value: what the command line gives, and what a record holds."""

from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from domainbed_ext.runs import arguments
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.arguments import RunArguments


def test_the_command_line_has_every_argument_and_its_default():
    named = {action.dest for action in arguments.make_parser()._actions} - {"help", "config", "print_config"}
    assert named == {field.name for field in fields(RunArguments)}
    assert arguments.parse([]) == RunArguments()


def test_tuples_of_names_name_arguments():
    names = {field.name for field in fields(RunArguments)}
    for group in (arguments.NUMBERS, arguments.PLACES, arguments.EXTRA):
        assert len(set(group)) == len(group) and set(group) <= names


def test_arguments_are_not_changed_by_a_run(make_args):
    args = make_args(test_envs=["plain"])
    setup = run_setup.set_up(args)
    assert (args.test_envs, args.protocol, setup.args.test_envs, setup.test_envs) == (["plain"], None, [1], [1])
    with pytest.raises(FrozenInstanceError):
        args.steps = 7


def test_what_was_not_given_is_filled_in_and_what_was_given_stays():
    complete = RunArguments(sampling="epochs").complete(workers=3)
    assert (complete.sampling, complete.test_on, complete.workers, complete.test_envs) == ("epochs", "in", 3, [0])
    assert RunArguments(workers=0, test_envs=[2]).complete(workers=3).workers == 0
    assert RunArguments(protocol="single_source").complete().test_envs is None  # follows from the source


def test_arguments_of_another_versions_record_are_read():
    values = {**asdict(RunArguments(steps=7)), "of_another_version": 1}
    assert RunArguments.from_mapping(values) == RunArguments(steps=7)
