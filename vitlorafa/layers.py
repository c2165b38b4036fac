"""Linear layers: one with adapters, and a faster version of torch's."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError
from vitlorafa.init import RESIDUAL, blank_factors, initialise
from vitlorafa.ops import autocast_dtype, linear, lora_linear
from vitlorafa.ops.eager import fold
from vitlorafa.ops.private import belongs_to_torch_func, inside_torch_func
from vitlorafa.ops.quantised import QuantisedWeight, Unpack, dense
from vitlorafa.quantised_linear import QuantisedLinear, float_linear
from vitlorafa.quantised_weight import frozen_weight

QKV = ("q", "k", "v")  # order in which a fused qkv stacks its outputs
# Name of a layer that computes several projections -> these projections, in the order in which it stacks them.
STACKS: dict[str, tuple[str, ...]] = {"qkv": QKV, "in_proj": QKV, "qk": ("q", "k"), "kv": ("k", "v")}


class FastLinear(nn.Linear):
    """torch's linear layer by `vitlorafa.ops.linear`; weight and bias may have another number format than the input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out], in autocast's format or the input's."""
        return linear(x, self.weight, self.bias)


class LoRALinear(nn.Module):
    """A linear layer with one low-rank update W + s·B·A (LoRA, Hu et al. 2021) for each adapted projection.

    A state dict holds the pretrained weight and the factors, merged or not, so it can be loaded into merged and
    unmerged layers.

    Args:
        base: Pretrained layer, which may be quantised. The object is kept unchanged; `inject` freezes it.
        config: Rank, scaling, initialisation and trained factors.
        projections: Adapted projections: one name, or any of those in `stack`, in its order.
        stack: Projections that `base` computes as equal parts of its outputs, such as q, k and v; empty if it computes
            one only.
        generator: Generator on the CPU for the initialisation; if None, a new one from the config.
        blank: Whether the factors are zeros, which a file's are loaded over, instead of the config's initialisation.

    Attributes:
        lora_A: Stacked factors A, [k, r, d_in], for k projections.
        lora_B: Stacked factors B, [k, m, r], with m outputs per projection. Factors are float32 or better for weights
            of any precision, so that small optimizer steps are not rounded away.
        start_A: Factors A at the start, [k, r, d_in], and `start_B`, [k, m, r], if the update starts at a part of the
            weight, such as "pissa"; else None. The frozen weight is then the residual W − s·B₀·A₀. B₀ is zero for
            projections that start otherwise. They belong to the state dict.
        starts: First output of each projection.
        strength: Share a of the update in all that the layer computes, from 0 to 1: W + a·s·B·A. Set it with
            `vitlorafa.set_strength`, which keeps merged weights up to date. It does not belong to the state dict.
        merged: Whether the update is added to `base.weight`.
        disabled: Whether the layer computes like `base`, without the update.
        reloaded: Whether `load_state_dict` has loaded a weight since construction.

    Raises:
        AdapterError: If the rank is larger than the width of a projection.
    """

    start_A: Tensor | None  # noqa: N815
    start_B: Tensor | None  # noqa: N815
    reloaded = False
    _merge_again = False  # after a state dict is loaded

    def __init__(
        self,
        base: nn.Linear | QuantisedLinear,
        config: AdapterConfig,
        projections: tuple[str, ...],
        stack: tuple[str, ...] = (),
        generator: Generator | None = None,
        blank: bool = False,
    ) -> None:
        super().__init__()
        m = base.out_features // max(1, len(stack))
        if config.rank > min(m, base.in_features):
            raise AdapterError(
                f"rank {config.rank} is larger than the layer's width {min(m, base.in_features)}: choose a smaller rank"
            )
        generator = generator or config.generator()
        self.base = base
        self.projections = projections
        self.starts = tuple(stack.index(name) * m for name in projections) if stack else (0,)
        self.full_scale = config.scale
        self.strength = 1.0
        self.dropout = config.dropout
        self.fold = config.compute == "folded"
        self.merged = False
        self.disabled = False
        weight = dense(frozen_weight(base))
        weights = [weight[start : start + m] for start in self.starts]
        inits = [config.inits(name) for name in projections]
        if blank:
            A, B = blank_factors(config.rank, weights)
        else:
            A, B = initialise(inits, config.rank, weights, self.scale, generator)
        self.lora_A = nn.Parameter(A, requires_grad="A" in config.train)
        self.lora_B = nn.Parameter(B, requires_grad="B" in config.train)
        residual = [init in RESIDUAL for init, _ in inits]
        self.register_buffer("start_A", A.clone() if any(residual) else None)
        self.register_buffer("start_B", B * B.new_tensor(residual)[:, None, None] if any(residual) else None)
        self._unmerged: Tensor | None = None  # the pretrained weight, while merged
        self._merged: Tensor | None = None  # the weight with the update, while merged into a quantised layer
        self._cast: tuple[Any, ...] | None = None  # see `_cast_base`
        self._folded: tuple[Any, ...] | None = None  # see `_folded_weight`
        self.register_load_state_dict_post_hook(_merge_again)

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """The adapted layer: [..., d_in] -> [..., d_out].

        Args:
            x: Input.
            gelu: Whether to apply GELU to the output.
        """
        if self._has_one_weight:
            y = self.base(x) if self._merged is None else linear(x, self._merged, self.base.bias)
            return F.gelu(y) if gelu else y
        adapter, dropout = self._chosen_adapter(), self.dropout if self.training else 0.0
        fold = self.fold and not dropout and not isinstance(adapter, Tensor)
        weight, bias = self._cast_base(None if fold else autocast_dtype(x))
        folded = self._folded_weight(weight, x) if fold and adapter is None else None
        if folded is not None and x.shape[-1:] == folded.shape[1:]:
            y = linear(x.reshape(-1, x.shape[-1]), folded, bias, gelu=gelu)
            return y.view(*x.shape[:-1], len(folded))
        factors = self.lora_A, self.lora_B, self.scale
        how: Any = {"starts": self.starts, "dropout": dropout, "fold": fold, "gelu": gelu, "adapter": adapter}
        return lora_linear(x, weight, bias, *factors, **how)

    def _chosen_adapter(self) -> Tensor | int | None:
        """The adapter of each sample, or of all; None if the layer has one adapter only, as it has without `stack`."""
        return None

    @property
    def scale(self) -> float:
        """The factor of B·A: the config's s, times the strength."""
        return self.full_scale * self.strength

    @property
    def _has_one_weight(self) -> bool:
        """Whether the layer computes with one weight, merged or pretrained."""
        return self.merged or self.disabled or self.strength == 0

    def _cast_base(self, dtype: torch.dtype | None) -> tuple[Tensor | QuantisedWeight, Tensor | None]:
        """The base's weight, or its residual, and its bias, in autocast's dtype; computed once until they change.

        A quantised weight is returned as it is stored, because a cached one would take the memory that it saves.
        """
        weight, bias = frozen_weight(self.base), self.base.bias
        if isinstance(weight, QuantisedWeight):
            return self._quantised_residual(weight), bias
        if dtype in (None, weight.dtype) and self.start_A is None:
            return weight, bias
        sources = [tensor for tensor in (weight, bias, self.start_A, self.start_B) if tensor is not None]
        if not all(map(_can_cache_cast, sources)):
            return self._residual(), bias
        state = (dtype, weight.device, self.scale, *((p.data_ptr(), p._version) for p in sources))
        if self._cast is None or self._cast[0] != state:
            # Created outside inference mode, because training cannot use inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                residual = self._residual()
                cast = residual.to(dtype or residual.dtype), None if bias is None else bias.to(dtype or bias.dtype)
                # Keeps the original tensors alive, so that no other tensor gets their address.
                self._cast = (state, *cast, *(p.detach() for p in sources))
        return self._cast[1:3]

    def _folded_weight(self, weight: Tensor | QuantisedWeight, x: Tensor) -> Tensor | None:
        """W + s·B·A in the number format of x's matmul, formed once until one changes; None if it is not to be kept.

        It is kept on a CPU where no gradient is needed, so that evaluation forms it once and not in each batch.
        """
        A, B = self.lora_A, self.lora_B
        if torch.compiler.is_compiling() or inside_torch_func() or isinstance(weight, QuantisedWeight):
            return None
        is_plain = weight.is_cpu and type(A) is type(B) is nn.Parameter and _can_cache_cast(weight)
        if torch.is_grad_enabled() or not is_plain:
            self._folded = None  # training has no use for it
            return None
        dtype = autocast_dtype(x) or x.dtype
        state = (dtype, self.scale, weight.data_ptr(), weight._version)
        if self._folded is not None and self._folded[0] == state:
            # Optimizers may change factors without giving them a new version. They are small enough to be compared.
            _, folded, old_A, old_B, _ = self._folded
            if torch.equal(old_A, A) and torch.equal(old_B, B):
                return folded
        with torch.inference_mode(False), torch.no_grad():
            folded = fold(weight, A, B, self.scale, self.starts, dtype)
            self._folded = (state, folded, A.clone(), B.clone(), weight.detach())  # keeps the weight's address taken
        return folded

    def _residual(self) -> Tensor:
        """W − s·B₀·A₀ in float32 or better, [d_out, d_in]; W itself if the update starts at zero."""
        start = self._start()
        return self.base.weight if start is None else self.base.weight - start

    def _quantised_residual(self, weight: QuantisedWeight) -> QuantisedWeight:
        """W − s·B₀·A₀ for a quantised W, subtracted whenever it is dequantised."""
        if self.start_A is None or self.start_B is None:
            return weight
        unpack = partial(_unpack_residual, weight.unpack, self.starts, self.scale)
        return weight._replace(tensors=(*weight.tensors, self.start_A, self.start_B), unpack=unpack)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cast": None, "_folded": None}  # neither copied nor saved

    def _apply(self, fn: Any, recurse: bool = True) -> "LoRALinear":
        self._cast = self._folded = None  # moved or converted: frees the old ones immediately
        self._unmerged = None if self._unmerged is None else fn(self._unmerged)
        self._merged = None if self._merged is None else fn(self._merged)
        return super()._apply(fn, recurse)

    @property
    def pretrained_weight(self) -> Tensor:
        """The base's weight without the update, [d_out, d_in], also while merged; dequantised if it is quantised."""
        return dense(frozen_weight(self.base)) if self._unmerged is None else self._unmerged

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """torch's `state_dict`, with the pretrained weight also while merged."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        name = f"{prefix}base.weight"
        if self._unmerged is not None and name in state:
            state[name] = self._unmerged
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        # Everything is loaded unmerged; `_merge_again` runs once the base is loaded too.
        self.reloaded |= any(f"{prefix}base.{name}" in state_dict for name in ("weight", "codes"))
        self._merge_again = self.merged
        # Under `fully_shard`, a new weight may have the address and the version of the old one.
        self._cast = self._folded = None
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def delta_weight(self) -> Tensor:
        """The update s·B·A of all projections, [d_out, d_in], differentiable, in the factors' dtype.

        It is s·(B·A − B₀·A₀) if the factors started at a part of the weight, and times the strength.
        """
        update, start = self._update(self.lora_A, self.lora_B), self._start()
        return update if start is None else update - start

    def _start(self) -> Tensor | None:
        """The part s·B₀·A₀ of the weight at which the update started; None if it started at zero."""
        return None if self.start_A is None or self.start_B is None else self._update(self.start_A, self.start_B)

    def _update(self, A: Tensor, B: Tensor) -> Tensor:
        """s·B·A of all projections, [d_out, d_in]."""
        delta = A.new_zeros(self.out_features, self.in_features)
        with torch.autocast(delta.device.type, enabled=False):  # the result must not depend on the caller's autocast
            for start, A_j, B_j in zip(self.starts, A, B, strict=True):
                delta[start : start + len(B_j)] = self.scale * (B_j @ A_j)
        return delta

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to `base.weight`, so that the layer costs as much as the pretrained one.

        The pretrained weight is kept, so that `unmerge` is exact in every precision. A quantised one stays quantised;
        the layer then computes with its dequantised values plus the update, which are not quantised again.
        """
        if not self.merged:
            weight = frozen_weight(self.base)
            with torch.inference_mode(False):
                merged = (dense(weight).detach() + self.delta_weight()).to(weight.dtype)
            if isinstance(weight, QuantisedWeight):
                self._merged = merged.detach()
            else:
                # In new memory, so that an earlier state dict keeps the pretrained weight.
                self._unmerged, weight.data = weight.detach(), merged
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the exact pretrained weight."""
        if self._unmerged is not None:
            self.base.weight.data = self._unmerged
        self._unmerged = self._merged = None
        self.merged = False

    def without_adapter(self) -> nn.Module:
        """The base; if the update is merged into a quantised one, a linear layer with the merged weight instead."""
        return self.base if self._merged is None else float_linear(self.base, self._merged)

    def take_off(self) -> None:
        """Lets go of the base, after the layer was taken out of its model."""
        self.base = nn.Identity()  # type: ignore[assignment]
        self._cast = self._folded = None

    def put_on(self, base: nn.Linear | QuantisedLinear) -> "LoRALinear":
        """Continues on a base, which may have another device or format than before.

        Args:
            base: Pretrained layer.

        Returns:
            This layer, in the base's mode.
        """
        weight = frozen_weight(base)
        device = weight.tensors[0].device if isinstance(weight, QuantisedWeight) else weight.device
        self.to(device, torch.promote_types(self.lora_A.dtype, weight.dtype))
        self.base = base
        return self.train(base.training)

    # These attributes let models use the layer like an nn.Linear. An attention that computes F.linear(x, qkv.weight,
    # ...) itself gets the update too, but without dropout, and x is kept for backward.

    @property
    def weight(self) -> Tensor:
        """The weight with the update, [d_out, d_in], differentiable."""
        weight = dense(frozen_weight(self.base)) if self._merged is None else self._merged
        return weight if self._has_one_weight else (weight + self.delta_weight()).to(weight.dtype)

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
        """The layer's text in `print(model)`."""
        trained = "".join(name for name in "BA" if getattr(self, f"lora_{name}").requires_grad)
        text = f"{', '.join(self.projections)}, rank={self.lora_A.shape[1]}, trained={trained or 'none'}"
        return text if self.strength == 1 else f"{text}, strength={self.strength:g}"


def _merge_again(layer: LoRALinear, _: Any) -> None:
    """Merges a layer again that was merged before a state dict was loaded."""
    if layer._merge_again:
        layer._merge_again = False
        layer.merge()


def _unpack_residual(
    unpack: Unpack,
    starts: tuple[int, ...],
    scale: float,
    tensors: tuple[Tensor, ...],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """The weight that `unpack` reads from all tensors but the last two, A₀ and B₀, minus s·B₀·A₀."""
    *stored, A, B = tensors
    return fold(unpack(tuple(stored), shape, torch.float32), A, B, -scale, starts, dtype)


def _can_cache_cast(tensor: Tensor) -> bool:
    """Whether what is computed from the tensor can be cached: it is frozen, and address and version reveal changes.

    False inside a compiler or torch.func's transforms, and for tensors created in inference mode.
    """
    return (
        not torch.compiler.is_compiling()
        and not tensor.requires_grad
        and not tensor.is_inference()
        and not belongs_to_torch_func(tensor)
    )
