"""Quantised frozen weights under the adapters of runs."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from domainbed_ext import evaluate, train
from domainbed_ext.algorithms.names import describe, get_algorithm_class
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.hparams_registry import default_hparams, random_hparams, resolve
from domainbed_ext.runs.folder import RunFolder

FORMATS = pytest.mark.parametrize("format", ["int8", "nf4"])


def make(name, **hparams):
    torch.manual_seed(0)
    settings = {**resolve(name, "DigitsShift"), "weights": "none", "precision": "float32", **hparams}
    return get_algorithm_class(name)((3, 32, 32), 10, 3, settings)


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 3, 32, 32, generator=draw), torch.arange(4)) for _ in range(3)]


@pytest.mark.parametrize(
    ("method", "format", "precision"), [("BA", "nf4", "float32"), ("BOnly", "int8", "bf16"), ("AOnly", "nf4", "bf16")]
)
def test_only_the_frozen_weights_of_blocks_are_quantised_and_training_is_nearly_the_same(method, format, precision):
    pytest.importorskip("bitsandbytes")
    plain, ours = make(method, precision=precision), make(f"{method}@quantise={format}", precision=precision)
    trained = {name: p.shape for name, p in plain.named_parameters() if p.requires_grad}
    assert trained == {name: p.shape for name, p in ours.named_parameters() if p.requires_grad}
    integers = {name.rpartition(".")[0] for name, p in ours.named_parameters() if not p.is_floating_point()}
    layers = ("attn.qkv.base", "attn.proj.base", "mlp.fc1.base", "mlp.fc2.base")
    assert integers == {f"backbone.blocks.{index}.{layer}" for index in range(4) for layer in layers}
    losses = [(plain.update(batches())["loss"], ours.update(batches())["loss"]) for _ in range(3)]
    for expected, loss in losses:
        assert loss == pytest.approx(expected, rel=0.1) and loss != expected
    state = ours.training_state()
    assert not [name for name in state["tensors"] if "codes" in name or "scales" in name]
    other = make(f"{method}@quantise={format}", precision=precision)
    other.load_training_state(state)
    assert other.update(batches()) == ours.update(batches())


@FORMATS
def test_a_run_records_it_saves_an_adapter_alone_and_evaluates_to_its_numbers(format, make_args, capsys):
    pytest.importorskip("bitsandbytes")
    args = make_args(algorithm=f"BOnly@quantise={format}", checkpoint_freq=1)
    assert train.run(args, lambda share: None) == 0
    folder = RunFolder(args.output_dir)
    assert {record["hparams"]["quantise"] for record in folder.records()} == {format}
    saved = [load_file(path) for path in Path(args.output_dir).rglob("adapter.safetensors")]
    assert saved and {tensor.dtype for tensors in saved for tensor in tensors.values()} == {torch.float32}
    capsys.readouterr()
    assert evaluate.main(["--run", str(folder.path)]) == 0
    assert "All 8 accuracies are as recorded." in capsys.readouterr().out


def test_it_is_off_and_not_drawn_and_other_methods_refuse_it():
    for method in ("BA", "BOnly", "AOnly"):
        assert default_hparams(method, "PACS")["quantise"] is None
        assert all(random_hparams(method, "PACS", seed)["quantise"] is None for seed in range(5))
        assert describe(method).hyperparameters["quantise"].later
    for method in ("LP", "FullFT", "BitFit", "ERM"):
        with pytest.raises(BenchmarkError, match="'quantise' belongs to BA, .*BOnly, AOnly.*: leave it out"):
            resolve(f"{method}@quantise=nf4", "PACS")
    with pytest.raises(BenchmarkError, match="unknown format of quantised weights 'int4': .*int8.*"):
        make("BA@quantise=int4")


def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch):
    from vitlorafa.ops import quantised

    quantised.bitsandbytes.cache_clear()
    for name in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BenchmarkError, match=r"BA on vit_pico_patch8_32: .*pip install 'vitlorafa\[quant\]'"):
        make("BA@quantise=nf4")
    quantised.bitsandbytes.cache_clear()
