"""What `Peft@method=NAME` offers: label, paper and hyperparameters of each of PEFT's methods. This loads no torch.

A method is one entry here and one in `vitlorafa.peft_methods`, which says how its config is made. A hyperparameter
that is not among the shared ones is a field of PEFT's config of the same name, with PEFT's default.
"""

from typing import Any

from domainbed_ext.algorithms import hyperparameters as hp
from domainbed_ext.algorithms.registry import Method
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hyperparameter import Hyperparameter, Hyperparameters, merge

NAME = "Peft"
SELECTOR = "method"
EXTRA_FIELDS = "peft_config"
"""Hyperparameter with further fields of PEFT's config, a JSON object."""

CLASS = "domainbed_ext.algorithms.peft:Peft"
ORDER = 20  # after the methods without PEFT


def _only_in_the_name(value: Any) -> Any:
    raise BenchmarkError(
        f"{SELECTOR} {value!r} is a hyperparameter of the method's name: write it there, as in {NAME}@{SELECTOR}=dora"
    )


_SHARED: Hyperparameters = {
    **hp.TUNED,
    **{name: hp.ADAPTER[name] for name in ("lr", "targets")},
    EXTRA_FIELDS: Hyperparameter({}),
}
_RANK: Hyperparameters = {"rank": hp.ADAPTER["rank"]}
_ALPHA: Hyperparameters = {"alpha": hp.ADAPTER["alpha"]}
_DROPOUT: Hyperparameters = {"adapter_dropout": hp.ADAPTER["adapter_dropout"]}
_LORA: Hyperparameters = {**_RANK, **_ALPHA, **_DROPOUT}


def _ranked(default: int) -> Hyperparameters:
    """A rank of another meaning than LoRA's, with PEFT's default and no random draw."""
    return merge(_RANK, {"rank": default})


VARIANTS: dict[str, Method] = {}
"""The declaration of each method by its name in `vitlorafa.peft_methods`."""
OWN: dict[str, tuple[str, ...]] = {}
"""The hyperparameters that each has for itself."""


def _declare(
    name: str, label: str, explanation: str, paper: str, shared: Hyperparameters, own: dict[str, Any] | None = None
) -> None:
    own = own or {}
    selector = Hyperparameter(name, read=_only_in_the_name)
    kinds = merge({**_SHARED, **shared, SELECTOR: selector}, own)
    OWN[name] = tuple(own)
    VARIANTS[name] = Method(
        f"{NAME}@{SELECTOR}={name}",
        CLASS,
        label=f"{label} (PEFT)",
        explanation=explanation,
        order=ORDER,
        hyperparameters=kinds,
        group="PEFT",
        paper=paper if "/" in paper else f"https://arxiv.org/abs/{paper}",
    )


