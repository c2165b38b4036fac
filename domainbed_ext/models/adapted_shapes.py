"""The layers of a backbone that an adapter adapts."""

import functools
from typing import Any

from domainbed_ext.errors import BenchmarkError


@functools.cache
def adapted_shapes(backbone: str, targets: str, blocks: str | None = None) -> tuple[tuple[int, int], ...]:
    """Returns (d_in, d_out) of every projection that an adapter of these targets adapts.

    Args:
        backbone: Name of a timm model; it is built without memory or weights.
        targets: Adapted projections, as in `AdapterConfig`.
        blocks: Adapted transformer blocks, as in `AdapterConfig`; None for all.

    Returns:
        Shapes, q, k and v of a fused layer apart; none if the backbone is not known here.
    """
    # Imported here: they take seconds, and most tables are made of numbers alone.
    import timm
    import torch

    from domainbed_ext.models import backbone_names
    from vitlorafa import AdapterConfig, AdapterError, in_blocks, linear_sites

    try:
        config = AdapterConfig(targets=targets, blocks=blocks)  # type: ignore[arg-type]
        with torch.device("meta"):
            model = timm.create_model(backbone_names.parse(backbone).timm, pretrained=False)
        sites = in_blocks(model, linear_sites(model), config.blocks)
    # A name of another release or of a plug-in that is not here, or a folder that is elsewhere.
    except (AdapterError, BenchmarkError, RuntimeError, ValueError):
        return ()
    shapes = []
    for site in sites:
        layer: Any = site.layer
        width = layer.out_features // len(site.targets)
        shapes += [(layer.in_features, width) for target in site.targets if target in config.targets]
    return tuple(shapes)
