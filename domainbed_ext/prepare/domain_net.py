"""DomainNet without the duplicates that its authors found.

Its archives hold 596,006 images. The authors' lists of training and test images, `<domain>_train.txt` and
`<domain>_test.txt`, name the 586,575 that are left; DomainBed deletes the others by a list of its own.
"""

from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.layout import Plan, Root, folder_plan, named_files


def plan(roots: Sequence[Root], domains: Sequence[str]) -> Plan:
    """The listed images; all of them for a domain without lists, which then has too many, and verifying says so.

    Args:
        roots: where the archives and lists are.
        domains: names.

    Raises:
        BenchmarkError: a domain, one of its two lists, or a listed image is missing.
    """
    found = named_files(roots, [name for domain in domains for name in _lists(domain)])
    kept = folder_plan("DomainNet", roots, domains)
    for domain in domains:
        lists = [found[name] for name in _lists(domain) if name in found]
        if not lists:
            continue
        if len(lists) == 1:
            missing = next(name for name in _lists(domain) if name not in found)
            raise BenchmarkError(f"DomainNet: there is {lists[0].name} but no {missing}: give both by --archive")
        listed = {place for file in lists for place in _read(file)}
        absent = sorted(listed - {place for _, place in kept})
        if absent:
            raise BenchmarkError(
                f"DomainNet: {len(absent)} image(s) of the lists of {domain} are not there, {absent[0]} first: "
                f"give {domain}.zip, whole, by --archive"
            )
        kept = [(file, place) for file, place in kept if place.split("/")[0] != domain or place in listed]
    return kept


def _lists(domain: str) -> tuple[str, str]:
    return f"{domain}_train.txt", f"{domain}_test.txt"


def _read(path: Path) -> list[str]:
    """The images of a list, whose lines are "<domain>/<class>/<image> <label>"."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is no list of images: get it again") from error
    return [line.rsplit(maxsplit=1)[0] for line in lines if line.strip()]
