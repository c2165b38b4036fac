"""The methods of PEFT that adapt a timm vision transformer by their config alone, each declared once.

`domainbed_ext` trains them and `vitlorafa.bench` measures them. No method's code is repeated here: PEFT has it.
"""

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, unknown
from vitlorafa.noise import silence_bitsandbytes, without_extension_messages
from vitlorafa.sites import check_targets, linear_sites

INSTALL = "pip install 'vitlorafa[peft]'"

_REFUSALS = (
    *(ValueError, TypeError, ImportError, NotImplementedError, RuntimeError),
    *(AssertionError, AttributeError, LookupError, ArithmeticError),
)


@dataclass(frozen=True)
class Sizes:
    """What a user chooses for every method; a method without a rank, say, ignores it.

    Attributes:
        rank: Rank of the update.
        alpha: Numerator of the scaling.
        dropout: Dropout probability on the adapter's input.
        steps: Number of training steps, which AdaLoRA's schedule needs.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    steps: int = 1000


@dataclass(frozen=True)
class PeftMethod:
    """One method of PEFT.

    Attributes:
        label: Name in tables and plots.
        paper: URL of the paper.
        config: Name of PEFT's class.
        options: Function from what a user chooses, and the names of the adapted layers, to the class's arguments.
        optimizer: PEFT's optimizer that makes the method, "lora_fa" or "lora_plus"; empty for any optimizer.
    """

    label: str
    paper: str
    config: str = "LoraConfig"
    options: Callable[[Sizes, Sequence[str]], dict[str, Any]] = field(default=lambda sizes, layers: {})
    optimizer: str = ""


def peft_config(name: str, sizes: Sizes, layers: Sequence[str], **more: Any) -> Any:
    """The config of a method for `peft.get_peft_model`.

    Args:
        name: Name in `PEFT_METHODS`.
        sizes: What the user chose.
        layers: Full names of the linear layers to adapt. PEFT matches the end of a name, so "proj" would include the
            patch embedding.
        more: Further arguments of PEFT's class, which replace those declared here.

    Raises:
        AdapterError: If there is no such method, PEFT is missing or too old, or it refuses the arguments.
    """
    import_peft()
    method = find_peft_method(name)
    try:
        config_class = getattr(importlib.import_module("peft"), method.config)
        return config_class(**{"target_modules": list(layers), **method.options(sizes, layers), **more})
    except (AttributeError, TypeError) as error:
        from peft import __version__

        raise AdapterError(f"PEFT {__version__} does not have {method.label} ({error}): install a newer one") from None
    except (ValueError, ImportError) as error:
        raise AdapterError(f"PEFT refuses {method.label}: {_first_line(error)}") from None


def apply_peft(model: nn.Module, name: str, sizes: Sizes, layers: Sequence[str], **more: Any) -> nn.Module:
    """The model with a method of PEFT in it: `peft.get_peft_model`, with PEFT's refusals as one sentence.

    Args:
        model: The timm model; its layers are replaced in place.
        name: Name in `PEFT_METHODS`.
        sizes: What the user chose.
        layers: Full names of the linear layers to adapt.
        more: Further arguments of PEFT's config class.

    Raises:
        AdapterError: As `peft_config`, or if PEFT cannot adapt these layers or train them.
    """
    config = peft_config(name, sizes, layers, **more)
    from peft import get_peft_model

    try:
        with without_extension_messages():
            adapted: nn.Module = get_peft_model(model, config)
        _try_layers([model.get_submodule(layer) for layer in layers])
    except _REFUSALS as error:
        raise AdapterError(f"PEFT refuses {PEFT_METHODS[name].label} here: {_first_line(error)}") from None
    _check_butterfly_factors(model, layers, config)
    return adapted


def _try_layers(layers: Sequence[Any]) -> None:
    """Computes forward and backward passes of one row on a copy of one layer of each shape: some values fail there."""
    shapes = {(layer.in_features, layer.out_features): layer for layer in layers}
    with torch.random.fork_rng([]), torch.enable_grad():
        for layer in shapes.values():
            trial = copy.deepcopy(layer)
            row = torch.zeros(1, 1, layer.in_features, device=next(trial.parameters()).device, requires_grad=True)
            trial(row).sum().backward()


def _check_butterfly_factors(model: nn.Module, layers: Sequence[str], config: Any) -> None:
    """Refuses a number of BOFT's factors that PEFT has replaced by 1."""
    wanted = getattr(config, "boft_n_butterfly_factor", 1)
    if any(len(model.get_parameter(f"{layer}.boft_R.default")) != wanted for layer in layers if wanted != 1):
        raise AdapterError(
            f"PEFT computes boft_n_butterfly_factor {wanted} only with its CUDA extension, which it could not compile "
            "here: leave it out"
        )


