"""Domain generalisation of parameter-efficient fine-tuning, in DomainBed's protocol.

    python -m domainbed_ext.sweep launch                 # the quickstart: five methods, four environments
    python -m domainbed_ext.train --help                 # one run
    python -m domainbed_ext.collect_results --input_dir DIR
    python -m domainbed_ext.evaluate --run DIR           # a run's recorded accuracies, from what it saved

The protocol (splits, seeds, records, model selection, tables) is that of DomainBed: Gulrajani and Lopez-Paz,
"In Search of Lost Domain Generalization", ICLR 2021.
"""

import sys

from domainbed_ext.system.commands import refuse_what_is_none

__version__ = "0.1.0"

refuse_what_is_none()
if sys.argv[:1] == ["-m"]:  # one of the commands starts, and takes seconds to import: Ctrl-C then is no error
    from domainbed_ext.system.command_line import interrupt_quietly

    interrupt_quietly()
