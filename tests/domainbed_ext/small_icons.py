"""Tiny packages of icons in Iconify's JSON, as npm packs them, and a stand-in for npm."""

import json
import os

from domainbed_ext.prepare.downloads import DOWNLOADS, Download
from domainbed_ext.prepare.emoji_styles import CATEGORIES, DOMAINS
from domainbed_ext.prepare.fetch import compute_integrity
from tests.domainbed_ext.small_archives import know, write_tar

VERSION = "1.0.0"
CONCEPTS = {label: [f"{label}-a", f"{label}-b"] for label in CATEGORIES.values()}
NOT_IN = {"ink": "not-in-ink", "openmoji": "an-alias-in-openmoji"}
NO_CLASS = {"man-light-skin-tone": "People & Body", "flag-norway": "Flags"}


def icons_of(domain):
    """Every icon is a square in the middle, in the colour of its domain."""
    names = [name for members in CONCEPTS.values() for name in members] + [*NO_CLASS]
    names += [name for lacking, name in NOT_IN.items() if lacking != domain]
    colour = "currentColor" if domain == "ink" else "#ff0000"
    icons = {name: {"body": f'<path fill="{colour}" d="M8 8h16v16H8z"/>'} for name in names}
    icons["food-a"] |= {"width": 64, "body": f'<path fill="{colour}" d="M0 0h64v32H0z"/>'}  # twice as wide as high
    return icons


def write_package(folder, domain):
    """Writes `iconify-json-<name>-1.0.0.tgz`."""
    package = DOMAINS[domain]
    of_category = {category: CONCEPTS[label] for category, label in CATEGORIES.items()}
    of_category["Objects"] = [*of_category["Objects"], *NOT_IN.values()]
    for name, category in NO_CLASS.items():
        of_category[category] = [name]
    files = {
        "icons.json": {
            "prefix": package,
            "icons": icons_of(domain),
            "aliases": {"an-alias-in-openmoji": {"parent": "food-a"}},
            "width": 32,
            "height": 32,
        },
        "info.json": {
            "name": f"{domain} set",
            "author": {"name": f"{domain} artist", "url": f"https://example.org/{domain}"},
            "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "https://example.org/licence"},
        },
        "metadata.json": {"categories": of_category},
        "package.json": {"name": f"@iconify-json/{package}", "version": VERSION},
    }
    path = folder / f"iconify-json-{package}-{VERSION}.tgz"
    write_tar(path, {f"package/{name}": json.dumps(content).encode() for name, content in files.items()})
    return path


def make_packages(monkeypatch, folder):
    """Writes all five, which from then on are the known ones, in this order of domains."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {domain: write_package(folder, domain) for domain in DOMAINS}
    sources = tuple(
        Download(path.name, package=f"@iconify-json/{DOMAINS[domain]}@{VERSION}", integrity=compute_integrity(path))
        for domain, path in paths.items()
    )
    monkeypatch.setitem(DOWNLOADS, "EmojiStyles", sources)
    counts = {label: len(names) for label, names in sorted(CONCEPTS.items())}
    know(monkeypatch, "EmojiStyles", dict.fromkeys(DOMAINS, counts), classes=len(CONCEPTS))
    return paths


def put_npm(monkeypatch, folder, script):
    """Puts a stand-in for npm before all others; its words are logged in `calls`."""
    folder.mkdir()
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/calls"\n{script}\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "calls"
