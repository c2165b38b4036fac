"""DomainNet without the duplicates that its authors found.

Its archives hold 596,006 images. The authors' lists of training and test images, `<domain>_train.txt` and
`<domain>_test.txt`, name the 586,575 that are left; DomainBed deletes the others by a list of its own.
"""

from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.errors import BenchmarkError
from domainbed_ext.prepare.layout import Plan, Root, find_files, plan_folders


def plan(roots: Sequence[Root], domains: Sequence[str]) -> Plan:
    """Plans the listed images; all images of a domain without lists, which verifying then finds to be too many.

    Args:
        roots: Where the archives and lists are.
        domains: Names of the domains.

    Raises:
        BenchmarkError: A domain, one of its two lists, or a listed image is missing.
    """
    files = find_files(roots, [name for domain in domains for name in _list_names(domain)])
    kept = plan_folders("DomainNet", roots, domains)
    for domain in domains:
        lists = [files[name] for name in _list_names(domain) if name in files]
        if not lists:
            continue
        if len(lists) == 1:
            missing = next(name for name in _list_names(domain) if name not in files)
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


def _list_names(domain: str) -> tuple[str, str]:
    return f"{domain}_train.txt", f"{domain}_test.txt"


def _read(path: Path) -> list[str]:
    """Reads the images of a list, whose lines are "<domain>/<class>/<image> <label>"."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is no list of images: download it again") from error
    return [line.rsplit(maxsplit=1)[0] for line in lines if line.strip()]
