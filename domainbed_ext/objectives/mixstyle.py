"""MixStyle (Zhou et al. 2021) on the tokens of a vision transformer."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from domainbed_ext.models.blocks import transformer_blocks
from domainbed_ext.objectives.base import Batch, Model, Objective, Values
from domainbed_ext.objectives.cycle import draw_cycle

_EPS = 1e-6


class MixStyle(Objective):
    """The mean cross-entropy of images whose style is mixed with that of an image of another domain.

    The style is the mean and standard deviation of each channel over an image's patch tokens; the class token and
    register tokens are not changed. It is mixed after each of the first `mixstyle_blocks` blocks (None: the first
    quarter, at least one), with probability `mixstyle_p` each, in training alone.
    """

    reads_images = True

    def attach(self, backbone: nn.Module, model: Model) -> None:
        """Finds the blocks."""
        blocks, count = transformer_blocks(backbone), self.hparams["mixstyle_blocks"]
        self._blocks = blocks[: max(1, len(blocks) // 4) if count is None else count]
        self._prefix = int(getattr(backbone, "num_prefix_tokens", 0))

    def loss(self, batch: Batch, model: Model) -> Values:
        """The mean cross-entropy, with hooks on the blocks that are gone afterwards."""
        hooks = [block.register_forward_hook(partial(self._mix, batch.sizes)) for block in self._blocks]
        try:
            logits = model.logits(batch.images)
        finally:
            for hook in hooks:
                hook.remove()
        return {"loss": self.cross_entropy(logits, batch.labels)}

    def _mix(self, sizes: tuple[int, ...], block: nn.Module, inputs: Any, tokens: Tensor) -> Tensor:
        """The output of a block with mixed styles, [n, tokens, width] or [n, height, width, channels]."""
        if torch.rand(()).item() >= self.hparams["mixstyle_p"]:
            return tokens
        alpha = torch.full((len(tokens),), float(self.hparams["mixstyle_alpha"]))
        shares = torch.distributions.Beta(alpha, alpha).sample().to(tokens.device, non_blocking=True)
        partners = draw_partners(sizes).to(tokens.device, non_blocking=True)
        prefix, patches = tokens[:, : self._prefix], tokens[:, self._prefix :]
        return torch.cat([prefix, mix_styles(patches, partners, shares)], 1)


def draw_partners(sizes: tuple[int, ...]) -> Tensor:
    """Draws a partner of another domain for each image, from torch's generator; of the same one if there is no other.

    Args:
        sizes: Number of images of each domain. A smaller domain's images are partners of several images.

    Returns:
        Index of each image's partner in the batch, [n].
    """
    starts = torch.tensor([0, *sizes]).cumsum(0)
    partners = torch.empty(int(starts[-1]), dtype=torch.long)
    for i, j in draw_cycle(len(sizes)):
        drawn = torch.randperm(sizes[j])
        repeats = -(-sizes[i] // sizes[j])
        partners[starts[i] : starts[i + 1]] = starts[j] + drawn.repeat(repeats)[: sizes[i]]
    return partners


def mix_styles(tokens: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Gives each image the mixed style of its own and of its partner's tokens; gradients do not pass through styles.

    Args:
        tokens: Tokens [n, ..., channels].
        partners: Index of each image's partner, [n].
        shares: Share of each image's own style, [n].

    Returns:
        Tokens of the same shape and number format.
    """
    flat = tokens.float().flatten(1, -2)
    variance, mean = (each.detach() for each in torch.var_mean(flat, 1, keepdim=True))
    deviation = (variance + _EPS).sqrt()
    share = shares.float()[:, None, None]
    mixed_mean, mixed_deviation = (torch.lerp(each[partners], each, share) for each in (mean, deviation))
    return ((flat - mean) / deviation * mixed_deviation + mixed_mean).reshape(tokens.shape).to(tokens.dtype)
