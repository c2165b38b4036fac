import csv
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from messages import assert_only_error
from timm.layers import set_fused_attn, use_fused_attn
from torch.utils.flop_counter import FlopCounterMode

from vitlorafa import AdapterError
from vitlorafa.bench import case as cases
from vitlorafa.bench import formulas, machine, measure, methods, plots, tables
from vitlorafa.bench.__main__ import main, make_parser
from vitlorafa.bench.case import Case
from vitlorafa.bench.methods import CORE, METHODS, build, count
from vitlorafa.config import TARGETS

SMALL = Case("test_vit", 4, 32, "float32", rank=4, targets=TARGETS, depth=2)
SUBSETS = [TARGETS, ("q", "v"), ("proj", "fc2"), ("fc1",), ("fc2",)]
SIZES = {"models": "test_vit", "resolution": 32, "batch_size": 2, "depth": 1, "repeats": 1, "warmup": 0, "ranks": 2}
OPTIONS = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def unfused():
    """Attention made of plain products, which the counter of operations knows on every device."""
    before = bool(use_fused_attn())
    set_fused_attn(False)
    yield
    set_fused_attn(before)


@pytest.fixture
def no_child(monkeypatch):
    """The CLI without a fresh process for each method, which takes seconds to import torch."""
    monkeypatch.setattr("vitlorafa.bench.grid.measure_peak", lambda method, case: measure.Peak(3 << 20, 1 << 20))


def possible(case):
    return [method for method in CORE if methods.why_unavailable(method, case) is None]


def stack(case):
    return formulas.Stack.of(cases.build_backbone(case), case.batch_size, case.element)


def count_by_torch(setup, case):
    setup = replace(setup, optimizer=None)  # PEFT's multiplies matrices too
    # The counter leaves out what is computed in place.
    mapping = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        measure.train_step(setup, case, *measure.make_batch(case), lambda: None)
    return counter.get_total_flops()


@pytest.mark.parametrize("targets", SUBSETS, ids="-".join)
def test_operations_by_formula_are_those_torch_counts(unfused, targets):
    case = replace(SMALL, targets=targets)
    sizes = stack(case)
    for method in possible(case):
        assert count(method, case, sizes)[0] == count_by_torch(build(method, case), case), method


def test_operations_of_forward(unfused):
    setup = build("lower_bound", SMALL)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        setup.model(measure.make_batch(SMALL)[0])
    assert formulas.forward_flops(stack(SMALL)) == counter.get_total_flops()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("targets", SUBSETS, ids="-".join)
def test_kept_bytes_by_formula_are_those_measured(targets, precision):
    case = replace(SMALL, targets=targets, precision=precision)
    sizes = stack(case)
    for method in possible(case):
        assert count(method, case, sizes)[1] == measure.measure_saved(build(method, case), case).activations, method


def test_dropout_keeps_nothing_more_in_ours_and_more_in_plain_torch():
    dropping = replace(SMALL, dropout=0.1)
    kept = {
        (case, method): measure.measure_saved(build(method, case), case).activations
        for case in (SMALL, dropping)
        for method in ("lora_fa_separate", "lora_fa_plain")
    }
    assert (
        kept[dropping, "lora_fa_separate"]
        == kept[SMALL, "lora_fa_separate"]
        == count("lora_fa_separate", dropping, stack(SMALL))[1]
    )
    assert kept[dropping, "lora_fa_plain"] > kept[SMALL, "lora_fa_plain"]
    assert count("lora_fa_plain", dropping, stack(SMALL))[1] is None
    assert not {"lora_fa", "lora_fb", "lora"} & set(possible(dropping))


def test_kept_weights_do_not_grow_with_the_batch():
    case = replace(SMALL, precision="bf16")
    cases = [replace(case, batch_size=size) for size in (1, 6)]
    kept = [measure.measure_saved(build("lora_fa_plain", case), case) for case in cases]
    assert kept[0].weights == kept[1].weights > 0
    assert kept[1].activations == 6 * kept[0].activations


