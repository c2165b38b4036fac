"""The methods that the benchmark measures: each prepares a model with random weights for training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from vitlorafa import AdapterConfig, cast_frozen, correct_gradients, inject, quantise
from vitlorafa.bench import formulas
from vitlorafa.bench.case import LEARNING_RATE, SCALE, Case, build_backbone, count_blocks
from vitlorafa.bench.formulas import LINEARS, Adapter, Stack
from vitlorafa.bench.plain_lora import PlainLoRA
from vitlorafa.errors import unknown
from vitlorafa.peft_methods import INSTALL, PEFT_METHODS, Sizes, apply_peft
from vitlorafa.quantised_linear import FORMATS

LAST_BLOCKS = 2  # blocks that "last blocks" trains
_LR_RATIO = 16  # learning rate of B over that of A in LoRA+


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
        group: Kind of the method: "reference", "part of the model", "base in fewer bits", or the adapter's package:
            "vitlorafa", "plain PyTorch" or "PEFT".
        train: Factors that train ("B", "A" or "BA") of a method whose cost has a formula; otherwise empty.
        way: How the adapter computes: "folded", "separate" or "plain" (see `vitlorafa.bench.formulas.Adapter`); empty
            without a formula.
        peft: Name in `PEFT_METHODS`; empty for methods that are not PEFT's.
        optimizer: What makes the optimizer of the trained parameters.
        targets: Projections that it adapts whatever the case's are; None for those of the case.
        needs: Module that has to be there, the name of its package, and the line that installs it.
    """

    label: str
    colour: str
    prepare: Callable[[VisionTransformer, Case], nn.Module]
    group: str
    train: str = ""
    way: str = ""
    peft: str = ""
    optimizer: "Callable[[nn.Module, Case], Optimizer | None] | None" = None
    targets: tuple[str, ...] | None = None
    needs: tuple[str, str, str] | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether something is added to frozen layers."""
        return self.group not in ("reference", "part of the model")

    @property
    def is_ours(self) -> bool:
        """Whether the adapter is one of `vitlorafa`."""
        return self.way in ("folded", "separate")


def find_method(name: str) -> str:
    """The name in `METHODS` for what a user typed: that name, a label, or a name of earlier versions.

    Raises:
        AdapterError: If there is no such method.
    """
    plain = _plain(name)
    method = _ALIASES.get(plain, plain)
    if method not in METHODS:
        raise unknown("method", name, [*METHODS, *(short for short in PEFT_METHODS if short not in METHODS)])
    return method


def why_unavailable(method: str, case: Case) -> str | None:
    """The reason why a method cannot run in a case; None if it can.

    Args:
        method: Name in `METHODS`.
        case: Case to run.
    """
    described = METHODS[method]
    if described.way == "folded" and case.dropout:
        return "with dropout an adapter computes the separate way"
    if described.needs and find_spec(described.needs[0]) is None:
        return "{1} is not installed: {2}".format(*described.needs)
    if described.peft and 0 < len(set(LINEARS["qkv"]) & set(case.targets)) < 3:
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
    described, backbone, case = METHODS[method], build_backbone(case), own_case(method, case)
    head = backbone.get_classifier()
    model = described.prepare(backbone, case).to(case.device).train()
    if case.head and method != "lower_bound":
        head.requires_grad_(True)
    return Setup(model, (described.optimizer or _make_adamw)(model, case))


def own_case(method: str, case: Case) -> Case:
    """The case with the targets of a method that has targets of its own.

    Args:
        method: Name in `METHODS`.
        case: Case of the comparison.
    """
    targets = METHODS[method].targets
    return case if targets is None else replace(case, targets=targets)


def count(method: str, case: Case, stack: Stack | None) -> tuple[int | None, int | None]:
    """Operations of a step, and bytes of kept activations, by formula; None where there is no formula.

    Args:
        method: Name in `METHODS`.
        case: Case to count for.
        stack: Sizes of the model; None if it does not consist of plain blocks only.
    """
    if stack is None or case.blocks is not None:
        return None, None
    if method in _FORMULAS:
        count_flops, count_saved = _FORMULAS[method]
        return count_flops and count_flops(stack), count_saved(stack) if stack.fused else None
    if not METHODS[method].train:
        return None, None
    adapter = adapter_of(method, case)
    flops, saved = formulas.adapter_flops(stack, adapter), formulas.adapter_saved(stack, adapter)
    if case.head:
        flops, saved = flops + formulas.head_flops(stack), saved + formulas.head_saved(stack)
    # Outside `vitlorafa`, dropout keeps masks of several kinds and precisions.
    has_formula = stack.fused and (METHODS[method].is_ours or not case.dropout)
    return flops, saved if has_formula else None


def adapter_of(method: str, case: Case) -> Adapter:
    """The adapter of a method, as the formulas need it.

    Args:
        method: Name in `METHODS` of a method with an adapter.
        case: Case with rank, targets and dropout.
    """
    described, case = METHODS[method], own_case(method, case)
    # With dropout, the gradient of the input has two paths, as in plain PyTorch.
    way = "plain" if case.dropout else described.way
    return Adapter(case.rank, case.targets, described.train, way, bool(described.peft))


def adapted_linears(case: Case) -> list[str]:
    """The full names of the linear layers that an adapter changes."""
    owners = {"qkv": "attn", "proj": "attn", "fc1": "mlp", "fc2": "mlp"}
    blocks = range(count_blocks(case)) if case.blocks is None else case.blocks
    return [f"blocks.{i}.{owners[name]}.{name}" for i in blocks for name in _linears(case)]


def _make_adamw(model: nn.Module, case: Case) -> Optimizer | None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return AdamW(trained, lr=LEARNING_RATE, foreach=True) if trained else None


def _make_corrected(model: nn.Module, case: Case) -> Optimizer | None:
    optimizer = _make_adamw(model, case)
    if optimizer is not None:
        correct_gradients(optimizer, model)
    return optimizer


def _make_lora_fa(model: nn.Module, case: Case) -> Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    # This is what freezes A.
    optimizer: Optimizer = create_lorafa_optimizer(model, r=case.rank, lora_alpha=SCALE * case.rank, lr=LEARNING_RATE)
    return optimizer


def _make_lora_plus(model: nn.Module, case: Case) -> Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    optimizer: Optimizer = create_loraplus_optimizer(
        model, AdamW, lr=LEARNING_RATE, loraplus_lr_ratio=_LR_RATIO, foreach=True
    )
    return optimizer


def _make_adalora(model: Any, case: Case) -> Optimizer | None:
    """AdamW, followed by AdaLoRA's update of its importance scores, which is part of each of its steps."""
    optimizer = _make_adamw(model, case)
    if optimizer is not None:
        optimizer.register_step_post_hook(lambda *_: model.base_model.update_and_allocate(1))
    return optimizer


