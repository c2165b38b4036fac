"""Reading and writing PEFT's folder format (`adapter_config.json`, `adapter_model.safetensors`) without PEFT.

A PEFT LoRA has one A [R, d_in] and one B [d_out, R] per layer. The k adapters on q, k and v of a fused qkv are written
as one LoRA of rank R = k·r, with their A's stacked and a block-diagonal B; alpha is changed so that the scaling stays
the same. If the factors started at a part of the weight (PiSSA, MiLoRA), the start is subtracted within the LoRA, of
rank 2·k·r, as PEFT converts its own. A PEFT LoRA on a whole qkv is read as one adapter for each of q, k and v, with the
same A and a third of B. All conversions are exact.

What PEFT's format does not have, such as which factor trains, is in the header of the tensors' file. PEFT ignores the
header and drops it when it saves the adapter again, so the header is never older than the tensors. `save_adapter`
writes the same as `adapter.json` beside it, for people and other programs.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import pad

from vitlorafa import peft_attention, trained
from vitlorafa.adapted import adapted_state, adapter_layers, classifiers
from vitlorafa.config import AdapterConfig
from vitlorafa.errors import AdapterError, abbreviate
from vitlorafa.layers import STACKS
from vitlorafa.named_sites import ANY, linear_layers
from vitlorafa.sharding import gather
from vitlorafa.sites import linear_sites
from vitlorafa.wrappers import named_modules

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_HEADER = "vitlorafa"
_REMEDY = "merge it with PEFT's merge_and_unload and use the merged model"

# Initialisations that do not change the pretrained weights; the others subtract the initial update from them.
_UNCHANGING = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Settings that may have any value, because they do not matter here or `read` uses them. All others must be off: they
# may change the forward pass without a tensor that shows it.
_SETTINGS = (
    "alpha_pattern auto_mapping base_model_name_or_path eva_config exclude_modules fan_in_fan_out inference_mode "
    "init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save "
    "peft_type peft_version qalora_group_size r rank_pattern revision target_modules task_type use_rslora"
)


def encode(model: nn.Module, description: dict[str, Any], saved: dict[str, Tensor]) -> dict[str, bytes]:
    """The files that `PeftModel.from_pretrained` loads onto the same timm model.

    Args:
        model: Adapted model, merged or not.
        description: Description by `save_adapter`, for the header.
        saved: Factors and other tensors to save, by name.

    Returns:
        File contents by file name, in the order in which to write them.

    Raises:
        AdapterError: If PEFT cannot represent the adapter, see `obstacle`.
    """
    if reason := obstacle(model, saved):
        raise AdapterError(reason)
    layers = dict(adapter_layers(model))
    others = saved.keys() - trained.factors(model).keys()
    tensors = {name: tensor for name, tensor in saved.items() if name in others}
    # PEFT saves all tensors of a module or none; `read` ignores those that did not train.
    tensors |= {
        name: gather(t) for name, t in trained.complete_modules(model, [*tensors]).items() if name not in others
    }
    others_saved = list(tensors)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in layers.items():
        A, factors = saved[f"{name}.lora_A"], saved[f"{name}.lora_B"]
        if layer.start_A is not None:  # B A - B0 A0 = [B, -B0] [A; A0], as PEFT converts its own PiSSA
            A = torch.cat([A, saved[f"{name}.start_A"]], dim=1)
            factors = torch.cat([factors, -saved[f"{name}.start_B"]], dim=2)
        k, m, r = factors.shape
        B = factors.new_zeros(layer.out_features, k * r)
        for j, start in enumerate(layer.starts):
            B[start : start + m, j * r : (j + 1) * r] = factors[j]
        pairs[name] = A.flatten(0, 1), B
    pairs = peft_attention.to_peft(model, pairs)
    for name, (A, B) in pairs.items():
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    ranks = {name: len(A) for name, (A, _) in pairs.items() if not peft_attention.is_part(name)}
    values = _peft_config(adapted_state(model).config, ranks, description["architecture"], others_saved)
    config = (json.dumps(values, indent=2) + "\n").encode()
    header = description | {"config_sha256": _sha256(config)}
    data = safetensors.torch.save(
        {_PREFIX + name: tensor for name, tensor in trained.copy_to_cpu(tensors).items()},
        metadata={"format": "pt", _HEADER: json.dumps(header)},
    )
    return {TENSORS: data, CONFIG: config}


def obstacle(model: nn.Module, names: Iterable[str]) -> str:
    """Why PEFT cannot represent an adapter and what to do, as a sentence; empty if it can.

    PEFT would ignore an adapter if the model reads the weight of its layer instead of calling the layer. Other trained
    parameters have to belong to a module that PEFT can save.

    Args:
        model: Adapted model, merged or not.
        names: Names of the tensors to save.
    """
    if joint := adapted_state(model).joint_bias:
        return (
            f"PEFT has no effect on {joint[0]}.qkv, because the model reads its weight without calling it: set "
            "qkv_bias_separate = True on the attentions before inject and before loading in PEFT, or leave out q, k "
            "and v"
        )
    factors, layers = trained.factors(model), [name for name, _ in adapter_layers(model)]
    outside = (trained.OUTSIDE, *(f"{name}." for name in layers))
    unowned = [name for name in names if name not in factors and ("." not in name or name.startswith(outside))]
    if unowned:
        return (
            f"PEFT's format cannot hold {abbreviate(unowned)}, which trained in addition to the adapters: save with "
            "format='vitlorafa'"
        )
    return peft_attention.obstacle(model, layers)


def read(model: nn.Module | None, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads a folder in PEFT's format.

    In a folder that PEFT wrote, both factors train. Layers with a lower rank than others are padded with zeros, which
    stay zero in training. If a layer's scaling differs from that of the layer with the highest rank, B is multiplied by
    the ratio.

    Args:
        model: Model to load onto, adapted or not; it is not changed. Folders of `save_adapter` do not need it.
        folder: Folder to read.

    Returns:
        The description as in `save_adapter`'s own format, and the tensors by the names of the adapted model's
        parameters: factors A [k, r, d_in] and B [k, m, r], and those of the head.

    Raises:
        AdapterError: If the files are missing, damaged or pickled, or use features that an AdapterConfig cannot
            express.
    """
    config, header, tensors = _read_files(folder)
    pairs: dict[str, dict[str, Tensor]] = {}  # A and B by layer
    heads: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        if factor in ("A.weight", "B.weight"):
            pairs.setdefault(name, {})[factor[0]] = tensor
        else:
            heads[key.removeprefix(_PREFIX)] = tensor
    is_own = bool(header)
    pairs = peft_attention.from_peft(pairs)
    if is_own and (changed := sorted(header["layers"].keys() ^ pairs.keys())):
        raise AdapterError(
            f"{folder / TENSORS} is damaged: its layers differ from its header ({abbreviate(changed)}): save it again"
        )
    if not is_own:
        _check_supported(_needed(model, folder), folder, config, list(heads))
    incomplete = [name for name, pair in pairs.items() if not _is_pair(**pair)]
    if incomplete or not pairs:
        layers = abbreviate(incomplete) or "any layer"
        raise AdapterError(f"{folder} has no A [r, d_in] and B [d_out, r] for {layers}: save it again")
    description = header if is_own else _describe(_needed(model, folder), folder, config, pairs) | {"head": list(heads)}
    if is_own and "extra" in header:
        heads = {name: tensor for name, tensor in heads.items() if name in (*header["head"], *header["extra"])}
    factors: dict[str, Tensor] = {}
    read = AdapterConfig.from_dict(description["config"])
    for name, projections in description["layers"].items():
        stack = _stack(name, projections, read)
        A, B = _slices(stack, projections, **pairs[name], shared=not is_own)
        r = read.rank
        factors |= {f"{name}.lora_A": A[:, :r], f"{name}.lora_B": B[..., :r]}
        if A.shape[1] > r:
            factors |= {f"{name}.start_A": A[:, r:], f"{name}.start_B": -B[..., r:]}
    return description, factors | heads


