"""What becomes of each kind of image, in each place that reads images: uncached, cached, verified, prepared."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from domainbed_ext.cache import decode
from domainbed_ext.cache.entries import Entries
from domainbed_ext.cache.variants import Decoded, Resized
from domainbed_ext.datasets import image_files
from domainbed_ext.datasets.folders import FileEnvironment
from domainbed_ext.datasets.listing import IMAGE_ENDINGS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.examine import examine
from tests.domainbed_ext.cached_environment import cached

HEIGHT, WIDTH = 24, 36
RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
GREY = np.rint(255 * RAMP)
COLOURS = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1).astype(np.uint8)
RGB = Image.fromarray(COLOURS)
ALPHA = Image.fromarray(np.uint8(GREY[::-1, ::-1]))


def whole_numbers(bits: int) -> Image.Image:
    return Image.fromarray(np.rint((2**bits - 1) * RAMP).astype(np.uint16))


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def frames(folder: Path, name: str, **options: object) -> None:
    RGB.save(folder / name, save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180)], **options)


def tiff(folder: Path, name: str, values: np.ndarray, **tags: int) -> None:
    """An uncompressed grey TIFF of any dtype, written by hand since Pillow saves few of them."""
    kinds = {"u": 1, "i": 2, "f": 3}
    height, width = values.shape
    data = values.tobytes()
    entries = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    entries |= {279: len(data), 339: kinds[values.dtype.kind], **{int(name[1:]): tag for name, tag in tags.items()}}
    directory = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(entries.items()))
    header = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    (folder / name).write_bytes(header + data + struct.pack("<H", len(entries)) + directory + bytes(4))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """Of 16-bit colours."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))


