"""Whether a target of this project is met is decided right, and only where the target applies."""

from bench_targets import compare

from vitlorafa.bench import formulas, measure, methods
from vitlorafa.bench.case import Case, stack_of
from vitlorafa.config import TARGETS

CASE = Case("vit_small_patch16_224", 16, 224, "bf16", 8, TARGETS)
OTHER = Case("test_vit", 4, 32, "float32", 4, TARGETS, depth=2)


def timed(method, seconds, case=CASE):
    return measure.Times(case, method, 0, None, [seconds], [0.0], [0.0])


def test_a_limit_on_time():
    rows = compare([timed("lower_bound", 1.0), timed("lora_fa", 1.05)], [])
    assert [(row["at most"], row["measured"], row["met"]) for row in rows] == [("1.06 × lower bound", "1.050", "yes")]
    rows = compare([timed("lower_bound", 1.0), timed("lora_fa", 1.07)], [])
    assert [row["met"] for row in rows] == ["no"]
    assert not compare([timed("lower_bound", 1.0, OTHER), timed("lora_fa", 1.05, OTHER)], [])
    assert not compare([timed("lower_bound", 1.0), timed("lora", 1.05), timed("lora_fa_plain", 1.05)], [])


def test_a_limit_on_memory():
    sizes = stack_of(CASE)
    bound = formulas.lower_bound_saved(sizes)
    limit = bound * 1.01 + formulas.rank_saved(sizes, methods.adapter_of("lora_fa", CASE))
    for size, met in ((int(limit) - 9, "yes"), (int(limit) + 9, "no")):
        memory = [
            measure.Memory(CASE, name, measure.Saved(saved, 0), None, measure.Peak(None, None))
            for name, saved in (("lower_bound", bound), ("lora_fa", size))
        ]
        assert [row["met"] for row in compare([], memory)] == [met]
