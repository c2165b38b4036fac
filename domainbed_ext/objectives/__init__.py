"""What a method minimises: `BOnly+CORAL` trains the adapters of `BOnly` by the loss of `CORAL`.

base          the base class, and what an objective sees of a step
declarations  what each says of itself: label, paper, hyperparameters
registry      all by name; `register_objective` adds one
others        one objective each
"""

from typing import TYPE_CHECKING

from domainbed_ext.system import lazy

if TYPE_CHECKING:
    from domainbed_ext.objectives.base import Batch, Model, Objective, Outputs, Values
    from domainbed_ext.objectives.registry import OBJECTIVES, register_objective

__all__ = ["OBJECTIVES", "Batch", "Model", "Objective", "Outputs", "Values", "register_objective"]
__getattr__ = lazy.attributes(
    __name__,
    {
        **dict.fromkeys(("Batch", "Model", "Objective", "Outputs", "Values"), "domainbed_ext.objectives.base"),
        **dict.fromkeys(("OBJECTIVES", "register_objective"), "domainbed_ext.objectives.registry"),
    },
)
