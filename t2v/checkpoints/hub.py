"""Models saved as a folder of safetensors and JSON, and loaded strictly."""

from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import nn

from t2v.errors import UserError


class HubModel(PyTorchModelHubMixin):
    """Base of models with `save_pretrained` and `from_pretrained`, for a local folder or the Hugging Face Hub.

    Loading reads no pickles, and refuses missing or unexpected weights.
    """

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **arguments: Any
    ) -> Any:
        """Load a model, frozen and in eval mode; `PyTorchModelHubMixin.from_pretrained` calls this.

        Raises:
            UserError: If there are no weights.
        """
        download = {
            name: arguments.pop(name)
            for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")
        }
        arguments.pop("device", None)  # the device it was trained on
        path = Path(model_id) / "model.safetensors"
        try:
            if not Path(model_id).is_dir():
                path = Path(hf_hub_download(model_id, path.name, **download))
            weights = load_file(path, device=map_location)
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise UserError(
                f"There are no weights of a {cls.__name__} at '{model_id}' ({type(error).__name__}): give a folder "
                f"that `save_pretrained` wrote, or a repository of the Hugging Face Hub that has {path.name}."
            ) from error
        # On the meta device, weights that are replaced anyway take no time or memory.
        takes_device = "device" in signature(cls).parameters
        model = cls(**arguments, device="meta") if takes_device else cls(**arguments)
        assert isinstance(model, nn.Module)
        model.load_state_dict(weights, strict=strict, assign=takes_device)
        return model.requires_grad_(False).eval()
