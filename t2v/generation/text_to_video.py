"""From text to video: transformer, VQ-VAE and text encoder together, with the settings of generation."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from t2v import __version__
from t2v.batch import TextEmbedding
from t2v.checkpoints.config import to_config
from t2v.checkpoints.hub import find_folder, upload_folder
from t2v.checkpoints.storage import model_weights
from t2v.errors import UserError, reason_of
from t2v.files import atomic_path
from t2v.generation.candidates import best_of
from t2v.generation.card import CARD, model_card, training_record
from t2v.generation.decode import generate_frames
from t2v.generation.devices import find_device, find_dtype, float_type
from t2v.generation.loading import OBJECT_SETTINGS, check_parts, check_target, load_checkpoint, read_options
from t2v.generation.parallel import Parallel
from t2v.generation.quantization import Weights, convert
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule
from t2v.generation.stream import VideoStream
from t2v.text import TextEncoder
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.loading import load_vqvae
from t2v.vqvae.model import VQVAE, to_model_range

FORMAT = 4
"""Version of the exported folder; raised by changes that older code cannot read."""
SETTINGS = "text_to_video.json"
FILES = (
    SETTINGS,
    *(f"{part}/{name}" for part in ("transformer", "vqvae") for name in ("config.json", "model.safetensors")),
)
"""Files of an exported folder that are read; it has a model card too."""


class TextToVideo:
    """Generates videos from text: both models and the text encoder in one object.

    Load one with `from_pretrained` or `from_checkpoint`, then call `generate` or `stream`.

    Args:
        transformer: Predicts tokens; put into eval mode.
        vqvae: Decodes tokens; the one that encoded the transformer's training tokens. Put into eval mode.
        text_encoder: The one that embedded the captions of the transformer's training set.
        fps: Frames per second of the videos.
        sampler: Draws the tokens; by default from the unchanged probabilities.
        guidance: Guidance scale (classifier-free guidance), a number or a schedule over the frames; 1 is no guidance.
        frames: Default length of a video.
        compiled: Whether to compile the transformer's decoding pass, which takes a minute or more at the first frame.
        prompts: Example prompts, for the model card and the page.
        training: What the model was trained on, and its figures, for the model card.
        candidates: Default number of candidates of a video with guidance, see `t2v.generation.candidates`.

    Raises:
        UserError: If the parts do not fit each other.
    """

    def __init__(
        self,
        transformer: VideoTransformer,
        vqvae: VQVAE,
        text_encoder: TextEncoder,
        fps: float,
        sampler: Sampler | None = None,
        guidance: float | Schedule = 1.0,
        frames: int = 16,
        compiled: bool = False,
        prompts: Sequence[str] = (),
        training: Mapping[str, str | int | float] | None = None,
        candidates: int = 1,
    ) -> None:
        check_parts(transformer, vqvae, text_encoder)
        self.transformer, self.vqvae, self.text_encoder = transformer.eval(), vqvae.eval(), text_encoder
        self.fps, self.frames, self.candidates = float(fps), index(frames), index(candidates)
        self.sampler, self.compiled = sampler or Sampler(), compiled
        self.guidance = guidance if isinstance(guidance, Schedule) else float(guidance)
        self.prompts, self.training = list(prompts), dict(training or {})

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return next(self.transformer.parameters()).device

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TextToVideo":
        """Move models and text encoder to a device, or change the type of their weights, and return self.

        Raises:
            UserError: If the device does not exist; nothing is changed then.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        device = self.device if device is None else find_device(device)
        self.transformer.to(device, dtype)
        self.vqvae.to(device, dtype)
        self.text_encoder.to(device, dtype)
        return self

    def generate(
        self,
        prompts: str | Sequence[str] | TextEmbedding,
        frames: int | None = None,
        seed: int | Sequence[int] = 0,
        start: Shaped[Tensor, "*shape"] | None = None,
        guidance: float | Schedule | None = None,
        sampler: Sampler | None = None,
        parallel: Parallel = "auto",
        negative_prompt: str | Sequence[str] = "",
        candidates: int | None = None,
    ) -> UInt8[Tensor, "b t c height width"]:
        """Generate one whole video per prompt; the arguments are those of `stream`."""
        stream = self.stream(prompts, frames, seed, start, guidance, sampler, parallel, negative_prompt, candidates)
        return torch.cat(list(stream), dim=1)

    def stream(
        self,
        prompts: str | Sequence[str] | TextEmbedding,
        frames: int | None = None,
        seed: int | Sequence[int] = 0,
        start: Shaped[Tensor, "*shape"] | None = None,
        guidance: float | Schedule | None = None,
        sampler: Sampler | None = None,
        parallel: Parallel = "auto",
        negative_prompt: str | Sequence[str] = "",
        candidates: int | None = None,
    ) -> VideoStream:
        """Generate one video per prompt and yield frame after frame, in constant memory for any length.

        Args:
            prompts: One prompt, several, or the result of `embed`.
            frames: Length of the videos, start frames included; `self.frames` by default.
            seed: Prompt number i uses seed + i; or one seed per prompt. The same prompt, seed, length and start frames
                give the same video on the same kind of device, whatever else is in the batch.
            start: Start frames: one picture (c, height, width) or one clip (t, c, height, width) for all prompts, or
                one clip per prompt (b, t, c, height, width); uint8, of the VQ-VAE's size. The videos begin with their
                reconstructions by the VQ-VAE, so that the generated frames look alike.
            guidance: Guidance scale; `self.guidance` by default.
            sampler: Draws the tokens; `self.sampler` by default.
            parallel: Tokens of each video that a pass of the transformer computes; 1 is one after the other. "auto" is
                as many as are worth it on this kind of device. The video is the same with any number, up to rounding.
            negative_prompt: What the videos should not show, for all or one per prompt; empty for none. Guidance leads
                away from its text in place of "no text".
            candidates: Videos that are generated for each prompt, of which the one is kept that is most probable under
                guidance; `self.candidates` by default, if there is guidance. Takes as many times the work and memory,
                and the first frame comes when all of them are finished.

        Returns:
            The frames in order, start frames included.

        Raises:
            UserError: If an argument is invalid, before anything is generated.
        """
        text = self._to_model(prompts) if isinstance(prompts, TextEmbedding) else self.embed(prompts)
        batch = len(text.mask)
        start_tokens = None if start is None else self._encode(start, batch)
        generate = partial(
            generate_frames,
            self.transformer,
            frames=self.frames if frames is None else frames,
            sampler=sampler or self.sampler,
            guidance=self.guidance if guidance is None else guidance,
            compiled=self.compiled,
            parallel=parallel,
        )
        seeds = [int(seed) + i for i in range(batch)] if isinstance(seed, int | Integral) else [int(s) for s in seed]
        negative = self._embed_negative(negative_prompt, batch)
        tokens = best_of(candidates, self.candidates, generate, text, seeds, start_tokens, negative)
        return VideoStream(self.vqvae, tokens, start_tokens)

    def embed(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Embed prompts by the text encoder, without autocast, as captions were embedded for training.

        Args:
            prompts: One or several.

        Returns:
            The embeddings on the device of the models and in the type of the transformer.

        Raises:
            UserError: If there are no prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("There are no prompts: give at least one; an empty string is a prompt too.")
        with torch.autocast(self.text_encoder.device.type, enabled=False):
            return self._to_model(self.text_encoder.encode(prompts))

    def _embed_negative(self, prompts: str | Sequence[str], batch: int) -> TextEmbedding | None:
        """Return the negative prompts' embeddings, without text tokens for empty ones, or None if all are empty."""
        each = [prompts] * batch if isinstance(prompts, str) else list(prompts)
        if not any(each):
            return None
        text = self.embed(each)
        return text._replace(mask=text.mask & torch.tensor([bool(e) for e in each], device=text.mask.device)[:, None])

    def _to_model(self, text: TextEmbedding) -> TextEmbedding:
        """Return text embeddings on the device of the models and in the type of the transformer."""
        device, dtype = self.device, float_type(self.transformer)
        return TextEmbedding(text.tokens.to(device, dtype), text.mask.to(device))

    @torch.inference_mode()
    def _encode(self, start: Shaped[Tensor, "*shape"], batch: int) -> Int[Tensor, "{batch} t h w"]:
        """Return the tokens of the start frames of each video."""
        size = self.vqvae.image_size
        if not isinstance(start, Tensor):
            raise UserError(f"start is {type(start).__name__}, but must be a tensor: use torch.from_numpy.")
        if not 3 <= start.ndim <= 5 or start.dtype != torch.uint8 or start.shape[-3:] != (3, size, size):
            raise UserError(
                f"start is {str(start.dtype).removeprefix('torch.')} of shape {tuple(start.shape)}, but must be uint8 "
                f"with last dimensions (3, {size}, {size}): read it with t2v.video.read_clip, or resize it."
            )
        clips = start[(None,) * (5 - start.ndim)].to(self.device)
        if len(clips) not in (1, batch):
            raise UserError(f"start has {len(clips)} clips for {batch} prompts: give one for all, or one per prompt.")
        if clips.shape[1] == 0:
            raise UserError("start has no frames: give at least one, or leave start out.")
        return self.vqvae.encode(to_model_range(clips)).expand(batch, -1, -1, -1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything into a folder of safetensors and JSON with a model card; it appears complete or not at all.

        Args:
            folder: Must not exist yet, or be empty.

        Raises:
            UserError: If the folder is not empty, or cannot be written.
        """
        folder = Path(folder)
        check_target(folder)
        settings = {
            "format": FORMAT,
            "t2v_version": __version__,
            "fps": self.fps,
            "frames": self.frames,
            "candidates": self.candidates,
            **{name: to_config(getattr(self, name)) for name in OBJECT_SETTINGS},
            "prompts": self.prompts,
            "training": self.training,
        }
        try:
            folder.absolute().parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(folder.absolute()) as partial:
                self.transformer.save_pretrained(partial / "transformer")
                self.vqvae.save_pretrained(partial / "vqvae")
                for part in ("transformer", "vqvae"):
                    (partial / part / CARD).unlink(missing_ok=True)  # the folder has one for both
                model_card(self, folder.absolute().name).save(partial / CARD)
                (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write '{folder}' ({error.strerror or error}): give another folder.") from error

    def push_to_hub(self, repository: str, revision: str | None = None, private: bool | None = None) -> str:
        """Upload everything to a repository of Hugging Face's Hub; the folder for temporary files needs the space.

        Args:
            repository: "user/name"; it is made if there is none. A model card that it has is kept.
            revision: Branch to upload to, which must exist; main by default.
            private: Whether a new repository is private; by default as the account is set up.

        Returns:
            Address of the commit.

        Raises:
            UserError: If the Hub cannot be reached or refuses; `hf auth login` gives it your token.
        """
        with tempfile.TemporaryDirectory(prefix="t2v-hub-") as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder)
            model_card(self, repository).save(folder / CARD)
            return upload_folder(folder, repository, revision, private, keep=CARD)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        weights: Weights = "full",
        compiled: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        text_device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> "TextToVideo":
        """Load what `save_pretrained`, `push_to_hub` or `python -m t2v export` wrote. No code is loaded from it.

        Each weight goes straight to its type and device, so that only one at a time is in memory twice.

        Args:
            folder: Path of the folder, or else a repository of Hugging Face's Hub, "user/name".
            weights: Storage of the transformer's weights: unchanged, or quantized (see `t2v.generation.quantization`).
            compiled: Whether to compile the decoding pass.
            dtype: Type of the text encoder and of weights that are not quantized: "float32", "bfloat16", or "auto", the
                type in the folder, but float32 on CPUs without bfloat16 units.
            device: Device of the models; the first GPU if there is one, else the CPU.
            text_device: Device of the text encoder, such as "cpu" for a large one; that of the models by default.
            revision: Branch, tag or commit of the repository; main by default.

        Raises:
            UserError: If something is missing, damaged or of another version, parts do not fit, or a value is invalid.
        """
        device = find_device(device)
        text_device = device if text_device is None else find_device(text_device, "text_device")
        model_dtype, text_dtype = find_dtype(dtype, device), find_dtype(dtype, text_device)
        given, folder = folder, find_folder(folder, revision, [*FILES, "*.sha256"])
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(
                f"'{given}' is not an exported model, it has no {', '.join(missing)}: give a folder that "
                "`python -m t2v export` wrote."
            )
        part = SETTINGS
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            if settings["format"] != FORMAT:
                raise UserError(
                    f"'{folder}' has format {settings['format']}, written by t2v {settings['t2v_version']}, but this "
                    f"is t2v {__version__}, which reads format {FORMAT}: install that version, or export again."
                )
            options = read_options(settings)
            options |= {"prompts": list(settings.get("prompts", [])), "training": dict(settings.get("training", {}))}
            part = "transformer"
            target: dict[str, Any] = {"map_location": device, "dtype": model_dtype}
            transformer = VideoTransformer.from_pretrained(folder / part, **(target if weights == "full" else {}))
            part = "vqvae"
            vqvae = VQVAE.from_pretrained(folder / part, **target)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UserError(
                f"'{folder / part}' is damaged, or not written by `python -m t2v export` ({reason_of(error)}): export "
                "the model again."
            ) from error
        convert(transformer, weights, device)
        transformer.to(device, model_dtype)
        options["text_encoder"].to(text_device, text_dtype or float_type(transformer))
        return cls(transformer, vqvae, **options, compiled=compiled)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        weights: Weights = "full",
        compiled: bool = False,
    ) -> "TextToVideo":
        """Load a checkpoint of stage 2 and the VQ-VAE it was trained with, on the CPU and in the types it has.

        Args:
            path: The .ckpt file or folder that `fit` of stage 2 wrote. The moving average of the weights is loaded if
                training kept one.
            tokenizer: Checkpoint or exported folder of the VQ-VAE; by default the path used in training.
            weights: Storage of the transformer's weights, as in `from_pretrained`.
            compiled: Whether to compile the decoding pass.

        Raises:
            UserError: If a file is missing, tokenizer or text encoder are not those of the training run, or `weights`
                is not known.
        """
        checkpoint = load_checkpoint(Path(path))
        try:
            arguments, fingerprint = checkpoint["hyper_parameters"], checkpoint["fingerprint"]
            tokenizer = tokenizer or arguments["tokenizer"]
            stored = {"text_encoder": arguments["text_encoder"], "fps": fingerprint["fps"]}
            options = read_options({**arguments["generation"], **stored})
            with torch.device("meta"):  # takes no time or memory for weights that are replaced
                transformer = VideoTransformer.from_config({**arguments["model"]["init_args"], "device": None})
            transformer.load_state_dict(model_weights(checkpoint, path), assign=True)
            transformer.requires_grad_(False)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"'{path}' is not a checkpoint of stage 2, the transformer, that this version can read "
                f"({reason_of(error)}): give the path of one."
            ) from error
        if not Path(tokenizer).exists():
            raise UserError(
                f"There is no VQ-VAE at '{tokenizer}', the path used in training of '{path}': give its path with "
                "--tokenizer."
            )
        vqvae = load_vqvae(str(tokenizer))
        for key, ours in (("tokenizer", vqvae.fingerprint()), ("text_encoder", options["text_encoder"].name)):
            if fingerprint.get(key) != ours:
                raise UserError(
                    f"The {key} is {ours}, but '{path}' was trained with {fingerprint.get(key)}: give the {key} that "
                    "it was trained with."
                )
        convert(transformer, weights)
        options |= {"prompts": checkpoint.get("prompts", []), "training": training_record(checkpoint, Path(path))}
        return cls(transformer, vqvae, **options, compiled=compiled)
