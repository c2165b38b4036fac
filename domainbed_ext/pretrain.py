"""Makes the packaged backbone's weights: `python -m domainbed_ext.pretrain`.

Trains `vit_pico_patch8_32` to name drawn glyphs and shapes (`datasets/glyphs.py`), without any image of the
benchmark, and writes it without its head, in half precision, with a JSON of how it was made. Equal seed, thread
count and library versions give equal bytes.

    python -m domainbed_ext.pretrain --out weights.safetensors --steps 6000 --threads 2
"""

import argparse
import hashlib
import json
import platform
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import matplotlib
import PIL
import safetensors
import timm
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save
from torch.nn import functional as F

from domainbed_ext.datasets import glyphs
from domainbed_ext.errors import BenchmarkError, exit_cleanly
from domainbed_ext.tiny_vit import NAME, WEIGHTS

_TEST_BATCHES = 8
_TEST_SEED = 10**6  # added to the seed: test images are drawn from a stream of their own


def pretrain(
    steps: int, batch_size: int, lr: float, seed: int, progress: Progress
) -> tuple[torch.nn.Module, float]:
    """Trains the backbone on freshly drawn images, each seen once.

    Args:
        steps: number of AdamW steps; the rate rises over the first tenth and falls by a cosine to zero.
        batch_size: images per step.
        lr: highest learning rate.
        seed: of the initial weights and of the images.
        progress: where to show the steps.

    Returns:
        The model, with its glyph head, and its accuracy on other drawn images (0 to 1).
    """
    torch.manual_seed(seed)
    bank = glyphs.render()
    model = timm.create_model(NAME, num_classes=len(glyphs.CLASSES))
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    task = progress.add_task("pretraining", total=steps)
    for _ in range(steps):
        images, labels = glyphs.draw(bank, batch_size, generator)
        loss = F.cross_entropy(model(images * 2 - 1), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(task, advance=1, description=f"pretraining, loss {loss.item():.3f}")

    model.eval()
    generator.manual_seed(seed + _TEST_SEED)
    with torch.inference_mode():
        right = 0
        for _ in range(_TEST_BATCHES):
            images, labels = glyphs.draw(bank, batch_size, generator)
            right += int((model(images * 2 - 1).argmax(1) == labels).sum())
    return model, right / (_TEST_BATCHES * batch_size)


def main(argv: list[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: its arguments; those of the process if None.
    """
    description, _, example = (__doc__ or "").partition("\n\n    ")
    parser = argparse.ArgumentParser(
        prog="python -m domainbed_ext.pretrain",
        description=description,
        epilog="example:\n  " + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=WEIGHTS,
        help="weights to write; a .json goes beside them (default: the packaged file)",
    )
    parser.add_argument("--steps", type=int, default=6000, help="training steps (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch_size, args.threads) < 1:
        raise BenchmarkError("--steps, --batch_size and --threads must be at least 1")

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    console = Console(stderr=True)
    try:
        with Progress(console=console, disable=not console.is_terminal) as progress:
            model, accuracy = pretrain(args.steps, args.batch_size, args.lr, args.seed, progress)
    finally:
        torch.set_num_threads(threads)

    state = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    data = save({name: weight for name, weight in state.items() if not name.startswith("head.")})
    record = {
        "model": NAME,
        "made_by": shlex.join(
            ["python", "-m", "domainbed_ext.pretrain", *(argv if argv is not None else sys.argv[1:])]
        ),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "data": f"{len(glyphs.CLASSES)} drawn classes, see domainbed_ext/datasets/glyphs.py",
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "threads": args.threads,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "glyph_accuracy": round(accuracy, 4),
        "versions": {
            "python": platform.python_version(),
            **{
                package.__name__: package.__version__
                for package in (torch, timm, matplotlib, PIL, safetensors)
            },
        },
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(data)
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise BenchmarkError(f"cannot write {args.out}: {error.strerror}") from error
    print(f"{args.out}: {len(data):,} bytes, glyph accuracy {accuracy:.1%}, {record['minutes']} min")


if __name__ == "__main__":
    exit_cleanly(main)
