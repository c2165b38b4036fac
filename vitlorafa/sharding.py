"""Models that several processes share (DDP, FSDP): gathering sharded tensors, and which process writes files."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are sharded over several devices, by `fully_shard` (DTensors) or by FSDP."""
    return any(map(_is_dtensor, model.parameters())) or bool(_fsdp_modules(model))


def reduces_gradients(model: nn.Module) -> bool:
    """Whether DistributedDataParallel wraps the model or a part of it."""
    return any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules())


def gather(tensor: Tensor) -> Tensor:
    """The full tensor, on every process that holds a shard of it; all of them have to call."""
    tensor = tensor.detach()
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def own_part(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds: all of it, if it is not sharded."""
    part: Tensor = tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return part


def assign(target: Tensor, value: Tensor) -> None:
    """Copies a full tensor, the same on every process, into one that may be sharded.

    Args:
        target: Tensor to write to.
        value: Full tensor.
    """
    if _is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = target
        value = distribute_tensor(value.to(target.device, target.dtype), sharded.device_mesh, sharded.placements)
    target.copy_(value)


def is_writer(model: nn.Module) -> bool:
    """Whether this process writes files: it is the first of those that share the model by DDP or FSDP."""
    return all(dist.get_rank(group) == 0 for group in _groups(model))


@contextmanager
def gather_parameters(model: nn.Module, write: bool = False) -> Iterator[None]:
    """Context with the full parameters of FSDP version 1, for which `gather` does not work; all processes have to call.

    Args:
        model: Any model.
        write: Whether to keep changes of the parameters.
    """
    with ExitStack() as stack:
        if _fsdp_modules(model):
            from torch.distributed.fsdp import FullyShardedDataParallel

            stack.enter_context(FullyShardedDataParallel.summon_full_params(model, writeback=write))
        yield


def wait_for_all(model: nn.Module) -> None:
    """Waits until all processes have called, if the model is sharded; otherwise returns immediately."""
    if is_sharded(model):
        for group in _groups(model):
            dist.barrier(group)


def _groups(model: nn.Module) -> list[Any]:
    """The process groups that share the model."""
    groups: list[Any] = []
    for parameter in model.parameters():
        if _is_dtensor(parameter):
            mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
            groups += [mesh.get_group(dim) for dim in range(mesh.ndim)]
            break
    wrappers = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    return groups + [module.process_group for module in [*wrappers, *_fsdp_modules(model)]]


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _fsdp_modules(model: nn.Module) -> list[nn.Module]:
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
