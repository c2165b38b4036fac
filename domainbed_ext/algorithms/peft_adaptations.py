"""What PEFT's methods need beyond `peft.get_peft_model`: an optimizer, a penalty, a schedule, a start of their own."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from domainbed_ext.algorithms.peft_methods import EXTRA_FIELDS, OWN
from domainbed_ext.algorithms.strength import between
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.models.tensor_files import save_tensors
from domainbed_ext.system import strict_json
from vitlorafa import AdapterError, classifiers, copy_to_cpu, describe_model
from vitlorafa.peft_methods import Sizes, apply_peft, find_peft_method, peft_config, peft_layers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

_ADAPTER = "default"  # PEFT's name for the only adapter
_PREFIX = "base_model.model."

Losses = Callable[[int], Iterator[Tensor]]
"""Function that returns the losses of a number of minibatches."""


class Adaptation:
    """A backbone that PEFT has adapted in place.

    Args:
        backbone: Timm model.
        name: Name in `vitlorafa.peft_methods`.
        hparams: Hyperparameters of the run.

    Attributes:
        model: PEFT's model around the backbone, which shares its layers.
        replaced: Pretrained weights by layer, on the CPU, where PEFT has taken a part out of them.

    Raises:
        AdapterError: PEFT is missing or too old, or it refuses the method on these layers.
    """

    NESTED: str | None = None
    """Field of PEFT's config that holds the method's own fields."""
    NOT_FIELDS: frozenset[str] = frozenset()
    """The method's own hyperparameters that are no field of PEFT's config."""

    def __init__(self, backbone: nn.Module, name: str, hparams: Mapping[str, Any]) -> None:
        self.backbone, self.name, self.hparams = backbone, name, hparams
        self.layers = peft_layers(backbone, hparams["targets"])
        heads = [name for name, module in backbone.named_modules() if module in classifiers(backbone)]
        self.touched = (*self.layers, *heads)
        before = {name: backbone.get_parameter(f"{name}.weight").detach().clone() for name in self.layers}
        self.model: Any = apply_peft(
            backbone, name, self.sizes(), self.layers, **self._own_fields(), modules_to_save=heads
        )
        self.replaced = {
            name: before[name]
            for name, layer in self.adapted()
            if not torch.equal(before[name], layer.get_base_layer().weight)
        }

    def sizes(self, steps: int = Sizes.steps) -> Sizes:
        """What the user chose of the sizes that most methods have.

        Args:
            steps: Number of training steps.
        """
        rank = self.hparams.get("rank", Sizes.rank)
        alpha = self.hparams.get("alpha")
        return Sizes(rank, 2 * rank if alpha is None else alpha, self.hparams.get("adapter_dropout", 0.0), steps)

    @property
    def config(self) -> Any:
        """PEFT's config."""
        return self.model.peft_config[_ADAPTER]

    def adapted(self) -> Iterator[tuple[str, Any]]:
        """PEFT's layers by the names of those that they adapt."""
        modules = dict(self.backbone.named_modules())
        return ((name, modules[name]) for name in self.layers)

    def untouched(self, module: str) -> bool:
        """Returns whether a module of the backbone is neither adapted nor a classifier, so that PEFT does not save it.

        Args:
            module: Name.
        """
        return not any(f"{module}.".startswith(f"{name}.") for name in self.touched)

    def make_optimizer(self, hparams: Mapping[str, Any]) -> Optimizer | None:
        """Makes PEFT's own optimizer of the method; None if it has none.

        Args:
            hparams: Hyperparameters of the run.
        """
        return None

    def penalty(self) -> Tensor | None:
        """Computes what the method adds to the loss; None for nothing."""
        return None

    def begin(self, steps: int, losses: Losses) -> None:
        """Is called before the first step of a run.

        Args:
            steps: Number of training steps.
            losses: Function that returns the losses of the run's first minibatches.
        """

    def after_step(self) -> None:
        """Is called after each step of the optimizer, while the gradients are still there."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what training changes besides parameters and buffers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""

    def pretrained(self, name: str, layer: Any) -> Tensor:
        """Returns the pretrained weight of an adapted layer.

        Args:
            name: Name of the layer.
            layer: PEFT's layer.
        """
        return self.replaced.get(name, layer.get_base_layer().weight)

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        """Lets adapted layers compute with weights between the pretrained ones and those that the method makes of them.

        PEFT's own scaling, which few of its methods have, is the same for those whose update is a sum; layers compute
        as PEFT's again at 1.

        Args:
            strength: Strength, from 0 to 1.
        """
        for name, layer in self.adapted():
            vars(layer).pop("forward", None)
            if strength < 1:
                weight, bias = weight_and_bias(layer)
                base = layer.get_base_layer()
                changed = {"weight": between(self.pretrained(name, layer), weight, strength)}
                if base.bias is not None:
                    changed["bias"] = between(base.bias, bias, strength)
                layer.forward = partial(_compute, base, changed)

    def saved(self) -> tuple[dict[str, Tensor], Any]:
        """Returns tensors by their names in PEFT's files, and the config to save beside them."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model), self.config

    def restored(self, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the tensors of a file in the shapes of this model.

        Args:
            tensors: What `saved` returned.
            config: Config that was saved beside them.
        """
        return tensors

    def save(self, folder: Path) -> None:
        """Saves adapter and head in PEFT's format.

        Args:
            folder: Folder to write into; created if it is missing.
        """
        tensors, config = self.saved()
        description = describe_model(self.backbone)
        config = copy.copy(config)
        config.inference_mode, config.base_model_name_or_path = True, description["architecture"]
        for field, value in vars(config).items():
            if isinstance(value, set):
                setattr(config, field, sorted(value))  # PEFT would write a set in any order
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(copy_to_cpu(tensors), folder / TENSORS, {"format": "pt", "model": strict_json.dumps(description)})
        config.save_pretrained(str(folder))

    def load(self, folder: Path) -> None:
        """Loads what `save` wrote.

        Args:
            folder: Folder of the files.

        Raises:
            BenchmarkError: The files do not fit.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = self.restored(load_file(folder / TENSORS), config)
        here = get_peft_model_state_dict(self.model)
        misfits = [name for name in {**here, **tensors} if _shape(here, name) != _shape(tensors, name)]
        if misfits:
            raise BenchmarkError(
                f"{folder / TENSORS} does not fit this Peft ({misfits[0]}, {len(misfits)} in all): give the run's own "
                "backbone and number of classes"
            )
        set_peft_model_state_dict(self.model, tensors)

    def _own_fields(self) -> dict[str, Any]:
        """The fields of PEFT's config that are not shared between methods; None is PEFT's default, or derived."""
        names = [name for name in OWN[self.name] if name not in self.NOT_FIELDS]
        own = {name: self.hparams[name] for name in names if self.hparams[name] is not None}
        return {**({self.NESTED: own} if self.NESTED else own), **self._extra_fields()}

    def _extra_fields(self) -> dict[str, Any]:
        """The fields in `peft_config`, each of which PEFT's config has."""
        extra: dict[str, Any] = self.hparams[EXTRA_FIELDS]
        known = [field.name for field in fields(type(peft_config(self.name, self.sizes(), self.layers)))]
        for field in extra:
            if field in ("target_modules", "modules_to_save", "peft_type"):
                raise BenchmarkError(f"{field} in {EXTRA_FIELDS}: targets says which layers are adapted: leave it out")
            if field not in known:
                raise unknown(f"field of PEFT's {find_peft_method(self.name).config} in {EXTRA_FIELDS}:", field, known)
        return extra


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None


class LoRAPlus(Adaptation):
    """LoRA whose B learns at a multiple of A's rate."""

    NOT_FIELDS = frozenset({"loraplus_lr_ratio"})

    def make_optimizer(self, hparams: Mapping[str, Any]) -> Optimizer:
        """PEFT's optimizer: AdamW with a group for A and the head, and one for B."""
        from peft.optimizers import create_loraplus_optimizer

        optimizer: Optimizer = create_loraplus_optimizer(
            self.model,
            torch.optim.AdamW,
            lr=hparams["lr"],
            loraplus_lr_ratio=hparams["loraplus_lr_ratio"],
            loraplus_weight_decay=hparams["weight_decay"],
            weight_decay=hparams["weight_decay"],
            fused=True,
        )
        return optimizer


class LoRAFA(Adaptation):
    """LoRA with frozen A, whose B is updated by PEFT's optimizer."""

    def __init__(self, backbone: nn.Module, name: str, hparams: Mapping[str, Any]) -> None:
        super().__init__(backbone, name, hparams)
        for _, layer in self.adapted():
            layer.lora_A.requires_grad_(False)

    def make_optimizer(self, hparams: Mapping[str, Any]) -> Optimizer:
        """PEFT's AdamW, which brings B's update as close as possible to that of full fine-tuning."""
        from peft.optimizers import create_lorafa_optimizer

        sizes = self.sizes()
        optimizer: Any = create_lorafa_optimizer(
            self.model, sizes.rank, sizes.alpha, lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )

        def add(group: dict[str, Any]) -> None:  # of an objective's parameters, without the names that PEFT reads
            names = [f"objective.{number}" for number, _ in enumerate(group["params"])]
            type(optimizer).add_param_group(
                optimizer, {**group, "names": names, "scaling_factors": [None] * len(names)}
            )

        optimizer.add_param_group = add
        optimizer.register_load_state_dict_post_hook(_move_named_states)
        made: Optimizer = optimizer
        return made


def _move_named_states(optimizer: Optimizer) -> None:
    """Moves states to the parameters' device that PEFT keeps by name, which torch does for states by parameter."""
    device = optimizer.param_groups[0]["params"][0].device
    for key, state in optimizer.state.items():
        if isinstance(key, str):
            state.update({name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)})


