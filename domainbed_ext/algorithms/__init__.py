"""The methods, as DomainBed algorithms: `BA`, `BOnly`, `AOnly`, `LP`, `FullFT`; and DomainBed's `ERM`.

base       what they share: loss, optimizer, checkpoints, what is saved
full       FullFT and ERM
probe      LP
lora       BA, BOnly and AOnly
registry   all by name
"""

from typing import TYPE_CHECKING

from domainbed_ext.system import lazy

if TYPE_CHECKING:
    from domainbed_ext.algorithms.base import Algorithm
    from domainbed_ext.algorithms.registry import ALGORITHMS, get_algorithm_class, parse_name

__all__ = ["ALGORITHMS", "Algorithm", "get_algorithm_class", "parse_name"]
__getattr__ = lazy.attributes(
    __name__,
    {
        "ALGORITHMS": "domainbed_ext.algorithms.registry",
        "get_algorithm_class": "domainbed_ext.algorithms.registry",
        "parse_name": "domainbed_ext.algorithms.registry",
        "Algorithm": "domainbed_ext.algorithms.base",
    },
)
