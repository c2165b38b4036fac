"""Adapters of a model that two processes share: by DDP, and in parts by `fully_shard` (FSDP2)."""

import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import build, images, perturb

from vitlorafa import AdapterConfig, cast_frozen, correct_gradients, inject, load_adapter, quantise
from vitlorafa.adapted import adapted_state
from vitlorafa.sharding import gather
from vitlorafa.wrappers import named_parameters

TESTS = Path(__file__).parent

PROCESS = """
    import sys
    from datetime import timedelta
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    sys.path.insert(0, sys.argv[3])
    from small_models import build, images
    from test_sharding import trained
    from vitlorafa import AdapterConfig, AdapterError, adapter_folder, inject, load_adapter, merge, remove, save_adapter

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    mesh = init_device_mesh("cpu", (2,))

    def shard(model):
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def refused(call):
        try:
            call()
        except AdapterError as error:
            return str(error)

    written = []
    write = adapter_folder._write
    adapter_folder._write = lambda path, data: (written.append(path.parent.name), write(path, data))
    model, x = trained(), images(build("test_vit"))
    y = model(x).detach()
    for format in ("vitlorafa", "peft"):
        save_adapter(shard(trained()), folder / format, head=True, format=format)
        assert (folder / format).is_dir()  # when it returns, in every process
        assert torch.equal(load_adapter(build("test_vit"), folder / format)(x), y)
        target = shard(inject(build("test_vit"), AdapterConfig(rank=2), train_head=True))
        load_adapter(target, folder / format)
        assert torch.equal(target.eval()(x), y)
        again = load_adapter(shard(trained(seed=5)), folder / format)  # after a state dict
        again.load_state_dict(again.state_dict())
        save_adapter(again, folder / "again", head=True)
        assert torch.equal(load_adapter(build("test_vit"), folder / "again")(x), y)
    assert "before fully_shard or FSDP" in refused(lambda: inject(shard(build("test_vit")), AdapterConfig(rank=2)))
    assert "save the adapter" in refused(lambda: merge(target))
    remove(target)

    parallel = DistributedDataParallel(trained())
    save_adapter(parallel, folder / "ddp", head=True)
    dist.barrier()
    assert torch.equal(load_adapter(build("test_vit"), folder / "ddp")(x), y)
    target = DistributedDataParallel(inject(build("test_vit"), AdapterConfig(rank=2), train_head=True))
    assert torch.equal(load_adapter(target, folder / "ddp").eval()(x), y)
    if rank == 0:  # as many loops do
        save_adapter(parallel, folder / "alone", head=True)
    for _ in range(5):  # both at once, each a model of its own
        save_adapter(trained(seed=rank), folder / "both", head=True)
    dist.barrier()
    load_adapter(build("test_vit"), folder / "both")  # all of one save, whoever came last
    names = {"vitlorafa", "peft", "again", "ddp", "alone", "both"} if rank == 0 else {"both"}
    assert set(written) == names, written
    dist.destroy_process_group()
"""

