"""Questions about defaults that only a GPU can answer: backend, compiling, CUDA graphs, determinism, transfers, tiles.

Each question is asked on its own: one that fails leaves a row that says why, and the next one is asked.
"""

import gc
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_ext.algorithms.base import Algorithm
from domainbed_ext.algorithms.names import get_algorithm_class
from domainbed_ext.bench import report, timing
from domainbed_ext.hparams_registry import resolve
from domainbed_ext.models.determinism import compute_reproducibly
from domainbed_ext.models.precision import DTYPES
from domainbed_ext.runs.profile import wait
from vitlorafa.bench.kernels import TILES, Tiles, kernel_calls, using_backend, using_tiles
from vitlorafa.bench.machine import matmul_rate
from vitlorafa.bench.tables import Row

STEPS = 10  # of a timed call: values are read after the last one
Asked = Iterator[Row]
Setting = Callable[[], AbstractContextManager[None]]
"""Function that makes the context of a setting."""


def measure(args: Namespace, output_dir: Path) -> None:
    """Asks the questions, and writes the answers after each.

    Args:
        args: Arguments of `python -m domainbed_ext.bench`.
        output_dir: Folder for the table.
    """
    compute_reproducibly(torch.device(report.device()))
    rows: list[Row] = []
    for name in args.ask:
        if name in NEED_A_CARD and report.device() == "cpu":
            report.print_need(f"question {name}")
            continue
        try:
            for row in QUESTIONS[name](args):
                rows.append({"question": name, **row})
                report.write("questions", "Which defaults are fastest", rows, output_dir, show=False)
        except Exception as error:  # a compiler may raise any, and later questions do not depend on this one
            first = (str(error).strip().splitlines() or ["no message"])[0].replace("|", "/")
            rows.append({"question": name, **_row("", "failed", f"{type(error).__name__}: {first}", "")})
            print(f"warning: question {name} failed: {first}")
    if rows:
        report.write("questions", "Which defaults are fastest", rows, output_dir)


def _row(case: str, variant: str, value: Any, unit: str, ratio: float | None = None) -> Row:
    return {
        "case": case,
        "variant": variant,
        "value": f"{value:.4g}" if isinstance(value, float) else value,
        "unit": unit,
        "× first variant": None if ratio is None else f"{ratio:.3f}",
    }


def _compared(case: str, variants: Mapping[str, Callable[[], object]], rounds: int, calls: int = STEPS) -> Asked:
    """The milliseconds of each variant, timed in interleaved rounds, and their ratio to the first variant's."""
    seconds = timing.interleaved(variants, rounds)
    first = next(iter(variants))
    for name, times in seconds.items():
        yield _row(case, name, 1e3 * median(times) / calls, "ms", timing.ratio(seconds, name, first))


def _algorithm(args: Namespace, backbone: str, name: str = "BOnly", **hparams: Any) -> Algorithm:
    chosen = {**resolve(name, "PACS"), "backbone": backbone, "weights": "none", "image_size": args.image_size}
    chosen |= {"targets": "all", **hparams}
    made: Algorithm = get_algorithm_class(name)((3, args.image_size, args.image_size), 7, 1, chosen)
    return made


