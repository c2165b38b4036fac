"""Every method and every objective: a run that is killed and resumed gives what it gives without, and is reproduced.

The lists come from the registries, so that a method or an objective is tested by being declared.
"""

import json
import math

import pytest
from safetensors import safe_open

from domainbed_ext import evaluate, train
from domainbed_ext.algorithms.registry import METHODS
from domainbed_ext.objectives.registry import DEFAULT, OBJECTIVES
from domainbed_ext.runs.folder import RunFolder

STEPS, SAVED, KILLED, ANNEALED = 20, 8, 11, 10
OBJECTIVE_NAMES = [name for name in OBJECTIVES if name != DEFAULT]
COMPOSED = [f"{method}+{objective}" for method in ("BOnly", "FullFT") for objective in OBJECTIVE_NAMES]
VARIANTS = [
    pytest.param(variant.name, marks=pytest.mark.slow)
    for method in METHODS.registered().values()
    for variant in method.variants.values()
]
TRAINED_WITH = "schedule=cosine,warmup=0.2,clip_grad=0.5,label_smoothing=0.1,accumulate=2"
WITH_OPTIONS = [
    f"FullFT@{TRAINED_WITH}",
    f"LoRAPro+SAM@{TRAINED_WITH},adapter_seed=3",
    f"BOnly+MIRO@{TRAINED_WITH.replace('cosine', 'linear')}",
    *(
        pytest.param(f"Peft@method={method},{TRAINED_WITH}", marks=pytest.mark.slow)
        for method in (
            "adalora",
            "lora_fa",
            "lora_ga",
            "lora_plus",
        )  # with an optimizer, a penalty or a start of their own
    ),
]
HPARAMS = {"batch_size": 4} | {
    name: ANNEALED  # so that the weight of a penalty changes within the run
    for objective in OBJECTIVES.registered().values()
    for name in objective.hyperparameters
    if name.endswith("_anneal_iters")
}
VARYING = {"run", "step_time", "args", "mem_gb", "ways"}  # "ways" are those of the attempt so far


class Killed(BaseException):
    """What a kill is to a run: nothing handles it."""


@pytest.mark.usefixtures("few_evaluated")
@pytest.mark.parametrize("name", [*METHODS.registered(), *VARIANTS, *COMPOSED, *WITH_OPTIONS])
def test_a_run_resumes_to_the_same_and_is_reproduced(name, make_args, tmp_path):
    if name.startswith("Peft"):
        pytest.importorskip("peft")

    def run(folder, progress=lambda share: None):
        options = {"algorithm": name, "steps": STEPS, "save_steps": SAVED, "hparams": json.dumps(HPARAMS)}
        train.run(make_args(**options, checkpoint_freq=15, output_dir=str(tmp_path / folder)), progress)
        return RunFolder(tmp_path / folder)

    def kill(share):
        if share >= KILLED / STEPS:
            raise Killed

    expected = run("whole")
    with pytest.raises(Killed):
        run("killed", kill)
    resumed = run("killed")
    assert f"resumes after {SAVED} of {STEPS} steps" in (resumed.path / "out.txt").read_text()
    assert _content(resumed) == _content(expected)
    assert all(math.isfinite(record["loss"]) for record in expected.records())
    for step in ("best", "last"):
        record, reproduced = evaluate.evaluate(resumed, step)
        assert len(reproduced) == 8 and evaluate.describe_difference(record, reproduced) == ""


def _content(folder):
    """The records, and what was saved."""
    records = [{k: v for k, v in record.items() if k not in VARYING} for record in folder.records()]
    files = {str(path.relative_to(folder.path)): _read(path) for path in sorted(folder.path.glob("*/*.*"))}
    return records, files


def _read(path):
    """The bytes of a file; of a safetensors file its content, for its header has the metadata in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
