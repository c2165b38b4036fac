"""Domain generalisation of parameter-efficient fine-tuning, in DomainBed's protocol.

    python -m domainbed_ext.sweep launch                 # the quickstart: five methods, four environments
    python -m domainbed_ext.train --help                 # one run
    python -m domainbed_ext.collect_results --input_dir DIR
    python -m domainbed_ext.evaluate --run DIR           # a run's recorded accuracies, from what it saved
    python -m domainbed_ext.predict --run DIR IMAGES     # labels and probabilities of image files
    python -m domainbed_ext.soup --input_dir DIR         # means of the weights of finished runs
    python -m domainbed_ext.analyse similarity --input_dir DIR   # learned A's and B's, as the papers look at them
    python -m domainbed_ext.frontier --input_dir DIR     # the selected runs along the strength of their update

The protocol (splits, seeds, records, model selection, tables) is that of DomainBed: Gulrajani and Lopez-Paz,
"In Search of Lost Domain Generalization", ICLR 2021.
"""

import sys
from typing import TYPE_CHECKING

from domainbed_ext.system import lazy
from domainbed_ext.system.commands import is_started_by_script, refuse_other_modules

if TYPE_CHECKING:
    from domainbed_ext.algorithms import ALGORITHMS, Algorithm, register_algorithm
    from domainbed_ext.datasets import DATASETS, register_dataset
    from domainbed_ext.objectives import OBJECTIVES, Objective, register_objective
    from domainbed_ext.trackers import TRACKERS, Tracker, register_tracker

__version__ = "0.1.0"
__all__ = [
    "ALGORITHMS",
    "DATASETS",
    "OBJECTIVES",
    "TRACKERS",
    "Algorithm",
    "Objective",
    "Tracker",
    "register_algorithm",
    "register_dataset",
    "register_objective",
    "register_tracker",
]
__getattr__ = lazy.attributes(
    __name__,
    {
        **dict.fromkeys(("ALGORITHMS", "Algorithm", "register_algorithm"), "domainbed_ext.algorithms"),
        **dict.fromkeys(("DATASETS", "register_dataset"), "domainbed_ext.datasets"),
        **dict.fromkeys(("OBJECTIVES", "Objective", "register_objective"), "domainbed_ext.objectives"),
        **dict.fromkeys(("TRACKERS", "Tracker", "register_tracker"), "domainbed_ext.trackers"),
    },
)

refuse_other_modules()
if sys.argv[:1] == ["-m"] or is_started_by_script(sys.argv):  # a command starts: Ctrl-C in its imports is no error
    from domainbed_ext.system.command_line import interrupt_quietly

    interrupt_quietly()
