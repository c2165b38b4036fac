"""The table of all methods: what it counts, and its files."""

import csv
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from messages import assert_only_error
from timm.layers import set_fused_attn, use_fused_attn

from vitlorafa import AdapterError
from vitlorafa.bench import case as cases
from vitlorafa.bench import costs, formulas, machine, measure, methods, methods_table, plots
from vitlorafa.bench.__main__ import main
from vitlorafa.bench.case import Case
from vitlorafa.bench.methods import METHODS, build, count
from vitlorafa.config import TARGETS

RANK, DEPTH = 4, 2
SMALL = Case("test_vit", 4, 32, "float32", rank=RANK, targets=TARGETS, depth=DEPTH, head=True)
POSSIBLE = [method for method in METHODS if methods.why_unavailable(method, SMALL) is None]
SIZES = {"model": "test_vit", "resolution": 32, "batch_size": 2, "depth": 1, "rank": 2, "repeats": 1, "warmup": 0}
OPTIONS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))] + ["--device", "cpu"]
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about kernels that were not compiled


@pytest.fixture
def no_rate(monkeypatch):
    """Without the large matmul, which takes seconds."""
    monkeypatch.setattr(methods_table, "matmul_rate", lambda dtype, device: 1e12)


def run(tmp_path, *options):
    return main(["methods", *OPTIONS, "--output_dir", str(tmp_path / "out"), *options])


def read(tmp_path):
    with (tmp_path / "out" / f"methods_{machine.file_name('cpu')}.csv").open() as file:
        return list(csv.DictReader(file))


def shapes():
    """(d_in, d_out) of every linear layer of the blocks; a fused qkv is one."""
    stack = cases.stack_of(SMALL)
    return list(stack.linears.items())


# Trained parameters of a block's linear layers, without the head.
def ours(factors):
    def count_in(name, d_in, d_out):
        projections = 3 if name == "qkv" else 1
        sizes = {"A": projections * RANK * d_in, "B": RANK * d_out}
        return sum(sizes[factor] for factor in factors)

    return count_in


CLOSED = {
    "lora_fa": ours("B"),
    "lora_fa_separate": ours("B"),
    "lora_fa_plain": ours("B"),
    "lora_fa_corrected": ours("B"),
    "lora_fb": ours("A"),
    "lora": ours("BA"),
    "lora_pro": ours("BA"),
    "pissa": ours("BA"),
    "lora_bf16": ours("BA"),
    "lora_nf4": ours("BA"),
    "lora_fa_int8": ours("B"),
    "peft_lora": lambda name, d_in, d_out: RANK * (d_in + d_out),
    "peft_rslora": lambda name, d_in, d_out: RANK * (d_in + d_out),
    "peft_pissa": lambda name, d_in, d_out: RANK * (d_in + d_out),
    "peft_velora": lambda name, d_in, d_out: RANK * (d_in + d_out),
    "peft_lora_fa": lambda name, d_in, d_out: RANK * d_out,
    "peft_mica": lambda name, d_in, d_out: RANK * d_in,
    "peft_dora": lambda name, d_in, d_out: RANK * (d_in + d_out) + d_out,
    "peft_adalora": lambda name, d_in, d_out: 3 * RANK // 2 * (d_in + d_out + 1),
    "peft_vera": lambda name, d_in, d_out: RANK + d_out,
    "peft_ia3": lambda name, d_in, d_out: d_in if name == "fc2" else d_out,
    "peft_hra": lambda name, d_in, d_out: RANK * d_in,
    "peft_loha": lambda name, d_in, d_out: 2 * RANK * (d_in + d_out),
    "peft_fourierft": lambda name, d_in, d_out: 1000,
    "peft_miss": lambda name, d_in, d_out: RANK * d_out,
    "peft_road": lambda name, d_in, d_out: 2 * d_out // 2 * 1,
    "peft_c3a": lambda name, d_in, d_out: d_in * d_out // 64,
}


