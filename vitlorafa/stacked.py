"""The parts of a model with several adapters over one A: which adapter each image has, the layers, and the head.

`vitlorafa.stack` makes them. Hooks of the model take `adapter=` from a call and put it where layers and head read it.
The last of a layer's factors and of the heads are those of the model without an adapter, so that an index of -1 chooses
them.
"""

import operator
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitlorafa.errors import AdapterError
from vitlorafa.layers import LoRALinear
from vitlorafa.quantised_weight import frozen_weight

Adapter = int | Tensor  # one index for all images, or one for each, [batch]
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Choice(threading.local):
    """The adapters of the images that a model computes at the moment, in each thread its own.

    Args:
        count: Number of adapters.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._chosen: list[Adapter | None] = []  # by the calls that are running, the innermost last

    def __reduce__(self) -> tuple[type["Choice"], tuple[int]]:
        return type(self), (self.count,)  # copied and pickled without what is running

    @property
    def adapter(self) -> Adapter:
        """The index of all images, or of each.

        Raises:
            AdapterError: If none is chosen.
        """
        adapter = self._chosen[-1] if self._chosen else None
        if adapter is None:
            raise AdapterError(
                f"none of the model's adapters is chosen ({self.count}): call model(images, adapter=0), with one index "
                "or one for each image, -1 for none; or use choose_adapter(model, ...)"
            )
        return adapter

    @contextmanager
    def use(self, adapter: Any) -> Iterator[None]:
        """Context with these adapters for calls that choose none themselves.

        Args:
            adapter: Index, or indices, as users give them.
        """
        self._chosen.append(self._check(adapter))
        try:
            yield
        finally:
            self._chosen.pop()

    def add_hooks(self, model: nn.Module, inner: nn.Module) -> list[RemovableHandle]:
        """Lets a model take `adapter=` in its calls, whatever arguments its own forward has.

        Args:
            model: The timm model, or a module that holds it.
            inner: The timm model.

        Returns:
            The handles that remove the hooks again.
        """
        handles = []
        for module in dict.fromkeys((model, inner)):
            handles.append(module.register_forward_pre_hook(self._start, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end, always_call=True))
        # The timm model and its first layer see the images; the latter in methods such as `forward_features` too.
        first = [child for name, child in inner.named_children() if name == "patch_embed"]
        for module in (inner, *first):
            handles.append(module.register_forward_pre_hook(self._match, with_kwargs=True))
        return handles

    def _start(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._chosen.append(self._chosen[-1] if self._chosen else None)  # that of the module around it, or of `use`
        if (adapter := self._check(kwargs.get("adapter"))) is not None:  # after `append`: `_end` runs after errors too
            self._chosen[-1] = adapter
        return args, {name: value for name, value in kwargs.items() if name != "adapter"}

    def _match(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        adapter = self._chosen[-1] if self._chosen else None
        images = _first_tensor((args, kwargs))
        if isinstance(adapter, Tensor) and images is not None:
            if len(adapter) != len(images):
                raise AdapterError(
                    f"adapter has {len(adapter)} indices for {len(images)} images: give one for each image, or one "
                    "number for all"
                )
            self._chosen[-1] = adapter.to(images.device)

    def _end(self, *_: Any) -> None:
        if self._chosen:  # empty if another module's hook failed before `_start`
            self._chosen.pop()

    def _check(self, adapter: Any) -> Adapter | None:
        """The adapter as an int or as a tensor of int64, [batch]."""
        if adapter is None:
            return None
        if isinstance(adapter, bool):
            raise self._refuse(adapter)
        if (number := _to_int(adapter)) is not None:
            if not -1 <= number < self.count:
                raise self._refuse(number)
            return number
        try:
            indices = torch.as_tensor(adapter)
        except (TypeError, ValueError, RuntimeError):
            raise self._refuse(adapter) from None
        if indices.dim() != 1 or (indices.dtype not in _WHOLE and len(indices)):
            raise self._refuse(adapter)
        if not torch.compiler.is_compiling():  # a compiler cannot look at values; indexing checks them then
            wrong = indices[(indices < -1) | (indices >= self.count)]
            if len(wrong):
                raise self._refuse(int(wrong[0]))
        return indices.long()

    def _refuse(self, value: Any) -> AdapterError:
        return AdapterError(
            f"adapter must be a number from 0 to {self.count - 1}, -1 for none, or one of these for each image, not "
            f"{value!r}"
        )


class StackedLoRALinear(LoRALinear):
    """A `LoRALinear` with the factors B of n adapters, of which each sample has its own.

    Attributes:
        lora_B: Stacked factors B, [n + 1, k, m, r]; the last one adds nothing to the pretrained weight.
        choice: Adapters of the samples.
    """

    choice: Choice

    @classmethod
    def convert(cls, layer: LoRALinear, factors: Sequence[Tensor], choice: Choice) -> None:
        """Gives a layer the factors of several adapters over its A, in place.

        Args:
            layer: Layer with one adapter.
            factors: Factors B of each adapter, [k, m, r].
            choice: Adapters of the samples.
        """
        none = torch.zeros_like(layer.lora_B) if layer.start_B is None else layer.start_B
        layer.lora_B = nn.Parameter(torch.stack([*factors, none.to(factors[0].dtype)]), requires_grad=False)
        layer.__class__ = cls
        layer.choice = choice  # type: ignore[assignment]

    def _chosen_adapter(self) -> Adapter:
        """The adapter of each sample."""
        return self.choice.adapter

    def delta_weight(self) -> Tensor:
        """Not defined: each adapter has its own.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError("a layer with several adapters has several weights: call remove(model), then load one")

    @property
    def weight(self) -> Tensor:
        """Not a number, [d_out, d_in], since each adapter has its own weight; models such as ConViT read its device."""
        if self._has_one_weight:
            return super().weight
        dtype = frozen_weight(self.base).dtype
        return torch.full((), torch.nan, dtype=dtype, device=self.lora_A.device).expand(
            self.out_features, self.in_features
        )

    def extra_repr(self) -> str:
        """The layer's text in `print(model)`."""
        return f"{super().extra_repr()}, adapters={len(self.lora_B) - 1}"


