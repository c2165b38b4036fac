"""Linear layers: the adapted one, and torch's with less work."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError
from vitlorafa.init import initialise
from vitlorafa.ops import autocast_dtype, linear, lora_linear
from vitlorafa.ops.private import is_of_torch_func

QKV = ("q", "k", "v")  # the order in which a fused qkv stacks its outputs
# Name of a layer that computes several projections -> those, in the order in which it stacks them.
STACKS: dict[str, tuple[str, ...]] = {"qkv": QKV, "qk": ("q", "k"), "kv": ("k", "v")}


class FastLinear(nn.Linear):
    """torch's linear layer by `vitlorafa.ops.linear`, whose weight and bias may be in another format than its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], in autocast's format or the input's."""
        return linear(x, self.weight, self.bias)


class LoRALinear(nn.Module):
    """A linear layer with low-rank updates W + s·B·A (LoRA, Hu et al. 2021), one per adapted projection.

    Args:
        base: The pretrained layer. It stays this object, unchanged and frozen by whoever adapts the model.
        config: Rank, scaling, start and which factor trains.
        projections: What is adapted: one name, or any of the `stack` in its order.
        stack: The projections that `base` stacks, equal parts of its outputs, such as q, k and v; none if it is one.
        generator: Source of the factors' start, on the CPU; the config's if None.

    Attributes:
        lora_A: Stacked factors A, [k, r, d_in], for k projections.
        lora_B: Stacked factors B, [k, m, r], with m outputs per projection. Factors are float32 or better,
            whatever the weight's precision: small steps of an optimizer must not be rounded away.
        starts: First output of each projection.
        merged: Whether the update is added to `base.weight`.
        disabled: Whether the layer does as `base` alone.
        reloaded: Whether `load_state_dict` brought the weight, so that it may be another than when this was made.

    A state dict holds the pretrained weight and the factors, whether or not they are merged, so that it can be loaded
    into a layer of either kind.

    Raises:
        AdapterError: If the rank is over the width of a projection.
    """

    reloaded = False
    _merge_again = False  # after a state dict is loaded

    def __init__(
        self,
        base: nn.Linear,
        config: AdapterConfig,
        projections: tuple[str, ...],
        stack: tuple[str, ...] = (),
        generator: Generator | None = None,
    ) -> None:
        super().__init__()
        m = base.out_features // max(1, len(stack))
        if config.rank > min(m, base.in_features):
            raise AdapterError(f"rank {config.rank} is over the layer's width {min(m, base.in_features)}")
        generator = generator or config.generator()
        self.base = base
        self.projections = projections
        self.starts = tuple(stack.index(name) * m for name in projections) if stack else (0,)
        self.scale = config.scale
        self.dropout = config.dropout
        self.fold = config.compute == "folded"
        self.merged = False
        self.disabled = False
        weights = [base.weight[start : start + m] for start in self.starts]
        A = torch.stack([initialise("A", config.init_A, config.rank, W, generator) for W in weights])
        B = torch.stack([initialise("B", config.init_B, config.rank, W, generator) for W in weights])
        self.lora_A = nn.Parameter(A, requires_grad="A" in config.train)
        self.lora_B = nn.Parameter(B, requires_grad="B" in config.train)
        self._unmerged: Tensor | None = None  # the pretrained weight, while merged
        self._cast: tuple[Any, ...] | None = None  # see _frozen
        self.register_load_state_dict_post_hook(_merge_again)

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """The adapted layer: [..., d_in] -> [..., d_out], and GELU behind it if asked for."""
        if self.merged or self.disabled:
            y = self.base(x)
            return F.gelu(y) if gelu else y
        dropout = self.dropout if self.training else 0.0
        fold = self.fold and not dropout
        weight, bias = (self.base.weight, self.base.bias) if fold else self._frozen(autocast_dtype(x))
        factors = self.lora_A, self.lora_B, self.scale
        return lora_linear(x, weight, bias, *factors, starts=self.starts, dropout=dropout, fold=fold, gelu=gelu)

    def _frozen(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        """The base's weight and bias for autocast's dtype, cast once for as long as they stay the same."""
        weight, bias = self.base.weight, self.base.bias
        params = [weight] if bias is None else [weight, bias]
        if dtype in (None, weight.dtype) or not all(map(_keeps_still, params)):
            return weight, bias
        state = (dtype, weight.device, *((p.data_ptr(), p._version) for p in params))
        if self._cast is None or self._cast[0] != state:
            # Made outside of inference mode, for training cannot use a tensor that was made in it.
            with torch.inference_mode(False), torch.no_grad():
                cast = weight.to(dtype), None if bias is None else bias.to(dtype)
                # What was cast is held on to, so that no other tensor can get its address.
                self._cast = (state, *cast, *(p.detach() for p in params))
        return self._cast[1:3]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cast": None}  # neither copies nor files carry it

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRALinear":
        self._cast = None  # moved or converted: free the old cast at once
        self._unmerged = None if self._unmerged is None else fn(self._unmerged)
        return super()._apply(fn, recurse)

    @property
    def pretrained_weight(self) -> Tensor:
        """The base's weight without the update, [d_out, d_in], merged or not."""
        return self.base.weight if self._unmerged is None else self._unmerged

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """torch's, with the pretrained weight also while it is merged."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        name = f"{prefix}base.weight"
        if self._unmerged is not None and name in state:
            state[name] = self._unmerged
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        # Everything loads unmerged, and `_merge_again` comes once the base has loaded too.
        self.reloaded |= f"{prefix}base.weight" in state_dict
        self._merge_again = self.merged
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def delta_weight(self) -> Tensor:
        """The update s·B·A of all projections, [d_out, d_in], differentiable, in the factors' dtype."""
        delta = self.lora_A.new_zeros(self.base.weight.shape)
        with torch.autocast(delta.device.type, enabled=False):  # merging must not depend on where it is called
            for start, A, B in zip(self.starts, self.lora_A, self.lora_B, strict=True):
                delta[start : start + len(B)] = self.scale * (B @ A)
        return delta

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to `base.weight`, so that the layer costs what the pretrained one does.

        The pretrained weight is kept beside it, so that `unmerge` is exact in every precision.
        """
        if not self.merged:
            weight = self.base.weight
            with torch.inference_mode(False):
                merged = (weight.detach() + self.delta_weight()).to(weight.dtype)
            # In other memory, so that a state dict that was taken before keeps the pretrained weight.
            self._unmerged, weight.data = weight.detach(), merged
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the pretrained weight back, bit for bit."""
        if self._unmerged is not None:
            self.base.weight.data = self._unmerged
            self._unmerged = None
            self.merged = False

    # The rest makes the layer pass for an nn.Linear where a model reads one's attributes. An attention that
    # computes F.linear(x, qkv.weight, ...) itself so gets the update too, without dropout and keeping x.

    @property
    def weight(self) -> Tensor:
        """The weight in effect, [d_out, d_in], differentiable."""
        weight = self.base.weight
        return weight if self.merged or self.disabled else (weight + self.delta_weight()).to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, [d_out] or None."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """The base's input width d_in."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """The base's output width d_out."""
        return self.base.out_features

    def extra_repr(self) -> str:
        """What `print(model)` says of the layer beside its base."""
        trained = "".join(name for name in "BA" if getattr(self, f"lora_{name}").requires_grad)
        return f"{', '.join(self.projections)}, rank={self.lora_A.shape[1]}, trained={trained or 'none'}"


def _merge_again(layer: LoRALinear, _: Any) -> None:
    """After a state dict was loaded, merges a layer that was merged before."""
    if layer._merge_again:
        layer._merge_again = False
        layer.merge()


def _keeps_still(parameter: Tensor) -> bool:
    """Whether a cast of the parameter can be kept: it is frozen, and its address and version tell of a change.

    Not so inside a compiler or torch.func's transforms, and for what was made in inference mode.
    """
    return (
        not torch.compiler.is_compiling()
        and not parameter.requires_grad
        and not parameter.is_inference()
        and not is_of_torch_func(parameter)
    )
