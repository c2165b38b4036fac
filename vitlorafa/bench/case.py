"""What is the same for all methods of a comparison, and the model that they start from."""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from vitlorafa import AdapterError
from vitlorafa.bench.formulas import Stack
from vitlorafa.config import TARGETS
from vitlorafa.errors import unknown

CLASSES = 10
SCALE = 2  # alpha / rank of every adapter
LEARNING_RATE = 1e-3
PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # name -> autocast's dtype


@dataclass(frozen=True)
class Case:
    """What is the same for all methods of a comparison.

    Attributes:
        model: Name of the timm model.
        batch_size: Number of images.
        resolution: Height and width of an image in pixels.
        precision: Name in `PRECISIONS`.
        rank: Rank of every adapter.
        targets: Adapted projections.
        dropout: Dropout probability on the adapter's input.
        device: "cpu" or "cuda".
        depth: Number of blocks; if None, the model's own.
        head: Whether the classifier trains beside an adapter.
        blocks: Indices of the adapted blocks; if None, all of them.
    """

    model: str
    batch_size: int
    resolution: int
    precision: str
    rank: int
    targets: tuple[str, ...]
    dropout: float = 0.0
    device: str = "cpu"
    depth: int | None = None
    head: bool = False
    blocks: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.setting}, rank {self.rank}"

    @property
    def setting(self) -> str:
        """Everything but the rank, as text."""
        targets = "all targets" if self.targets == TARGETS else ", ".join(self.targets)
        depth = f", {self.depth} blocks" if self.depth else ""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        images = f"batch {self.batch_size} at {self.resolution} px"
        return f"{self.model}{depth}, {images}, {self.precision}, {targets}{dropout}"

    @property
    def size(self) -> str:
        """Model, batch and number format, as text."""
        return f"{self.model}, batch {self.batch_size}, {self.precision}"

    @property
    def element(self) -> int:
        """Bytes of an element in the precision of the matmuls."""
        return 4 if PRECISIONS[self.precision] is None else 2

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return asdict(self) | {"targets": list(self.targets), "blocks": self.blocks and list(self.blocks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Case":
        """The case that `to_dict` wrote."""
        blocks = values.get("blocks")
        return cls(**values | {"targets": tuple(values["targets"]), "blocks": blocks and tuple(blocks)})


def build_backbone(case: Case) -> VisionTransformer:
    """The case's model on the CPU, with the same random weights in every call.

    Raises:
        AdapterError: If timm does not have the model or cannot build it with these sizes, or if it is not a plain
            `VisionTransformer`.
    """
    if not timm.is_model(case.model):
        raise unknown("model", case.model, timm.list_models("*vit*"))
    options: dict[str, Any] = {"num_classes": CLASSES, "img_size": case.resolution}
    if case.depth is not None:
        options["depth"] = case.depth
    torch.manual_seed(0)
    try:
        model = timm.create_model(case.model, pretrained=False, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        words = ", ".join(f"{name}={value}" for name, value in options.items())
        raise AdapterError(f"timm cannot build {case.model} with {words}: {error}") from None
    if not isinstance(model, VisionTransformer):
        raise AdapterError(f"{case.model} is a {type(model).__name__}: the benchmark needs timm's VisionTransformer")
    patch = max(model.patch_embed.patch_size)
    if case.resolution % patch:
        raise AdapterError(f"resolution {case.resolution} is not a multiple of {case.model}'s patches of {patch} px")
    return model


@cache
def stack_of(case: Case) -> Stack | None:
    """The sizes of the case's model for the formulas; None if it does not consist of plain blocks only."""
    return Stack.of(build_backbone(case), case.batch_size, case.element)


@cache
def count_blocks(case: Case) -> int:
    """Number of blocks of the case's model."""
    with torch.device("meta"):
        return len(build_backbone(case).blocks)