def png(folder: Path, name: str, values: np.ndarray) -> None:
    """A PNG of 16-bit colours, which Pillow reads but does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (folder / name).write_bytes(png_header(values.shape[1], values.shape[0]) + parts)


# How each is drawn, the mode that Pillow opens it in (two, where versions differ), and what it should become, to within
# a level; None: what Pillow makes of it.
KINDS = {
    "1.png": (lambda folder, name: RGB.convert("1").save(folder / name), "1", RGB.convert("1")),
    "1.tif": (lambda folder, name: RGB.convert("1").save(folder / name), "1", RGB.convert("1")),
    "L.png": (lambda folder, name: RGB.convert("L").save(folder / name), "L", RGB.convert("L")),
    "L.pgm": (lambda folder, name: RGB.convert("L").save(folder / name), "L", RGB.convert("L")),
    "L.bmp": (lambda folder, name: RGB.convert("L").save(folder / name), "L", RGB.convert("L")),
    "L.JPEG": (lambda folder, name: RGB.convert("L").save(folder / name, quality=100), "L", RGB.convert("L")),
    "LA.png": (lambda folder, name: with_alpha(RGB.convert("L")).save(folder / name), "LA", RGB.convert("L")),
    "LA.tif": (lambda folder, name: with_alpha(RGB.convert("L")).save(folder / name), "LA", RGB.convert("L")),
    "I;16.png": (lambda folder, name: whole_numbers(16).save(folder / name), "I;16 I", GREY),
    "I;16.tif": (lambda folder, name: whole_numbers(16).save(folder / name), "I;16", GREY),
    "I;16.pgm": (lambda folder, name: whole_numbers(16).save(folder / name), "I;16 I", GREY),
    "I;16B.tif": (lambda folder, name: big_endian().save(folder / name), "I;16B", GREY),
    "12 of 16 bits.png": (lambda folder, name: whole_numbers(12).save(folder / name), "I;16 I", GREY / 16.06),
    "F.tif": (lambda folder, name: Image.fromarray(np.float32(RAMP)).save(folder / name), "F", GREY),
    "float32.tif": (lambda folder, name: tiff(folder, name, np.float32(RAMP)), "F", GREY),
    "white is zero.tif": (
        lambda folder, name: tiff(folder, name, np.uint16(65535 - np.rint(65535 * RAMP)), _262=0),
        "I;16",
        GREY,
    ),
    "P.png": (lambda folder, name: RGB.quantize(16).save(folder / name), "P", RGB.quantize(16)),
    "P.bmp": (lambda folder, name: RGB.quantize(16).save(folder / name), "P", RGB.quantize(16)),
    "P transparent.png": (
        lambda folder, name: RGB.quantize(16).save(folder / name, transparency=bytes(range(16))),
        "P",
        RGB.quantize(16),
    ),
    "PA.tif": (lambda folder, name: RGB.quantize(16).convert("PA").save(folder / name), "PA", RGB.quantize(16)),
    "RGB.png": (lambda folder, name: RGB.save(folder / name), "RGB", RGB),
    "RGB.ppm": (lambda folder, name: RGB.save(folder / name), "RGB", RGB),
    "RGB.webp": (lambda folder, name: RGB.save(folder / name, lossless=True), "RGB", RGB),
    "RGB16.png": (lambda folder, name: png(folder, name, COLOURS.astype(np.uint16) * 257), "RGB", RGB),
    "RGBA.png": (lambda folder, name: with_alpha(RGB).save(folder / name), "RGBA", RGB),
    "RGBA.tiff": (lambda folder, name: with_alpha(RGB).save(folder / name), "RGBA", RGB),
    "RGBA.webp": (lambda folder, name: with_alpha(RGB).save(folder / name, lossless=True, exact=True), "RGBA", RGB),
    "CMYK.tif": (lambda folder, name: RGB.convert("CMYK").save(folder / name), "CMYK", RGB),
    "CMYK.jpg": (lambda folder, name: RGB.convert("CMYK").save(folder / name, quality=100), "CMYK", None),
    "YCbCr.tif": (lambda folder, name: RGB.convert("YCbCr").save(folder / name), "YCbCr RGB", RGB.convert("YCbCr")),
    "LAB.tif": (lambda folder, name: RGB.convert("LAB").save(folder / name), "LAB", RGB.convert("LAB")),
    "animated.webp": (lambda folder, name: frames(folder, name, lossless=True), "RGB RGBA RGBX", RGB),
    "animated.png": (frames, "RGB", RGB),
    "animated gif.png": (lambda folder, name: frames(folder, name, format="GIF"), "P RGB", None),
    "pages.tif": (frames, "RGB", RGB),
    "pages.jpg": (lambda folder, name: frames(folder, name, format="MPO", quality=100), "RGB", None),
}

if int(PIL.__version__.partition(".")[0]) < 13:
    del KINDS["YCbCr.tif"]  # which Pillow writes truncated

# And those that are refused, with the reason.
REFUSED = {
    "float 255.tif": (
        lambda folder, name: Image.fromarray(np.float32(GREY)).save(folder / name),
        "F",
        "floating-point values from 0 to 255",
    ),
    "negative.tif": (
        lambda folder, name: Image.fromarray(np.float32(RAMP - 1)).save(folder / name),
        "F",
        "floating-point values from -1 to 0",
    ),
    "nan.tif": (
        lambda folder, name: Image.fromarray(np.float32(RAMP * np.nan)).save(folder / name),
        "F",
        "floating-point values from nan",
    ),
    "float.ppm": (
        lambda folder, name: Image.fromarray(np.float32(GREY)).save(folder / name),
        "F",
        "floating-point values from 0 to 255",
    ),
    "uint32.tif": (lambda folder, name: tiff(folder, name, np.uint32(RAMP * 2**32 - 1)), "I", "32-bit numbers"),
    "int32.tif": (lambda folder, name: tiff(folder, name, np.int32(RAMP * 1000)), "I", "signed 32-bit numbers"),
    "int16.tif": (lambda folder, name: tiff(folder, name, np.int16(RAMP * 1000)), "I", "signed 16-bit numbers"),
}


def big_endian() -> Image.Image:
    return Image.frombytes("I;16B", (WIDTH, HEIGHT), np.asarray(whole_numbers(16)).astype(">u2").tobytes())


@pytest.fixture
def cache(tmp_path):
    return Entries(tmp_path / "cache", 10**9)


def environment(folder: Path, *names: str) -> FileEnvironment:
    return FileEnvironment("sketch", [str(folder / name) for name in names], [0] * len(names))


def test_every_extension_is_tried():
    assert {Path(name).suffix.lower() for name in KINDS} == set(IMAGE_ENDINGS) - {".jpeg"} | {".jpeg"}


def test_what_becomes_of_each_kind(tmp_path, cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow has one for transparent palettes
        for name, (draw, modes, _) in KINDS.items():
            draw(tmp_path, name)
            with Image.open(tmp_path / name) as image:
                assert image.mode in modes.split(), name
        files = environment(tmp_path, *KINDS)
        loaded = [np.asarray(files.load(index)) for index in range(len(files))]
        assert files.verify() == {}
        assert [examine(path, decode=True).problem for path in files.paths] == [""] * len(files)
        whole, small = (cached(files, variant, cache, "Zoo", processes=2) for variant in (Decoded(), Resized(8, 8)))
    for index, (name, (_, _, expected)) in enumerate(KINDS.items()):
        np.testing.assert_array_equal(whole[index], loaded[index], err_msg=name)
        np.testing.assert_array_equal(
            small[index], np.asarray(Image.fromarray(loaded[index]).resize((8, 8), Image.Resampling.BILINEAR))
        )
        if expected is None:
            with Image.open(tmp_path / name) as image:
                as_pillow = np.asarray(image.convert("RGB"))
            np.testing.assert_array_equal(loaded[index], as_pillow, err_msg=name)
            assert np.abs(loaded[index].astype(int) - COLOURS).mean() < 12, name
            continue
        if isinstance(expected, np.ndarray):
            expected = Image.fromarray(np.uint8(expected))
        difference = np.abs(loaded[index].astype(int) - np.asarray(expected.convert("RGB")).astype(int))
        assert difference.max() <= (3 if name.endswith(".JPEG") else 1), (name, difference.max())


@pytest.mark.parametrize("processes", [1, 2])
def test_what_has_no_known_range_is_refused_with_its_name(tmp_path, cache, processes):
    for name, (draw, mode, _) in REFUSED.items():
        draw(tmp_path, name)
        with Image.open(tmp_path / name) as image:
            assert image.mode == mode
    files = environment(tmp_path, *REFUSED)
    with pytest.raises(BenchmarkError) as caught:
        cached(files, Resized(8, 8), cache, "Zoo", processes)
    broken = files.verify()
    for index, (path, (_, _, reason)) in enumerate(zip(files.paths, REFUSED.values(), strict=True)):
        assert path in str(caught.value) and reason in broken[path]
        assert reason in examine(path, decode=True).problem
        with pytest.raises(BenchmarkError, match=f"^not a readable image: {path}; .*{Path(path).name}: {reason}"):
            files.load(index)
    assert f"(float 255.tif: {broken[files.paths[0]]}; negative.tif: " in str(caught.value)


TURNS = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: np.swapaxes(x, 0, 1)}
TURNS |= {6: lambda x: np.rot90(x, 3), 7: lambda x: np.rot90(np.swapaxes(x, 0, 1), 2), 8: np.rot90}


def test_exif_orientation_counts_in_every_format(tmp_path, cache):
    names = []
    for orientation in (*range(10), 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for ending in ("jpg", "png", "webp", "tif"):
            image, options = RGB, {"jpg": {"quality": 100}, "webp": {"lossless": True}}.get(ending, {})
            if len(names) >= 40:  # and what has 16 bits
                image = whole_numbers(16) if ending in ("png", "tif") else RGB
            names.append(f"{len(names)}-{orientation}.{ending}")
            image.save(tmp_path / names[-1], exif=exif, **options)
    late = (tmp_path / "25-6.png").read_bytes()  # with its orientation behind its pixels, as some programs write it
    start = late.index(b"eXIf") - 4
    length = 12 + int.from_bytes(late[start : start + 4], "big")
    end = late.index(b"IEND") - 4
    assert start < late.index(b"IDAT")
    (tmp_path / "late-6.png").write_bytes(
        late[:start] + late[start + length : end] + late[start : start + length] + late[end:]
    )
    names.append("late-6.png")
    files = environment(tmp_path, *names)
    stored = cached(files, Decoded(), cache, "Zoo")
    for index, name in enumerate(names):
        upright = COLOURS if index < 40 or "jpg" in name or "webp" in name or "late" in name else GREY[..., None]
        expected = TURNS.get(int(name.split("-")[1][0]), np.asarray)(upright).astype(int)
        loaded = np.asarray(files.load(index))
        assert loaded.shape == (*expected.shape[:2], 3), name
        assert np.abs(loaded - expected).max() <= (12 if name.endswith("jpg") else 1), name
        np.testing.assert_array_equal(stored[index], loaded)
    assert files.verify() == {}


def test_broken_exif_data_break_no_image(tmp_path, cache):
    RGB.save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    RGB.save(tmp_path / "short.webp", exif=b"Exif\0\0M", lossless=True)
    files = environment(tmp_path, "odd.jpg", "short.webp")
    assert [image.shape for image in cached(files, Decoded(), cache, "Zoo")] == [(HEIGHT, WIDTH, 3)] * 2


def test_without_orientation_a_png_is_not_decoded_for_its_size(tmp_path, monkeypatch):
    RGB.save(tmp_path / "plain.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert decode.read_sizes([str(tmp_path / "plain.png")]) == [(HEIGHT, WIDTH)]


@pytest.mark.parametrize("processes", [1, 2])
def test_too_many_pixels_are_one_sentence_and_many_are_none(tmp_path, cache, processes, monkeypatch):
    if processes == 1:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow warns above this, and refuses above twice as many
        RGB.resize((20, 30)).save(tmp_path / "large.png")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cached(environment(tmp_path, "large.png"), Decoded(), cache, "Zoo")[0].shape == (30, 20, 3)
    # Its header alone: worker processes have Pillow's own limit.
    (tmp_path / "bomb.png").write_bytes(png_header(10**5, 10**5) + chunk(b"IDAT", b""))
    files = environment(tmp_path, "bomb.png")
    reason = r"bomb.png: more than the [\d,]+ pixels that Pillow decodes: scale it down"
    for variant in (Decoded(), Resized(8, 8)):
        with pytest.raises(BenchmarkError, match=reason):
            cached(files, variant, cache, "Zoo", processes)
    with pytest.raises(BenchmarkError, match=reason):
        files.load(0)
    assert list(files.verify()) == files.paths


RAISED = [
    *(SyntaxError("not a TIFF file"), ValueError("odd"), struct.error("unpack"), EOFError(), IndexError("list")),
    *(KeyError(258), TypeError("none"), zlib.error("inflate"), OverflowError("long"), RuntimeError("codec")),
    *(PermissionError(13, "Permission denied"), Image.DecompressionBombError("bomb"), RecursionError()),
]


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_pillow_raises_is_a_sentence(tmp_path, cache, monkeypatch, error):
    RGB.save(tmp_path / "odd.png")
    files = environment(tmp_path, "odd.png")

    def fail(*args, **kwargs):
        raise error

    for owner, name in ((Image, "open"), (Image.Image, "convert")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            for variant in (Decoded(), Resized(8, 8)):
                with pytest.raises(BenchmarkError, match="^not a readable image: .*odd.png; .*odd.png: .+"):
                    cached(files, variant, cache, "Zoo")
            with pytest.raises(BenchmarkError, match="^not a readable image: .*odd.png; .*odd.png: .+"):
                files.load(0)
            assert examine(files.paths[0], decode=True).problem
    assert len(cached(files, Decoded(), cache, "Zoo")) == 1


def test_no_memory_is_said_of_the_machine_and_not_of_the_image(tmp_path, cache, monkeypatch):
    RGB.save(tmp_path / "large.png")

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(BenchmarkError, match="^not enough memory to decode .*large.png: .*--workers"):
        cached(environment(tmp_path, "large.png"), Decoded(), cache, "Zoo")


def test_files_that_are_no_images_are_named_with_the_reason(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    RGB.save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    files = environment(tmp_path, "empty.jpg", "page.png", "folder.png", "dead.png", "cut.png")
    reasons = list(files.verify().values())
    assert reasons[:4] == [
        "an empty file",
        "of no kind that Pillow reads",
        "Is a directory",
        "No such file or directory",
    ]
    assert len(reasons) == 5


def test_pixels_of_other_rules_are_decoded_again(tmp_path, cache, monkeypatch):
    RGB.save(tmp_path / "a.png")
    files = environment(tmp_path, "a.png")
    before = cached(files, Decoded(), cache, "Zoo").folder
    monkeypatch.setattr(decode, "RULES", image_files.RULES + 1)
    assert cached(files, Decoded(), cache, "Zoo").folder != before
