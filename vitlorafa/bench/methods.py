"""The methods that the benchmark compares: each prepares a model with random weights for training."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vitlorafa import AdapterConfig, AdapterError, inject
from vitlorafa.bench import formulas
from vitlorafa.bench.formulas import LINEARS, Adapter, Stack
from vitlorafa.config import TARGETS
from vitlorafa.errors import unknown

CLASSES = 10
SCALE = 2  # alpha / rank of every adapter
LEARNING_RATE = 1e-3
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # name -> autocast's dtype


@dataclass(frozen=True)
class Case:
    """What is the same for all methods of a comparison.

    Attributes:
        model: Name of the timm model.
        batch_size: Number of images.
        resolution: Height and width of an image in pixels.
        precision: Name in `PRECISIONS`.
        rank: Rank of every adapter.
        targets: Adapted projections.
        dropout: Dropout probability on the adapter's input.
        device: "cpu" or "cuda".
        depth: Number of blocks; if None, the model's own.
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
        """Everything but the rank, as text."""
        targets = "all targets" if self.targets == TARGETS else ", ".join(self.targets)
        depth = f", {self.depth} blocks" if self.depth else ""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        images = f"batch {self.batch_size} at {self.resolution} px"
        return f"{self.model}{depth}, {images}, {self.precision}, {targets}{dropout}"

    @property
    def element(self) -> int:
        """Bytes of an element in the precision of the matmuls."""
        return 4 if PRECISIONS[self.precision] is None else 2

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return asdict(self) | {"targets": list(self.targets)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Case":
        """The case that `to_dict` wrote."""
        return cls(**values | {"targets": tuple(values["targets"])})


@dataclass
class Setup:
    """A model ready to train, on its device.

    Attributes:
        model: Model in training mode.
        optimizer: Optimizer of the trained parameters; None if nothing trains.
    """

    model: nn.Module
    optimizer: Optimizer | None

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    Attributes:
        label: Name in tables and plots.
        colour: Colour in all plots.
        prepare: Function that adapts a new model for a case.
        train: Factors that train ("B", "A" or "BA"); empty without an adapter.
        way: How the adapter computes: "folded", "separate" or "plain" (see `vitlorafa.bench.formulas.Adapter`).
        peft: Whether the adapter is PEFT's.
    """

    label: str
    colour: str
    prepare: Callable[[VisionTransformer, Case], nn.Module]
    train: str = ""
    way: str = ""
    peft: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether the adapter is one of `vitlorafa`."""
        return self.way in ("folded", "separate")


def build_backbone(case: Case) -> VisionTransformer:
    """The case's model on the CPU, with the same random weights in every call.

    Raises:
        AdapterError: If timm does not have the model or cannot build it with these sizes, or if it is not a plain
            `VisionTransformer`.
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
        words = ", ".join(f"{name}={value}" for name, value in options.items())
        raise AdapterError(f"timm cannot build {case.model} with {words}: {error}") from None
    if not isinstance(model, VisionTransformer):
        raise AdapterError(f"{case.model} is a {type(model).__name__}: the benchmark needs timm's VisionTransformer")
    patch = max(model.patch_embed.patch_size)
    if case.resolution % patch:
        raise AdapterError(f"resolution {case.resolution} is not a multiple of {case.model}'s patches of {patch} px")
    return model


@cache
def stack_of(case: Case) -> Stack | None:
    """The sizes of the case's model for the formulas; None if it does not consist of plain blocks only."""
    return Stack.of(build_backbone(case), case.batch_size, case.element)


def find_method(name: str) -> str:
    """The name in `METHODS` for what a user typed: that name, a label, or a name of earlier versions.

    Raises:
        AdapterError: If there is no such method.
    """
    plain = name.lower().replace("-", "_").replace(" ", "_")
    method = _ALIASES.get(plain, plain)
    if method not in METHODS:
        raise unknown("method", name, METHODS)
    return method


def why_unavailable(method: str, case: Case) -> str | None:
    """The reason why a method cannot run in a case; None if it can.

    Args:
        method: Name in `METHODS`.
        case: Case to run.
    """
    if METHODS[method].way == "folded" and case.dropout:
        return "with dropout an adapter computes the separate way"
    if METHODS[method].peft:
        if find_spec("peft") is None:
            return "PEFT is not installed: pip install 'vitlorafa[peft]'"
        if 0 < len(set(LINEARS["qkv"]) & set(case.targets)) < 3:
            return "PEFT adapts a fused qkv as a whole: give it all of q, k and v, or none"
    return None


def build(method: str, case: Case) -> Setup:
    """The model and optimizer of a method.

    Args:
        method: Name in `METHODS`.
        case: Case to build for.

    Raises:
        AdapterError: If the model or the adapter cannot be built.
    """
    model = METHODS[method].prepare(build_backbone(case), case).to(case.device).train()
    if method == "peft_lora_fa":
        from peft.optimizers import create_lorafa_optimizer

        # This is what freezes A.
        alpha = SCALE * case.rank
        return Setup(model, create_lorafa_optimizer(model, r=case.rank, lora_alpha=alpha, lr=LEARNING_RATE))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Setup(model, AdamW(trained, lr=LEARNING_RATE, foreach=True) if trained else None)


def count(method: str, case: Case, stack: Stack | None) -> tuple[int | None, int | None]:
    """Operations of a step, and bytes of kept activations, by formula; None where there is no formula.

    Args:
        method: Name in `METHODS`.
        case: Case to count for.
        stack: Sizes of the model; None if it does not consist of plain blocks only.
    """
    if stack is None:
        return None, None
    if method == "lower_bound":
        flops, saved = formulas.lower_bound_flops(stack), formulas.lower_bound_saved(stack)
        return flops, saved if stack.fused else None
    if method == "full":
        return formulas.full_flops(stack), formulas.full_saved(stack) if stack.fused else None
    adapter = adapter_of(method, case)
    # Outside `vitlorafa`, dropout keeps masks of several kinds and precisions.
    has_formula = stack.fused and (METHODS[method].is_ours or not case.dropout)
    return formulas.adapter_flops(stack, adapter), formulas.adapter_saved(stack, adapter) if has_formula else None


def adapter_of(method: str, case: Case) -> Adapter:
    """The adapter of a method, as the formulas need it.

    Args:
        method: Name in `METHODS` of a method with an adapter.
        case: Case with rank, targets and dropout.
    """
    described = METHODS[method]
    # With dropout, the gradient of the input has two paths, as in plain PyTorch.
    way = "plain" if case.dropout else described.way
    return Adapter(case.rank, case.targets, described.train, way, described.peft)


class PlainLoRA(nn.Module):
    """y = base(x) + s·B(A(x)) for each projection, with A frozen: what people write without a kernel.

    Args:
        base: Pretrained layer.
        case: Case with rank and dropout.
        adapted: For each of the equal parts of the output, whether it is adapted.
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
        zeros = y.new_zeros(*y.shape[:-1], y.shape[-1] // len(self.adapted))
        return y + torch.cat([next(updates) if adapted else zeros for adapted in self.adapted], dim=-1)


def _freeze(model: VisionTransformer, case: Case) -> nn.Module:
    model.requires_grad_(False)

    def require_grad(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].detach().requires_grad_(), *inputs[1:])

    model.blocks[0].register_forward_pre_hook(require_grad)
    return model


def _keep(model: VisionTransformer, case: Case) -> nn.Module:
    return model


def _add_plain_lora(model: VisionTransformer, case: Case) -> nn.Module:
    model.requires_grad_(False)
    for name in _adapted_linears(case):
        for block in model.blocks:
            owner = block.attn if name in ("qkv", "proj") else block.mlp
            adapted = [target in case.targets for target in LINEARS[name]]
            setattr(owner, name, PlainLoRA(getattr(owner, name), case, adapted))
    return model


def _inject(model: VisionTransformer, case: Case, *, train: str, compute: str) -> nn.Module:
    options: dict[str, Any] = {"targets": case.targets, "dropout": case.dropout, "alpha": SCALE * case.rank}
    return inject(model, AdapterConfig(rank=case.rank, train=train, compute=compute, seed=0, **options))


def _add_peft_lora(model: VisionTransformer, case: Case) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    # Full names: PEFT matches the end of a name, so "proj" would include the patch embedding.
    owners = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}
    names = [f"blocks.{i}.{owners[name]}.{name}" for i in range(len(model.blocks)) for name in _adapted_linears(case)]
    options = {"r": case.rank, "lora_alpha": SCALE * case.rank, "lora_dropout": case.dropout}
    return get_peft_model(model, LoraConfig(target_modules=names, **options))


def _adapted_linears(case: Case) -> list[str]:
    return [name for name, targets in LINEARS.items() if set(targets) & set(case.targets)]


def _own_methods() -> dict[str, Method]:
    kinds = (
        ("lora_fa", "LoRA-FA", "#D55E00", "B"),
        ("lora_fb", "LoRA-FB", "#009E73", "A"),
        ("lora", "LoRA", "#0072B2", "BA"),
    )
    methods = {}
    for name, label, colour, train in kinds:
        for way, suffix, addition in (("folded", "", ""), ("separate", "_separate", " (separate)")):
            prepare = partial(_inject, train=train, compute=way)
            methods[name + suffix] = Method(label + addition, colour, prepare, train, way)
    return methods


# Okabe and Ito's palette, which colour-blind readers can tell apart. Methods that `domainbed_ext` plots too have the
# same colours there.
METHODS: dict[str, Method] = {
    "lower_bound": Method("lower bound", "#7A7A7A", _freeze),
    "full": Method("full fine-tuning", "#CC79A7", _keep),
    "lora_fa_plain": Method("LoRA-FA (plain PyTorch)", "#8C6D31", _add_plain_lora, "B", "plain"),
    **_own_methods(),
    "peft_lora": Method("PEFT LoRA", "#56B4E9", _add_peft_lora, "BA", "plain", peft=True),
    "peft_lora_fa": Method("PEFT LoRA-FA", "#E69F00", _add_peft_lora, "B", "plain", peft=True),
}
_ALIASES = {
    **{method.label.lower().replace("-", "_").replace(" ", "_"): name for name, method in METHODS.items()},
    # Names of earlier versions, which committed commands use.
    "floor": "lower_bound",
    "lora_plain": "lora_fa_plain",
    **{
        f"{method.train.lower()}_{method.way}": name
        for name, method in METHODS.items()
        if method.way in ("folded", "separate")
    },
}