def _peft_config(
    config: AdapterConfig, layers: dict[str, int], architecture: str | None, heads: list[str]
) -> dict[str, Any]:
    # One rank for all layers, or its own for each kind of layer, because some compute several projections or have a
    # start. PEFT matches names and patterns with the end of a module's name after a dot: a full name is one layer,
    # "qkv" is every layer of that name, which have the same rank but for layers that a pattern chose.
    least = min(layers.values())
    by_kind: dict[str, set[int]] = {}
    for name, rank in layers.items():
        by_kind.setdefault(_kind(name), set()).add(rank)
    wider = {
        _kind(name) if len(by_kind[_kind(name)]) == 1 else name: rank for name, rank in layers.items() if rank > least
    }

    def alpha(rank: int) -> float:  # PEFT declares an int, and some readers require one
        ratio = rank / config.rank
        value = config.alpha * (math.sqrt(ratio) if config.rank_stabilised else ratio)
        return int(value) if value.is_integer() else value

    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": architecture,
        "inference_mode": True,
        "r": least,
        "lora_alpha": alpha(least),
        "rank_pattern": wider,
        "alpha_pattern": {name: alpha(rank) for name, rank in wider.items()},
        "use_rslora": config.rank_stabilised,
        "lora_dropout": config.dropout,
        "target_modules": list(layers),
        "modules_to_save": list(dict.fromkeys(name.rpartition(".")[0] for name in heads)) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """PEFT's config, our header (empty if it is missing or belongs to another config), and the tensors."""
    if not (folder / TENSORS).exists() and (folder / _PICKLE).exists():
        raise AdapterError(
            f"{folder / _PICKLE} is a pickle, which can run code, so it is not opened: convert it with PEFT's "
            "save_pretrained(..., safe_serialization=True)"
        )
    try:
        text = (folder / CONFIG).read_bytes()
        config = json.loads(text)
        with safe_open(folder / TENSORS, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (the file is no mapping)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"cannot read an adapter from {folder}: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} is not a PEFT config: save the adapter again")
    # A config that was edited since, for example with another alpha, counts; the header then does not.
    return config, header if header.get("config_sha256") == _sha256(text) else {}, tensors


