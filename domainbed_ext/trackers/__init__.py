"""Where the records of a run are sent beside its folder, if `--track` asks for it: TensorBoard, W&B, Trackio, CSV.

base       the base class, and what a tracker is told of a run
registry   all by name; `register_tracker` adds one
values     the numbers of a record, by the names that people see
others     one tracker each
"""

from typing import TYPE_CHECKING

from domainbed_ext.system import lazy

if TYPE_CHECKING:
    from domainbed_ext.trackers.base import TrackedRun, Tracker
    from domainbed_ext.trackers.registry import TRACKERS, register_tracker

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "register_tracker"]
__getattr__ = lazy.attributes(
    __name__,
    {
        **dict.fromkeys(("TrackedRun", "Tracker"), "domainbed_ext.trackers.base"),
        **dict.fromkeys(("TRACKERS", "register_tracker"), "domainbed_ext.trackers.registry"),
    },
)