@pytest.mark.parametrize("method", CLOSED)
def test_trained_parameters_are_those_of_the_closed_formula(method):
    if reason := methods.why_unavailable(method, SMALL):
        pytest.skip(reason)
    cost = costs.measure_cost(method, SMALL, build(method, SMALL))
    assert cost.adapter == DEPTH * sum(CLOSED[method](name, *shape) for name, shape in shapes())
    assert cost.head == 10 * cases.stack_of(SMALL).dim + 10


def test_targets_of_its_own():
    dim = cases.stack_of(SMALL).dim
    for case in (SMALL, replace(SMALL, targets=("fc1",))):
        cost = costs.measure_cost("lora_qv", case, build("lora_qv", case))
        assert cost.adapter == DEPTH * 2 * RANK * (dim + dim)
        assert cost.formula == cost.saved.activations


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_base_in_bf16_takes_half_the_bytes(precision):
    case = replace(SMALL, precision=precision)
    dense, half = (costs.measure_cost(method, case, build(method, case)) for method in ("lora_fa", "lora_fa_bf16"))
    linears = [shape for _, shape in shapes()]
    assert dense.frozen - half.frozen == DEPTH * 2 * sum((d_in + 1) * d_out for d_in, d_out in linears)
    assert half.saved.activations == dense.saved.activations == half.formula
    # W + s·B·A is kept where base and matmuls differ in their format; otherwise it is formed again from the base. The
    # first layer needs neither, because nothing before it trains.
    sizes = DEPTH * [d_in * d_out for d_in, d_out in linears]
    assert dense.saved.weights - half.saved.weights == {"float32": -4, "bf16": 2}[precision] * sum(sizes[1:])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantised_base_takes_fewer_bytes():
    sizes = [d_in * d_out for _, (d_in, d_out) in shapes()]
    dense = costs.measure_cost("lora", SMALL, build("lora", SMALL))
    int8 = costs.measure_cost("lora_int8", SMALL, build("lora_int8", SMALL))
    nf4 = costs.measure_cost("lora_nf4", SMALL, build("lora_nf4", SMALL))
    rows = sum(d_out for _, (_, d_out) in shapes())
    assert dense.frozen - int8.frozen == DEPTH * (3 * sum(sizes) - 4 * rows)
    assert dense.frozen - nf4.frozen > DEPTH * 3.3 * sum(sizes)
    assert int8.saved.activations == nf4.saved.activations == dense.saved.activations


def test_trained_parts_of_the_model():
    model = cases.build_backbone(SMALL)
    expected = {
        "linear_probe": 0,
        "bitfit": sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias")) - 10,
        "norm_tuning": sum(p.numel() for name, p in model.named_parameters() if "norm" in name),
        "last_blocks": sum(p.numel() for p in [*model.blocks.parameters(), *model.norm.parameters()]),
        "full": sum(p.numel() for name, p in model.named_parameters() if "head" not in name),
    }
    for method, number in expected.items():
        assert costs.measure_cost(method, SMALL, build(method, SMALL)).adapter == number, method


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_kept_bytes_are_those_of_the_formula_where_the_head_trains(precision):
    case = replace(SMALL, precision=precision, depth=3)  # of which two train where "last blocks" do
    sizes, compared = cases.stack_of(case), set()
    for method in POSSIBLE:
        if (expected := count(method, case, sizes)[1]) is not None:
            assert measure.measure_saved(build(method, case), case).activations == expected, method
            compared.add(method)
    assert compared >= {"full", "linear_probe", "bitfit", "norm_tuning", "last_blocks", "lora_fa", "lora_separate"}
    assert find_spec("peft") is None or compared >= {"peft_lora", "peft_pissa", "peft_mica", "peft_lora_fa"}


@pytest.mark.parametrize("method", POSSIBLE)
def test_kept_bytes_are_linear_in_the_batch(method):
    """What the largest batch relies on, for every method, at two number formats' worth of casts."""
    case = replace(SMALL, precision="bf16", depth=1, batch_size=2)
    setup = build(method, case)
    line = measure.measure_saved(setup, case)
    third = replace(case, batch_size=5)
    assert measure._saved_bytes(setup, third, 5) == line.weights + 5 * line.activations // 2