def _needed(model: nn.Module | None, folder: Path) -> nn.Module:
    if model is None:
        raise AdapterError(
            f"{folder} was written by PEFT, which does not say which projections are adapted: pass the model too"
        )
    return model


def _check_supported(model: nn.Module, folder: Path, config: dict[str, Any], heads: list[str]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} has peft_type {config.get('peft_type')}, not LORA: {_REMEDY}")
    initialisation = config.get("init_lora_weights", True)
    if initialisation not in _UNCHANGING:
        raise AdapterError(
            f"{folder} has init_lora_weights={initialisation!r}, which changes the pretrained weights: convert "
            "it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for name, value in config.items():
        if value and name not in _SETTINGS.split() and (name, value) != ("bias", "none"):
            raise AdapterError(f"{folder} has {name}={value!r}, which vitlorafa does not support: {_REMEDY}")
    # By identity, because a model without a head has an nn.Identity in its place.
    own_heads = classifiers(model)
    prefixes = [f"{name}." for name, module in named_modules(model) if any(module is head for head in own_heads)]
    others = [name for name in heads if not name.startswith(tuple(prefixes))]
    if others:
        raise AdapterError(
            f"{folder} has {abbreviate(others)}, which are neither LoRA nor the head of this model: {_REMEDY}"
        )


def _describe(
    model: nn.Module, folder: Path, config: dict[str, Any], pairs: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """The config and layers of a folder that PEFT wrote; gives all `pairs` one rank and scaling, in place."""
    known = {site.name: site.targets for site in linear_sites(model)}
    sites = {name: (ANY,) for name, _, _ in linear_layers(model)} | known
    outside = [name for name in pairs if name not in sites]
    if outside:
        raise AdapterError(
            f"{folder} adapts {abbreviate(outside)}, which is no linear layer in front of the head of this "
            f"{type(model).__name__}: choose other target_modules, or {_REMEDY}"
        )
    layers = _projections(sites, pairs)
    targets = [target for projections in layers.values() for target in projections]
    if pairs.keys() - known.keys():
        targets = ["|".join(map(re.escape, pairs))]  # a pattern of these names

    patterns = config.get("alpha_pattern") or {}
    configs = {
        name: AdapterConfig(
            rank=len(pair["A"]),
            # As in PEFT, the first pattern counts that matches the end of the name.
            alpha=next(
                (
                    alpha
                    for pattern, alpha in patterns.items()
                    if re.fullmatch(rf"(.*\.)?({pattern})", peft_attention.peft_name(name))
                ),
                config.get("lora_alpha", 8),
            ),
            train="BA",
            targets=tuple(targets),
            rank_stabilised=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout", 0.0),
        )
        for name, pair in pairs.items()
    }
    widest = max(configs.values(), key=lambda each: each.rank)
    for name, pair in pairs.items():
        missing = widest.rank - configs[name].rank
        pair["A"] = pad(pair["A"], (0, 0, 0, missing))
        pair["B"] = pad(pair["B"] * (configs[name].scale / widest.scale), (0, missing))
    return {
        "architecture": config.get("base_model_name_or_path"),
        "config": widest.to_dict(),
        "layers": layers,
    }


def _projections(sites: dict[str, tuple[str, ...]], pairs: dict[str, dict[str, Tensor]]) -> dict[str, list[str]]:
    """The projections that a PEFT LoRA adapts in each layer; the same for all fused layers of one name.

    PEFT's format does not say which projections of a fused layer are adapted. Those that are not have zero rows of B in
    all layers. If all rows are zero, nothing has trained yet, and all projections count as adapted.
    """
    adapted: dict[str, set[str]] = {}
    for name, pair in pairs.items():
        parts = zip(sites[name], pair["B"].tensor_split(len(sites[name])), strict=True)
        adapted.setdefault(_kind(name), set()).update(target for target, rows in parts if rows.any())
    return {
        name: [target for target in sites[name] if target in (adapted[_kind(name)] or sites[name])] for name in pairs
    }


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _is_pair(A: Tensor | None = None, B: Tensor | None = None) -> bool:
    return A is not None and B is not None and min(A.dim(), B.dim()) > 1 and len(A) == B.shape[1]


def _stack(name: str, projections: list[str], config: AdapterConfig) -> tuple[str, ...]:
    """The projections that a layer stacks; empty if it computes one only."""
    mapped = (targets for pattern, targets in config.sites or () if re.fullmatch(pattern, name))
    stack = next(mapped, STACKS.get(_kind(name), ()))
    return stack if len(stack) > 1 and set(projections) <= set(stack) else ()


def _slices(
    stack: tuple[str, ...], projections: list[str], A: Tensor, B: Tensor, shared: bool
) -> tuple[Tensor, Tensor]:
    """A [k, r, d_in] and B [k, m, r] of a layer's projections, which have a block of A each or a `shared` A."""
    m = len(B) // max(1, len(stack))
    r = len(A) if shared else len(A) // len(projections)
    rows = [stack.index(projection) * m for projection in projections] if stack else [0]
    columns = [0 if shared else j * r for j in range(len(rows))]
    factor_B = [B[row : row + m, column : column + r] for row, column in zip(rows, columns, strict=True)]
    return torch.stack([A[column : column + r] for column in columns]), torch.stack(factor_B)