def _freeze(model: VisionTransformer, case: Case) -> nn.Module:
    model.requires_grad_(False)

    def require_grad(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].detach().requires_grad_(), *inputs[1:])

    model.blocks[0].register_forward_pre_hook(require_grad)
    return model


def _keep(model: VisionTransformer, case: Case) -> nn.Module:
    return model


def _train_part(
    model: VisionTransformer, case: Case, *, part: Callable[[VisionTransformer], Iterable[nn.Parameter]]
) -> nn.Module:
    model.requires_grad_(False)
    for parameter in [*part(model), *model.get_classifier().parameters()]:
        parameter.requires_grad_(True)
    return model


def _biases(model: VisionTransformer) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]


def _norms(model: VisionTransformer) -> list[nn.Parameter]:
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    return [parameter for norm in norms for parameter in norm.parameters()]


def _last_blocks(model: VisionTransformer) -> list[nn.Parameter]:
    return [*model.blocks[-LAST_BLOCKS:].parameters(), *model.norm.parameters()]


def _add_plain_lora(model: VisionTransformer, case: Case) -> nn.Module:
    model.requires_grad_(False)
    for name in adapted_linears(case):
        owner, _, attribute = name.rpartition(".")
        adapted = [target in case.targets for target in LINEARS[attribute]]
        setattr(model.get_submodule(owner), attribute, PlainLoRA(model.get_submodule(name), case, adapted))
    return model


def _inject(model: VisionTransformer, case: Case, *, train: str, compute: str, **more: Any) -> nn.Module:
    options: dict[str, Any] = {"targets": case.targets, "dropout": case.dropout, "alpha": SCALE * case.rank, **more}
    if case.blocks is not None:
        options["blocks"] = case.blocks
    return inject(model, AdapterConfig(rank=case.rank, train=train, compute=compute, seed=0, **options))


def _add_peft(model: VisionTransformer, case: Case, *, name: str) -> nn.Module:
    return apply_peft(model, name, Sizes(case.rank, SCALE * case.rank, case.dropout), adapted_linears(case))


def _linears(case: Case) -> list[str]:
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
            methods[name + suffix] = Method(label + addition, colour, prepare, "vitlorafa", train, way)
    return methods


def _variants() -> dict[str, Method]:
    """Methods that compute as LoRA-FA or LoRA, with other gradients, another start or other targets."""
    lora_fa, lora = _own_methods()["lora_fa"], _own_methods()["lora"]
    corrected: dict[str, Any] = {"compute": "folded", "gradient_correction": True}
    return {
        "lora_fa_corrected": replace(
            lora_fa,
            label="LoRA-FA (gradient correction)",
            prepare=partial(_inject, train="B", **corrected),
            optimizer=_make_corrected,
        ),
        "lora_pro": replace(
            lora, label="LoRA-Pro", prepare=partial(_inject, train="BA", **corrected), optimizer=_make_corrected
        ),
        "pissa": replace(
            lora, label="PiSSA", prepare=partial(_inject, train="BA", compute="folded", init_A="pissa", init_B="pissa")
        ),
        "lora_qv": replace(lora, label="LoRA (q, v)", targets=("q", "v")),
    }


