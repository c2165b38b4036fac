"""Runs in fp16, whose loss is scaled, and on a chosen device."""

import json

import pytest
import torch
from torch.amp import GradScaler

from domainbed_ext import train
from domainbed_ext.algorithms.lora import BOnly
from domainbed_ext.algorithms.registry import register_algorithm
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.launchers.command import Command
from domainbed_ext.launchers.slots import make_slots
from domainbed_ext.models import device, precision
from domainbed_ext.runs import arguments, checkpoint
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder, State
from domainbed_ext.runs.saved import recorded_arguments
from domainbed_ext.sweep.arguments import parse as parse_sweep
from domainbed_ext.system.exit_codes import ExitCode
from tests.domainbed_ext.fault_injection import Run, outcome

CPU = torch.device("cpu")


def needs_half():
    try:
        precision.check("fp16", CPU)
    except BenchmarkError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("algorithm", ["BOnly", "BA", "FullFT", "LP", "BOnly+SAM", "BOnly@clip_grad=0.5", "LoRAPro"])
def test_a_run_in_fp16_trains_and_records_its_scale(make_args, few_evaluated, algorithm):
    needs_half()
    assert train.run(make_args(precision="fp16", algorithm=algorithm, hparams='{"batch_size": 4}')) == 0
    (record,) = RunFolder(make_args().output_dir).records()
    assert record["precision"] == "fp16" and record["loss"] > 0 and 1 <= record["loss_scale"] <= 65536
    assert "diverged" not in record


def first_step(make_args, **overrides):
    setup = run_setup.set_up(make_args(hparams='{"batch_size": 8}', **overrides))
    algorithm = setup.make_algorithm()
    return algorithm, next(Feed(setup, algorithm).training(range(1)))


def test_the_gradients_of_a_step_are_those_without_a_scale(make_args):
    needs_half()
    gradients = {}
    for name in ("fp16", "float32"):
        algorithm, batches = first_step(make_args, precision=name)
        algorithm.optimizer.step = lambda: None  # what it would step with stays
        if algorithm.scaler:
            algorithm.scaler.step = lambda optimizer: None
        algorithm.update(batches)
        named = algorithm.named_parameters()
        gradients[name] = torch.cat([each.grad.flatten() for _, each in named if each.grad is not None])
    assert torch.cosine_similarity(gradients["fp16"], gradients["float32"], dim=0) > 0.99
    assert gradients["fp16"].norm().item() == pytest.approx(gradients["float32"].norm().item(), rel=0.05)


def test_a_step_with_gradients_that_are_not_finite_is_left_out_and_lowers_the_scale(make_args):
    needs_half()
    algorithm, batches = first_step(make_args, precision="fp16", algorithm="BOnly@clip_grad=1.0")
    algorithm.scaler = GradScaler("cpu", init_scale=2.0**40)  # overflows
    stepped = []
    algorithm.after_step = lambda: stepped.append(1)
    before = {name: each.detach().clone() for name, each in algorithm.named_parameters()}
    values = algorithm.update(batches)
    assert all(torch.equal(each, before[name]) for name, each in algorithm.named_parameters())
    assert algorithm.scaler.get_scale() == 2.0**39 and values["loss_scale"] == 2.0**40
    assert "grad_norm" not in values and not stepped
    algorithm.scaler = GradScaler("cpu", init_scale=256.0)
    assert "grad_norm" in algorithm.update(batches) and stepped


