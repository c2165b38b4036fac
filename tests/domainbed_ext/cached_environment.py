"""The cached images of a single environment."""

from domainbed_ext.cache.images import open_cached


def cached(environment, variant, entries, dataset, processes=1, progress=None):
    return open_cached(dataset, [environment], variant, entries, processes, progress)[0]
