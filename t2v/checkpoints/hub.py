"""Models that are written as a folder of safetensors and JSON, and read back strictly."""

from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import nn

from t2v.errors import UserError


class HubModel(PyTorchModelHubMixin):
    """`save_pretrained` and `from_pretrained`, from a folder or Hugging Face's hub; no pickles, no missing weights."""

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **arguments: Any
    ) -> Any:
        """What the mixin's `from_pretrained` calls; the model comes frozen and in eval mode."""
        download = {
            name: arguments.pop(name)
            for name in ("revision", "cache_dir", "force_download", "local_files_only", "token")
        }
        arguments.pop("device", None)  # where it was trained
        path = Path(model_id) / "model.safetensors"
        try:
            if not Path(model_id).is_dir():
                path = Path(hf_hub_download(model_id, path.name, **download))
            weights = load_file(path, device=map_location)
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise UserError(
                f"There are no weights of a {cls.__name__} at '{model_id}' ({type(error).__name__}): give a folder "
                f"that `save_pretrained` wrote, or a repository of the hub that holds {path.name}."
            ) from error
        bare = "device" in signature(cls.__init__).parameters  # no time or memory for weights that are replaced
        model = cls(**arguments, device="meta") if bare else cls(**arguments)
        assert isinstance(model, nn.Module)
        model.load_state_dict(weights, strict=strict, assign=bare)
        return model.requires_grad_(False).eval()
