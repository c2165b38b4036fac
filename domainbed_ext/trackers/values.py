"""The numbers of a record by the names that trackers show.

loss                        mean training loss since the record before; what an objective or method adds is beside it
loss/<environment>          the same of each training environment
learning_rate step_time     and epoch, mem_gb and so on: as in the record
accuracy/<environment>_in   and _out: of a training environment
accuracy/in_domain          their mean accuracy on held-out images, which selects the step
test_accuracy/<environment>_in        and _out: of a test environment
test_accuracy/out_of_domain           mean accuracy on the test environments, where the record has it
"""

import contextlib
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.model_selection import mean, target_accuracy, validation_accuracy

_ACCURACY, _LOSS = re.compile(r"env(\d+)_(\w+)_acc"), re.compile(r"env(\d+)_loss")


def tracked_values(record: Mapping[str, Any], facts: Collection[str]) -> dict[str, float]:
    """Returns the numbers of a record that differ from step to step.

    Args:
        record: Record of a run.
        facts: Names of what all its records hold.

    Returns:
        Finite numbers by name.
    """
    environments, tested = record["environments"], record["args"]["test_envs"]
    values = {}
    for name, value in record.items():
        if name in facts or name == "step" or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if match := _ACCURACY.fullmatch(name):
            group = "test_accuracy" if int(match[1]) in tested else "accuracy"
            name = f"{group}/{environments[int(match[1])]}_{match[2]}"
        elif match := _LOSS.fullmatch(name):
            name = f"loss/{environments[int(match[1])]}"
        values[name] = float(value)
    values["accuracy/in_domain"] = validation_accuracy(dict(record))
    with contextlib.suppress(BenchmarkError):  # it is measured at the selected and at the last step alone
        values["test_accuracy/out_of_domain"] = mean([target_accuracy(dict(record), env) for env in tested])
    return {name: value for name, value in values.items() if math.isfinite(value)}
