"""Models saved as a folder of safetensors and JSON, and loaded strictly; folders of Hugging Face's Hub."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, PyTorchModelHubMixin, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from t2v.errors import UserError, reason_of
from t2v.files import allow_by_umask, sha256

WEIGHTS = "model.safetensors"
"""The file of the weights in a model's folder."""


class HubModel(PyTorchModelHubMixin):
    """Base of models with `save_pretrained` and `from_pretrained`, for a local folder or the Hugging Face Hub.

    Loading reads no pickles, and refuses missing, unexpected or damaged weights: `model.safetensors.sha256`, which
    `sha256sum --check` reads too, has their hash.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the weights and their hash, readable for whom the umask allows; safetensors allows the user alone."""
        path = save_directory / WEIGHTS
        _hash_path(path).unlink(missing_ok=True)
        try:
            super()._save_pretrained(save_directory)
        except SafetensorError as error:  # such as a full disk
            raise OSError(str(error)) from error
        allow_by_umask(path)
        _hash_path(path).write_text(f"{sha256(path)}  {path.name}\n")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        map_location: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        strict: bool = True,
        **arguments: Any,
    ) -> Any:
        """Load a model, frozen and in eval mode; `PyTorchModelHubMixin.from_pretrained` calls this.

        Args:
            model_id: The folder or repository.
            map_location: Device of the weights.
            dtype: Type of the floating-point weights; by default as stored.
            strict: Whether to refuse missing and unexpected weights.
            arguments: Options of the download, and the arguments that the model was built with.

        Raises:
            UserError: If there are no weights, or they are damaged.
        """
        download = {
            name: arguments.pop(name)
            for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")
        }
        arguments.pop("device", None)  # the device it was trained on
        path = Path(model_id) / WEIGHTS
        with torch.device("meta"):  # weights that are replaced anyway take no time or memory
            model = cls(**arguments)
        assert isinstance(model, nn.Module)
        try:
            if not Path(model_id).is_dir():
                path = Path(hf_hub_download(model_id, path.name, **download))
            _check_hash(path)
            types = {name: dtype for name, _ in model.named_parameters()}
            weights = _read(path, model.state_dict(), torch.device(map_location), types)
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise UserError(
                f"There are no weights of a {cls.__name__} at '{model_id}' ({type(error).__name__}): give a folder "
                f"that `save_pretrained` wrote, or a repository of the Hugging Face Hub that has {path.name}."
            ) from error
        model.load_state_dict(weights, strict=strict, assign=True)
        return model.to(map_location, dtype).requires_grad_(False).eval()  # and the buffers that are not stored


def _hash_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _check_hash(path: Path) -> None:
    """Check a file against the hash beside it; earlier versions wrote none.

    Raises:
        UserError: If it is damaged.
    """
    stored = _hash_path(path)
    if path.is_file() and stored.is_file() and stored.read_text().split()[:1] != [sha256(path)]:
        raise UserError(
            f"'{path}' is damaged: its sha256 is not that in {stored.name}. Copy it or export the model again; if you "
            f"have changed it yourself, remove {stored.name}."
        )


def _read(
    path: Path, layouts: dict[str, Tensor], device: torch.device, types: dict[str, torch.dtype | None]
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Tensors that need no change stay mapped to the file. Each of the others is copied from a mapping of its own, which
    is released, so that no more than one is in memory twice.

    Args:
        path: The file.
        layouts: Tensors with the shapes and memory formats of those that are read.
        device: Where they are copied to.
        types: Type of each floating-point tensor, if it is not the stored one; the model converts its buffers itself.
    """
    tensors = {}
    with safe_open(path, framework="pt") as shared:
        for name in shared.keys():  # noqa: SIM118  (no dictionary)
            tensor = tensors[name] = shared.get_tensor(name)
            layout = layouts.get(name)
            if layout is None or layout.shape != tensor.shape:
                continue  # `load_state_dict` refuses it
            wanted = (types.get(name) if tensor.is_floating_point() else None) or tensor.dtype
            if (tensor.device, tensor.dtype, tensor.stride()) != (device, wanted, layout.stride()):
                with safe_open(path, framework="pt") as own:
                    tensors[name] = torch.empty_like(layout, device=device, dtype=wanted).copy_(own.get_tensor(name))
    return tensors


def find_folder(name: str | Path, revision: str | None, files: Sequence[str]) -> Path:
    """Return a local folder, or download a repository of the Hub into its cache.

    Args:
        name: Path of a folder. If there is none, and it has the form "user/name", it is a repository.
        revision: Branch, tag or commit of the repository; its main branch by default.
        files: Which files to download.

    Raises:
        UserError: If there is neither, the Hub cannot be reached, or a revision of a local folder is asked for.
    """
    folder = Path(name)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name), re.ASCII):
        if revision is not None:
            raise UserError(
                f"revision={revision} is of a repository of the Hub, but '{name}' is "
                f"{'a local folder' if folder.exists() else 'none, and no folder'}: leave it out, or give user/name."
            )
        return folder
    at = "" if revision is None else f" with the revision {revision}"
    with _refusals(
        f"'{name}' is not an exported model: there is no such folder, and {constants.ENDPOINT} gives no repository of "
        f"this name{at}"
    ):
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(files)))


def upload_folder(folder: Path, repository: str, revision: str | None, private: bool | None, keep: str) -> str:
    """Upload a folder to a repository of the Hub in one commit, and return the commit's address.

    Args:
        folder: The folder.
        repository: "user/name"; it is made if there is none.
        revision: Branch; main by default.
        private: Whether a new repository is private; by default as the account is set up.
        keep: A file that is not uploaded if the repository has it already.

    Raises:
        UserError: If the Hub cannot be reached, or refuses.
    """
    api = HfApi()
    with _refusals(f"'{repository}' cannot be uploaded to {constants.ENDPOINT}"):
        api.create_repo(repository, private=private, exist_ok=True)
        kept = [keep] if api.file_exists(repository, keep, revision=revision) else None
        return str(api.upload_folder(repo_id=repository, folder_path=folder, revision=revision, ignore_patterns=kept))


@contextmanager
def _refusals(problem: str) -> Iterator[None]:
    """Raise what the Hub or the network refuses as a `UserError`; the system's errors, such as a full disk, pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(
            f"{problem} ({reason_of(error, 240)}): check the name, the network, HF_HUB_OFFLINE, and for a private "
            "repository your login by `hf auth login`."
        ) from error