@pytest.mark.parametrize("method", CORE)
def test_what_trains(method):
    if reason := methods.why_unavailable(method, SMALL):
        pytest.skip(reason)
    setup = build(method, SMALL)
    before = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    for _ in range(2):  # in the first step a factor's gradient is zero while the other is
        measure.train_step(setup, SMALL, *measure.make_batch(SMALL), lambda: None)
    moved = {name for name, p in setup.model.named_parameters() if not torch.equal(p, before[name])}
    if method in ("lower_bound", "full"):
        assert moved == (set() if method == "lower_bound" else set(before))
    else:
        train = {"lora_fa_plain": "B", "peft_lora": "BA", "peft_lora_fa": "B"}.get(method) or METHODS[method].train
        trained = {f"lora_{factor}" for factor in train} | set(train)
        assert moved == {name for name in before if trained & set(name.split("."))}
        assert sum(before[name].numel() for name in moved) == setup.trainable


def test_every_adapter_starts_as_the_backbone():
    images, _ = measure.make_batch(SMALL)
    with torch.no_grad():
        expected = build("lower_bound", SMALL).model(images)
        for method in possible(SMALL):
            torch.testing.assert_close(build(method, SMALL).model(images), expected, msg=method)


def test_methods_take_turns_in_a_rotating_order():
    names = ["lower_bound", "lora_fa_plain", "lora_fa_separate"]
    setups = {name: build(name, SMALL) for name in names}
    seen = []
    for name, setup in setups.items():
        setup.model.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    advanced = []
    times = measure.time_steps(setups, SMALL, repeats=3, warmup=1, advance=lambda: advanced.append(1))
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert [sorted(each) for each in rounds] == [sorted(names)] * 4
    assert {each[0] for each in rounds[1:]} == set(names)
    assert len(advanced) == 12
    assert [record.method for record in times] == names
    assert all(len(part) == 3 for t in times for part in (t.forward, t.backward, t.optimizer))


def timed(method, *seconds, case=SMALL):
    return measure.Times(case, method, 0, None, list(seconds), [0.0] * len(seconds), [0.0] * len(seconds))


def test_a_ratio_is_taken_within_rounds():
    bound, other = timed("lower_bound", 1.0, 2.0, 10.0), timed("full", 2.0, 4.0, 30.0)
    assert other.ratio(bound) == 2.0
    row = tables.step_rows([bound, other])[1]
    assert (row["ratio_to_lower_bound"], row["ratio_of_medians"], row["step_ms"], row["fastest_ms"]) == (
        2,
        2,
        4000,
        2000,
    )


@pytest.mark.slow
@pytest.mark.skipif(not measure._STATUS.exists(), reason="needs Linux's count of resident memory")
def test_peak_memory_is_that_of_a_fresh_process():
    case = replace(SMALL, batch_size=64, resolution=160)
    peak = measure.measure_peak("lower_bound", case)
    kept = formulas.lower_bound_saved(stack(case))
    assert 0.8 * kept < peak.step <= peak.total


def test_a_failing_process_is_told(monkeypatch):
    monkeypatch.setattr(measure.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"peak memory of lower bound .*exit code 1"):
        measure.measure_peak("lower_bound", SMALL)


def run(tmp_path, *options):
    return main([*OPTIONS, "--output_dir", str(tmp_path / "out"), *options])


