"""Drawn pretraining images: glyphs and shapes in every style, an unlimited number from a seed.

A class is a character; its variants are the fonts that matplotlib ships (DejaVu, STIX, Computer Modern) at
several weights. Each image takes one variant, bends and places it, and draws it as fill or outline, sharp or
coarse, in plain colours or textures, over or by difference with a plain or textured ground. What stays the same
under all of this is the class, so a classifier must find features that survive a change of style.

No photograph and no handwriting: neither scikit-learn's digits nor its sample photographs are used.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from domainbed_ext.errors import BenchmarkError

SIZE = 32  # px, width and height of an image
# One of each group of look-alikes (O and 0, s and S, l and I, ...), as size and place carry no meaning here.
_LETTERS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZabdefghijkmnqrty"
_SYMBOLS = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπστφψω&@#%$€!?+=≠±÷∞√∫∂∩∀∃→↑⇒{}()[]<>"
_SHAPES = "■▲●◆★♥♠♣✚☾♪☂✈☎♛⚑✿☯▶⬟"  # filled; outlines come from the style
CLASSES = _LETTERS + _SYMBOLS + _SHAPES
_ASCII_FONTS = ("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")  # other codes are not Unicode in these
_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif"),
    *("DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *_ASCII_FONTS,
)
_CANVAS = 48  # px, of a mask, larger than the image so that it stays sharp when bent
_STROKES = (0, 1, 3)  # px added around a glyph of _CANVAS px


@dataclass(frozen=True)
class Bank:
    """Rendered glyphs.

    Attributes:
        masks: Ink from 0 to 1, half precision, [m, 1, 48, 48], sorted by class.
        first: Index of the first mask of each class, [classes].
        count: Number of masks of each class, [classes].
    """

    masks: Tensor
    first: Tensor
    count: Tensor


def _path(font: str) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


def missing_fonts() -> list[str]:
    """The fonts that this matplotlib does not ship."""
    return [font for font in _FONTS if not _path(font).exists()]


def render() -> Bank:
    """Renders every class in every font that has it, in all stroke widths (a few seconds).

    Returns:
        The bank, with at least three masks per class.

    Raises:
        BenchmarkError: If this matplotlib lacks fonts; other fonts would give other weights.
    """
    if missing := missing_fonts():
        raise BenchmarkError(
            f"matplotlib {matplotlib.__version__} has no font {', '.join(missing)}: upgrade it to 3.11 or later "
            "(Python 3.11 or later)"
        )
    fonts = {name: ImageFont.truetype(str(_path(name)), 40) for name in _FONTS}
    known = {name: set(FT2Font(str(_path(name))).get_charmap()) for name in _FONTS}
    masks: list[list[np.ndarray]] = []
    for character in CLASSES:
        usable = [
            name
            for name in _FONTS
            if ord(character) in known[name]
            and (name not in _ASCII_FONTS or (character.isalnum() and character.isascii()))
        ]
        masks.append([_glyph(character, fonts[name], stroke) for name in usable for stroke in _STROKES])
    count = torch.tensor([len(variants) for variants in masks])
    flat = np.stack([mask for variants in masks for mask in variants])
    return Bank(torch.from_numpy(flat).unsqueeze(1).half() / 255, count.cumsum(0) - count, count)


def _glyph(character: str, font: ImageFont.FreeTypeFont, stroke: int) -> np.ndarray:
    """One glyph as a mask [48, 48] (0 to 255), centred, its longer side always the same."""
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    ink = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(ink).text((-left, -top), character, 255, font, stroke_width=stroke)
    scale = (_CANVAS - 8) / max(ink.size)
    ink = ink.resize((max(3, round(ink.width * scale)), max(3, round(ink.height * scale))), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    canvas.paste(ink, ((_CANVAS - ink.width) // 2, (_CANVAS - ink.height) // 2))
    return np.asarray(canvas)


@dataclass(frozen=True)
class _Dice:
    """Random numbers for a batch of n images: an array's first axis is always the image."""

    n: int
    generator: torch.Generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(self.n, *shape, generator=self.generator) * (high - low) + low

    def some(self, share: float) -> Tensor:
        return self.uniform(0, 1, 1, 1, 1) < share