@pytest.mark.slow
def test_a_killed_run_in_fp16_resumes_to_the_same(tmp_path):
    needs_half()
    words = ["--precision", "fp16"]
    assert Run(tmp_path / "whole", *words).end() == 0
    run = Run(tmp_path / "killed", *words)
    run.wait_for_step(6)
    run.kill()
    state, warnings = checkpoint.load(tmp_path / "killed")
    assert not warnings and state["algorithm"]["parts"]["scaler"]["scale"] > 0
    assert Run(tmp_path / "killed", *words).end() == 0
    assert "resumes after" in (tmp_path / "killed" / "out.txt").read_text()
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def test_fp16_is_refused_in_a_sentence_where_the_device_lacks_it(make_args, monkeypatch, capsys):
    def refuse(*args):
        raise RuntimeError('"addmm" not implemented for Half\nmore')

    precision._try_half.cache_clear()
    monkeypatch.setattr(precision.F, "linear", refuse)
    try:
        assert train.run(make_args(precision="fp16")) == ExitCode.BAD_INPUT
    finally:
        precision._try_half.cache_clear()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --precision fp16: torch ") and error.endswith(
        'does not train in it on this cpu ("addmm" not implemented for Half): use bf16 or float32'
    )
    assert RunFolder(make_args().output_dir).state is State.FAILED


def test_a_method_with_an_update_of_its_own_has_no_fp16(make_args, registries, capsys):
    needs_half()

    @register_algorithm("Own")
    class Own(BOnly):
        def update(self, minibatches, unlabeled=None):
            return {"loss": 1.0}

    assert train.run(make_args(precision="fp16", algorithm="Own")) == ExitCode.BAD_INPUT
    assert "Own has an update of its own, which does not scale the loss" in capsys.readouterr().err


def test_the_device_is_chosen_and_is_no_part_of_the_run(make_args, few_evaluated, monkeypatch):
    assert arguments.parse(["--device", "cuda:1"]).device == "cuda:1"
    for word in ("gpu", "cuda:x", "cpu:0"):
        with pytest.raises(BenchmarkError, match=f"--device: '{word}' is no device, give auto, cpu, cuda or cuda:N"):
            arguments.parse(["--device", word])
    args = make_args(steps=1, device="cpu")
    assert train.run(args) == 0
    (record,) = RunFolder(args.output_dir).records()
    assert record["args"]["device"] == "cpu" and record["machine"]["gpu"] is None
    assert train.run(make_args(steps=1)) == 0  # done already, whatever the device
    assert recorded_arguments({**record, "args": {**record["args"], "device": "cuda:7"}})[0].device is None


@pytest.mark.parametrize(
    ("gpus", "name", "found"),
    [
        (0, None, "cpu"),
        (0, "auto", "cpu"),
        (0, "cuda", "--device cuda: torch sees no GPU here: give one that is here, cpu or auto"),
        (1, "cuda:1", "--device cuda:1: torch sees 1 GPU, which is cuda:0 here"),
        (2, "cuda:2", "--device cuda:2: torch sees 2 GPUs, which are cuda:0 to cuda:1 here"),
        (2, "cuda:1", "cuda:1"),
        (1, "auto", "cuda"),
        (1, "cpu", "cpu"),
    ],
)
def test_a_device_is_found_or_refused(monkeypatch, gpus, name, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if found.startswith("--device"):
        with pytest.raises(BenchmarkError, match=found):
            device.find_device(name)
    else:
        assert device.find_device(name) == torch.device(found)
        with device.using_device(name):
            assert device.current_device() == torch.device(found)


def test_a_sweep_leaves_the_number_of_the_gpu_to_its_launcher(monkeypatch):
    assert parse_sweep(["launch", "--device", "cpu"]).device == "cpu"
    with pytest.raises(BenchmarkError, match="--device cuda:1: the launcher gives each run of a sweep its GPU"):
        parse_sweep(["launch", "--device", "cuda:1"])


def test_runs_on_the_cpu_have_slots_as_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on_cpu, elsewhere = (Command.for_run(argv, tmp_path) for argv in (["--device", "cpu"], ["--steps", "3"]))
    assert [slot.environment for slot in make_slots([on_cpu, on_cpu], parallel=2)] == [{}, {}]
    assert json.dumps([dict(slot.environment) for slot in make_slots([on_cpu, elsewhere])]) == json.dumps(
        [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    )
