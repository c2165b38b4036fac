"""The objectives of this package, with the names, defaults and random draws that upstream's hyperparameters have."""

from domainbed_ext.objectives.registry import Declaration, declare

declare(
    Declaration(
        "ERM",
        "domainbed_ext.objectives.erm:ERM",
        label="ERM",
        explanation="mean cross-entropy of all domains' images",
        paper="https://arxiv.org/abs/2007.01434",
        order=0,
    )
)