class StackedHead(nn.Module):
    """The heads of several adapters, of which each sample has its own.

    Args:
        heads: Head of each adapter.
        own: Head of the model without an adapter.
        choice: Adapters of the samples.

    Attributes:
        own: Head of the model without an adapter.
    """

    def __init__(self, heads: Sequence[nn.Module], own: nn.Module, choice: Choice) -> None:
        super().__init__()
        self.heads = nn.ModuleList([*heads, own])
        self.choice = choice

    @property
    def own(self) -> nn.Module:
        """The head of the model without an adapter."""
        return self.heads[-1]

    def forward(self, x: Tensor) -> Tensor:
        """[N, ...] -> [N, ..., classes]."""
        adapter = self.choice.adapter
        if isinstance(adapter, int):
            output: Tensor = self.heads[adapter](x)
            return output
        # All heads compute all samples: heads are small, and any module may be one.
        outputs = torch.stack([head(x) for head in self.heads])
        N = outputs.shape[1]
        index = adapter.to(x.device).repeat_interleave(N // max(len(adapter), 1))
        return outputs[index, torch.arange(N, device=x.device)]


def _to_int(adapter: Any) -> int | None:
    """A whole number of Python, NumPy or torch as int; None for everything else."""
    if isinstance(adapter, Tensor):
        return int(adapter) if adapter.dim() == 0 and adapter.dtype in _WHOLE else None
    try:
        return operator.index(adapter)
    except TypeError:
        return None


def _first_tensor(values: Any) -> Tensor | None:
    """The first tensor with a batch in nested arguments."""
    if isinstance(values, Tensor):
        return values if values.dim() else None
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if not isinstance(values, (tuple, list)):
        return None
    return next((found for value in values if (found := _first_tensor(value)) is not None), None)
