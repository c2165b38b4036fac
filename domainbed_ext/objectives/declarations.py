"""The objectives of this package, with the names, defaults and random draws that upstream's hyperparameters have."""

from numpy.random import RandomState

from domainbed_ext.hyperparameter import Hyperparameter, log_uniform
from domainbed_ext.objectives.registry import Declaration, declare

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
        explanation="equal means and covariances of the domains' features (Sun and Saenko 2016)",
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
        explanation="equal distributions of the domains' features (Li et al. 2018)",
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
        explanation="one classifier that is optimal in every domain (Arjovsky et al. 2019)",
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
        explanation="equal losses of the domains (Krueger et al. 2021)",
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
        explanation="the loss of the domain with the highest (Sagawa et al. 2020)",
        paper="https://arxiv.org/abs/1911.08731",
        order=5,
        hyperparameters={"groupdro_eta": Hyperparameter(0.01, log_uniform(-3, -1))},
    )
)
