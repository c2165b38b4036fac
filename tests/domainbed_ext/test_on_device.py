"""Runs on a GPU where there is one, and the same tests on the CPU."""

import contextlib
import gc
import json
import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as F

from domainbed_ext import train
from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.full import FullFT
from domainbed_ext.algorithms.registry import ALGORITHMS
from domainbed_ext.data.loader import stream
from domainbed_ext.launchers.slots import list_visible_devices
from domainbed_ext.models import determinism
from domainbed_ext.models.device import using_device
from domainbed_ext.models.inputs import Inputs
from domainbed_ext.objectives.base import Batch
from domainbed_ext.objectives.registry import OBJECTIVES
from domainbed_ext.runs import checkpoint, device_errors, features, feed, step_values
from domainbed_ext.runs import setup as run_setup
from domainbed_ext.runs.feed import Feed
from domainbed_ext.runs.folder import RunFolder
from domainbed_ext.runs.profile import product_rate
from domainbed_ext.runs.step_values import UnreadValues
from domainbed_ext.system.exit_codes import ExitCode
from domainbed_ext.system.interrupts import Interrupted
from tests.domainbed_ext.fault_injection import outcome
from tests.domainbed_ext.launched_processes import execute, launch, train_command
from tests.domainbed_ext.objectives.small_algorithms import batches, make

SMALL = '{"batch_size": 4}'
METHODS = [
    *ALGORITHMS,
    *(f"BOnly+{name}" for name in OBJECTIVES),
    "BOnly@clip_grad=1.0",
    "BOnly@adapter_dropout=0.1",
    "BOnly@gradient_correction=true",
]
WAITS = {"LoRAPro"}  # its eigenvalues are checked on the CPU
# Numbers that an update reads from tensors that are on the CPU with a GPU too: Mixup's and MixStyle's random draws, the
# steps of annealed objectives, and seeds of dropout. DomainBed's Adam reads its steps too, which it does not on a GPU.
READ_ON_CPU = {
    **{"BOnly+Mixup": 3, "BOnly+MixStyle": 1, "BOnly+IRM": 2, "BOnly+VREx": 2},
    **dict.fromkeys(("ERM", "BOnly@adapter_dropout=0.1"), math.inf),
}


@pytest.fixture(autouse=True)
def settings_of_torch():
    """What runs on a GPU set in the whole process is as before after each test."""
    before = torch.are_deterministic_algorithms_enabled()
    tf32 = torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cudnn.allow_tf32 = tf32


