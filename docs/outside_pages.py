"""Adds pages and pictures from outside of docs/ to the site, so that links work in the repository and on the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "results/README.md",
    "results/*/findings.md",
    "results/*/*.png",
    "results/*/index.html",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what `OUTSIDE` names, at its path in the repository."""
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        place = path.relative_to(ROOT).as_posix()
        files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at the place on the site: docs/ is its root."""
    folder = (Path("docs") if page.file.src_dir == config.docs_dir else Path()) / Path(page.file.src_uri).parent

    def moved(link: re.Match[str]) -> str:
        target = (ROOT / folder / link[1]).resolve().relative_to(ROOT)
        place = target.relative_to("docs") if target.is_relative_to("docs") else target
        up = "../" * (len(Path(page.file.src_uri).parts) - 1)
        return f"]({up}{place.as_posix()}{link[2]})"

    return re.sub(r"\]\((?!https:|#)([^)#]+)([^)]*)\)", moved, markdown)