class Residual(Adaptation):
    """LoRA that starts at a part of W, which is taken out of the frozen weights.

    What is saved is an ordinary LoRA of twice the rank, B·A - B₀·A₀, which needs no other weights than the pretrained
    ones: PEFT's own conversion of such adapters.
    """

    def __init__(self, backbone: nn.Module, name: str, hparams: Mapping[str, Any]) -> None:
        super().__init__(backbone, name, hparams)
        self.start = self._factors()

    def state_dict(self) -> dict[str, Any]:
        """The factors at the start."""
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the same part out of the frozen weights."""
        self._restart({name: (A, B) for name, (A, B) in state["start"].items()})

    def saved(self) -> tuple[dict[str, Tensor], Any]:
        """An ordinary LoRA of twice the rank."""
        tensors, config = super().saved()
        for name, (A, B) in self.start.items():
            key_A, key_B = _keys(name)
            tensors[key_A] = torch.cat([tensors[key_A], A.to(tensors[key_A])])
            tensors[key_B] = torch.cat([tensors[key_B], -B.to(tensors[key_B])], dim=1)
        scaled = 2 if not config.use_rslora else 2**0.5
        return tensors, replace(
            copy.copy(config),
            r=2 * config.r,
            lora_alpha=scaled * config.lora_alpha,
            init_lora_weights=True,
            **({"lora_ga_config": None} if self.NESTED else {}),
        )

    def restored(self, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The first half of the ranks; the other half is the start."""
        start, tensors = {}, dict(tensors)
        for name, layer in self.adapted():
            key_A, key_B = _keys(name)
            if tensors[key_A].shape[0] == 2 * layer.r[_ADAPTER]:
                tensors[key_A], A = tensors[key_A].chunk(2)
                tensors[key_B], B = tensors[key_B].chunk(2, dim=1)
                start[name] = A, -B
        if len(start) == len(self.layers):
            self._restart(start)
        return tensors

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (layer.lora_A[_ADAPTER].weight.detach().clone(), layer.lora_B[_ADAPTER].weight.detach().clone())
            for name, layer in self.adapted()
        }

    @torch.no_grad()
    def _restart(self, start: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Changes the frozen weights to those of another start; equal ones stay as they are, to the last bit."""
        for name, layer in self.adapted():
            weight = layer.get_base_layer().weight
            A, B = (factor.to(weight.device) for factor in start[name])
            if name in self.start:
                A_here, B_here = (factor.to(weight.device) for factor in self.start[name])
                if torch.equal(A, A_here) and torch.equal(B, B_here):
                    continue
                weight.add_(layer.scaling[_ADAPTER] * (B_here @ A_here))
            weight.sub_(layer.scaling[_ADAPTER] * (B @ A))
            self.start[name] = A, B


def _keys(layer: str) -> tuple[str, str]:
    return f"{_PREFIX}{layer}.lora_A.weight", f"{_PREFIX}{layer}.lora_B.weight"


class LoRAGA(Residual):
    """LoRA that starts at singular vectors of the gradient of the run's first minibatches."""

    NESTED = "lora_ga_config"
    NOT_FIELDS = frozenset({"gradient_steps"})

    def __init__(self, backbone: nn.Module, name: str, hparams: Mapping[str, Any]) -> None:
        super().__init__(backbone, name, hparams)
        for field, kind in get_type_hints(type(self.config.lora_ga_config)).items():  # PEFT does not check them
            if field in hparams and get_origin(kind) is Literal and hparams[field] not in get_args(kind):
                raise unknown(field, hparams[field], get_args(kind))
        self.start = {}  # until the run begins, it is LoRA

    def begin(self, steps: int, losses: Losses) -> None:
        """Estimates the gradients of W, and lets PEFT start from them."""
        from peft.tuners.lora.loraga import estimate_gradients

        def backward() -> None:
            for loss in losses(self.hparams["gradient_steps"]):
                loss.backward()

        config = copy.copy(self.config)
        config.target_modules = {f"{name}.base_layer" for name in self.layers}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # images need no gradient
            estimate_gradients(self.backbone, config, backward)
        for _, layer in self.adapted():
            layer.lora_ga_init(_ADAPTER, config.lora_ga_config)
        self.start = self._factors()

    def pretrained(self, name: str, layer: Any) -> Tensor:
        """Returns the frozen weight with the part that was taken out when the run began, which rounds."""
        weight = super().pretrained(name, layer)
        if name not in self.start:
            return weight
        A, B = (factor.to(weight.device) for factor in self.start[name])
        return weight + layer.scaling[_ADAPTER] * (B @ A)


class AdaLoRA(Adaptation):
    """AdaLoRA: a penalty on factors that are not orthogonal, and ranks that are pruned by their importance."""

    def __init__(self, backbone: nn.Module, name: str, hparams: Mapping[str, Any]) -> None:
        super().__init__(backbone, name, hparams)
        if self.config.init_r <= self.config.target_r:
            raise AdapterError(
                f"init_r {self.config.init_r} has to be above the rank {self.config.target_r} that it is pruned to"
            )
        self.step = 0

    def begin(self, steps: int, losses: Losses) -> None:
        """Sets the schedule to the run's number of steps."""
        config = peft_config(self.name, self.sizes(steps), self.layers, **self._own_fields())
        for field in ("total_step", "tinit", "tfinal", "deltaT"):
            setattr(self.config, field, getattr(config, field))

    def penalty(self) -> Tensor:
        """What PEFT adds to a loss: it looks for one in the outputs of a model, so it gets outputs with a loss of 0."""
        tuner = self.model.base_model
        outputs = SimpleNamespace(loss=torch.zeros((), device=next(self.backbone.parameters()).device))
        inner = SimpleNamespace(forward=lambda: outputs, named_parameters=tuner.model.named_parameters)
        type(tuner).forward(
            SimpleNamespace(
                model=inner, peft_config=tuner.peft_config, trainable_adapter_name=tuner.trainable_adapter_name
            )
        )
        return outputs.loss

    def after_step(self) -> None:
        """Updates importances and prunes."""
        self.model.base_model.update_and_allocate(self.step)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Schedule, importances and the pattern of ranks."""
        allocator, config = self.model.base_model.rankallocator, self.config
        return {
            "step": self.step,
            "config": {name: getattr(config, name) for name in _SCHEDULE},
            "importances": {name: dict(getattr(allocator, name)) for name in _IMPORTANCES},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.step = state["step"]
        for name, value in state["config"].items():
            setattr(self.config, name, value)
        device = next(self.backbone.parameters()).device
        for name, scores in state["importances"].items():
            setattr(self.model.base_model.rankallocator, name, {key: score.to(device) for key, score in scores.items()})

    def saved(self) -> tuple[dict[str, Tensor], Any]:
        """The ranks that are not pruned, and their pattern."""
        from peft import get_peft_model_state_dict

        config, before = self.config, self.config.rank_pattern
        kept = {name: (layer.lora_E[_ADAPTER] != 0).flatten().tolist() for name, layer in self.adapted()}
        pruned = not all(map(all, kept.values()))
        try:
            config.rank_pattern = {f"{name}.lora_E": pattern for name, pattern in kept.items()} if pruned else None
            # With tensors that are given, PEFT does not take layers whose ranks are all pruned for broken ones.
            return get_peft_model_state_dict(self.model, self.model.state_dict()), copy.copy(config)
        finally:
            config.rank_pattern = before

    def restored(self, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """All ranks; those that were pruned are zero."""
        tensors = dict(tensors)
        for name, pattern in (config["rank_pattern"] or {}).items():
            layer, kept = name.removesuffix(".lora_E"), torch.tensor(pattern, dtype=torch.bool)
            for factor in ("lora_A", "lora_E", "lora_B"):
                key = f"{_PREFIX}{layer}.{factor}"
                rows = tensors[key].T if factor == "lora_B" else tensors[key]
                full = rows.new_zeros(len(pattern), rows.shape[1])
                full[kept] = rows
                tensors[key] = full.T.contiguous() if factor == "lora_B" else full
        return tensors


_SCHEDULE = ("total_step", "tinit", "tfinal", "deltaT", "rank_pattern")
_IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class VeLoRA(Adaptation):
    """VeLoRA, whose settings are in a config of their own."""

    NESTED = "velora_config"


def _compute(base: nn.Module, changed: dict[str, Tensor], x: Tensor) -> Tensor:
    """[..., d_in] → [..., d_out] by a linear layer, with other weights."""
    y: Tensor = functional_call(base, changed, x)
    return y


def weight_and_bias(layer: Any) -> tuple[Tensor, Tensor]:
    """The weight [d_out, d_in] and the bias [d_out] that an adapted layer computes with, whatever the method.

    They are what it makes of unit vectors and of zeros.
    In evaluation mode, which has no dropout, and exact gradients where a method approximates them in training.
    """
    is_training, device = layer.training, next(layer.parameters()).device
    layer.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            outputs: Tensor = layer(torch.eye(layer.in_features + 1, layer.in_features, device=device))
    finally:
        layer.train(is_training)
    bias = outputs[-1]  # the last row of the input is zero
    return (outputs[:-1] - bias).mT, bias


ADAPTATIONS: dict[str, type[Adaptation]] = {
    "adalora": AdaLoRA,
    "lora_fa": LoRAFA,
    "lora_ga": LoRAGA,
    "lora_plus": LoRAPlus,
    "olora": Residual,
    "pissa": Residual,
    "velora": VeLoRA,
}
"""Classes of the methods that need more than their config."""
