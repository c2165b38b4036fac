"""From an environment to batches.

splits         `in`, `out` and `uda`, as DomainBed makes them
augmentation   of training images
loader         minibatches, and batches for evaluation
duplicates     images that a data set contains more than once
"""

from typing import TYPE_CHECKING

from domainbed_ext.system import lazy

if TYPE_CHECKING:
    from domainbed_ext.data.loader import Minibatch
    from domainbed_ext.data.splits import Split

__all__ = ["Minibatch", "Split"]
__getattr__ = lazy.attributes(
    __name__,
    {
        "Minibatch": "domainbed_ext.data.loader",
        "Split": "domainbed_ext.data.splits",
    },
)
