"""The methods, as DomainBed algorithms: `BA` (LoRA), `BOnly` (LoRA-FA), `AOnly` (LoRA-FB), `LP`, `FullFT`, `ERM`.

base       what they share: loss, optimizer, checkpoints, what is saved
full       FullFT and ERM
probe      LP
lora       BA, LoRAPro, BOnly and AOnly
partial    BitFit, NormTuning and LastBlocks
peft       Peft, with `peft_methods` (what it offers) and `peft_adaptations` (what its methods need beside a config)
methods    what each says of itself: label, place and colour in tables and plots, hyperparameters
registry   all by name; `register_algorithm` adds one
names      how names are written, and what they stand for
schedules  learning rates over a run
strength   how much of what training changed is in the weights
"""

from typing import TYPE_CHECKING

from domainbed_ext.system import lazy

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm
    from domainbed_ext.algorithms.names import get_algorithm_class, parse_name
    from domainbed_ext.algorithms.registry import ALGORITHMS, register_algorithm
    from domainbed_ext.hyperparameter import Hyperparameter

__all__ = ["ALGORITHMS", "Algorithm", "Hyperparameter", "get_algorithm_class", "parse_name", "register_algorithm"]
__getattr__ = lazy.attributes(
    __name__,
    {
        "ALGORITHMS": "domainbed_ext.algorithms.registry",
        "get_algorithm_class": "domainbed_ext.algorithms.names",
        "parse_name": "domainbed_ext.algorithms.names",
        "register_algorithm": "domainbed_ext.algorithms.registry",
        "Algorithm": "domainbed_ext.algorithms.base",
        "Hyperparameter": "domainbed_ext.hyperparameter",
    },
)
