"""Adapters on the Hugging Face hub: a repository has the files of `save_adapter` and a model card."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vitlorafa import adapter_folder, peft_format
from vitlorafa.adapted import adapted_state, classifiers, timm_model
from vitlorafa.errors import AdapterError
from vitlorafa.io import load_adapter, save_adapter
from vitlorafa.model_card import ModelCard
from vitlorafa.named_adapters import using_adapter
from vitlorafa.sharding import is_writer

CARD = "README.md"


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    card: ModelCard | None = None,
    head: bool | Literal["auto"] = "auto",
    class_names: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    adapter: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload adapter",
    token: str | None = None,
    prefix: str | None = None,
) -> str:
    """Uploads the adapter with a model card to a repository, which is created if it is missing.

    Files of an earlier upload are replaced. Nothing else is sent: no images, and not the backbone.

    Args:
        model: Adapted model, or a module that wraps or holds it. All processes of a sharded one have to call.
        repo_id: Name of the repository, such as "you/my_adapter".
        card: What the model card says beside the backbone, the config and the versions.
        head: Whether to upload the classifier. "auto" means yes if it trains or was loaded with the adapter.
        class_names: Names of the classes in the order of the logits.
        metadata: Additional values, as in `save_adapter`.
        adapter: Name of the adapter, if the model has several; if None, the active one.
        private: Whether a new repository is private; if None, as the account's settings say.
        revision: Branch to upload to; if None, the main one.
        commit_message: Title of the commit.
        token: Access token; if None, that of `hf auth login` or of the environment variable HF_TOKEN.
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The address of the repository.

    Raises:
        AdapterError: If huggingface_hub is missing, if the hub refuses or cannot be reached, or where `save_adapter`
            raises one.
    """
    api = _huggingface_hub().HfApi(token=token)
    inner = timm_model(model, prefix)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with using_adapter(model, inner, adapter if adapter in adapted_state(inner).adapters else None):
            head = _has_own_head(inner) if head == "auto" else head
        options: dict[str, Any] = {"metadata": metadata, "adapter": adapter, "prefix": prefix}
        save_with_card(model, folder, repo_id, card=card, head=head, class_names=class_names, **options)
        if not is_writer(model):
            return ""
        with _explained(f"upload to {repo_id}"):
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.create_commit(
                repo_id, _operations(api, repo_id, folder, revision), commit_message=commit_message, revision=revision
            )
    return str(address)


def from_pretrained(
    model: nn.Module,
    repo_id_or_folder: str | os.PathLike[str],
    *,
    head: bool | Literal["auto"] = "auto",
    adapter: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    prefix: str | None = None,
) -> nn.Module:
    """`load_adapter` for a folder or a repository on the hub, of this package or of PEFT.

    Only the files of the adapter are downloaded, once; pickles are not. Nothing in them is executed.

    Args:
        model: Model that the adapter belongs to, or a module that wraps or holds it.
        repo_id_or_folder: Folder, if there is one of this name, or name of a repository.
        head: Whether to load the classifier too. "auto" loads it if it was saved and the model has one.
        adapter: Name of the adapter to load it as, see `load_adapter`.
        revision: Branch, tag or commit; if None, the main branch.
        cache_dir: Folder for downloads; if None, the hub's default.
        local_files_only: Whether to use what was downloaded before, without asking the hub.
        token: Access token; if None, that of `hf auth login` or of the environment variable HF_TOKEN.
        prefix: Name of the timm model within `model`, if it holds several.

    Returns:
        The same model.

    Raises:
        AdapterError: If there is neither such a folder nor such a repository, if huggingface_hub is missing or the hub
            cannot be reached, or where `load_adapter` raises one.

    Warns:
        AdapterWarning: Where `load_adapter` does.
    """
    folder = Path(repo_id_or_folder).expanduser()
    if isinstance(repo_id_or_folder, str) and not folder.is_dir() and _may_be_repository(repo_id_or_folder):
        with _explained(f"load {repo_id_or_folder}, which is no folder, from the hub"):
            folder = Path(
                _huggingface_hub().snapshot_download(
                    repo_id_or_folder,
                    revision=revision,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=list(adapter_folder.FILES),
                )
            )
    return load_adapter(model, folder, head=head, adapter=adapter, prefix=prefix)


def save_with_card(
    model: nn.Module,
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    card: ModelCard | None = None,
    head: bool = False,
    **options: Any,
) -> Path:
    """Saves an adapter with its model card: the folder that `push_to_hub` uploads.

    Args:
        model: Adapted model, or a module that wraps or holds it.
        folder: Folder to write to.
        repo_id: Name of the repository that the card names.
        card: What the card says beside what the folder does.
        head: Whether to save the classifier.
        options: Further options of `save_adapter`.

    Returns:
        The folder.

    Raises:
        AdapterError: Where `save_adapter` raises one.
    """
    written = save_adapter(model, folder, head=head, **options)
    if is_writer(model):
        description = json.loads((written / adapter_folder.DESCRIPTION).read_text(encoding="utf-8"))
        classes = _count_classes(timm_model(model, options.get("prefix"))) if head else 0
        for_peft = (written / peft_format.CONFIG).exists()
        text = (card or ModelCard()).text(repo_id, description, classes, for_peft)
        (written / CARD).write_text(text, encoding="utf-8")
    return written


def _may_be_repository(name: str) -> bool:
    return name.count("/") < 2 and not name.startswith((".", "/", "~"))


def _operations(api: Any, repo_id: str, folder: Path, revision: str | None) -> list[Any]:
    """What replaces the adapter of a repository, in one commit: its files of another format are deleted."""
    hub = _huggingface_hub()
    new = {path.name: path for path in sorted(folder.iterdir())}
    there = api.list_repo_files(repo_id, revision=revision)
    outdated = [name for name in adapter_folder.FILES if name in there and name not in new]
    add = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in new.items()]
    return [*add, *(hub.CommitOperationDelete(path_in_repo=name) for name in outdated)]


def _has_own_head(inner: nn.Module) -> bool:
    """Whether the head trains with the active adapter, or was loaded with it."""
    parameters = {parameter for head in classifiers(inner) for parameter in head.parameters()}
    names = {name for name, parameter in inner.named_parameters() if parameter in parameters}
    return any(p.requires_grad for p in parameters) or bool(names & adapted_state(inner).originals.keys())


def _count_classes(inner: nn.Module) -> int:
    linears = [module for head in classifiers(inner) for module in head.modules() if isinstance(module, nn.Linear)]
    return linears[-1].out_features if linears else 0


def _huggingface_hub() -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError:
        raise AdapterError(
            "the package huggingface_hub is missing: install it with pip install 'vitlorafa[hub]'"
        ) from None


@contextmanager
def _explained(action: str) -> Iterator[None]:
    """Context in which what the hub's client raises becomes one sentence."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:  # also those of its HTTP library, which differs between versions
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(
            f"cannot {action} ({reason.rstrip('.')}): check the name, your connection and your token (`hf auth login`)"
        ) from error
