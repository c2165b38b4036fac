"""EmojiStyles of tiny packages, whose icons are drawn here and now."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from domainbed_ext.datasets import DATASETS
from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare import emoji_styles
from domainbed_ext.prepare.downloads import DOWNLOADS, KNOWN, count_images
from domainbed_ext.prepare.emoji_styles import DOMAINS, SIZE
from tests.domainbed_ext.small_archives import listing, prepare
from tests.domainbed_ext.small_icons import CONCEPTS, make_packages, put_npm

PLACES = sorted(
    f"{domain}/{label}/{name}.png" for domain in DOMAINS for label, names in CONCEPTS.items() for name in names
)
COPY = """\
name=$(echo "$2" | sed 's|^@||; s|/|-|; s|@|-|')
cp "{packages}/$name.tgz" "$4"
"""


@pytest.fixture
def packages(monkeypatch, tmp_path):
    return make_packages(monkeypatch, tmp_path / "tgz")


@pytest.fixture
def renderer():
    pytest.importorskip("resvg_py", reason="needs resvg-py")


def test_from_files(packages, renderer, tmp_path, capsys):
    assert prepare("EmojiStyles", tmp_path / "data", tmp_path / "tgz", options=["--decode", "--workers", "1"]) == 0
    folder = tmp_path / "data" / "emoji_styles"
    assert listing(folder) == PLACES  # neither what some lack, nor people, skin tones and flags
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["emoji_styles"]
    assert "70" in capsys.readouterr().out
    dataset = DATASETS["EmojiStyles"](tmp_path / "data", [0], {})
    assert list(dataset.classes) == sorted(CONCEPTS) and tuple(dataset.domains) == tuple(DOMAINS)
    concepts = [name for label in sorted(CONCEPTS) for name in CONCEPTS[label]]
    assert [each.concepts for each in dataset.datasets] == [concepts] * 5


def test_what_is_drawn(packages, renderer, tmp_path):
    prepare("EmojiStyles", tmp_path, tmp_path / "tgz", options=["--workers", "1"])

    def read(name):
        return np.asarray(Image.open(tmp_path / "emoji_styles" / name).convert("RGB"))

    noto, ink, wide = read("noto/food/food-b.png"), read("ink/food/food-b.png"), read("noto/food/food-a.png")
    assert noto.shape == (SIZE, SIZE, 3) == ink.shape
    quarter, half = SIZE // 4, SIZE // 2
    assert (noto[0, 0] == 255).all() and (noto[half, half] == [255, 0, 0]).all() and (ink[half, half] == 0).all()
    assert (noto[quarter : 3 * quarter, quarter : 3 * quarter] == [255, 0, 0]).all()
    assert (noto[: quarter - 1] == 255).all()
    assert (wide[quarter : 3 * quarter] == [255, 0, 0]).all() and (wide[: quarter - 1] == 255).all()  # not distorted


def test_licences_and_counts_are_beside_the_images(packages, renderer, tmp_path):
    prepare("EmojiStyles", tmp_path, tmp_path / "tgz", options=["--workers", "1"])
    folder = tmp_path / "emoji_styles"
    facts = json.loads((folder / "attribution.json").read_text())
    assert (facts["images"], facts["concepts"], facts["background"], facts["width"]) == (70, 14, "#ffffff", SIZE)
    assert facts["renderer"].startswith("resvg-py ")
    integrity = {source.package: source.integrity for source in DOWNLOADS["EmojiStyles"]}
    for domain, each in facts["domains"].items():
        assert each["author"] == f"{domain} artist" and each["licence"] == "CC-BY-4.0"
        assert each["classes"] == dict.fromkeys(sorted(CONCEPTS), 2) and each["images"] == 14
        assert each["integrity"] == integrity[each["package"]]
    text = (folder / "ATTRIBUTION.txt").read_text()
    for domain in DOMAINS:
        assert f"{domain} artist" in text and f"https://example.org/{domain}" in text
    assert text.count("CC-BY-4.0, https://example.org/licence") == 5 and "People & Body and Flags are none" in text
    sources = json.loads((folder / "prepared.json").read_text())["sources"]
    assert len(sources) == 5 and all(source["sha256"] for source in sources)


def test_its_manifest_has_the_concepts(packages, renderer, tmp_path):
    prepare("EmojiStyles", tmp_path, tmp_path / "tgz", options=["--workers", "1"])
    listed = DATASETS["Manifest"](tmp_path / "emoji_styles" / "manifest.csv", [0], {})
    folders = DATASETS["EmojiStyles"](tmp_path, [0], {})
    assert [list(a.concepts) for a in listed.datasets] == [list(b.concepts) for b in folders.datasets]
    (tmp_path / "emoji_styles/noto/food/food-a.png").write_bytes(b"changed")
    with pytest.raises(BenchmarkError, match=r"1 image\(s\) are changed \(noto/food/food-a.png first\)"):
        prepare("EmojiStyles", tmp_path, options=["--verify"])


def test_through_npm(packages, renderer, monkeypatch, tmp_path):
    calls = put_npm(monkeypatch, tmp_path / "bin", COPY.format(packages=tmp_path / "tgz"))
    assert prepare("EmojiStyles", tmp_path / "data", options=["--workers", "1"]) == 0
    assert listing(tmp_path / "data" / "emoji_styles") == PLACES
    asked = [words.split()[:3] for words in calls.read_text().splitlines()]
    assert asked == [["pack", source.package, "--pack-destination"] for source in DOWNLOADS["EmojiStyles"]]
    calls.unlink()
    assert prepare("EmojiStyles", tmp_path / "data") == 0  # which is there: nothing is asked for, and nothing drawn
    assert not calls.exists()


def test_a_start_that_was_interrupted_resumes(packages, renderer, monkeypatch, tmp_path):
    draw, drawn = emoji_styles._draw, []

    def spy(drawing):
        if len(drawn) == 20:
            raise KeyboardInterrupt
        draw(drawing)
        drawn.append(drawing.path)

    monkeypatch.setattr(emoji_styles, "_draw", spy)
    options = ["--workers", "1"]
    with pytest.raises(KeyboardInterrupt):
        prepare("EmojiStyles", tmp_path / "data", tmp_path / "tgz", options=options)
    assert not (tmp_path / "data" / "emoji_styles").exists()
    first = drawn[:]
    drawn.clear()
    monkeypatch.setattr(emoji_styles, "_draw", lambda drawing: (draw(drawing), drawn.append(drawing.path)))
    assert prepare("EmojiStyles", tmp_path / "data", tmp_path / "tgz", options=options) == 0
    assert not set(first) & set(drawn) and len(first) + len(drawn) == len(PLACES)
    assert listing(tmp_path / "data" / "emoji_styles") == PLACES


def test_several_processes_draw_the_same(packages, renderer, tmp_path):
    for workers in ("1", "2"):
        prepare("EmojiStyles", tmp_path / workers, tmp_path / "tgz", options=["--workers", workers])
    for place in PLACES:
        one, two = (tmp_path / workers / "emoji_styles" / place for workers in ("1", "2"))
        assert one.read_bytes() == two.read_bytes()


def test_another_file_is_refused(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_styles, "check_renderer", lambda: None)
    noto = packages["noto"]
    noto.write_bytes(noto.read_bytes()[:-1] + b"x")
    with pytest.raises(BenchmarkError, match=r"noto-1.0.0.tgz is not @iconify-json/noto@1.0.0 \(its digest is sha512-"):
        prepare("EmojiStyles", tmp_path / "data", tmp_path / "tgz")
    assert not (tmp_path / "data" / "emoji_styles").exists()
    calls = put_npm(monkeypatch, tmp_path / "bin", COPY.format(packages=tmp_path / "tgz"))
    with pytest.raises(
        BenchmarkError, match=r"cannot download \(its digest is .*by npm pack @iconify-json/noto@1.0.0 "
    ):
        prepare("EmojiStyles", tmp_path / "data")
    assert len(calls.read_text().splitlines()) == 5


def test_a_missing_package_is_named(packages, renderer, tmp_path):
    other = packages["ink"].rename(tmp_path / "tgz" / "ink.tgz")
    given = [*(path for domain, path in packages.items() if domain != "ink"), other]
    with pytest.raises(
        BenchmarkError, match=r"no iconify-json-fluent-emoji-high-contrast-1.0.0.tgz in .*ink.tgz: give the files"
    ):
        prepare("EmojiStyles", tmp_path / "data", *given)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            """printf '%s' '{"error": {"code": "E404", "summary": "Not found\\nmore"}}'; exit 1""",
            r"\(npm pack: Not found\)",
        ),
        ("echo 'npm ERR! broken' >&2; exit 1", r"\(npm pack: npm ERR! broken\)"),
        ("exit 3", r"exit code 3 and made no file"),
    ],
)
def test_what_npm_says_is_told_with_what_to_do(packages, monkeypatch, tmp_path, script, sentence):
    monkeypatch.setattr(emoji_styles, "check_renderer", lambda: None)
    calls = put_npm(monkeypatch, tmp_path / "bin", script)
    with pytest.raises(BenchmarkError, match=sentence) as error:
        prepare("EmojiStyles", tmp_path / "data")
    assert "--archive iconify-json-fluent-emoji-1.0.0.tgz" in str(error.value)
    assert len(calls.read_text().splitlines()) == 5


def test_an_npm_that_reaches_nothing_is_asked_once(packages, monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_styles, "check_renderer", lambda: None)
    say = """echo '{"error": {"code": "ENOTFOUND", "summary": "no network"}}'; exit 1"""
    calls = put_npm(monkeypatch, tmp_path / "bin", say)
    with pytest.raises(BenchmarkError, match="no network"):
        prepare("EmojiStyles", tmp_path / "data")
    assert len(calls.read_text().splitlines()) == 1


def test_without_npm_or_renderer(packages, monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_styles, "check_renderer", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BenchmarkError, match=r"npm is not installed here\): get .*twemoji-1.0.0.tgz by npm pack "):
        prepare("EmojiStyles", tmp_path / "data")
    monkeypatch.undo()
    monkeypatch.setattr(emoji_styles, "_RENDERER", "no_such_package")
    with pytest.raises(BenchmarkError, match="drawn by resvg-py, which is not installed: pip install"):
        prepare("EmojiStyles", tmp_path / "data")


def test_a_dry_run_says_what_npm_would_get(tmp_path, capsys):
    assert prepare("EmojiStyles", tmp_path, options=["--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "would download iconify-json-noto-1.2.9.tgz by npm pack @iconify-json/noto@1.2.9, 3.1 MB" in out
    assert out.count("would download") == 5 and list(tmp_path.iterdir()) == []


def test_the_known_counts():
    (counts,) = KNOWN["EmojiStyles"]
    assert [count_images(counts, domain) for domain in DOMAINS] == [1234] * 5
    assert all(
        source.integrity.startswith("sha512-") and len(source.integrity) == 95 for source in DOWNLOADS["EmojiStyles"]
    )