def _methods_of_smaller_bases() -> dict[str, Method]:
    """Adapters on linear layers in 16, 8 or 4 bits; in `_own_methods` they are in float32."""
    own = _own_methods()
    return {
        f"{name}_{format}": replace(
            own[name],
            label=f"{own[name].label} ({format} base)",
            prepare=partial(_shrink_base, prepare=own[name].prepare, format=format),
            group="base in fewer bits",
            needs=None if format == "bf16" else ("bitsandbytes", "bitsandbytes", "pip install 'vitlorafa[quant]'"),
        )
        for name, format in product(("lora_fa", "lora"), ("bf16", *FORMATS))
    }


def _shrink_base(
    model: VisionTransformer, case: Case, *, prepare: Callable[[VisionTransformer, Case], nn.Module], format: str
) -> nn.Module:
    model.requires_grad_(False)
    if format == "bf16":
        cast_frozen(model.blocks)  # the layers that `quantise` quantises
    else:
        quantise(model, format)
    return prepare(model, case)


_PEFT_COLOUR = "#E69F00"
# What trains in methods of PEFT whose cost is that of LoRA, LoRA-FA or LoRA-FB in plain PyTorch.
_PEFT_FACTORS = {
    **dict.fromkeys(("lora", "rslora", "lora_plus", "lora_ga", "pissa", "olora"), "BA"),
    "lora_fa": "B",
    "mica": "A",
}
_PEFT_OPTIMIZERS = {"lora_fa": _make_lora_fa, "lora_plus": _make_lora_plus, "adalora": _make_adalora}


def _peft_methods() -> dict[str, Method]:
    methods = {}
    for name, declared in PEFT_METHODS.items():
        factors = _PEFT_FACTORS.get(name, "")
        methods[f"peft_{name}"] = Method(
            label=declared.label,
            colour="#56B4E9" if name == "lora" else _PEFT_COLOUR,
            prepare=partial(_add_peft, name=name),
            group="PEFT",
            train=factors,
            way="plain" if factors else "",
            peft=name,
            optimizer=_PEFT_OPTIMIZERS.get(name),
            needs=("peft", "PEFT", INSTALL),
        )
    return methods


def _parts() -> dict[str, Method]:
    parts: dict[str, tuple[str, Callable[[VisionTransformer], Iterable[nn.Parameter]]]] = {
        "linear_probe": ("linear probe", lambda model: ()),
        "bitfit": ("BitFit", _biases),
        "norm_tuning": ("norm tuning", _norms),
        "last_blocks": (f"last {LAST_BLOCKS} blocks", _last_blocks),
    }
    return {
        name: Method(label, "#999933", partial(_train_part, part=part), "part of the model")
        for name, (label, part) in parts.items()
    }


# Okabe and Ito's palette, which colour-blind readers can tell apart. Methods that `domainbed_ext` plots too have the
# same colours there.
METHODS: dict[str, Method] = {
    "lower_bound": Method("lower bound", "#7A7A7A", _freeze, "reference"),
    "full": Method("full fine-tuning", "#CC79A7", _keep, "reference"),
    **_parts(),
    "lora_fa_plain": Method("LoRA-FA (plain PyTorch)", "#8C6D31", _add_plain_lora, "plain PyTorch", "B", "plain"),
    **_own_methods(),
    **_variants(),
    **_methods_of_smaller_bases(),
    **_peft_methods(),
}
# The methods that `step` and `memory` compare by default; each has a colour and a marker of its own.
CORE = (
    "lower_bound",
    "full",
    "lora_fa_plain",
    *_own_methods(),
    "peft_lora",
    "peft_lora_fa",
)
# Name -> operations of a step and kept bytes, of methods without an adapter.
_FORMULAS: dict[str, tuple[Callable[[Stack], int] | None, Callable[[Stack], int]]] = {
    "lower_bound": (formulas.lower_bound_flops, formulas.lower_bound_saved),
    "full": (formulas.full_flops, formulas.full_saved),
    "linear_probe": (formulas.probe_flops, formulas.probe_saved),
    "bitfit": (None, formulas.bias_saved),
    "norm_tuning": (None, formulas.norm_tuning_saved),
    "last_blocks": (None, partial(formulas.last_blocks_saved, n=LAST_BLOCKS)),
}


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


_ALIASES = {
    **{name: f"peft_{name}" for name in PEFT_METHODS if name not in METHODS},
    **{_plain(method.label): name for name, method in METHODS.items()},
    # Names of earlier versions, which committed commands and tables use.
    "floor": "lower_bound",
    "lora_plain": "lora_fa_plain",
    **{f"{method.train.lower()}_{method.way}": name for name, method in _own_methods().items()},
}
