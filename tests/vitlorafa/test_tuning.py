import json
import threading

import pytest
import timm
import torch
from small_models import build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitlorafa import AdapterError, AdapterWarning, evaluation_batch, fastest_evaluation_batch, tuning, use_ways
from vitlorafa.kept_ways import MachineFile, machine_file
from vitlorafa.tuning import Question, answers, choose, identity, note, pin

QUESTION = Question("attention", "of a test", ("torch", "slow", "fast"))
NAME = "attention: of a test"
SECONDS = {"torch": 0.01, "slow": 0.02, "fast": 0.005}


@pytest.fixture
def ask(clock):
    """Asks a question whose ways count their calls and take some time."""

    def ask(question=QUESTION, seconds=SECONDS):
        def call(way):
            calls.append(way)
            if isinstance(seconds[way], Exception):
                raise seconds[way]
            clock.now += seconds[way]

        return choose(question, lambda: {way: lambda way=way: call(way) for way in question.ways})

    calls = ask.calls = []
    return ask


@pytest.fixture
def restart(monkeypatch):
    """What this process knows is forgotten, as in a new one."""

    def restart():
        monkeypatch.setattr(tuning, "_state", tuning._State())
        machine_file.cache_clear()

    return restart


def content():
    return json.loads(machine_file().path.read_text(encoding="utf-8"))


# Which way


def test_the_fastest_way_is_chosen_kept_and_not_timed_again(ask, restart):
    assert ask() == "fast" and answers() == {NAME: "fast"}
    assert ask.calls == list(QUESTION.ways) * (len(ask.calls) // 3) and len(ask.calls) >= 9  # interleaved
    kept = content()["answers"][NAME]
    assert kept["way"] == "fast" and kept["seconds"] == pytest.approx(
        {way: s + 0.001 for way, s in SECONDS.items()}, rel=0.01
    )
    count = len(ask.calls)
    assert ask() == "fast"
    restart()
    assert ask() == "fast" and answers() == {NAME: "fast"} and len(ask.calls) == count


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        ({"torch": 0.1, "slow": 0.2, "fast": 0.097}, "torch"),  # not faster by the margin
        ({"torch": 0.1, "slow": 0.09, "fast": 0.089}, "slow"),  # nor is the last
        ({"torch": 0.1, "slow": RuntimeError(), "fast": 0.05}, "fast"),
        ({"torch": RuntimeError(), "slow": 0.1, "fast": 0.05}, "torch"),
        ({"torch": 99, "slow": 0.1, "fast": 0.05}, "torch"),  # no time left for others
    ],
)
def test_the_default_stays_unless_another_is_clearly_faster(ask, seconds, way):
    assert ask(seconds=seconds) == way


def test_a_slow_sample_is_called_three_times_and_a_fast_one_more_often(ask):
    ask(seconds=dict.fromkeys(SECONDS, 0.05))
    assert len(ask.calls) == 3 * tuning._FEWEST_CALLS
    ask.calls.clear()
    ask(Question("attention", "another", QUESTION.ways, seconds=1.0), dict.fromkeys(SECONDS, 0))
    assert len(ask.calls) == 3 * tuning._MOST_CALLS


def test_a_sample_that_computes_more_may_take_longer(clock):
    def call(size):
        clock.now += {1: 0.01, 4: 0.03}[size]
        return float(size)

    question = Question("evaluation_batch", "of a test", ("1", "4"))
    assert choose(question, lambda: {way: lambda way=way: call(int(way)) for way in question.ways}) == "4"


# What decides


def test_a_run_decides_before_the_user_and_the_user_before_the_machine(ask, restart):
    ask()
    ask.calls.clear()
    use_ways({"attention": "slow"})
    assert ask() == "slow"
    use_ways({"attention": "slow", NAME: "torch"})  # the question before its kind
    assert ask() == "torch"
    pin({NAME: "fast", "linear: of earlier steps": "torch"})
    assert ask() == "fast" and answers() == {NAME: "fast", "linear: of earlier steps": "torch"}
    pin({"attention": "slow"})
    assert ask() == "slow" and answers() == {NAME: "slow"}
    pin({})
    assert answers() == {} and ask() == "torch"
    use_ways({})
    assert ask() == "fast" and not ask.calls


@pytest.mark.parametrize("fix", [pin, use_ways])
def test_a_way_that_is_not_here_is_replaced_by_the_default(ask, fix):
    fix({NAME: "quantum"})
    with pytest.warns(AdapterWarning, match="no way 'quantum' here, only torch, slow, fast: torch is used"):
        assert ask() == "torch"
    assert ask() == "torch" and not ask.calls


