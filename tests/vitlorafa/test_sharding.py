"""Adapters of a model that two processes share: by DDP, and in parts by `fully_shard`."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import build, images, perturb

from vitlorafa import AdapterConfig, inject, load_adapter

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
    from vitlorafa import AdapterConfig, AdapterError, inject, io, load_adapter, merge, remove, save_adapter

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
    write = io._write
    io._write = lambda path, data: (written.append(path.parent.name), write(path, data))
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
        save_adapter(parallel, folder / "alone")
    for _ in range(5):  # both at once, each a model of its own
        save_adapter(trained(seed=rank), folder / "both", head=True)
    dist.barrier()
    load_adapter(build("test_vit"), folder / "both")  # all of one save, whoever came last
    names = {"vitlorafa", "peft", "again", "ddp", "alone", "both"} if rank == 0 else {"both"}
    assert set(written) == names, written
    dist.destroy_process_group()
"""


def trained(seed=0):
    model = inject(build("test_vit"), AdapterConfig(rank=2, seed=seed), train_head=True)
    torch.manual_seed(seed)
    perturb(model)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_save_and_load(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    root = TESTS.parents[1]  # where the package may be imported from without being installed
    pipes = {"cwd": root, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(tmp_path), str(rank), str(TESTS)], **pipes) for rank in (0, 1)]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output
            assert "AdapterWarning" not in output
    finally:
        for process in processes:
            process.kill()
    model = trained()
    for name in ("vitlorafa", "ddp"):
        other = load_adapter(build("test_vit"), tmp_path / name)
        assert torch.equal(other(images(model)), model(images(model)))
        assert torch.equal(load_file(tmp_path / name / "adapter.safetensors")["head.weight"], model.head.weight)
    assert not list(tmp_path.rglob("*.partial"))
