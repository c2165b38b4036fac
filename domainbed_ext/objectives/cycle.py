"""A random cycle of the training domains, by which objectives pair each with another one."""

import torch


def draw_cycle(num_domains: int) -> list[tuple[int, int]]:
    """Draws a random cycle from torch's generator.

    Args:
        num_domains: Number of domains.

    Returns:
        Pairs of neighbours: each domain is the first of one pair and the second of another. A single domain is paired
        with itself.
    """
    order = torch.randperm(num_domains).tolist()
    return list(zip(order, order[1:] + order[:1], strict=True))