_declare("lora", "LoRA", "both factors train", "2106.09685", _LORA)
_declare("rslora", "rsLoRA", "LoRA, scaled by alpha/√rank", "2312.03732", _LORA)
_declare("lora_fa", "LoRA-FA", "A is frozen, gradients of B are corrected by PEFT's optimizer", "2308.03303", _LORA)
_declare(
    "lora_plus",
    "LoRA+",
    "LoRA, with a higher learning rate for B",
    "2402.12354",
    _LORA,
    {"loraplus_lr_ratio": 16.0},  # of the paper; PEFT has no default
)
_declare("dora", "DoRA", "LoRA of the directions of W's columns, whose lengths train too", "2402.09353", _LORA)
_declare("pissa", "PiSSA", "LoRA that starts at the largest singular vectors of W", "2404.02948", _LORA)
_declare("olora", "OLoRA", "LoRA that starts at a QR decomposition of W", "2406.01775", _LORA)
_declare("mica", "MiCA", "B is frozen at the smallest singular vectors of W, A trains", "2604.01694", _LORA)
_declare(
    "lora_ga",
    "LoRA-GA",
    "LoRA that starts at the singular vectors of the loss's gradient",
    "2407.05000",
    _LORA,
    {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16, "gradient_steps": 8},
)
_declare(
    "velora",
    "VeLoRA",
    "LoRA that keeps compressed activations for the backward pass",
    "2405.17991",
    _LORA,
    {"num_groups": 64, "scale": 1.0, "init_type": "batch_average"},
)
_declare(
    "adalora",
    "AdaLoRA",
    "LoRA as an SVD, pruned in training to an average rank",
    "2303.10512",
    _LORA,
    {
        **{"init_r": None, "tinit": None, "tfinal": None, "deltaT": None},  # None: from the rank and the run's steps
        **{"beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5},
    },
)
_declare(
    "vera",
    "VeRA",
    "scaling vectors train around random projections that all layers share",
    "2310.11454",
    {**_ranked(256), **_DROPOUT},
    {"projection_prng_key": 0, "save_projection": True, "d_initial": 0.1},
)
_declare(
    "randlora",
    "RandLoRA",
    "a full-rank update of scaled random bases",
    "2502.00987",
    {**_ranked(32), **_DROPOUT},
    {"randlora_alpha": 640, "projection_prng_key": 0, "save_projection": True, "sparse": False, "very_sparse": False},
)
_declare("ia3", "IA3", "a scaling of each output, and of the input of fc2", "2205.05638", {})
_declare(
    "boft",
    "BOFT",
    "an orthogonal transform of W, of butterfly factors",
    "2311.06243",
    {},
    {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1, "boft_dropout": 0.0},
)
_declare(
    "oft",
    "OFT",
    "an orthogonal transform of W, in blocks",
    "2306.07280",
    {},
    {"oft_block_size": 32, "module_dropout": 0.0, "coft": False, "eps": 6e-5, "block_share": False},
)
_declare(
    "hra",
    "HRA",
    "an orthogonal transform of W, of Householder reflections",
    "2405.17484",
    _ranked(8),
    {"apply_GS": False},
)
_declare(
    "loha",
    "LoHa",
    "the Hadamard product of two low-rank updates",
    "2108.06098",
    {**_RANK, **_ALPHA},
    {"rank_dropout": 0.0, "module_dropout": 0.0},
)
_declare(
    "lokr",
    "LoKr",
    "a Kronecker product with a low-rank factor",
    "2309.14859",
    {**_RANK, **_ALPHA},
    {"rank_dropout": 0.0, "module_dropout": 0.0, "decompose_both": False, "decompose_factor": -1},
)
_declare(
    "fourierft",
    "FourierFT",
    "a few coefficients of the update's Fourier transform train",
    "2405.03003",
    {},
    {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
)
_declare(
    "waveft",
    "WaveFT",
    "a few coefficients of the update's wavelet transform train",
    "2505.12532",
    {},
    {"n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True, "random_loc_seed": 777},
)
_declare(
    "vblora",
    "VB-LoRA",
    "LoRA whose factors are mixtures of vectors that all layers share",
    "2405.15179",
    _ranked(4),
    {
        "vblora_dropout": 0.0,
        "num_vectors": 256,
        "vector_length": 64,
        "topk": 2,
    },  # PEFT's 256 divides the widths of few ViTs
)
_declare(
    "miss",
    "MiSS",
    "one matrix, shared by the shards of W",
    "2409.15371",
    _ranked(64),
    {"miss_dropout": 0.0, "mini_r": 1},
)
_declare("road", "RoAd", "rotations of pairs of outputs", "2409.00119", {}, {"variant": "road_1", "group_size": 64})
_declare("shira", "SHiRA", "a few random entries of W train", "2406.13175", _ranked(32), {"mask_type": "random"})
_declare(
    "c3a",
    "C3A",
    "a circular convolution",
    "2407.19342",
    {},
    {"block_size": 64},  # PEFT's 256 divides few widths
)
_declare(
    "delora",
    "DeLoRA",
    "LoRA whose directions and strength are apart",
    "2503.18225",
    _ranked(8),
    {"delora_lambda": 15, "module_dropout": 0.0},
)
_declare(
    "gralora",
    "GraLoRA",
    "a grid of small LoRAs in each layer",
    "2505.20355",
    {**_ranked(32), **_ALPHA},
    {"gralora_dropout": 0.0, "gralora_k": 2, "hybrid_r": 0},
)
_declare(
    "hira",
    "HiRA",
    "the Hadamard product of W and a low-rank update",
    "https://openreview.net/forum?id=TwJrTz9cRS",
    _ranked(32),
    {"hira_dropout": 0.0},
)
_declare(
    "psoft",
    "PSOFT",
    "an orthogonal transform in the principal subspace of W",
    "https://openreview.net/forum?id=FSHrinMArK",
    _ranked(32),
    {
        "psoft_dropout": 0.0,
        "psoft_alpha": 32,
        "ab_svd_init": "psoft_init",
        "psoft_orth": True,
        "psoft_mag_a": True,
        "psoft_mag_b": True,
    },
)
