"""Regenerates the weights of the embedded backbone: `python -m domainbed_ext.pretrain`.

Trains `vit_pico_patch8_32` to classify drawn glyphs and shapes (`models/glyphs.py`), without any image of the
benchmark. Writes its weights without the head, in half precision, and a JSON file with the settings. The same seed,
thread count and library versions give the same bytes on one machine.

    python -m domainbed_ext.pretrain --out weights.safetensors --steps 2000 --threads 1
"""

import argparse
import hashlib
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL
import safetensors
import sklearn
import timm
import torch
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from timm.models import VisionTransformer
from torch.nn import functional as F

from domainbed_ext.datasets.digits import digits_environments
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.models import glyphs
from domainbed_ext.models.vit_pico import NAME, WEIGHTS
from domainbed_ext.system import option_values, strict_json
from domainbed_ext.system.command_line import START_AGAIN, CommandLine, as_command
from domainbed_ext.system.progress import Bar, bar, format_duration

_LINE_STEPS = 100  # steps from one printed line to the next
_TEST_IMAGES = 2048
_TEST_SEED = 10**6  # added to the seed: test images are drawn from a stream of their own
_INK_WEIGHT = 4.0  # of the ink's loss, a mean over pixels, against that of the class
_PLAIN_START = 0.6  # share of the steps over which styled images replace white on black


def pretrain(steps: int, batch_size: int, lr: float, seed: int, shown: Bar) -> tuple[VisionTransformer, float]:
    """Trains the backbone on freshly drawn images, each seen once, to classify the glyph and to find its ink.

    The class alone teaches a transformer without convolutions too slowly on a CPU. So the patch tokens also
    predict which of their pixels are ink, through a linear layer that is then discarded, and the first images
    are mostly white on black.

    Args:
        steps: Number of AdamW steps; the rate rises over the first tenth and falls by a cosine to zero.
        batch_size: Images per step.
        lr: Highest learning rate.
        seed: Seed of the initial weights and of the images.
        shown: Progress bar.

    Returns:
        The model, with its glyph head, and its accuracy on other drawn images, all styled (0 to 1).
    """
    torch.manual_seed(seed)
    bank = glyphs.render()
    # timm's "jax" initialisation goes by fan-in; its default is made for wider models, and learns late here.
    model: VisionTransformer = timm.create_model(NAME, num_classes=len(glyphs.CLASSES), weight_init="jax")
    torch.nn.init.normal_(model.pos_embed, std=0.2)
    patch = model.patch_embed.patch_size[0]
    ink_head = torch.nn.Linear(model.embed_dim, patch**2)
    weights = [*model.parameters(), *ink_head.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.05},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    for step in range(steps):
        styled = min(1.0, step / (_PLAIN_START * steps))
        images, ink, labels = glyphs.draw(bank, batch_size, generator, styled)
        tokens = model.forward_features(images * 2 - 1)
        named = F.cross_entropy(model.forward_head(tokens), labels, label_smoothing=0.1)
        ink_patches = F.unfold(ink, patch, stride=patch).transpose(1, 2)  # [n, patches, patch²]
        found = F.binary_cross_entropy_with_logits(ink_head(tokens[:, model.num_prefix_tokens :]), ink_patches)
        optimizer.zero_grad()
        (named + _INK_WEIGHT * found).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        shown.advance()
        shown.note(f"class loss {named.item():.2f}")
        if step % _LINE_STEPS == 0 or step == steps - 1:
            took = format_duration(time.perf_counter() - start)
            print(f"step {step:{len(str(steps - 1))}}  class loss {named.item():.2f}  {took}", flush=True)

    model.eval()
    with torch.inference_mode():
        images, _, labels = glyphs.draw(bank, _TEST_IMAGES, generator.manual_seed(seed + _TEST_SEED))
        right = model(images * 2 - 1).argmax(1) == labels
    return model, right.float().mean().item()


@threadpool_limits.wrap(limits=1)  # these problems are small: threads only wait for each other
@torch.inference_mode()
def linear_probe(model: VisionTransformer) -> dict[str, dict[str, float]]:
    """Accuracy of linear probes of the frozen features on DigitsShift, leaving out one environment at a time.

    For the record only: the training does not use it.

    Args:
        model: Backbone; its head is not used.

    Returns:
        For each environment left out, the accuracy (0 to 1) of a logistic regression trained on four fifths of
        the three others: "in_domain" on their last fifth, "out_of_domain" on the environment left out.
    """
    features = {}
    for name, (images, labels) in digits_environments().items():
        tokens = model.eval().forward_features(torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1)
        features[name] = (model.forward_head(tokens, pre_logits=True).numpy(), labels)
    accuracies = {}
    for left_out in features:
        x, y = (np.concatenate([features[name][i] for name in features if name != left_out]) for i in (0, 1))
        held_out = np.arange(len(y)) % 5 == 0  # digits are in no order that matters
        probe = LogisticRegression(C=0.1, max_iter=500).fit(x[~held_out], y[~held_out])
        in_domain, out_of_domain = probe.score(x[held_out], y[held_out]), probe.score(*features[left_out])
        accuracies[left_out] = {"in_domain": round(in_domain, 3), "out_of_domain": round(out_of_domain, 3)}
    return accuracies


@as_command(START_AGAIN)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: Arguments; None for those of the process.
    """
    description, _, example = (__doc__ or "").partition("\n\n    ")
    parser = CommandLine(
        prog="python -m domainbed_ext.pretrain",
        description=description,
        epilog="example:\n  " + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=option_values.tensors_path,
        default=WEIGHTS,
        help="file for the weights; a .json file is written beside it (default: the packaged file)",
    )
    for name, kind, default, meaning in (
        ("steps", option_values.whole(1), 2000, "training steps"),
        ("batch_size", option_values.whole(1), 64, "images per step"),
        ("lr", option_values.number(above=0), 1e-3, "highest learning rate"),
        ("seed", option_values.seed, 0, "seed of weights and images"),
        ("threads", option_values.whole(1), 1, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} (default: %(default)s)")
    args = parser.parse_args(argv)
    out = Path(args.out)

    try:  # before the training, not after it
        out.parent.mkdir(parents=True, exist_ok=True)
        is_new = not out.exists()
        with out.open("ab"):
            pass
        if is_new:
            out.unlink()
    except OSError as error:
        raise BenchmarkError(f"cannot write {out}: {error.strerror}") from error

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    try:
        with bar("pretraining", args.steps, "steps") as shown:
            model, accuracy = pretrain(args.steps, args.batch_size, args.lr, args.seed, shown)
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
        "data": f"{len(glyphs.CLASSES)} drawn classes, see domainbed_ext/models/glyphs.py",
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "threads": args.threads,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "glyph_accuracy": round(accuracy, 3),
        "linear_probe_on_digits_shift": linear_probe(model),
        "versions": {
            "python": platform.python_version(),
            **{
                package.__name__: package.__version__
                for package in (torch, timm, matplotlib, PIL, safetensors, sklearn, np)
            },
        },
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    out.write_bytes(data)
    out.with_suffix(".json").write_text(strict_json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{out}: {len(data):,} bytes, glyph accuracy {accuracy:.1%}, {record['minutes']} min")


if __name__ == "__main__":
    main()
