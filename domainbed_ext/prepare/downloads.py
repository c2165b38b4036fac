"""Where each data set comes from, and how many images it should have.

Addresses are those that DomainBed uses; EmojiStyles comes through the npm client. The MD5 sums are published by other
projects that download the same files (torchvision for MNIST, pytorch loaders of DomainBed's archives and of DomainNet
for the others); TerraIncognita's archives have known sizes instead, and npm packages the digests that npm reports.
"""

import urllib.parse
from dataclasses import dataclass

_LILA = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps"
_MNIST = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
_VISDA = "http://csr.bu.edu/ftp/visda/2019/multi-source"

Counts = dict[str, int | dict[str, int]]  # domain to its images, or to its classes and their images


@dataclass(frozen=True)
class Download:
    """One file of a data set.

    Attributes:
        name: Name of the file.
        urls: Addresses, the best first.
        md5: MD5 of its content; None if it is not known.
        size: Size in bytes; None if it is not known.
        page: Address for people, if it is not the first URL.
        package: Package and version that npm packs as this file, e.g. "@iconify-json/noto@1.2.9"; it has no addresses.
        integrity: SHA-512 of its content as npm writes it; also a file that the user gives must have it.
    """

    name: str
    urls: tuple[str, ...] = ()
    md5: str | None = None
    size: int | None = None
    page: str = ""
    package: str = ""
    integrity: str | None = None

    @property
    def where(self) -> str:
        """Address for people."""
        return self.page or self.urls[0]

    @property
    def hosts(self) -> set[str]:
        """What has to be reachable for it: hosts, or npm."""
        return {"npm"} if self.package else {urllib.parse.urlsplit(url).netloc for url in self.urls}


def _drive(name: str, key: str, md5: str) -> Download:
    """Makes the download of a file on Google Drive."""
    url = f"https://drive.google.com/uc?export=download&id={key}"
    return Download(name, (url,), md5, page=f"https://drive.google.com/file/d/{key}/view")


_DOMAIN_NET = {  # the cleaned version: MD5 of the zip, and of the lists of its training and test images
    "clipart": (
        "groundtruth/clipart.zip",
        "cd0d8f2d77a4e181449b78ed62bccf1e",
        "b4349693a7f9c05c53955725c47ed6cb",
        "f5ddbcfd657a3acf9d0f7da10db22565",
    ),
    "infograph": (
        "infograph.zip",
        "720380b86f9e6ab4805bb38b6bd135f8",
        "379b50054f4ac2018dca4f89421b92d9",
        "779626b50869edffe8ea6941c3755c71",
    ),
    "painting": (
        "groundtruth/painting.zip",
        "1ae32cdb4f98fe7ab5eb0a351768abfd",
        "7db0e7ca73ad9982f6e1f7f3ef372c0a",
        "232b35dc53f26d414686ae579e38d9b5",
    ),
    "quickdraw": (
        "quickdraw.zip",
        "bdc1b6f09f277da1a263389efe0c7a66",
        "b732ced3939ac8efdd8c0a889dca56cc",
        "c1a828fdfe216fb109f1c0083a252c6f",
    ),
    "real": (
        "real.zip",
        "dcc47055e8935767784b7162e7c7cca6",
        "8ebf02c2075fadd564705f0dc7cd6291",
        "6098816791c3ebed543c71ffa11b9054",
    ),
    "sketch": (
        "sketch.zip",
        "658d8009644040ff7ce30bb2e820850f",
        "1233bd18aa9a8a200bf4cecf1c34ef3e",
        "d8a222e4672cfd585298aa14d02ea441",
    ),
}


def _icons(name: str, version: str, size: int, integrity: str) -> Download:
    """Makes the download of a package of icons in Iconify's JSON."""
    file = f"iconify-json-{name}-{version}.tgz"
    return Download(file, size=size, package=f"@iconify-json/{name}@{version}", integrity=f"sha512-{integrity}")


def _domain_net() -> tuple[Download, ...]:
    sources = []
    for domain, (archive, archive_md5, *list_md5s) in _DOMAIN_NET.items():
        sources.append(Download(f"{domain}.zip", (f"{_VISDA}/{archive}",), archive_md5))
        for split, md5 in zip(("train", "test"), list_md5s, strict=True):
            name = f"{domain}_{split}.txt"
            sources.append(Download(name, (f"{_VISDA}/domainnet/txt/{name}",), md5))
    return tuple(sources)