def test_command_line(tmp_path, capsys, no_child):
    options = ["--methods", "lower_bound", "full", "lora", "lora_fa", "--plot_ranks", "1", "2", "--device", "cpu"]
    assert run(tmp_path, *options, "--threads", "1") == 0
    output = capsys.readouterr()
    assert output.err == ""  # no bar where nobody watches
    assert "| LoRA-FA |" in output.out
    device = machine.file_name("cpu")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"{what}_{device}.{kind}" for what in ("step", "memory") for kind in ("md", "csv", "json")} | {
        f"{what}_{device}.{kind}" for what in ("memory", "ranks") for kind in ("svg", "png")
    } | {f"ranks_{device}.csv"}
    rows = list(csv.DictReader((tmp_path / "out" / f"step_{device}.csv").open()))
    assert [row["method"] for row in rows] == ["lower bound", "full fine-tuning", "LoRA-FA", "LoRA"]
    assert all(float(row["gflop"]) > 0 and float(row["step_ms"]) > 0 for row in rows)
    rows = list(csv.DictReader((tmp_path / "out" / f"memory_{device}.csv").open()))
    assert all(row["kept_mib"] == row["formula_mib"] for row in rows)
    rows = list(csv.DictReader((tmp_path / "out" / f"ranks_{device}.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert rows[0]["lower bound"] == rows[1]["lower bound"]
    assert float(rows[0]["LoRA-FA"]) < float(rows[1]["LoRA-FA"]) < float(rows[1]["LoRA"])
    source = json.loads((tmp_path / "out" / f"step_{device}.json").read_text())
    assert source["versions"]["torch"] == torch.__version__
    assert source["machine"]["threads"] == 1
    assert source["command"].startswith("python -m vitlorafa.bench --models test_vit")


def test_a_grid_in_one_table_each(tmp_path, capsys):
    grid = [
        "step",
        "--precision",
        "float32",
        "bf16",
        "--dropout",
        "0",
        "0.1",
        "--methods",
        "lower_bound",
        "lora_fa_separate",
    ]
    assert run(tmp_path, *grid) == 0
    assert capsys.readouterr().out.count("| LoRA-FA (separate) |") == 4


def test_a_method_whose_memory_cannot_be_had_leaves_the_others(tmp_path, capsys, monkeypatch):
    def fail(method, case):
        raise RuntimeError("killed")

    monkeypatch.setattr("vitlorafa.bench.grid.measure_peak", fail)
    assert run(tmp_path, "memory", "--methods", "lower_bound", "--plot_ranks") == 0
    output = capsys.readouterr()
    assert output.err == "killed\n"
    assert "| - | - |" in output.out


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert run(tmp_path, "--dry_run") == 0
    assert "| LoRA-FA |" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--models", "vit_tiny_244"], ["model", "'vit_tiny_244'", "'vit_tiny_"]),
        (["--models", "resnet18"], ["timm", "resnet18", "img_size=32"]),
        (["--methods", "lora_fx"], ["method", "'lora_fx'", "'lora_f"]),
        (["--methods", "baseline"], ["'baseline'", "'lower_bound'"]),
        (["--precision", "bf61"], ["precision", "'bf61'", "'bf16'"]),
        (["--precision", "bfloat16"], ["precision", "'bfloat16'", "'bf16'"]),
        (["--targets", "q,w"], ["target", "'w'"]),
        (["steps"], ["'steps'", "'step'"]),
        (["--device", "tpu"], ["device", "'tpu'"]),
        (["--device", "cuda:99"], ["--device cuda:99", "cpu"]),
        (["--device", "meta"], ["--device meta", "cpu", "cuda"]),
        (["--ranks", "0"], ["--ranks", "at least 1", "0"]),
        (["--ranks", "65"], ["--ranks 65", "64", "test_vit"]),
        (["--resolution", "33"], ["resolution 33", "16 px", "test_vit"]),
        (["--dropout", "1"], ["dropout", "below 1", "1.0"]),
        (["--repeats", "many"], ["--repeats", "'many'", "python -m vitlorafa.bench --help"]),
        (["--redraw", "nowhere"], ["nowhere", "step_*.csv", "--output_dir"]),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(tmp_path, capsys, options, named):
    assert run(tmp_path, *options) == 2
    assert_only_error(capsys.readouterr(), named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "method"),
    [
        ("LoRA-FA", "lora_fa"),
        ("lora", "lora"),
        ("LoRA-FB (separate)", "lora_fb_separate"),
        ("PEFT LoRA", "peft_lora"),
        ("DoRA (PEFT)", "peft_dora"),
        ("dora", "peft_dora"),
        ("lower bound", "lower_bound"),
        ("floor", "lower_bound"),
        ("B-folded", "lora_fa"),
        ("BA-separate", "lora_separate"),
        ("lora_plain", "lora_fa_plain"),
    ],
)
def test_labels_and_names_of_earlier_versions_name_methods(typed, method):
    assert methods.find_method(typed) == method


def test_a_method_has_one_colour_and_marker_of_its_own_in_all_plots():
    variants = {METHODS[name].label.removesuffix(" (separate)") for name in CORE}
    assert len({METHODS[name].colour for name in CORE}) == len(variants)
    assert len(set(plots._MARKERS.values())) == len(CORE)


def test_redrawing_from_the_files_gives_the_same_files(tmp_path, capsys, no_child):
    options = [
        "--methods",
        "lower_bound",
        "LoRA-FA",
        "--plot_ranks",
        "1",
        "2",
        "--device",
        "cpu",
        "--dropout",
        "0",
        "0.1",
    ]
    assert run(tmp_path, *options) == 0
    folder = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.suffix in (".md", ".svg", ".png"):
            path.unlink()
    assert main(["--redraw", str(folder)]) == 0
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    # A CSV has six digits, which the tables round to fewer; plots may differ where a pixel hangs on the seventh.
    assert {name for name in after if after[name] != before[name]} <= {n for n in after if n.endswith((".svg", ".png"))}


def test_a_table_made_from_the_csv_is_the_same_even_where_rounding_twice_gives_another_digit(tmp_path):
    rows = [{"step_ms": 1.4349996}]  # 1.435 in six digits, and then 1.44; 1.43 if rounded once
    headers = {"step_ms": ("step, ms", "{:.2f}")}
    (tmp_path / "step.csv").write_text(tables.csv_text(rows))
    read = tables.read_csv(tmp_path / "step.csv")
    assert "{:.2f}".format(read[0]["step_ms"]) != "{:.2f}".format(rows[0]["step_ms"])
    assert tables.table(rows, headers) == tables.table(read, headers)


def test_without_peft_its_methods_are_left_out_with_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    assert run(tmp_path, "--dry_run", "--methods", "lower_bound", "peft_lora") == 0
    output = capsys.readouterr()
    assert output.err.startswith("LoRA (PEFT) ") and "pip install 'vitlorafa[peft]'" in output.err
    assert output.err.count("\n") == 1 and "LoRA (PEFT)" not in output.out
    assert run(tmp_path, "--methods", "peft_lora") == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and "pip install 'vitlorafa[peft]'" in output.err


@pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT")
def test_peft_takes_all_of_qkv_or_none():
    assert "all of q, k and v" in methods.why_unavailable("peft_lora", replace(SMALL, targets=("q", "v")))
    assert methods.why_unavailable("peft_lora", replace(SMALL, targets=("proj",))) is None
    model = build("peft_lora", replace(SMALL, targets=("proj",))).model
    adapted = [name for name, _ in model.named_modules() if name.endswith(".lora_A")]
    assert adapted == [f"base_model.model.blocks.{i}.attn.proj.lora_A" for i in range(2)]


def test_models_without_a_formula_are_measured_all_the_same():
    scaled = Case("deit3_small_patch16_224", 2, 32, "float32", 2, TARGETS, depth=1)
    assert stack(scaled) is None
    assert count("lora_fa", scaled, None) == (None, None)
    row = tables.step_rows(
        measure.time_steps(
            {"lower_bound": build("lower_bound", scaled)}, scaled, repeats=1, warmup=0, advance=lambda: None
        )
    )
    assert row[0]["gflop"] is None
    with pytest.raises(AdapterError, match="beit_base_patch16_224 .* VisionTransformer"):
        cases.build_backbone(replace(scaled, model="beit_base_patch16_224"))


@pytest.mark.gpu
def test_command_line_on_a_gpu(tmp_path, capsys):
    assert run(tmp_path, "--device", "cuda", "--precision", "bf16") == 0
    rows = list(csv.DictReader((tmp_path / "out" / f"memory_{machine.file_name('cuda')}.csv").open()))
    assert all(float(row["peak_mib"]) > float(row["step_peak_mib"]) > 0 for row in rows)


def test_weighing_leaves_nothing_behind():
    setup = build("lora_fa", SMALL)
    seen = []
    setup.model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, y: seen.append(weakref.ref(y)))
    measure.measure_saved(setup, SMALL)
    assert len(seen) == 2 and not any(ref() is not None for ref in seen)


def test_what_was_saved_for_a_graph_that_is_gone_is_not_kept():
    setup = build("lora_fa", SMALL)
    before = measure.measure_saved(setup, SMALL)

    def waste(module, inputs):
        (module.weight.detach().clone().requires_grad_() ** 2).exp().detach()

    setup.model.head.register_forward_pre_hook(waste)
    assert measure.measure_saved(setup, SMALL) == before


@pytest.mark.slow
def test_a_console_without_a_character_or_a_closed_pipe_ends_in_no_traceback():
    words = ["--dry_run", "--models", "vit_tiny_patch16_224", "--depth", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitlorafa.bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    process.stdout.close()
    with process.stderr:
        assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 0


def test_paths_of_the_bench_are_expanded(monkeypatch):
    monkeypatch.setenv("WHERE", "/place")
    assert make_parser().parse_args(["--output_dir", "$WHERE/bench"]).output_dir == "/place/bench"