def draw(bank: Bank, n: int, generator: torch.Generator, styled: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a batch.

    Args:
        bank: Rendered glyphs.
        n: Number of images.
        generator: Source of all randomness, on the CPU.
        styled: Share of images in any style; the others are white on black.

    Returns:
        Images [n, 3, 32, 32] in [0, 1], the ink alone [n, 1, 32, 32] in [0, 1], and the classes [n].
    """
    dice = _Dice(n, generator)
    labels = torch.randint(len(bank.count), (n,), generator=generator)
    variant = (dice.uniform(0, 1) * bank.count[labels]).long()
    ink = F.grid_sample(bank.masks[bank.first[labels] + variant].float(), _bend(dice), align_corners=False)
    shape = ink
    coarse = F.interpolate(F.avg_pool2d(ink, 4), scale_factor=4.0, mode="bicubic").clamp(0, 1)
    ink = torch.where(dice.some(0.3), coarse, ink)
    outline = F.max_pool2d(ink, 3, 1, 1) + F.max_pool2d(-ink, 3, 1, 1)
    ink = torch.where(dice.some(0.25), outline, ink)

    ground, paint = _texture(dice), _texture(dice)
    # Ink of the ground's brightness would leave nothing to see.
    alike = (ground - paint).mean((1, 2, 3), keepdim=True).abs() < 0.25
    paint = torch.where(alike, (paint + 0.5) % 1, paint)
    over = ground + (paint - ground) * ink
    images = torch.where(dice.some(0.25), (ground - paint * ink).abs(), over)
    images = images + torch.randn(images.shape, generator=generator) * dice.uniform(0, 0.08, 1, 1, 1)
    images = torch.where(dice.some(styled), images.clamp(0, 1), shape)
    return images, shape, labels


def _bend(dice: _Dice) -> Tensor:
    """Sampling grid [n, 32, 32, 2]: turn to 25 degrees, shear, stretch, shift, and a smooth random warp."""
    turn = dice.uniform(-25, 25) * (torch.pi / 180)
    width, height = dice.uniform(0.9, 1.5), dice.uniform(0.9, 1.5)  # of the window: more is a smaller glyph
    shear = dice.uniform(-0.3, 0.3)
    rows = [
        torch.stack([width * turn.cos(), width * (shear - turn.sin()), dice.uniform(-0.2, 0.2)], 1),
        torch.stack([height * turn.sin(), height * turn.cos(), dice.uniform(-0.2, 0.2)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [dice.n, 1, SIZE, SIZE], align_corners=False)
    warp = F.interpolate(dice.uniform(-0.12, 0.12, 2, 4, 4), size=(SIZE, SIZE), mode="bicubic")
    return grid + warp.permute(0, 2, 3, 1)


def _texture(dice: _Dice) -> Tensor:
    """Two colours mixed by a random field, [n, 3, 32, 32]: even, a gradient, clouds, blobs, stripes or grain."""
    field = torch.zeros(())
    for octave in (2, 4, 8, 16, 32):
        noise = F.interpolate(dice.uniform(-1, 1, 1, octave, octave), size=(SIZE, SIZE), mode="bilinear")
        field = field + noise * dice.uniform(0, 1, 1, 1, 1) ** 2 / (1 + octave / 8)
    line = torch.linspace(-1, 1, SIZE)
    angle, pitch = dice.uniform(0, torch.pi, 1, 1, 1), dice.uniform(3, 25, 1, 1, 1)
    across = line.view(-1, 1) * angle.cos() + line * angle.sin()
    field = torch.where(dice.some(0.15), torch.sin(pitch * across + 4 * field), field)
    mix = torch.sigmoid(field * torch.exp(dice.uniform(0, 3.5, 1, 1, 1)))  # from soft to two-coloured
    first, second = dice.uniform(0, 1, 3, 1, 1), dice.uniform(0, 1, 3, 1, 1)
    black_or_white = first.mean(1, keepdim=True).round().expand_as(first)
    first = torch.where(dice.some(0.4), black_or_white, first)
    second = torch.where(dice.some(0.5), first, second)
    return first + (second - first) * mix