def _batch(args: Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    return images, torch.arange(args.batch_size, device=device) % 7


def _steps(algorithm: Algorithm, batch: tuple[Tensor, Tensor], reads: bool = False) -> None:
    """Some training steps; `reads` waits for the values of each one."""
    for _ in range(STEPS):
        values = algorithm.update([batch])
        if reads:
            [float(value) for value in values.values()]
    wait(algorithm.device)


def ask_rate(args: Namespace) -> Asked:
    """The rate of large matmuls by number format."""
    for name, dtype in DTYPES.items():
        if report.device() == "cpu" and name == "fp16":
            continue  # some processors emulate it, in minutes
        yield _row("large matmul", name, matmul_rate(dtype, report.device()) / 1e12, "TFLOP/s")


def ask_values(args: Namespace) -> Asked:
    """The cost of reading the values of each step."""
    for backbone in args.backbones:
        algorithm = _algorithm(args, backbone)
        batch = _batch(args, algorithm.device)
        variants = {
            "read later": partial(_steps, algorithm, batch),
            "each step": partial(_steps, algorithm, batch, True),
        }
        yield from _compared(backbone, variants, args.rounds)


def ask_transfers(args: Namespace) -> Asked:
    """The time of copying a batch of images to the device."""
    device = torch.device(report.device())
    images = torch.zeros(args.batch_size, 3, args.image_size, args.image_size, dtype=torch.uint8)

    def copy(source: Tensor) -> None:
        for _ in range(STEPS):
            source.to(device, non_blocking=True)
        wait(device)

    variants = {"pageable memory": partial(copy, images)}
    if device.type == "cuda":
        variants["pinned memory"] = partial(copy, images.pin_memory())
    yield from _compared(f"{args.batch_size} images", variants, args.rounds)


def ask_determinism(args: Namespace) -> Asked:
    """The cost of deterministic algorithms, which attention's gradients have."""
    change = partial(_changed, torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms)
    for backbone in args.backbones:
        yield from _settings(args, backbone, {"any": partial(change, False), "deterministic": partial(change, True)})


def ask_backend(args: Namespace) -> Asked:
    """Whether Triton's kernels are faster than plain PyTorch."""
    backends = {name: partial(using_backend, name) for name in ("eager", "triton")}
    for backbone, rank, dropout in product(args.backbones, (8, 64), (0.0, 0.1)):
        case = f"{backbone}, rank {rank}, dropout {dropout:g}"
        yield from _settings(args, backbone, backends, case, rank=rank, adapter_dropout=dropout)


def ask_tf32(args: Namespace) -> Asked:
    """What TF32 would save a run in float32."""
    change = partial(_changed, torch.get_float32_matmul_precision, torch.set_float32_matmul_precision)
    for backbone in args.backbones:
        settings = {"float32": partial(change, "highest"), "TF32": partial(change, "high")}
        yield from _settings(args, backbone, settings, precision="float32")


def _settings(args: Namespace, backbone: str, settings: Mapping[str, Setting], case: str = "", **hparams: Any) -> Asked:
    """The milliseconds of a training step under each setting."""
    algorithm = _algorithm(args, backbone, **hparams)
    batch = _batch(args, algorithm.device)

    def steps(setting: Setting) -> None:
        with setting():
            _steps(algorithm, batch)

    variants = {name: partial(steps, setting) for name, setting in settings.items()}
    yield from _compared(case or backbone, variants, args.rounds)


@contextmanager
def _changed(get: Callable[[], Any], change: Callable[[Any], object], value: Any) -> Iterator[None]:
    """A setting of torch's with another value, and with its own again at the end."""
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


def ask_compile(args: Namespace) -> Asked:
    """Whether a compiled model is faster."""
    for backbone, name in product(args.backbones[:1], ("BOnly", "FullFT")):  # compiling takes long
        plain, compiled = (_algorithm(args, backbone, name) for _ in range(2))
        compiled.backbone.compile()
        batch = _batch(args, plain.device)
        variants = {"eager": partial(_steps, plain, batch), "compiled": partial(_steps, compiled, batch)}
        yield from _compared(f"{name}, {backbone}", variants, args.rounds)


def ask_graphs(args: Namespace) -> Asked:
    """Whether a CUDA graph of forward and backward is faster."""
    for backbone in args.backbones:
        algorithm = _algorithm(args, backbone)
        images, labels = _batch(args, algorithm.device)

        def compute(algorithm: Algorithm = algorithm, images: Tensor = images, labels: Tensor = labels) -> None:
            low = DTYPES[algorithm.precision]
            # The cache of casts would outlive the graph's memory.
            with torch.autocast("cuda", low, enabled=low != torch.float32, cache_enabled=False):
                logits = algorithm.logits(images)
            F.cross_entropy(logits.float(), labels).backward()

        def eager(algorithm: Algorithm = algorithm, compute: Callable[[], None] = compute) -> None:
            for _ in range(STEPS):
                compute()
            wait(algorithm.device)

        graph = _captured(algorithm, compute)

        def replayed(algorithm: Algorithm = algorithm, graph: torch.cuda.CUDAGraph = graph) -> None:
            for _ in range(STEPS):
                graph.replay()
            wait(algorithm.device)

        yield from _compared(backbone, {"eager": eager, "graph": replayed}, args.rounds)


def _captured(algorithm: Algorithm, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
    algorithm.train()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture needs libraries that are ready, and gradients that are there
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph


def ask_memory(args: Namespace) -> Asked:
    """How much memory fragments, which expandable segments would save."""
    for backbone in args.backbones:
        gc.collect()  # models of earlier questions
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        algorithm = _algorithm(args, backbone, "FullFT")
        images, labels = _batch(args, algorithm.device)
        for share in (1, 2, 3, 1):  # batches of other sizes, as of the last step of an evaluation
            algorithm.update([(images[::share], labels[::share])])
        wait(algorithm.device)
        reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        yield _row(f"FullFT, {backbone}", "allocated", allocated / 2**30, "GiB")
        yield _row(f"FullFT, {backbone}", "reserved", reserved / 2**30, "GiB", reserved / allocated)


def ask_evaluation(args: Namespace) -> Asked:
    """Which evaluation batch is fastest."""
    for backbone in args.backbones:
        algorithm = _algorithm(args, backbone).eval()
        sizes = [args.batch_size * factor for factor in (2, 4, 8, 16)]
        images = torch.randn(sizes[-1], 3, args.image_size, args.image_size, device=algorithm.device)

        def evaluate(size: int, algorithm: Algorithm = algorithm, images: Tensor = images) -> None:
            with torch.inference_mode():
                for part in images.split(size):
                    algorithm.predict(part)
            wait(algorithm.device)

        variants = {f"{size} images": partial(evaluate, size) for size in sizes}
        yield from _compared(f"{sizes[-1]} images, {backbone}", variants, args.rounds, calls=1)


def ask_tiles(args: Namespace) -> Asked:
    """Which sizes of tiles are fastest for Triton's kernels."""
    N, width, rank = 197 * args.batch_size, 768, 8
    device = torch.device(report.device())
    for name, call in kernel_calls(N, width, rank, device).items():
        variants = {str(tiles): partial(_tiled, call, device, tiles) for tiles in TILES}
        yield from _compared(f"{name}, {N} × {width}, rank {rank}", variants, args.rounds)


def _tiled(call: Callable[[], object], device: torch.device, tiles: Tiles) -> None:
    with using_tiles(tiles):
        for _ in range(STEPS):
            call()
    wait(device)


QUESTIONS: dict[str, Callable[[Namespace], Asked]] = {
    "rate": ask_rate,
    "backend": ask_backend,
    "values": ask_values,
    "determinism": ask_determinism,
    "graphs": ask_graphs,
    "transfers": ask_transfers,
    "evaluation": ask_evaluation,
    "tf32": ask_tf32,
    "memory": ask_memory,
    "tiles": ask_tiles,
    "compile": ask_compile,  # the slowest
}
NEED_A_CARD = ("backend", "graphs", "tf32", "memory", "compile", "tiles")
