"""The exception and the warning of the package, and the sentences that several messages share."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

# What people type -> the names that it may stand for; those among the choices of a message are suggested.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    # fields of AdapterConfig
    **dict.fromkeys(("lora_r", "lora_rank", "dim"), ("rank",)),
    **dict.fromkeys(("scale", "scaling", "lora_scale"), ("alpha",)),
    **dict.fromkeys(("modules", "lora_target"), ("targets",)),
    **dict.fromkeys(("layers",), ("targets", "blocks")),
    **dict.fromkeys(("depth", "block", "layer_indices"), ("blocks",)),
    **dict.fromkeys(("freeze", "frozen", "factors", "method", "variant"), ("train",)),
    **dict.fromkeys(("init", "init_lora_weights"), ("init_A",)),
    **dict.fromkeys(("random_seed",), ("seed",)),
    # initialisations
    **dict.fromkeys(("normal", "randn"), ("gaussian",)),
    **dict.fromkeys(("kaiming", "he", "default"), ("kaiming_uniform",)),
    **dict.fromkeys(("svd",), ("singular", "pissa")),
    **dict.fromkeys(("minor", "mica"), ("singular_minor", "milora")),
    **dict.fromkeys(("principal",), ("pissa",)),
    **dict.fromkeys(("zeros", "none", "0"), ("zero",)),
    **dict.fromkeys(("qr", "haar"), ("orthonormal",)),
    # projections
    **dict.fromkeys(("query", "q_proj", "wq"), ("q",)),
    **dict.fromkeys(("key", "k_proj", "wk"), ("k",)),
    **dict.fromkeys(("value", "v_proj", "wv"), ("v",)),
    **dict.fromkeys(("out", "o_proj", "out_proj", "attn.proj", "dense"), ("proj",)),
    **dict.fromkeys(("mlp.fc1", "up_proj", "gate_proj", "w1"), ("fc1",)),
    **dict.fromkeys(("mlp.fc2", "down_proj", "w2"), ("fc2",)),
    **dict.fromkeys(("linear", "everything", "*"), ("all",)),
    # ways to compute, backends, precisions, devices, formats
    **dict.fromkeys(("merged", "fused", "fast"), ("folded",)),
    **dict.fromkeys(("unmerged", "unfused", "naive"), ("separate",)),
    **dict.fromkeys(("torch", "pytorch"), ("eager",)),
    **dict.fromkeys(("bfloat16",), ("bf16",)),
    **dict.fromkeys(("float16", "half"), ("fp16",)),
    **dict.fromkeys(("fp32", "float"), ("float32",)),
    **dict.fromkeys(("gpu",), ("cuda",)),
    **dict.fromkeys(("native", "safetensors"), ("vitlorafa",)),
    # measurements and methods of the benchmark
    **dict.fromkeys(("time", "speed"), ("step",)),
    **dict.fromkeys(("baseline", "frozen", "bound"), ("lower_bound",)),
    **dict.fromkeys(("fullft", "finetune", "full_ft"), ("full",)),
    **dict.fromkeys(("peft",), ("peft_lora",)),
    **dict.fromkeys(("benchmark",), ("bench",)),
}


class AdapterError(ValueError):
    """An operation on an adapter is impossible; the message says what is wrong, where, and what to do instead."""


class AdapterWarning(UserWarning):
    """An operation on an adapter is probably not what was meant; the message says what happens instead."""


def warn(message: str) -> None:
    """Issues an `AdapterWarning` that points to the line of the user's code that called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "vitlorafa":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AdapterWarning, stacklevel=level)


def unknown(kind: str, name: object, choices: Iterable[str]) -> AdapterError:
    """An error for a name that does not exist; it suggests the synonym or up to three nearest names.

    Args:
        kind: What the name stands for, such as "initialisation".
        name: Name that the user typed.
        choices: Names that exist.

    Returns:
        The error, which the caller raises.
    """
    choices = list(choices)
    synonyms = [choice for choice in _SYNONYMS.get(str(name).lower(), ()) if choice in choices]
    near = synonyms or get_close_matches(str(name), choices, n=3)
    hint = f"did you mean {join_words([*map(repr, near)], 'or')}?" if near else "choose from " + ", ".join(choices)
    return AdapterError(f"unknown {kind} {name!r}: {hint}")


def is_synonym(name: str) -> bool:
    """Whether people type this name for another one, which `unknown` suggests.

    Args:
        name: Name that the user typed.
    """
    return name.lower() in _SYNONYMS


def join_words(words: Sequence[str], conjunction: str = "and") -> str:
    """The words as in a sentence: "a", "a and b", "a, b and c".

    Args:
        words: At least one word.
        conjunction: Word before the last one.
    """
    return f" {conjunction} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def abbreviate(names: Sequence[str]) -> str:
    """The first three names, separated by commas, and "..." if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