TRAINING = """
    import sys
    from datetime import timedelta
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    folder, rank, formats = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[4:]
    sys.path.insert(0, sys.argv[3])
    from small_models import build, images, perturb
    from test_sharding import CLOSE, LOW, gradients, shard, steps, trained
    from vitlorafa import AdapterConfig, AdapterError, load_adapter, quantise, save_adapter

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    mesh = init_device_mesh("cpu", (2,))
    x = images(build("test_vit"), 4)
    mine = x[2 * rank : 2 * rank + 2]
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def compare(ours, expected, tolerance, case):
        assert ours.keys() == expected.keys(), case
        for name, value in expected.items():
            off = (ours[name] - value).norm() / value.norm()
            assert off < tolerance, (case, name, float(off))

    cases = [
        ({}, {}),
        ({"compute": "separate", "train": "BA"}, {}),
        ({"gradient_correction": True}, {}),
        ({"gradient_correction": True, "train": "BA"}, {}),
        ({"init_A": "pissa", "init_B": "pissa", "train": "BA"}, {}),
        *(({}, {"format": format}) for format in formats),
    ]
    for config, options in cases:
        expected = steps(trained(**options, **config), x)
        compare(steps(shard(trained(**options, **config), mesh), mine), expected, CLOSE, (config, options))
        if options:  # the others are in test_machinery.py
            parallel = DistributedDataParallel(trained(**options, **config))
            compare(steps(parallel, mine), expected, CLOSE, ("DDP", config, options))
    cases = [({}, {"cast": True})]  # frozen parameters in bf16, trained ones in float32
    cases += [({"compute": "separate"}, {"format": format, "cast": True}) for format in formats]
    for config, options in cases:
        expected = gradients(trained(**options, **config), x, low=True)
        for model in (shard(trained(**options, **config), mesh), DistributedDataParallel(trained(**options, **config))):
            compare(gradients(model, mine, low=True), expected, LOW, ("autocast", config, options))
    for options in ({}, {"cast": True}, *({"format": format} for format in formats)):
        expected = gradients(trained(**options).bfloat16(), x.bfloat16())
        sharded = gradients(shard(trained(**options), mesh, mp_policy=bf16), mine)
        assert {value.dtype for value in sharded.values()} == {torch.float32}
        compare(sharded, expected, LOW, ("mixed precision", options))

    # Casts of the base are cached: not across other weights.
    model = shard(trained(compute="separate"), mesh).eval()
    other = trained(seed=1, compute="separate").eval()
    for block in other.blocks:
        block.attn.qkv.base.weight.data.mul_(1.5)
    shard(other, mesh)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert not torch.equal(model(x), other(x))
    model.load_state_dict(other.state_dict())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(x), other(x))

    for format in formats:
        model = trained(format=format).eval()
        y = model(x).detach()
        sharded = shard(trained(format=format), mesh).eval()
        sharded(x)
        assert torch.equal(sharded(x), y)
        local = sum(p.to_local().nbytes for p in sharded.blocks.parameters())
        assert local < 0.6 * sum(p.nbytes for p in model.blocks.parameters())  # the quantised base is sharded too
        save_adapter(sharded, folder / format, head=True)
        plain = quantise(build("test_vit").requires_grad_(False), format)
        assert torch.equal(load_adapter(plain, folder / format).eval()(x), y)
        fresh = load_adapter(shard(trained(seed=3, format=format), mesh), folder / format).eval()
        assert torch.equal(fresh(x), y)
        again = shard(trained(seed=4, format=format), mesh).eval()
        again.load_state_dict(sharded.state_dict())
        assert torch.equal(again(x), y)
        try:
            quantise(sharded, format)
        except AdapterError as error:
            assert "before fully_shard" in str(error)
        else:
            raise AssertionError("a sharded model was quantised")
    dist.barrier()
    dist.destroy_process_group()
"""
CLOSE = 1e-4  # relative, after a step: of a weight that is an SVD less its residual, rounding has grown
LOW = 0.06  # relative, for bf16: other batches are summed in another order


def shard(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def steps(model, x):
    """Gradients and parameters after two steps, whole, by their names in the plain model."""
    # eps: with Adam's default, an element whose gradient is mere rounding moves as far as any other
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-3)
    if adapted_state(model).config.gradient_correction:
        correct_gradients(optimizer, model)
    for _ in range(2):
        found = gradients(model, x)
        optimizer.step()
    return found | {name: gather(p) for name, p in named_parameters(model) if p.requires_grad}


def gradients(model, x, low=False):
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = model(x).float().sin().mean()
    loss.backward()
    return {f"gradient of {name}": gather(p.grad) for name, p in named_parameters(model) if p.requires_grad}


def trained(seed=0, format=None, cast=False, **config):
    model = inject(build("test_vit"), AdapterConfig(**{"rank": 2, "seed": seed, **config}), train_head=True)
    torch.manual_seed(seed)
    perturb(model)
    torch.nn.init.normal_(model.head.weight)
    if format:
        quantise(model, format)
    if cast:
        cast_frozen(model)
    return model.eval()


def run_two(script, folder, *arguments):
    """Runs a script in two processes, which get the folder, their rank, the folder of tests, and the arguments."""
    root = TESTS.parents[1]  # where the package may be imported from without being installed
    pipes = {"cwd": root, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    code = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    processes = [subprocess.Popen([*code, str(rank), str(TESTS), *arguments], **pipes) for rank in (0, 1)]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
            assert "AdapterWarning" not in output
    finally:
        for process in processes:
            process.kill()


two_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.mark.slow
@two_processes
def test_steps_of_two_processes_are_those_of_one(tmp_path):
    run_two(TRAINING, tmp_path, *(("int8", "nf4") if find_spec("bitsandbytes") else ()))


@pytest.mark.slow
@two_processes
def test_two_processes_save_and_load(tmp_path):
    run_two(PROCESS, tmp_path)
    model = trained()
    for name in ("vitlorafa", "ddp"):
        other = load_adapter(build("test_vit"), tmp_path / name)
        assert torch.equal(other(images(model)), model(images(model)))
        ((_, head),) = [
            item
            for path in (tmp_path / name).glob("*.safetensors")
            for item in load_file(path).items()
            if item[0].endswith("head.weight")
        ]
        assert torch.equal(head, model.head.weight)
    assert not list(tmp_path.rglob("*.partial"))
