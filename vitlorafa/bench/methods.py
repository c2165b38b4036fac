"""What the benchmark compares: each method makes a random model ready to train."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vitlorafa import AdapterConfig, AdapterError, inject
from vitlorafa.bench import floors
from vitlorafa.bench.floors import LINEARS, Adapter, Stack
from vitlorafa.config import COMPUTE, TARGETS, TRAIN
from vitlorafa.errors import unknown

OURS = {f"{train}-{compute}": (train, compute) for train in TRAIN for compute in COMPUTE}
CLASSES = 10
SCALE = 2  # alpha / rank of every adapter
LEARNING_RATE = 1e-3
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # -> autocast's dtype


@dataclass(frozen=True)
class Case:
    """What a comparison holds fixed over methods.

    Attributes:
        model: timm's name.
        batch_size: Images.
        resolution: Pixels of an image's side.
        precision: A name of `PRECISIONS`.
        rank: Of every adapter.
        targets: Adapted projections.
        dropout: On an adapter's input.
        device: "cpu" or "cuda".
        depth: Blocks; the model's own if None.
    """

    model: str
    batch_size: int
    resolution: int
    precision: str
    rank: int
    targets: tuple[str, ...]
    dropout: float = 0.0
    device: str = "cpu"
    depth: int | None = None

    def __str__(self) -> str:
        return f"{self.setting}, rank {self.rank}"

    @property
    def setting(self) -> str:
        """All but the rank, in words."""
        targets = "all targets" if self.targets == TARGETS else ", ".join(self.targets)
        depth = f", {self.depth} blocks" if self.depth else ""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        images = f"batch {self.batch_size} at {self.resolution} px"
        return f"{self.model}{depth}, {images}, {self.precision}, {targets}{dropout}"

    @property
    def element(self) -> int:
        """Bytes of an element in the precision of products."""
        return 4 if PRECISIONS[self.precision] is None else 2

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Case":
        """The case that `to_dict` wrote."""
        return cls(**values | {"targets": tuple(values["targets"])})


@dataclass
class Contestant:
    """A model ready to train, on its device.

    Attributes:
        model: In training mode.
        optimizer: None if nothing trains.
    """

    model: nn.Module
    optimizer: Optimizer | None

    @property
    def trainable(self) -> int:
        """Number of parameters that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def backbone(case: Case) -> VisionTransformer:
    """The case's model with random weights, the same ones every time, on the CPU.

    Raises:
        AdapterError: If timm has no such model, or cannot build it so, or it is no plain `VisionTransformer`.
    """
    if not timm.is_model(case.model):
        raise unknown("model", case.model, timm.list_models("*vit*"))
    options: dict[str, Any] = {"num_classes": CLASSES, "img_size": case.resolution}
    if case.depth is not None:
        options["depth"] = case.depth
    torch.manual_seed(0)
    try:
        model = timm.create_model(case.model, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise AdapterError(f"timm cannot build {case.model} with {given}: {error}") from None
    if not isinstance(model, VisionTransformer):
        raise AdapterError(f"{case.model} is a {type(model).__name__}: the benchmark takes timm's VisionTransformer")
    patch = max(model.patch_embed.patch_size)
    if case.resolution % patch:
        raise AdapterError(f"resolution {case.resolution} is not a multiple of {case.model}'s patches of {patch} px")
    return model


@cache
def stack_of(case: Case) -> Stack | None:
    """The sizes of the case's model for the formulas, None if it is not made of plain blocks alone."""
    return Stack.of(backbone(case), case.batch_size, case.element)


def unavailable(method: str, case: Case) -> str | None:
    """Why a method cannot run in a case, None if it can."""
    if method.endswith("-folded") and case.dropout:
        return "with dropout an adapter computes the separate way"
    if method.startswith("peft"):
        if find_spec("peft") is None:
            return "PEFT is not installed: pip install 'vitlorafa[peft]'"
        if 0 < len(set(LINEARS["qkv"]) & set(case.targets)) < 3:
            return "PEFT adapts a fused qkv as a whole: it needs all of q, k and v, or none"
    return None


def build(method: str, case: Case) -> Contestant:
    """A method's model and optimizer.

    Args:
        method: A name of `METHODS`.
        case: What to build.

    Raises:
        AdapterError: If the model or the adapter cannot be built.
    """
    model = METHODS[method](backbone(case), case).to(case.device).train()
    if method == "peft_lora_fa":
        from peft.optimizers import create_lorafa_optimizer

        # This is what freezes A.
        alpha = SCALE * case.rank
        return Contestant(model, create_lorafa_optimizer(model, r=case.rank, lora_alpha=alpha, lr=LEARNING_RATE))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Contestant(model, AdamW(trained, lr=LEARNING_RATE, foreach=True) if trained else None)


def counted(method: str, case: Case, stack: Stack | None) -> tuple[int | None, int | None]:
    """Operations of a step and bytes of kept activations by formula, None where there is none.

    Args:
        method: A name of `METHODS`.
        case: What is trained.
        stack: The model's sizes, None if it is not a plain one.
    """
    if stack is None:
        return None, None
    if method in ("floor", "full"):
        flops, saved = getattr(floors, f"{method}_flops")(stack), getattr(floors, f"{method}_saved")(stack)
        return flops, saved if stack.fused else None
    adapter = described(method, case)
    # Outside of our kernel dropout keeps masks, of more than one kind and precision.
    known = stack.fused and (method in OURS or not case.dropout)
    return floors.adapter_flops(stack, adapter), floors.adapter_saved(stack, adapter) if known else None


def described(method: str, case: Case) -> Adapter:
    """A method's adapter as the formulas take it."""
    if method.startswith("peft"):
        train = "BA" if method == "peft_lora" else "B"
        return Adapter(case.rank, case.targets, train, way="plain", peft=True)
    if method == "lora_plain":
        return Adapter(case.rank, case.targets, way="plain")
    train, compute = OURS[method]
    # With dropout the input's gradient takes two paths, as in plain torch.
    return Adapter(case.rank, case.targets, train, way="plain" if case.dropout else compute)


class PlainLoRA(nn.Module):
    """y = base(x) + s·B(A(x)) for each projection, A frozen: what one writes without a kernel.

    Args:
        base: The pretrained layer.
        case: Rank and dropout.
        adapted: Which of the equal parts of the output to adapt.
    """

    def __init__(self, base: nn.Linear, case: Case, adapted: list[bool]) -> None:
        super().__init__()
        width = base.out_features // len(adapted)
        self.base = base
        self.dropout = nn.Dropout(case.dropout)
        self.A, self.B = nn.ModuleList(), nn.ModuleList()
        self.adapted = adapted
        for _ in range(sum(adapted)):
            A = nn.Linear(base.in_features, case.rank, bias=False).requires_grad_(False)
            B = nn.Linear(case.rank, width, bias=False)
            nn.init.orthogonal_(A.weight)
            nn.init.zeros_(B.weight)
            self.A.append(A)
            self.B.append(B)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer: [..., d_in] -> [..., d_out]."""
        y = self.base(x)
        x = self.dropout(x)
        updates = (SCALE * B(A(x)) for A, B in zip(self.A, self.B, strict=True))
        if len(self.adapted) == 1:
            return y + next(updates)
        nothing = y.new_zeros(*y.shape[:-1], y.shape[-1] // len(self.adapted))
        return y + torch.cat([next(updates) if adapted else nothing for adapted in self.adapted], dim=-1)


def _floor(model: VisionTransformer, case: Case) -> nn.Module:
    model.requires_grad_(False)

    def require_grad(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].detach().requires_grad_(), *inputs[1:])

    model.blocks[0].register_forward_pre_hook(require_grad)
    return model


def _full(model: VisionTransformer, case: Case) -> nn.Module:
    return model


def _lora_plain(model: VisionTransformer, case: Case) -> nn.Module:
    model.requires_grad_(False)
    for name in _adapted_linears(case):
        for block in model.blocks:
            owner = block.attn if name in ("qkv", "proj") else block.mlp
            adapted = [target in case.targets for target in LINEARS[name]]
            setattr(owner, name, PlainLoRA(getattr(owner, name), case, adapted))
    return model


def _ours(train: str, compute: str) -> Callable[[VisionTransformer, Case], nn.Module]:
    def adapt(model: VisionTransformer, case: Case) -> nn.Module:
        options: dict[str, Any] = {"targets": case.targets, "dropout": case.dropout, "alpha": SCALE * case.rank}
        return inject(model, AdapterConfig(rank=case.rank, train=train, compute=compute, seed=0, **options))

    return adapt


def _peft(model: VisionTransformer, case: Case) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    # Whole names: PEFT takes endings, and "proj" would hit the patch embedding too.
    owners = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}
    names = [f"blocks.{i}.{owners[name]}.{name}" for i in range(len(model.blocks)) for name in _adapted_linears(case)]
    options = {"r": case.rank, "lora_alpha": SCALE * case.rank, "lora_dropout": case.dropout}
    return get_peft_model(model, LoraConfig(target_modules=names, **options))


def _adapted_linears(case: Case) -> list[str]:
    return [name for name, targets in LINEARS.items() if set(targets) & set(case.targets)]


# Name -> what makes a model of it. The first is the yardstick.
METHODS: dict[str, Callable[[VisionTransformer, Case], nn.Module]] = {
    "floor": _floor,
    "full": _full,
    "lora_plain": _lora_plain,
    **{name: _ours(*options) for name, options in OURS.items()},
    "peft_lora": _peft,
    "peft_lora_fa": _peft,
}