def find_peft_method(name: str) -> PeftMethod:
    """The method of a name.

    Raises:
        AdapterError: If there is none.
    """
    if name not in PEFT_METHODS:
        raise unknown("method of PEFT", name, PEFT_METHODS)
    return PEFT_METHODS[name]


def import_peft() -> None:
    """Checks that PEFT is installed, without importing it, and leaves out what its import would print.

    Raises:
        AdapterError: If it is not.
    """
    if find_spec("peft") is None:
        raise AdapterError(f"PEFT is not installed: {INSTALL}")
    silence_bitsandbytes()


def peft_layers(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The full names of the linear layers that PEFT adapts for some targets.

    PEFT adapts whole layers: any of q, k and v stands for all three where one layer computes them.

    Args:
        model: The timm model.
        targets: Targets as in `AdapterConfig`.

    Raises:
        AdapterError: If a target is unknown or missing, or if the model reads the weight of its qkv without calling
            the layer, so that PEFT would have no effect.
    """
    wanted = AdapterConfig(targets=targets).targets  # type: ignore[arg-type]
    sites = linear_sites(model)
    check_targets(model, sites, wanted)
    chosen = [site for site in sites if set(site.targets) & set(wanted)]
    for site in chosen:
        if site.attribute == "qkv" and getattr(site.owner, "qkv_bias_separate", True) is False:
            raise AdapterError(
                f"PEFT has no effect on {site.name}, because the model reads its weight without calling it: leave q, k "
                "and v out of the targets"
            )
    return [site.name for site in chosen]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _lora(**more: Any) -> Callable[[Sizes, Sequence[str]], dict[str, Any]]:
    return lambda sizes, _: {"r": sizes.rank, "lora_alpha": sizes.alpha, "lora_dropout": sizes.dropout, **more}


def _ranked(**more: Any) -> Callable[[Sizes, Sequence[str]], dict[str, Any]]:
    return lambda sizes, _: {"r": sizes.rank, **more}


def _fixed(**more: Any) -> Callable[[Sizes, Sequence[str]], dict[str, Any]]:
    return lambda sizes, _: more


def _lycoris(sizes: Sizes, _: Sequence[str]) -> dict[str, Any]:
    return {"r": sizes.rank, "alpha": sizes.alpha}


def _dropping(name: str) -> Callable[[Sizes, Sequence[str]], dict[str, Any]]:
    """The rank, and the dropout under the method's own name of it."""
    return lambda sizes, _: {"r": sizes.rank, name: sizes.dropout}


def _adalora(sizes: Sizes, _: Sequence[str]) -> dict[str, Any]:
    """AdaLoRA starts at 1.5 times its final rank; it prunes between a tenth and seven tenths of the steps.

    The paper prunes at about every 500th part of the steps.
    """
    return {
        "target_r": sizes.rank,
        "init_r": max(sizes.rank + 1, 3 * sizes.rank // 2),
        "lora_alpha": sizes.alpha,
        "lora_dropout": sizes.dropout,
        "total_step": sizes.steps,
        "tinit": sizes.steps // 10,
        "tfinal": 3 * sizes.steps // 10,
        "deltaT": max(1, sizes.steps // 500),
    }


def _lora_ga(sizes: Sizes, layers: Sequence[str]) -> dict[str, Any]:
    """LoRA-GA, which starts as LoRA where no gradient was estimated before."""
    return _lora(init_lora_weights="lora_ga", lora_ga_config={})(sizes, layers)


def _ia3(sizes: Sizes, layers: Sequence[str]) -> dict[str, Any]:
    """The input of an MLP's second layer is scaled, the output of all others."""
    return {"feedforward_modules": [name for name in layers if name.endswith("fc2")]}


def _arxiv(number: str) -> str:
    return f"https://arxiv.org/abs/{number}"


# PEFT's defaults apply where nothing is said. Sizes of blocks and vectors divide the widths of all ViTs with heads of
# 64.
PEFT_METHODS: dict[str, PeftMethod] = {
    "lora": PeftMethod("LoRA (PEFT)", _arxiv("2106.09685"), options=_lora()),
    "rslora": PeftMethod("rsLoRA (PEFT)", _arxiv("2312.03732"), options=_lora(use_rslora=True)),
    "lora_fa": PeftMethod("LoRA-FA (PEFT)", _arxiv("2308.03303"), options=_lora(), optimizer="lora_fa"),
    "lora_plus": PeftMethod("LoRA+ (PEFT)", _arxiv("2402.12354"), options=_lora(), optimizer="lora_plus"),
    "dora": PeftMethod("DoRA (PEFT)", _arxiv("2402.09353"), options=_lora(use_dora=True)),
    "pissa": PeftMethod("PiSSA (PEFT)", _arxiv("2404.02948"), options=_lora(init_lora_weights="pissa")),
    "olora": PeftMethod("OLoRA (PEFT)", _arxiv("2406.01775"), options=_lora(init_lora_weights="olora")),
    "mica": PeftMethod("MiCA (PEFT)", _arxiv("2604.01694"), options=_lora(init_lora_weights="mica")),
    "lora_ga": PeftMethod("LoRA-GA (PEFT)", _arxiv("2407.05000"), options=_lora_ga),
    "velora": PeftMethod("VeLoRA (PEFT)", _arxiv("2405.17991"), options=_lora(velora_config={})),
    "adalora": PeftMethod("AdaLoRA (PEFT)", _arxiv("2303.10512"), "AdaLoraConfig", _adalora),
    "vera": PeftMethod("VeRA (PEFT)", _arxiv("2310.11454"), "VeraConfig", _dropping("vera_dropout")),
    "randlora": PeftMethod("RandLoRA (PEFT)", _arxiv("2502.00987"), "RandLoraConfig", _dropping("randlora_dropout")),
    "ia3": PeftMethod("IA3 (PEFT)", _arxiv("2205.05638"), "IA3Config", _ia3),
    "boft": PeftMethod("BOFT (PEFT)", _arxiv("2311.06243"), "BOFTConfig", _fixed(boft_block_size=4)),
    "oft": PeftMethod("OFT (PEFT)", _arxiv("2306.07280"), "OFTConfig", _fixed(oft_block_size=32)),
    "hra": PeftMethod("HRA (PEFT)", _arxiv("2405.17484"), "HRAConfig", _ranked()),
    "loha": PeftMethod("LoHa (PEFT)", _arxiv("2108.06098"), "LoHaConfig", _lycoris),
    "lokr": PeftMethod("LoKr (PEFT)", _arxiv("2309.14859"), "LoKrConfig", _lycoris),
    "fourierft": PeftMethod("FourierFT (PEFT)", _arxiv("2405.03003"), "FourierFTConfig"),
    "waveft": PeftMethod("WaveFT (PEFT)", _arxiv("2505.12532"), "WaveFTConfig"),
    "vblora": PeftMethod("VB-LoRA (PEFT)", _arxiv("2405.15179"), "VBLoRAConfig", _ranked(vector_length=64)),
    "miss": PeftMethod("MiSS (PEFT)", _arxiv("2409.15371"), "MissConfig", _ranked()),
    "road": PeftMethod("RoAd (PEFT)", _arxiv("2409.00119"), "RoadConfig"),
    "shira": PeftMethod("SHiRA (PEFT)", _arxiv("2406.13175"), "ShiraConfig", _ranked()),
    "c3a": PeftMethod("C3A (PEFT)", _arxiv("2407.19342"), "C3AConfig", _fixed(block_size=64)),
    "delora": PeftMethod("DeLoRA (PEFT)", _arxiv("2503.18225"), "DeloraConfig", _ranked()),
    "hira": PeftMethod("HiRA (PEFT)", "https://openreview.net/forum?id=TwJrTz9cRS", "HiraConfig", _ranked()),
    "psoft": PeftMethod("PSOFT (PEFT)", "https://openreview.net/forum?id=FSHrinMArK", "PsoftConfig", _ranked()),
    "gralora": PeftMethod("GraLoRA (PEFT)", _arxiv("2505.20355"), "GraloraConfig", _lycoris),
}