def test_a_kept_way_that_is_not_here_is_timed_again(ask, restart):
    ask()
    text = machine_file().path.read_text(encoding="utf-8")
    machine_file().path.write_text(text.replace('"way": "fast"', '"way": "older"'), encoding="utf-8")
    restart()
    assert ask() == "fast" and content()["answers"][NAME]["way"] == "fast"


def test_off_takes_the_default_and_reads_nothing(ask, monkeypatch, restart):
    ask()
    restart()
    ask.calls.clear()
    monkeypatch.setenv("VITLORAFA_TUNE", "off")
    assert ask() == "torch" and not ask.calls
    use_ways({"attention": "fast"})
    assert ask() == "fast"


def test_small_problems_take_the_default_unless_a_way_is_set(ask):
    small = Question("attention", "small", QUESTION.ways, matters=False)
    assert ask(small) == "torch" and answers() == {}
    use_ways({"attention": "fast"})
    assert ask(small) == "fast" and answers() == {"attention: small": "fast"} and not ask.calls


def test_a_single_way_is_no_question(ask):
    assert ask(Question("linear", "alone", ("torch",))) == "torch" and not ask.calls and answers() == {}


def test_unknown_kinds_are_refused():
    with pytest.raises(AdapterError, match="unknown kind of question 'atention': did you mean 'attention'"):
        use_ways({"atention": "torch"})


def test_the_environment_sets_ways(monkeypatch):
    monkeypatch.setenv("VITLORAFA_WAYS", '{"attention": "fast"}')
    assert tuning._read_environment() == {"attention": "fast"}
    for text in ("fast", "[]", '"attention"'):
        monkeypatch.setenv("VITLORAFA_WAYS", text)
        with pytest.raises(AdapterError, match="VITLORAFA_WAYS=.* is no JSON object: give it ways by kind"):
            tuning._read_environment()


# The file


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"facts": 1}', "null", b"\xff\xfe", None])
def test_a_damaged_file_is_ignored_and_rewritten(ask, restart, damage):
    ask()
    if damage is None:  # of another machine
        text = json.dumps(content() | {"facts": {"device": "another"}})
        machine_file().path.write_text(text, encoding="utf-8")
    else:
        machine_file().path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    restart()
    ask.calls.clear()
    assert ask() == "fast" and ask.calls and content()["answers"][NAME]["way"] == "fast"


def test_without_a_folder_to_write_nothing_is_timed(ask, tmp_path):
    (tmp_path / "ways").touch()  # a file where the folder should be
    with pytest.warns(AdapterWarning, match="torch's own are used; set VITLORAFA_CACHE") as warned:
        assert ask() == "torch" and ask(Question("linear", "another", QUESTION.ways)) == "torch"
    assert len(warned) == 1 and not ask.calls and identity()["token"] is None


def test_a_disk_that_is_full_leaves_the_default(ask, monkeypatch):
    def full(self, found):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MachineFile, "write", full)
    with pytest.warns(AdapterWarning, match="No space left on device"):
        assert ask() == "torch"