@pytest.mark.parametrize("method", ["full", "lora_fa", "lora_fa_separate", "bitfit", "linear_probe"])
def test_parts_of_the_memory(method):
    setup = build(method, SMALL)
    cost = costs.measure_cost(method, SMALL, setup)
    trained = cost.adapter + cost.head
    tensors = sum(p.requires_grad for p in setup.model.parameters())
    assert cost.trained == 4 * trained
    assert cost.optimizer == 8 * trained + 4 * tensors  # AdamW's two moments, and its counter of steps
    assert cost.frozen == 4 * sum(p.numel() for p in setup.model.parameters() if not p.requires_grad)
    image = cost.saved.activations // 4 + 3 * 32 * 32 * 4
    assert cost.total == cost.frozen + 8 * trained + cost.optimizer + cost.saved.weights + 4 * image


@needs_peft
def test_state_beside_the_optimizers_counts():
    ada = costs.measure_cost("peft_adalora", SMALL, build("peft_adalora", SMALL))
    tensors = 3 * DEPTH * 4 + 2
    assert ada.optimizer == 8 * (ada.adapter + ada.head) + 4 * tensors + 12 * ada.adapter


def test_the_largest_batch_is_the_last_that_fits():
    cost = costs.measure_cost("lora_fa", SMALL, build("lora_fa", SMALL))
    for memory in (cost.total, cost.total + cost.per_image - 1):
        assert cost.largest_batch(memory) == SMALL.batch_size
    assert cost.largest_batch(cost.total - 1) == SMALL.batch_size - 1
    assert cost.largest_batch(cost.fixed - 1) == 0
    assert costs.scale_cost(cost, 8).total == cost.total + 4 * cost.per_image


def test_operations_of_the_model_itself():
    fused = bool(use_fused_attn())
    set_fused_attn(False)
    try:
        stack = formulas.Stack.of(cases.build_backbone(SMALL), SMALL.batch_size, 4)
    finally:
        set_fused_attn(fused)
    bound = formulas.lower_bound_flops(stack)
    assert costs.model_flops("lower_bound", SMALL) == bound
    assert costs.model_flops("full", SMALL) == formulas.full_flops(stack)
    assert costs.model_flops("linear_probe", SMALL) == formulas.probe_flops(stack)
    # Back to the first layer only: its own input needs no gradient. The head's weight has one more matmul.
    first = 2 * stack.rows * stack.dim * 3 * stack.dim
    for method in ("lora_fa", "lora", "lora_fa_plain", *(["peft_dora"] if find_spec("peft") else [])):
        assert costs.model_flops(method, SMALL) == bound - first + formulas.head_flops(stack), method
    assert bool(use_fused_attn()) == fused


def test_models_share_the_memory_of_equal_weights():
    backbone, setup = cases.build_backbone(SMALL), build("lora_fa", SMALL)
    images, _ = measure.make_batch(SMALL)
    before = setup.model(images)
    costs.share_weights(setup.model, backbone)
    assert torch.equal(setup.model(images), before)
    own = costs.count_bytes([*setup.model.parameters(), *backbone.parameters()])
    factors = sum(p.numel() for name, p in setup.model.named_parameters() if "lora_" in name)
    head = sum(p.numel() for p in setup.model.head.parameters())
    alone = costs.count_bytes(backbone.parameters())
    assert alone < own <= alone + 4 * (factors + head)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("24 gb", 24 * 10**9), ("1.5e9", 1_500_000_000), ("512MiB", 512 << 20), ("7b", 7)],
)
def test_sizes_of_memory(text, size):
    assert costs.parse_memory(text) == size