DOWNLOADS: dict[str, tuple[Download, ...]] = {
    "VLCS": (_drive("VLCS.tar.gz", "1skwblH1_okBwxWxmRsp9_qi15hyPpxg8", "8870171eba660927d9668f4e515928e4"),),
    "PACS": (_drive("PACS.zip", "1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", "fd5db817f7cdafeef3bfd525aaf9b42e"),),
    "OfficeHome": (_drive("office_home.zip", "1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC", "b1c14819770c4448fd5b6d931031c91c"),),
    "TerraIncognita": (
        Download("eccv_18_all_images_sm.tar.gz", (f"{_LILA}/eccv_18_all_images_sm.tar.gz",), size=6492615601),
        Download("eccv_18_annotations.tar.gz", (f"{_LILA}/eccv_18_annotations.tar.gz",), size=2997071),
    ),
    "DomainNet": _domain_net(),
    "MNIST": tuple(
        Download(name, tuple(mirror + name for mirror in _MNIST), md5)
        for name, md5 in (  # torchvision's, without importing it, for torch takes seconds
            ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
            ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
            ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
        )
    ),
    "EmojiStyles": (
        _icons(
            "noto",
            "1.2.9",
            3102958,
            "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        ),
        _icons(
            "twemoji",
            "1.2.5",
            1555888,
            "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        ),
        _icons(
            "openmoji",
            "1.2.29",
            1264633,
            "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        ),
        _icons(
            "fluent-emoji",
            "1.2.7",
            14323330,
            "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        ),
        _icons(
            "fluent-emoji-high-contrast",
            "1.2.6",
            1054969,
            "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        ),
    ),
}

ALIASES = {"RotatedMNIST": "MNIST", "ColoredMNIST": "MNIST"}

# Images of each domain; more than one version where the source has changed over the years. OfficeHome's, and
# DomainNet's, which are those of its authors' lists, add up to the 15,588 and 586,575 of the DomainBed paper;
# TerraIncognita had that paper's 24,788 once, and has 24,330 since. VLCS by class is counted in DomainBed's list of
# its files; papers also have the second one.
_VLCS = ("bird", "car", "chair", "dog", "person")
_PACS = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
_EMOJI = ("activities", "animals", "food", "objects", "smileys", "symbols", "travel")
KNOWN: dict[str, tuple[Counts, ...]] = {
    "VLCS": (
        {
            "Caltech101": dict(zip(_VLCS, (237, 123, 118, 67, 870), strict=True)),
            "LabelMe": dict(zip(_VLCS, (80, 1209, 88, 42, 1237), strict=True)),
            "SUN09": dict(zip(_VLCS, (20, 932, 1036, 30, 1264), strict=True)),
            "VOC2007": dict(zip(_VLCS, (330, 699, 428, 420, 1499), strict=True)),
        },
        {
            "Caltech101": dict(zip(_VLCS, (237, 123, 118, 67, 870), strict=True)),
            "LabelMe": dict(zip(_VLCS, (80, 1209, 89, 43, 1235), strict=True)),
            "SUN09": dict(zip(_VLCS, (21, 933, 1036, 31, 1261), strict=True)),
            "VOC2007": dict(zip(_VLCS, (330, 699, 428, 420, 1499), strict=True)),
        },
    ),
    "PACS": (
        {
            "art_painting": dict(zip(_PACS, (379, 255, 285, 184, 201, 295, 449), strict=True)),
            "cartoon": dict(zip(_PACS, (389, 457, 346, 135, 324, 288, 405), strict=True)),
            "photo": dict(zip(_PACS, (189, 202, 182, 186, 199, 280, 432), strict=True)),
            "sketch": dict(zip(_PACS, (772, 740, 753, 608, 816, 80, 160), strict=True)),
        },
    ),
    "OfficeHome": ({"Art": 2427, "Clipart": 4365, "Product": 4439, "Real World": 4357},),
    "TerraIncognita": (
        {"location_100": 4741, "location_38": 9736, "location_43": 3970, "location_46": 5883},
        {"location_100": 4879, "location_38": 9767, "location_43": 4020, "location_46": 6122},
    ),
    "DomainNet": (
        {
            "clipart": 48129,
            "infograph": 51605,
            "painting": 72266,
            "quickdraw": 172500,
            "real": 172947,
            "sketch": 69128,
        },
    ),
    "MNIST": (
        {
            "train": dict(zip("0123456789", (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949), strict=True)),
            "test": dict(zip("0123456789", (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009), strict=True)),
        },
    ),
    "EmojiStyles": (  # each concept once in each domain
        {
            domain: dict(zip(_EMOJI, (84, 156, 130, 262, 165, 219, 218), strict=True))
            for domain in ("fluent", "ink", "noto", "openmoji", "twemoji")
        },
    ),
}
CLASSES = {
    "VLCS": 5,
    "PACS": 7,
    "OfficeHome": 65,
    "TerraIncognita": 10,
    "DomainNet": 345,
    "MNIST": 10,
    "EmojiStyles": 7,
}


def count_images(counts: Counts, domain: str) -> int:
    """Counts the images of a domain.

    Args:
        counts: Counts of a data set.
        domain: Name of the domain.
    """
    count = counts[domain]
    return count if isinstance(count, int) else sum(count.values())