def test_limits_on_instructions_and_versions_have_files_of_their_own(clock, monkeypatch):
    paths = {machine_file().path}
    for name, value in (("ATEN_CPU_CAPABILITY", "avx2"), ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("OMP_NUM_THREADS", "3")):
        monkeypatch.setenv(name, value)
        machine_file.cache_clear()
        paths.add(machine_file().path)
    assert len(paths) == 3  # a run sets its number of threads, which is in the question
    monkeypatch.setattr(torch, "__version__", "9.9")
    machine_file.cache_clear()
    paths.add(machine_file().path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 3000")
    assert len({*paths, machine_file("cuda").path}) == 5 and "gpu_3000" in machine_file("cuda").path.name


def test_two_processes_that_start_together_agree(ask, monkeypatch):
    """Whoever comes second finds the first one's answer, though its own clock says otherwise."""
    own, inside, done = tuning._measure, threading.Event(), []

    def other():
        done.append(ask(seconds={"torch": 0.01, "slow": 0.001, "fast": 0.02}))

    def measure(*args):
        if not inside.is_set():
            inside.set()
            second.start()  # which waits for the lock
            second.join(0.2)
            assert not done
        return own(*args)

    second = threading.Thread(target=other)
    monkeypatch.setattr(tuning, "_measure", measure)
    assert ask() == "fast"
    second.join(30)
    assert done == ["fast"] and set(ask.calls) == set(SECONDS) and content()["answers"][NAME]["way"] == "fast"


def test_identity_changes_with_what_ways_follow_from(ask, restart, monkeypatch):
    before = identity()
    ask()
    restart()
    assert identity() == before  # another answer does not change those that were there
    pin({NAME: "fast"})
    assert identity() == before  # which it would be anyway
    pin({NAME: "slow"})
    assert identity() != before
    pin({})
    tuning.forget()
    assert identity()["token"] not in (None, before["token"])
    monkeypatch.setenv("VITLORAFA_TUNE", "off")
    assert identity() == {"token": None, "fixed": {}}


def test_what_was_computed_earlier_is_noted(ask):
    note({NAME: "slow", "linear: other": "torch"})
    assert answers() == {NAME: "slow", "linear: other": "torch"}


# Nobody notices


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_caller_does_not_notice(clock):
    seen, x = [], torch.ones(3, requires_grad=True)

    def sample():
        y = (torch.ones(4, 4) @ torch.ones(4, 4)).sum() + (x * torch.ones(3)).sum()
        seen.append((y.dtype, y.requires_grad, torch.is_autocast_enabled("cpu"), torch.get_num_threads()))

    state, packed = torch.get_rng_state(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t)
    counters = FlopCounterMode(display=False), Calls(), torch.profiler.profile()
    with counters[0] as flops, counters[1] as called, hooks, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with counters[2] as profiled:
            choose(QUESTION, lambda: sample() or dict.fromkeys(QUESTION.ways, sample))
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    assert set(seen) == {(torch.float32, True, False, torch.get_num_threads())} and len(seen) > 9
    assert not flops.get_total_flops() and not called.count and not packed and x.grad is None
    assert not [event for event in profiled.key_averages() if event.key == "aten::mm"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("threads", [1, 2])
def test_samples_have_the_callers_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert tuning.apart(torch.get_num_threads) == threads == torch.get_num_threads()
        with_matmul = tuning.apart(lambda: (torch.ones(300, 300) @ torch.ones(300, 300)) is None)
        assert not with_matmul and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_sample_asks_without_starting_a_timing(ask):
    inner = Question("linear", "within", QUESTION.ways)
    inside = []

    def sample():
        inside.append(ask(inner))

    assert choose(QUESTION, lambda: dict.fromkeys(QUESTION.ways, sample)) == "torch"
    assert set(inside) == {"torch"} and not ask.calls and answers() == {NAME: "torch"}
    other = Question("attention", "that runs first", QUESTION.ways)
    choose(other, lambda: inside.append(ask(inner)) or dict.fromkeys(QUESTION.ways, sample))  # before the clock starts
    assert inside[-1] == "fast" and answers()["linear: within"] == "fast"


# The batch of evaluation


def test_the_batch_size_is_timed_on_one_block(clock, monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=108, num_heads=3)
    sizes, own = [], type(model.blocks[0]).forward

    def forward(self, x):
        assert not self.training and torch.is_inference_mode_enabled()
        sizes.append(len(x))
        clock.now += 0.004 * len(x) / 16 * (0.5 if len(x) == 32 else 1)
        return own(self, x[:1])

    monkeypatch.setattr(type(model.blocks[0]), "forward", forward)
    assert fastest_evaluation_batch(model.train()) == 32
    assert model.blocks[0].training and set(sizes) == set(evaluation_batch.SIZES)
    (question,) = [name for name in answers() if name.startswith("evaluation_batch")]
    count = len(sizes)
    with torch.autocast("cpu", torch.bfloat16):
        fastest_evaluation_batch(model)
    assert len(sizes) > count and f"{question.replace('float32', 'bfloat16')}" in answers()
    use_ways({"evaluation_batch": "16"})
    assert fastest_evaluation_batch(model) == 16


def test_a_slow_block_leaves_the_default(clock, monkeypatch):
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    sizes = []

    def forward(self, x):
        sizes.append(len(x))
        clock.now += 0.01 * len(x)
        return x

    monkeypatch.setattr(type(model.blocks[0]), "forward", forward)
    assert fastest_evaluation_batch(model) == 64 and sizes == [16, 16]  # of which the first answers what it asks


def test_other_models_have_the_default(clock):
    assert (
        fastest_evaluation_batch(timm.create_model("test_resnet"))
        == fastest_evaluation_batch(torch.nn.Linear(2, 2))
        == 64
    )
    assert fastest_evaluation_batch(build("test_vit")) == 64 and answers() == {}  # too small to matter