def test_the_table_has_every_method_and_the_figure_is_made(tmp_path, capsys, no_rate):
    assert run(tmp_path, "--memory", "1GiB", "1MiB") == 0
    output = capsys.readouterr()
    # torch's compiler, which PEFT's BOFT imports, warns on machines with CUDA's compiler but without a GPU.
    expected = ("is left out", "cpp_extension.py")
    assert [line for line in output.err.splitlines() if not any(words in line for words in expected)] == []
    rows = read(tmp_path)
    assert [row["method"] for row in rows] == [METHODS[method].label for method in POSSIBLE]
    assert all(f"| {METHODS[method].label} |" in output.out for method in POSSIBLE)
    assert all(float(row["mfu"]) > 0 and float(row["step_ms"]) > 0 for row in rows)
    parts = [key for _, _, keys in plots._PARTS for key in keys]
    for row in rows:  # the bars of the figure end where the table's sum says
        assert sum(float(row[key]) for key in parts) == pytest.approx(float(row["total_mib"]), rel=1e-4)
    assert all(int(row["batch_in_1GiB"]) > int(row["batch_in_1MiB"]) for row in rows)
    folder, device = tmp_path / "out", machine.file_name("cpu")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(files) == {f"methods_{device}.{kind}" for kind in ("csv", "json", "md", "png", "svg")}
    assert "largest batch in 1MiB" in files[f"methods_{device}.md"].decode()
    assert '"command": "python -m vitlorafa.bench methods --model' in files[f"methods_{device}.json"].decode()
    assert main(["--redraw", str(folder)]) == 0
    assert (folder / f"methods_{device}.md").read_bytes() == files[f"methods_{device}.md"]


def test_one_method_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch, no_rate):
    def fail(model, case):
        raise AdapterError("PEFT refuses it")

    monkeypatch.setitem(METHODS, "bitfit", replace(METHODS["bitfit"], prepare=fail))
    assert run(tmp_path, "--methods", "lower_bound", "BitFit", "LoRA-FA") == 0
    assert capsys.readouterr().err == "BitFit is left out: PEFT refuses it\n"
    assert [row["method"] for row in read(tmp_path)] == ["lower bound", "LoRA-FA"]


def test_an_interruption_while_steps_are_timed_keeps_the_counts(tmp_path, capsys, monkeypatch, no_rate):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods_table, "time_steps", interrupt)
    assert run(tmp_path, "--methods", "lower_bound", "lora_fa") == 130
    assert str(tmp_path / "out") in capsys.readouterr().err
    assert [(float(row["kept_mib"]) > 0, row["step_ms"]) for row in read(tmp_path)] == [(True, "")] * 2


def test_without_rounds_nothing_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(methods_table, "time_steps")
    assert run(tmp_path, "--methods", "lora_fa", "--repeats", "0") == 0
    assert "| LoRA-FA |" in capsys.readouterr().out
    assert [row["mfu"] for row in read(tmp_path)] == [""]


def test_without_peft_its_methods_are_left_out_with_the_line_that_installs_it(tmp_path, capsys, monkeypatch, no_rate):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    assert run(tmp_path, "--methods", "linear_probe", "peft_dora") == 0
    assert capsys.readouterr().err == "DoRA (PEFT) is left out: PEFT is not installed: pip install 'vitlorafa[peft]'\n"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--methods", "dorra"], ["method", "'dorra'", "'dora'"]),
        (["--memory", "lots"], ["--memory lots", "8GiB"]),
        (["--memory", "0GiB"], ["--memory 0GiB", "8GiB"]),
        (["--rank", "65"], ["--rank 65", "64", "test_vit"]),
        (["--rank", "0"], ["--rank", "at least 1"]),
        (["--warmup", "-1"], ["--warmup", "at least 0"]),
        (["--repeats", "-1"], ["--repeats", "at least 0"]),
        (["--precision", "bf61"], ["precision", "'bf61'", "'bf16'"]),
        (["--device", "tpu"], ["device", "'tpu'"]),
        (["--model", "vit_tiny_244"], ["model", "'vit_tiny_244'"]),
        (["--modell", "a"], ["--modell", "see python -m vitlorafa.bench methods --help"]),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(tmp_path, capsys, options, named):
    assert run(tmp_path, *options) == 2
    assert_only_error(capsys.readouterr(), named)
    assert not (tmp_path / "out").exists()
