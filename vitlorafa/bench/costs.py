"""What a method costs in memory, part by part, and the largest batch that fits.

Every part is counted, not estimated. All but the last do not depend on the batch:

| part | bytes |
|---|---|
| frozen weights | parameters and buffers that do not train |
| trained weights | parameters that train, with the head |
| gradients | as many as trained weights |
| optimizer state | all tensors that the optimizer keeps after a step; AdaLoRA's importance scores too |
| kept weights | what autograd saves that does not grow with the batch: casts of weights, W + s·B·A |
| per image | the image, and the activations that autograd saves for it |

What is allocated for a moment only, such as a gradient on its way back, is not counted. So the largest batch is an
upper bound; on a GPU the table also has the measured peak.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from timm.layers import set_fused_attn, use_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitlorafa.bench.case import Case, build_backbone, stack_of
from vitlorafa.bench.measure import Peak, Saved, make_batch, measure_saved, storages_of, train_step
from vitlorafa.bench.methods import METHODS, Setup, adapted_linears, count, own_case
from vitlorafa.errors import AdapterError

_UNITS = {"": 1, "b": 1, **{f"{prefix}ib": 2 ** (10 * power) for power, prefix in enumerate("kmgt", start=1)}}
_UNITS |= {f"{prefix}b": 10 ** (3 * power) for power, prefix in enumerate("kmgt", start=1)}


@dataclass(frozen=True)
class Cost:
    """The memory and the operations of a method in a case.

    Attributes:
        case: Case that was run.
        method: Name in `METHODS`.
        adapter: Number of trained parameters without the head.
        head: Number of trained parameters of the head.
        frozen: Bytes of frozen weights.
        trained: Bytes of trained weights.
        optimizer: Bytes of the optimizer's state.
        saved: Bytes that autograd keeps for backward.
        formula: Bytes of kept activations by formula; None without a formula.
        flops: Model FLOPs of a step, see `model_flops`.
        peak: Largest memory use; None where it was not measured.
    """

    case: Case
    method: str
    adapter: int
    head: int
    frozen: int
    trained: int
    optimizer: int
    saved: Saved
    formula: int | None
    flops: int
    peak: Peak | None = None

    @property
    def fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.frozen + 2 * self.trained + self.optimizer + self.saved.weights

    @property
    def image(self) -> int:
        """Bytes of an image, in float32."""
        return 3 * self.case.resolution**2 * 4

    @property
    def per_image(self) -> int:
        """Bytes of an image and of its activations."""
        return self.saved.activations // self.case.batch_size + self.image

    @property
    def total(self) -> int:
        """All counted bytes."""
        return self.fixed + self.case.batch_size * self.per_image

    def largest_batch(self, memory: int) -> int:
        """The largest number of images whose counted bytes fit in a memory; 0 if not even one does.

        Args:
            memory: Bytes.
        """
        return max(0, (memory - self.fixed) // self.per_image)


def measure_cost(method: str, case: Case, setup: Setup) -> Cost:
    """Counts the bytes and operations of a method; it takes one training step, so that the optimizer has its state.

    Args:
        method: Name in `METHODS`.
        case: Case to count for.
        setup: Model and optimizer of the method.
    """
    saved = measure_saved(setup, case)
    train_step(setup, case, *make_batch(case, 1), lambda: None)
    trained = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]
    others = [tensor for tensor in [*setup.model.parameters(), *setup.model.buffers()] if not tensor.requires_grad]
    head = sum(p.numel() for name, p in setup.model.named_parameters() if p.requires_grad and _is_head(name))
    return Cost(
        case,
        method,
        sum(p.numel() for p in trained) - head,
        head,
        count_bytes(others),
        count_bytes(trained),
        count_bytes(_state(setup)),
        saved,
        count(method, case, stack_of(case))[1],
        model_flops(method, case),
    )


def scale_cost(cost: Cost, batch_size: int) -> Cost:
    """The cost of another batch size, in which only activations and images grow.

    Args:
        cost: Measured cost.
        batch_size: Number of images.
    """
    images = cost.case.batch_size
    return replace(
        cost,
        case=replace(cost.case, batch_size=batch_size),
        saved=replace(cost.saved, activations=cost.saved.activations * batch_size // images),
        formula=None if cost.formula is None else cost.formula * batch_size // images,
        flops=cost.flops * batch_size // images,
        peak=None,
    )


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages of tensors; each storage counts once.

    Args:
        tensors: Tensors, which may share storages.
    """
    storages = {storage.data_ptr(): storage for tensor in tensors for storage in storages_of(tensor)}
    return sum(storage.nbytes() for storage in storages.values())


def model_flops(method: str, case: Case) -> int:
    """The operations of a step that the model itself needs; what a method adds to them is not counted.

    These are the forward pass, the gradients of activations back to the first layer that trains or is adapted, and the
    gradients of those weights of the model that train. They are what model FLOPs utilisation divides by time: matmuls
    of an adapter, recomputations and casts only take time.

    Args:
        method: Name in `METHODS`.
        case: Case to count for.
    """
    # The methods of a table differ in a few sizes only, and what an adapter adds does not count.
    adapted = tuple(adapted_linears(own_case(method, case))) if METHODS[method].is_adapter else None
    return case.batch_size * _count_flops("" if adapted else method, case, adapted)


@cache
def _count_flops(method: str, case: Case, adapted: tuple[str, ...] | None) -> int:
    """Model FLOPs for one image, of a method without an adapter or with adapted layers."""
    fused = bool(use_fused_attn())
    set_fused_attn(False)  # plain matmuls: they are counted on every device, and nothing is recomputed
    try:
        with torch.device("meta"):
            model = build_backbone(case)
    finally:
        set_fused_attn(fused)
    if adapted is None:
        METHODS[method].prepare(model, case)
    else:
        model.requires_grad_(False)
        for name in adapted:
            model.get_submodule(name).register_forward_hook(_require_grad)
    if case.head and method != "lower_bound":
        model.get_classifier().requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, case.resolution, case.resolution, device="meta")).sum().backward()
    return int(counter.get_total_flops())


def share_weights(model: nn.Module, backbone: VisionTransformer) -> None:
    """Lets frozen parameters that equal one of the backbone use its memory, so that many models fit beside each other.

    Args:
        model: Model whose frozen parameters do not change any more.
        backbone: Model with the same weights on the same device.
    """
    candidates: dict[tuple[torch.Size, torch.dtype], list[nn.Parameter]] = {}
    for parameter in backbone.parameters():
        candidates.setdefault((parameter.shape, parameter.dtype), []).append(parameter)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            equal = (c for c in candidates.get((parameter.shape, parameter.dtype), ()) if torch.equal(c, parameter))
            parameter.data = next(equal, parameter).data


def parse_memory(text: str) -> int:
    """The bytes of a size such as "8GiB", "24 GB" or "1.5e9".

    Raises:
        AdapterError: If it is not a size above 0.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    try:
        size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    except (KeyError, ValueError):
        size = 0
    if size < 1:
        raise AdapterError(f"--memory {text} is not a size: give a number and a unit, such as 8GiB")
    return size


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def _is_head(name: str) -> bool:
    return "head" in name.split(".")


def _state(setup: Setup) -> Iterator[Tensor]:
    """The tensors of the optimizer, and those that AdaLoRA keeps beside it."""
    if setup.optimizer is None:
        return
    yield from _tensors(setup.optimizer.state)
    allocator = getattr(getattr(setup.model, "base_model", None), "rankallocator", None)
    if allocator is not None:
        yield from _tensors(vars(allocator))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
