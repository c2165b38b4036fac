"""Names of backbones: timm's own, those of the Hugging Face hub, and folders in timm's layout."""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, is_model, list_models
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

import domainbed_ext.models.vit_pico  # noqa: F401  (registers the embedded backbone with timm)
from domainbed_ext.errors import BenchmarkError, unknown
from domainbed_ext.system import option_values

CONFIG = "config.json"
_HUB, _FOLDER = "hf-hub:", "local-dir:"
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
_ALIASES = {"hf_hub:": _HUB, "hf-hub://": _HUB, "https://huggingface.co/": _HUB}


@dataclass(frozen=True)
class BackboneName:
    """A parsed name.

    Attributes:
        timm: Name that `timm.create_model` takes.
        architecture: Architecture's name in timm.
        input_size: Channels, height and width that the weights were trained with.
        mean: Mean per channel of the images they were trained with.
        std: Standard deviation per channel.
        folder: Folder that holds the model, of a local one.
    """

    timm: str
    architecture: str
    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    folder: Path | None = None

    @property
    def identity(self) -> str:
        """Identifies the backbone in records: a folder by its architecture and its config's digest, not by its path."""
        if self.folder is None:
            return self.timm
        digest = hashlib.blake2b((self.folder / CONFIG).read_bytes(), digest_size=8).hexdigest()
        return f"{_FOLDER}{self.architecture}-{digest}"


def canonical(name: str) -> str:
    """One spelling of each name: `timm/NAME` and `hf-hub:timm/NAME` are NAME, a folder is `local-dir:` and its path.

    Args:
        name: Name in any of these spellings.

    Returns:
        Name as `timm.create_model` takes it; an unknown name is returned unchanged.
    """
    for alias, scheme in _ALIASES.items():
        if name.startswith(alias):
            name = scheme + name.removeprefix(alias)
    bare = name.removeprefix(_HUB).removeprefix("timm/")
    if name.startswith(("timm/", f"{_HUB}timm/")) and is_model(bare.split(".")[0]):
        return bare
    if name.startswith(_HUB) or is_model(name.split(".")[0]):
        return name
    path = Path(option_values.expand("backbone", name.removeprefix(_FOLDER)))
    return f"{_FOLDER}{path.absolute()}" if name.startswith(_FOLDER) or path.is_dir() else name


def is_folder(name: str) -> bool:
    """Whether a name means a folder."""
    return canonical(name).startswith(_FOLDER)


def identity(name: str) -> str:
    """What tells a backbone from others, for a run's identity; of a folder that is not there, its name."""
    try:
        return parse(name).identity if is_folder(name) else canonical(name)
    except BenchmarkError:
        return canonical(name)


def parse(name: str) -> BackboneName:
    """Parses a name.

    Args:
        name: `NAME`, `NAME.TAG`, `timm/NAME.TAG`, `hf-hub:OWNER/REPOSITORY`, `local-dir:FOLDER` or a folder with timm's
            `config.json`.

    Raises:
        BenchmarkError: If timm has no such model (names the nearest one), or the config cannot be downloaded or read.
    """
    name = canonical(name)
    if name.startswith(_FOLDER):
        return _of_folder(Path(name.removeprefix(_FOLDER)))
    if name.startswith(_HUB):
        return _of_hub(name)
    return _of_timm(name)


def _of_timm(name: str) -> BackboneName:
    architecture = name.split(".")[0]
    if not is_model(architecture):
        if _REPOSITORY.fullmatch(name) and not name.startswith("timm/"):
            raise BenchmarkError(
                f"no backbone {name!r}: neither a folder nor a timm model; one on the Hugging Face hub is {_HUB}{name}"
            )
        if "/" in name.removeprefix("timm/") or "\\" in name:
            raise BenchmarkError(f"no backbone {name!r}: there is no such folder")
        raise unknown("backbone", architecture.removeprefix("timm/"), list_models())
    tagged = list_models(f"{architecture}.*", pretrained=True)
    if "." in name and name not in tagged:
        raise unknown("backbone", name, tagged)
    config = get_pretrained_cfg(name, allow_unregistered=True)
    return _with(name, architecture, vars(config) if config else {})


@cache
def _of_hub(name: str) -> BackboneName:
    repository = name.removeprefix(_HUB)
    try:
        config, architecture, _ = load_model_config_from_hf(repository)
    except KeyError as error:
        raise _not_timms(f"{CONFIG} of {name}", f"no {error.args[0]!r}") from error
    except Exception as error:  # hub clients raise many kinds: no network, no such repository, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BenchmarkError(
            f"could not get {CONFIG} of {name} ({reason}): check the name and the network, or give --backbone the "
            "folder that it was downloaded to"
        ) from error
    if not is_model(architecture):
        raise unknown(f"architecture in {CONFIG} of {name}:", str(architecture), list_models())
    return _with(name, architecture, config)


def _of_folder(folder: Path) -> BackboneName:
    path = folder / CONFIG
    try:
        config, architecture, _ = load_model_config_from_path(folder)
    except FileNotFoundError as error:
        raise BenchmarkError(
            f"no {path}: give --backbone a folder with timm's {CONFIG} and model.safetensors, or the name of a timm "
            "model, and --weights the file"
        ) from error
    except KeyError as error:
        raise _not_timms(str(path), f"no {error.args[0]!r}") from error
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _not_timms(str(path), str(error)) from error
    if not isinstance(architecture, str) or not is_model(architecture):
        raise unknown(f"architecture in {path}:", str(architecture), list_models())
    return _with(f"{_FOLDER}{folder}", architecture, config, folder)


def _with(name: str, architecture: str, config: dict[str, Any], folder: Path | None = None) -> BackboneName:
    try:
        size = tuple(map(int, config.get("input_size") or BackboneName.input_size))
        mean, std = (tuple(map(float, config.get(key) or ())) for key in ("mean", "std"))
        if len(size) != 3:
            raise ValueError(f"input_size {list(size)} is not channels, height and width")
    except (TypeError, ValueError) as error:
        raise _not_timms(f"{CONFIG} of {name}", str(error)) from error
    return BackboneName(name, architecture, size, mean, std, folder)


def _not_timms(what: str, reason: str) -> BenchmarkError:
    return BenchmarkError(
        f"{what} is not timm's ({reason}): name the timm model by --backbone, and give --weights the .safetensors file"
    )
