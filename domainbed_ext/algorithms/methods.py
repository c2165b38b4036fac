"""The methods of this package. Their colours are of Okabe and Ito's palette, which the colour-blind can tell apart."""

from domainbed_ext.algorithms import hyperparameters as hp
from domainbed_ext.algorithms import peft_methods as peft
from domainbed_ext.algorithms.registry import Method, NamedSetting, declare

declare(
    Method(
        "BA",
        "domainbed_ext.algorithms.lora:BA",
        label="LoRA",
        explanation="both factors train (Hu et al. 2021)",
        order=0,
        colour="#0072B2",
        trains="BA",
        hyperparameters=hp.BOTH_FACTORS,
        paper="https://arxiv.org/abs/2106.09685",
        group="adapters",
        named=(
            NamedSetting(
                "quantise",
                "nf4",
                "QLoRA",
                "LoRA on frozen weights in 4 bits (Dettmers et al. 2023)",
                "https://arxiv.org/abs/2305.14314",
            ),
            NamedSetting(
                "lr_B_ratio",
                16,
                "LoRA+",
                "LoRA with a higher learning rate for B (Hayou et al. 2024)",
                "https://arxiv.org/abs/2402.12354",
                others=True,
            ),
            NamedSetting(
                "init_A",
                "pissa",
                "PiSSA",
                "LoRA that starts at the largest singular vectors of W (Meng et al. 2024)",
                "https://arxiv.org/abs/2404.02948",
            ),
            NamedSetting(
                "init_A",
                "milora",
                "MiLoRA",
                "LoRA that starts at the smallest singular vectors of W (Wang et al. 2024)",
                "https://arxiv.org/abs/2406.09044",
            ),
            NamedSetting(
                "rank_stabilised",
                True,
                "rsLoRA",
                "LoRA, scaled by alpha/√rank (Kalajdzievski 2023)",
                "https://arxiv.org/abs/2312.03732",
            ),
        ),
    )
)
declare(
    Method(
        "LoRAPro",
        "domainbed_ext.algorithms.lora:LoRAPro",
        label="LoRA-Pro",
        explanation="both factors train, on gradients as close as possible to full fine-tuning's (Wang et al. 2024)",
        order=0,
        colour="#332288",
        trains="BA",
        hyperparameters=hp.BOTH_FACTORS,
        group="adapters",
        paper="https://arxiv.org/abs/2407.18242",
    )
)
declare(
    Method(
        "BOnly",
        "domainbed_ext.algorithms.lora:BOnly",
        label="LoRA-FA",
        explanation="A frozen and random orthonormal, B trains (Zhu et al. 2024; LoRA-FA)",
        order=1,
        colour="#D55E00",
        trains="B",
        hyperparameters=hp.FROZEN_FACTOR,
        paper="https://arxiv.org/abs/2308.03303",
        group="adapters",
    )
)
declare(
    Method(
        "AOnly",
        "domainbed_ext.algorithms.lora:AOnly",
        label="LoRA-FB",
        explanation="B frozen and random orthonormal, A trains",
        order=2,
        colour="#009E73",
        trains="A",
        hyperparameters=hp.FROZEN_FACTOR,
        paper="https://arxiv.org/abs/2402.16842",
        group="adapters",
    )
)
declare(
    Method(
        "LP",
        "domainbed_ext.algorithms.probe:LP",
        label="linear probe",
        explanation="only the head trains",
        order=3,
        colour="#7A7A7A",
        aliases=("linear probing",),
        hyperparameters=hp.PROBE,
        paper="https://arxiv.org/abs/1610.01644",
        group="partial tuning",
    )
)
declare(
    Method(
        "FullFT",
        "domainbed_ext.algorithms.full:FullFT",
        label="full fine-tuning",
        explanation="everything trains",
        order=4,
        colour="#CC79A7",
        aliases=("FT", "fine-tuning", "full finetune"),
        hyperparameters=hp.FULL,
        group="full fine-tuning",
    )
)
declare(
    Method(
        "BitFit",
        "domainbed_ext.algorithms.partial:BitFit",
        label="BitFit",
        explanation="the biases and the head train (Ben Zaken et al. 2022)",
        order=10,
        colour="#E69F00",
        aliases=("bias tuning",),
        hyperparameters=hp.FEW,
        paper="https://arxiv.org/abs/2106.10199",
        group="partial tuning",
    )
)
declare(
    Method(
        "NormTuning",
        "domainbed_ext.algorithms.partial:NormTuning",
        label="norm tuning",
        explanation="scales and shifts of the normalisation layers, and the head train (Qi et al. 2022)",
        order=11,
        colour="#56B4E9",
        aliases=("LN-Tuning", "LayerNorm tuning"),
        hyperparameters=hp.FEW,
        paper="https://arxiv.org/abs/2211.08682",
        group="partial tuning",
    )
)
declare(
    Method(
        "LastBlocks",
        "domainbed_ext.algorithms.partial:LastBlocks",
        label="last blocks",
        explanation="the last n blocks, the final norm and the head train (Yosinski et al. 2014)",
        order=12,
        colour="#882255",
        aliases=("partial fine-tuning",),
        hyperparameters=hp.LAST_BLOCKS,
        paper="https://arxiv.org/abs/1411.1792",
        group="partial tuning",
    )
)
declare(
    Method(
        peft.NAME,
        peft.CLASS,
        label="PEFT",
        explanation="a method of the package peft, as in Peft@method=dora",
        order=peft.ORDER,
        hyperparameters=peft.VARIANTS["lora"].hyperparameters,
        group="PEFT",
        selector=peft.SELECTOR,
        variants=peft.VARIANTS,
    )
)
declare(
    Method(
        "ERM",
        "domainbed_ext.algorithms.full:ERM",
        label="DomainBed ERM",
        explanation="full fine-tuning with DomainBed's optimizer and hyperparameters",
        hyperparameters=hp.DOMAINBED,  # tables and plots list it among upstream's methods
        paper="https://arxiv.org/abs/2007.01434",
        group="full fine-tuning",
    )
)