class Reads(TorchDispatchMode):
    """Counts what reads a number or a size from a tensor, for which a GPU's host waits."""

    READS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in self.READS
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_waits():
    """Waiting for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def made(device, name, **hparams):
    with using_device(device.type):
        return make(name, **hparams)


def on(device, minibatches):
    return [(images.to(device), labels.to(device)) for images, labels in minibatches]


@pytest.mark.parametrize("name", METHODS)
def test_an_update_does_not_wait_for_the_device(device, name):
    determinism.compute_reproducibly(device)  # as runs do: an operation that cannot be reproduced is an error
    algorithm = made(device, name)
    assert algorithm.leaves_values == (device.type != "cpu")
    algorithm.leaves_values = True
    minibatches = on(device, batches())
    algorithm.update(minibatches)  # sets up libraries, kernels and the optimizer's state
    if device.type == "cuda" and name in WAITS:
        values = algorithm.update(minibatches)
    elif device.type == "cuda":
        with without_waits():
            values = algorithm.update(minibatches)
    else:
        with Reads() as reads:
            values = algorithm.update(minibatches)
        assert reads.count <= READ_ON_CPU.get(name, 0)
    assert all(math.isfinite(float(value)) for value in values.values())


def test_images_are_normalised_without_a_wait(device, monkeypatch):
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, device=device)
    inputs = Inputs(mean=(0.1, 0.2, 0.3))
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), inputs.mean, inputs.std)
    inputs.ready(images)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, None)  # each copies from the CPU
    with without_waits() if device.type == "cuda" else contextlib.nullcontext():
        ready = inputs.ready(images)
    assert torch.equal(ready, expected)


def test_annealed_objectives_count_steps_on_the_cpu(device):
    algorithm = made(device, "BOnly+IRM", irm_penalty_anneal_iters=1)
    algorithm.update(on(device, batches()))
    assert algorithm.objective.steps.device.type == "cpu" and int(algorithm.objective.steps) == 1
    other = made(device, "BOnly+IRM", irm_penalty_anneal_iters=1)
    other.load_training_state(checkpoint.copied(algorithm.training_state()))
    assert other.objective.steps.device.type == "cpu" and int(other.objective.steps) == 1


def test_domains_of_images_are_made_on_the_device(device):
    with Reads() as reads:
        domains = Batch(torch.zeros(5, 1, device=device), torch.zeros(5, device=device), (2, 3)).domains
    assert domains.tolist() == [0, 0, 1, 1, 1] and domains.device.type == device.type and not reads.count


def run(args, progress=lambda share: None):
    return RunFolder(args.output_dir), train.run(args, progress)


def test_values_that_are_read_later_are_the_same(device, make_args, tmp_path, few_evaluated, monkeypatch):
    monkeypatch.setattr(step_values, "MOST", 2)
    records = []
    for later in (False, True):
        build = Algorithm.__init__

        def built(self, *args, build=build, later=later, **kwargs):
            build(self, *args, **kwargs)
            self.leaves_values = later

        with monkeypatch.context() as patch:
            patch.setattr(Algorithm, "__init__", built)
            args = make_args(
                steps=5, checkpoint_freq=2, hparams=SMALL, device=device.type, output_dir=str(tmp_path / str(later))
            )
            folder, code = run(args)
        assert code == 0
        records.append(folder.records())
    for one, two in zip(*records, strict=True):
        assert list(one) == list(two)
        for each in (one, two):
            assert each.pop("step_time") > 0
            each["args"].pop("output_dir", None)  # records of a run share their arguments
            each.pop("run")
            each.pop("mem_gb")  # tensors that wait take some bytes
        assert one == two


def test_unread_values_are_read_in_their_order_and_the_wait_is_the_last_steps():
    unread = UnreadValues()
    unread.add(0, {"loss": 1.5}, {}, 0.1)
    assert unread.are_due and [each.update for each in unread.read()] == [{"loss": 1.5}]
    for step in range(step_values.MOST):
        assert not unread.are_due or not step
        losses = torch.tensor([step, step + 0.5])
        unread.add(step, {"loss": torch.tensor(float(step)), "share": 0.25}, dict(zip("ab", losses, strict=True)), 0.1)
    assert unread.are_due
    read = list(unread.read())
    assert [each.update for each in read] == [{"loss": float(step), "share": 0.25} for step in range(step_values.MOST)]
    assert [each.losses for each in read] == [{"a": step, "b": step + 0.5} for step in range(step_values.MOST)]
    assert {each.seconds for each in read[:-1]} == {0.1} and read[-1].seconds > 0.1 and not list(unread.read())


def test_a_run_that_diverges_names_the_step_although_it_is_read_later(make_args, few_evaluated, monkeypatch):
    update = FullFT.update

    def diverge(self, *args):
        update(self, *args)
        self.calls = getattr(self, "calls", 0) + 1
        return {"loss": torch.tensor(math.nan if self.calls == 3 else 1.0)}

    monkeypatch.setattr(FullFT, "update", diverge)
    folder, code = run(make_args(steps=6, algorithm="FullFT", hparams=SMALL))
    assert code == 0 and folder.records()[-1]["first_nonfinite_step"] == 2
    folder, code = run(
        make_args(steps=6, algorithm="FullFT", hparams=SMALL, stop_on_nan=True, output_dir=f"{folder.path}2")
    )
    assert code == ExitCode.FAILED and "diverged at step 2: loss is nan" in folder.failure()


@pytest.mark.parametrize("algorithm", ["BOnly@adapter_dropout=0.1", "FullFT", "LP"])
def test_runs_on_a_device_are_the_same_and_resume_to_the_same(device, make_args, tmp_path, few_evaluated, algorithm):
    def arguments(name):
        words = {"steps": 6, "checkpoint_freq": 2, "hparams": SMALL, "algorithm": algorithm, "device": device.type}
        return make_args(**words, save_steps=2, output_dir=str(tmp_path / name))

    def interrupt(share):
        if share >= 0.5:
            raise Interrupted

    for name in ("first", "second"):
        assert run(arguments(name))[1] == 0
    assert run(arguments("stopped"), interrupt)[1] == ExitCode.INTERRUPTED
    assert run(arguments("stopped"))[1] == 0
    assert "resumes after" in "".join(path.read_text() for path in (tmp_path / "stopped").glob("*.txt"))
    first, second, stopped = (outcome(tmp_path / name) for name in ("first", "second", "stopped"))
    for records, _, _ in (first, second, stopped):
        for record in records:
            del record["mem_gb"]
    assert first[:2] == second[:2] == stopped[:2]


def test_a_record_says_what_it_was_computed_on(device, make_args, few_evaluated):
    folder, code = run(make_args(hparams=SMALL, device=device.type))
    (record,) = folder.records()
    on_gpu = device.type == "cuda"
    assert code == 0 and bool(record["machine"]["gpu"]) == on_gpu and (record["mem_gb"] > 0) == on_gpu
    assert not on_gpu or record["precision"] in ("bf16", "float32")


def test_random_states_of_the_device_are_restored(device, tmp_path):
    torch.rand(2, device=device)
    checkpoint.save(tmp_path, 1, checkpoint.random_states())
    drawn = [torch.rand(3, device=device).tolist() for _ in range(2)]
    state, warnings = checkpoint.load(tmp_path)
    checkpoint.set_random_states(state)
    assert not warnings and [torch.rand(3, device=device).tolist() for _ in range(2)] == drawn
    assert bool(state["cuda"]) == torch.cuda.is_initialized()


def test_a_run_on_the_cpu_does_not_start_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert checkpoint.random_states()["cuda"] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_copied_from_pinned_memory(device, make_args, workers, monkeypatch):
    devices, read = [], feed.stream
    monkeypatch.setattr(feed, "stream", lambda *args: devices.append(args[4].type) or read(*args))
    setup = run_setup.set_up(make_args(hparams=SMALL, device=device.type, workers=workers))
    loaded = Feed(setup, setup.make_algorithm())
    (batch, *_) = loaded.training(range(1))
    assert devices == [device.type] and all(images.device.type == device.type for images, _ in batch)
    data = [(torch.zeros(2, 3), torch.zeros(2))] * 3
    seen = list(stream(data, range(3), workers, lambda batch: batch[0].is_pinned(), device))
    assert seen == [device.type == "cuda"] * 3


def test_features_are_copied_once(device, make_args, monkeypatch):
    setup = run_setup.set_up(make_args(algorithm="LP", hparams=SMALL, device=device.type))
    algorithm = setup.make_algorithm()
    images = Feed(setup, algorithm).images.evaluation[0]
    devices, read = [], features.stream
    monkeypatch.setattr(features, "stream", lambda *args: devices.append(args[4]) or read(*args))
    computed = features.compute(algorithm, images, setup.inputs, 100)
    assert (
        [each.type for each in devices] == [device.type]
        and computed.device.type == "cpu"
        and len(computed) == len(images)
    )
    again = features.compute(algorithm, images, setup.inputs, 100, workers=2)
    assert torch.equal(computed, again) and computed.isfinite().all()


def test_logits_of_devices_are_near(device, make_args, few_evaluated):
    args = make_args(hparams=SMALL, device=device.type, precision="float32")
    setup = run_setup.set_up(args)
    run_setup.set_up_process(setup.args)
    here, cpu = (
        setup.make_algorithm(),
        run_setup.make_algorithm(
            run_setup.replace(setup.args, device="cpu"), setup.hparams, setup.inputs, setup.dataset.classes, 3
        ),
    )
    images = torch.randn(4, *setup.inputs.shape)
    with torch.inference_mode():
        ours, expected = (algorithm.eval().predict(images).cpu() for algorithm in (here, cpu))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)  # TF32 would be off by 1e-3


def test_set_up_asks_a_gpu_for_the_same_result_each_time(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    determinism.compute_reproducibly(torch.device("cpu"))
    assert not asked and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # as when the run's record asked for its name
    determinism.compute_reproducibly(torch.device("cuda"))
    assert asked == [True] and not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic
    monkeypatch.setenv(determinism.VARIABLE, "off")
    determinism.compute_reproducibly(torch.device("cuda"))
    assert asked == [True, False]


def test_a_gpu_that_was_used_before_is_warned_of(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    determinism.compute_reproducibly(torch.device("cpu"))
    determinism.compute_reproducibly(torch.device("cuda"))
    assert asked == [False] and "set CUBLAS_WORKSPACE_CONFIG=:4096:8 before it starts" in capsys.readouterr().err


def out_of_memory_above(count, monkeypatch):
    """Lets an update of more images than `count` run out of memory."""
    update = Algorithm.update

    def limited(self, minibatches, unlabeled=None):
        if sum(len(labels) for _, labels in minibatches) > count:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return update(self, minibatches, unlabeled)

    monkeypatch.setattr(Algorithm, "update", limited)


@pytest.mark.parametrize(
    ("fits", "sentence"),
    [
        (
            3 * 5,
            "a step of batch_size 16 does not fit into the memory of the GPU, and 4 fits: give --hparams batch_size=4; "
            "with accumulate=4 a step has as many images as now",
        ),
        (
            2,
            "a step of batch_size 16 does not fit into the memory of the GPU, nor does a smaller one: choose a smaller",
        ),
    ],
)
def test_out_of_memory_is_a_sentence_with_a_batch_size_that_fits(make_args, monkeypatch, capsys, fits, sentence):
    out_of_memory_above(fits, monkeypatch)
    folder, code = run(make_args(hparams='{"batch_size": 16}'))
    error = capsys.readouterr().err
    assert code == ExitCode.FAILED and f"error: {sentence}" in error and "Traceback" not in error
    assert sentence in folder.failure()


@pytest.mark.gpu
def test_a_full_gpu_is_a_sentence_with_a_batch_size_that_fits(make_args, capsys):
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 700 * 2**20) / total)
    try:
        _, code = run(
            make_args(
                hparams='{"batch_size": 128}',
                algorithm="FullFT",
                device="cuda",
                backbone="vit_tiny_patch16_224",
                weights="none",
            )
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert code == ExitCode.FAILED and " fits: give --hparams batch_size=" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU has no memory left outside of training steps"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "the GPU has no memory left"),
        (
            RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set"),
            "cumsum_cuda_kernel has no algorithm for a GPU that gives the same result each time: give --device cpu, or",
        ),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_errors_of_a_gpu_are_explained(make_args, monkeypatch, capsys, error, start):
    explained = device_errors.explain(error)
    assert explained is None if start is None else explained.startswith(start)

    def fail(*args):
        raise error

    monkeypatch.setattr(Feed, "accuracies", fail)
    folder, code = run(make_args(hparams=SMALL))
    assert code == ExitCode.FAILED and folder.failure().startswith(start or "RuntimeError: shapes do not match")
    assert ("Traceback" in capsys.readouterr().err) == (start is None)


def test_the_rate_of_matmuls_leaves_random_draws_alone(device):
    algorithm = made(device, "BOnly")
    before = torch.get_rng_state()
    assert product_rate(algorithm) > 0 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_slots_have_the_devices_that_are_there():
    devices = list_visible_devices()
    assert len(devices) == torch.cuda.device_count() and all(devices)


LAUNCHERS = [
    pytest.param("local", {"jobs_per_gpu": 2}, id="local"),
    pytest.param("ray", {"num_gpus": 0.5}, id="ray"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("launcher", "options"), LAUNCHERS)
def test_runs_side_by_side_on_a_gpu_are_those_of_one_alone(tmp_path, launcher, options):
    if launcher == "ray":
        pytest.importorskip("ray")
    words = ("--algorithm", "BOnly", "--steps", "4", "--hparams", SMALL)
    commands = [train_command(tmp_path / f"run{number}", *words) for number in range(2)]
    assert execute(launcher, commands, launch(tmp_path, 2, **options)) == [0, 0]
    assert execute("local", [train_command(tmp_path / "alone", *words)], launch(tmp_path)) == [0]
    records = [
        json.loads((tmp_path / name / "results.jsonl").read_text().splitlines()[-1])
        for name in ("run0", "run1", "alone")
    ]
    assert all(record["machine"]["gpu"] for record in records)
    for record in records:
        del record["step_time"], record["mem_gb"], record["args"]["output_dir"]  # each was read on its own
    assert records[0] == records[1] == records[2]
