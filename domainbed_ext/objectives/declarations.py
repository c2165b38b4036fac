"""The objectives of this package, with the names, defaults and random draws that upstream's hyperparameters have."""

from numpy.random import RandomState

from domainbed_ext.hyperparameter import (
    A_SHARE,
    ABOVE_0,
    NOT_BELOW_0,
    Allowed,
    Hyperparameter,
    choice,
    log_uniform,
    uniform,
)
from domainbed_ext.objectives.registry import Declaration, declare

_A_COUNT = Allowed(
    "a number of blocks from 1 on, or null for a quarter",
    lambda value: value is None or (type(value) is int and value >= 1),
)
MMD_GAMMA = Hyperparameter(1.0, log_uniform(-1, 1))


def _steps(generator: RandomState) -> int:
    """Draws a number of steps from 1 to 10,000."""
    return int(10 ** generator.uniform(0, 4))


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
declare(
    Declaration(
        "CORAL",
        "domainbed_ext.objectives.coral:CORAL",
        label="CORAL",
        explanation="differences of the means and covariances of the domains' features (Sun and Saenko 2016)",
        paper="https://arxiv.org/abs/1607.01719",
        order=1,
        hyperparameters={"mmd_gamma": MMD_GAMMA},
    )
)
declare(
    Declaration(
        "MMD",
        "domainbed_ext.objectives.mmd:MMD",
        label="MMD",
        explanation="differences of the distributions of the domains' features (Li et al. 2018)",
        paper="https://openaccess.thecvf.com/content_cvpr_2018/html/Li_Domain_Generalization_With_CVPR_2018_paper.html",
        order=2,
        hyperparameters={"mmd_gamma": MMD_GAMMA},
    )
)
declare(
    Declaration(
        "IRM",
        "domainbed_ext.objectives.irm:IRM",
        label="IRM",
        explanation="how far one classifier is from optimal in every domain (Arjovsky et al. 2019)",
        paper="https://arxiv.org/abs/1907.02893",
        order=3,
        hyperparameters={
            "irm_lambda": Hyperparameter(100.0, log_uniform(-1, 5)),
            "irm_penalty_anneal_iters": Hyperparameter(500, _steps),
        },
    )
)
declare(
    Declaration(
        "VREx",
        "domainbed_ext.objectives.vrex:VREx",
        label="VREx",
        explanation="the variance of the domains' losses (Krueger et al. 2021)",
        paper="https://arxiv.org/abs/2003.00688",
        order=4,
        hyperparameters={
            "vrex_lambda": Hyperparameter(10.0, log_uniform(-1, 5)),
            "vrex_penalty_anneal_iters": Hyperparameter(500, _steps),
        },
    )
)
declare(
    Declaration(
        "GroupDRO",
        "domainbed_ext.objectives.groupdro:GroupDRO",
        label="GroupDRO",
        explanation="the loss of the domain where it is highest (Sagawa et al. 2020)",
        paper="https://arxiv.org/abs/1911.08731",
        order=5,
        hyperparameters={"groupdro_eta": Hyperparameter(0.01, log_uniform(-3, -1))},
    )
)
declare(
    Declaration(
        "Mixup",
        "domainbed_ext.objectives.mixup:Mixup",
        label="Mixup",
        explanation="the loss on blends of two domains' images and labels (Wang et al. 2020)",
        paper="https://arxiv.org/abs/2001.00677",
        order=6,
        hyperparameters={"mixup_alpha": Hyperparameter(0.2, log_uniform(-1, 1), allowed=ABOVE_0)},
    )
)
declare(
    Declaration(
        "MixStyle",
        "domainbed_ext.objectives.mixstyle:MixStyle",
        label="MixStyle",
        explanation="the loss with statistics of patch tokens mixed between domains in early blocks (Zhou et al. 2021)",
        paper="https://openreview.net/forum?id=6xHJ37MVxxp",
        order=7,
        hyperparameters={
            "mixstyle_p": Hyperparameter(0.5, allowed=A_SHARE),
            "mixstyle_alpha": Hyperparameter(0.1, allowed=ABOVE_0),
            "mixstyle_blocks": Hyperparameter(None, allowed=_A_COUNT),  # None: a quarter of the blocks
        },
    )
)
declare(
    Declaration(
        "SAM",
        "domainbed_ext.objectives.sam:SAM",
        label="SAM",
        explanation="the highest loss within a radius of the trained weights (Foret et al. 2021)",
        paper="https://arxiv.org/abs/2010.01412",
        order=8,
        hyperparameters={"sam_rho": Hyperparameter(0.05, choice(0.01, 0.02, 0.05, 0.1), allowed=NOT_BELOW_0)},
    )
)
declare(
    Declaration(
        "MIRO",
        "domainbed_ext.objectives.miro:MIRO",
        label="MIRO",
        explanation="the distance of features to the pretrained model's (Cha et al. 2022)",
        paper="https://arxiv.org/abs/2203.10789",
        order=9,
        hyperparameters={
            "miro_lambda": Hyperparameter(0.1, choice(0.01, 0.1, 1.0), allowed=NOT_BELOW_0),
            "miro_lr_multiplier": Hyperparameter(10.0, allowed=ABOVE_0),
        },
    )
)
declare(
    Declaration(
        "L2SP",
        "domainbed_ext.objectives.l2sp:L2SP",
        label="L2-SP",
        explanation="the distance of weights to the pretrained ones (Li et al. 2018)",
        paper="https://arxiv.org/abs/1802.01483",
        order=10,
        method="FullFT",
        hyperparameters={
            "l2sp_alpha": Hyperparameter(0.1, log_uniform(-3, 0), allowed=NOT_BELOW_0),
            "l2sp_beta": Hyperparameter(0.01, allowed=NOT_BELOW_0),
        },
    )
)
declare(
    Declaration(
        "RSC",
        "domainbed_ext.objectives.rsc:RSC",
        label="RSC",
        explanation="the loss without the features that predictions depend on most (Huang et al. 2020)",
        paper="https://arxiv.org/abs/2007.02454",
        order=11,
        hyperparameters={
            "rsc_f_drop_factor": Hyperparameter(1 / 3, uniform(0, 0.5), allowed=A_SHARE),
            "rsc_b_drop_factor": Hyperparameter(1 / 3, uniform(0, 0.5), allowed=A_SHARE),
        },
    )
)
