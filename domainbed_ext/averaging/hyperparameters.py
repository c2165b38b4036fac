"""The hyperparameters of averages, which all methods have, with published defaults."""

from typing import Any

from domainbed_ext.hyperparameter import A_COUNT, Allowed, Hyperparameter, Hyperparameters, one_of

NONE, MA, SWAD = AVERAGES = "none", "ma", "swad"


def _is_start(value: Any) -> bool:
    if value is None or type(value) is int:
        return value is None or value >= 0
    return isinstance(value, float) and value >= 0 and (value < 1 or value.is_integer())


AVERAGE: Hyperparameters = {
    "average": Hyperparameter(NONE, later=True, allowed=one_of(*AVERAGES), labels={MA: "moving average", SWAD: "SWAD"}),
    # None: 100 as published by Arpit et al. (2022), but at most a fifth of the steps.
    "ma_start": Hyperparameter(
        None,
        later=True,
        allowed=Allowed("a number of steps, a share of them below 1, or null", _is_start),
        words="start {}",
    ),
    # N_s, N_e and r of Cha et al. (2021).
    "swad_optimum_patience": Hyperparameter(3, aliases=("n_converge",), later=True, allowed=A_COUNT),
    "swad_overfit_patience": Hyperparameter(6, aliases=("n_tolerance",), later=True, allowed=A_COUNT),
    "swad_tolerance": Hyperparameter(
        1.3, later=True, allowed=Allowed("1 or more", lambda value: value >= 1), words="SWAD tolerance {}"
    ).on(("VLCS",), 1.2),
}
