"""The name of a run that people read, where its folder's name is a hash."""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any


def name_run(
    args: Mapping[str, Any], environments: Iterable[str], longest: int | None = None, instead: str = ""
) -> str:
    """Names a run by data set, method, test environments, trial and hyperparameter seed.

    Args:
        args: Arguments of the run.
        environments: Names of its test environments.
        longest: Bytes that the part before the trial may have; None for any number.
        instead: What stands for method and environments if that part is longer.

    Returns:
        A name that can be a file's, e.g. "PACS_BOnly@rank=16_test-sketch_trial0_hparams0".
    """
    name = re.sub(r"[^\w.@=+,%-]", "-", f"{args['dataset']}_{args['algorithm']}_test-{'+'.join(environments)}")
    if longest is not None and len(os.fsencode(name)) > longest:
        name = f"{args['dataset']}_{instead}"
    return f"{name}_trial{args['trial_seed']}_hparams{args['hparams_seed']}"
