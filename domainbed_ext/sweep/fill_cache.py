"""Decodes the images that a sweep's runs share before any of them starts: on all cores, and with a bar."""

from collections.abc import Sequence

from domainbed_ext.cache.variants import Variant
from domainbed_ext.datasets.folders import FileEnvironment
from domainbed_ext.runs.images import RunImages, entries, open_images
from domainbed_ext.runs.setup import Setup
from domainbed_ext.sweep.check import Checked
from domainbed_ext.sweep.jobs import Job


def fill_cache(jobs: Sequence[Job], checked: dict[tuple[str, str], Checked], processes: int) -> None:
    """Puts the images of all runs into the cache; those that are there already take no time.

    Args:
        jobs: Jobs that are to run.
        checked: Results of `check_runs`.
        processes: Number of processes that decode.

    Raises:
        BenchmarkError: Some images cannot be read; names all of them.
    """
    wanted: dict[tuple[str, Variant], tuple[Setup, set[int]]] = {}
    for kind, test_envs in {(job.kind, tuple(job.train_args["test_envs"])) for job in jobs}:
        setup = checked[kind].setup
        if not isinstance(setup.dataset[0], FileEnvironment) or entries(setup.args) is None:
            continue
        everywhere = set(range(len(setup.dataset)))
        for variant, is_plain in RunImages(setup).variants.items():
            needed = everywhere if is_plain else everywhere - set(test_envs)
            wanted.setdefault((kind[0], variant), (setup, set()))[1].update(needed)
    for (_, variant), (setup, environments) in wanted.items():
        open_images(setup, variant, sorted(environments), processes)
