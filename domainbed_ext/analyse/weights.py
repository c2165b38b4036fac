"""What full fine-tuning changed in the layers that adapters adapt, and what enters these layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from domainbed_ext.analyse.matrices import Matrix, square_root
from domainbed_ext.analyse.moments import input_moments
from domainbed_ext.analyse.runs import Adapter, ChosenRun, Factors, Sweep, follow, group_by, read_adapter, to_matrix


@dataclass(frozen=True)
class FullTuning:
    """The layers of a fully fine-tuned run that adapters of other runs adapt.

    Attributes:
        chosen: The run.
        changes: Changes Δ of the weights from the pretrained to the trained ones, [d_out, d_in], by layer.
        roots: Square roots of the second moments of what enters the layers of the pretrained model, [d_in, d_in], by
            module; empty if they were not asked for.
    """

    chosen: ChosenRun
    changes: dict[str, Matrix]
    roots: dict[str, Matrix]


def read_full(chosen: ChosenRun, layers: Mapping[str, Factors], images: int = 0) -> FullTuning:
    """Reads a fully fine-tuned run.

    Args:
        chosen: The run.
        layers: Layers that adapters adapt.
        images: Number of training images that second moments are of; 0 for none.

    Raises:
        BenchmarkError: Its data or weights are not those of the run.
    """
    saved = chosen.load(with_start=True)
    modules = list(dict.fromkeys(layer.module for layer in layers.values()))

    def weights() -> dict[str, Matrix]:
        here = {name: to_matrix(saved.algorithm.backbone.get_submodule(name).weight) for name in modules}
        return {name: layer.rows(here[layer.module]) for name, layer in layers.items()}

    saved.algorithm.set_strength(0.0)
    before, roots = weights(), {}
    if images:
        moments = input_moments(saved.algorithm, saved.feed, modules, images)
        roots = {name: square_root(moments.of(name)) for name in modules}
    saved.algorithm.set_strength(1.0)
    return FullTuning(chosen, {name: weight - before[name] for name, weight in weights().items()}, roots)


def read_together(sweep: Sweep, runs: Sequence[ChosenRun]) -> Iterator[tuple[ChosenRun | None, list[Adapter]]]:
    """Reads the adapters that were trained on the same images together, with progress.

    Args:
        sweep: Runs of the sweep.
        runs: Runs with adapters.

    Yields:
        The fully fine-tuned run on these images, if there is one, and the adapters.
    """
    full = sweep.fully_tuned()
    together = group_by(runs, lambda each: each.place)
    for place, members in follow(list(together.items()), "analysing"):
        yield full.get(place), [read_adapter(each) for each in members]


def layers_of(adapters: Sequence[Adapter]) -> dict[str, Factors]:
    """The layers that any of some adapters adapts, each with the factors of one of them."""
    return {name: layer for adapter in adapters for name, layer in adapter.layers.items()}


def depths_of(layers: Mapping[str, Factors]) -> dict[str, int]:
    """The place of each layer among those of its projection, from 0."""
    counts: dict[str, int] = {}
    depths = {}
    for name, layer in layers.items():
        depths[name] = counts.get(layer.projection, 0)
        counts[layer.projection] = depths[name] + 1
    return depths
