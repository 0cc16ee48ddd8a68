"""From text to video: the three trained parts, and everything that generation needs to know."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from t2v.batch import TextEmbedding
from t2v.checkpoints.config import from_config, to_config
from t2v.checkpoints.storage import read_checkpoint
from t2v.errors import UserError
from t2v.generation.decode import generate_frames
from t2v.generation.quantization import Weights, convert
from t2v.generation.sampling import Sampler
from t2v.generation.schedules import Schedule
from t2v.text import TextEncoder
from t2v.transformer.model import VideoTransformer
from t2v.vqvae.loading import load_vqvae
from t2v.vqvae.model import VQVAE, to_model_range, to_uint8

FORMAT = 2
"""Of the folder; a change that older code cannot read raises it."""
SETTINGS = "text_to_video.json"
PARTS = ("transformer", "vqvae")
FILES = (SETTINGS, *(f"{part}/{name}" for part in PARTS for name in ("config.json", "model.safetensors")))
"""What an exported folder must hold."""
MADE: dict[str, type] = {"guidance": Schedule, "sampler": Sampler, "text_encoder": TextEncoder}
"""The settings that may be objects."""


class TextToVideo:
    """Makes videos from text, with both models and the text encoder in one object.

    Read one with `from_pretrained` or `from_checkpoint`, then call `generate` or `stream`.
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
    ):
        """
        Args:
            transformer: predicts tokens; it is put into eval mode.
            vqvae: made the tokens that the transformer was trained on, and decodes them; it is put into eval mode.
            text_encoder: the one whose embeddings the transformer was trained on.
            fps: frames a second of the videos.
            sampler: how tokens are drawn; from the plain probabilities by default.
            guidance: strength of classifier-free guidance, also a schedule over the frames; 1 is none.
            frames: length of a video, if a call asks for no other.

        Raises:
            UserError: if the parts do not fit each other.
        """
        check_parts(transformer, vqvae, text_encoder)
        self.transformer, self.vqvae, self.text_encoder = transformer.eval(), vqvae.eval(), text_encoder
        self.fps, self.frames = fps, frames
        self.sampler, self.guidance = sampler or Sampler(), guidance

    @property
    def device(self) -> torch.device:
        """Where the models compute."""
        return next(self.transformer.parameters()).device

    def to(self, device: torch.device | str) -> "TextToVideo":
        """Moves all three parts there."""
        for part in (self.transformer, self.vqvae, self.text_encoder):
            part.to(device)
        return self

    def generate(
        self,
        prompts: str | Sequence[str] | TextEmbedding,
        frames: int | None = None,
        seed: int | Sequence[int] = 0,
        start: UInt8[Tensor, "..."] | None = None,
        guidance: float | Schedule | None = None,
        sampler: Sampler | None = None,
    ) -> UInt8[Tensor, "b t c h w"]:
        """Makes one video a prompt, whole; the arguments are those of `stream`."""
        return torch.cat(list(self.stream(prompts, frames, seed, start, guidance, sampler)), dim=1)

    def stream(
        self,
        prompts: str | Sequence[str] | TextEmbedding,
        frames: int | None = None,
        seed: int | Sequence[int] = 0,
        start: UInt8[Tensor, "..."] | None = None,
        guidance: float | Schedule | None = None,
        sampler: Sampler | None = None,
    ) -> Iterator[UInt8[Tensor, "b 1 c h w"]]:
        """Makes one video a prompt and hands out frame after frame, in the same memory for any length.

        Args:
            prompts: one prompt, several, or what `embed` made of some.
            frames: length of the videos, those of `start` included; `self.frames` by default.
            seed: prompt number i gets seed + i; or one seed a prompt. The same prompt, seed, length and start make the
                same video on the same kind of device, whatever else is in the batch.
            start: frames that the videos begin with: one picture (c, h, w), one clip (t, c, h, w) for all prompts, or
                one clip a prompt (b, t, c, h, w), uint8, of the VQ-VAE's size. They go through the VQ-VAE too, so that
                the videos begin with their reconstructions, from which what is new does not stand out.
            guidance: strength of classifier-free guidance, in place of `self.guidance`.
            sampler: how tokens are drawn, in place of `self.sampler`.

        Returns:
            The frames in their order, from the first of `start`.

        Raises:
            UserError: before anything is made, if an argument is not as said above.
        """
        text = prompts if isinstance(prompts, TextEmbedding) else self.embed(prompts)
        count, frames = len(text.pooled), self.frames if frames is None else frames
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else seed
        given = None if start is None else self._encode(start, count)
        tokens = generate_frames(
            self.transformer,
            text,
            frames,
            sampler or self.sampler,
            seeds,
            self.guidance if guidance is None else guidance,
            given,
        )
        return self._decode(tokens, given)

    def embed(self, prompts: str | Sequence[str]) -> TextEmbedding:
        """Embeds prompts as captions were embedded for training: in full precision, whatever the models compute in.

        Args:
            prompts: one or several.

        Raises:
            UserError: if there is none.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("There are no prompts: give at least one; an empty string is a prompt too.")
        with torch.autocast(self.device.type, enabled=False):
            tokens, mask, pooled = self.text_encoder.encode(prompts)
        dtype = next(weight.dtype for weight in self.transformer.parameters() if weight.is_floating_point())
        return TextEmbedding(tokens.to(dtype), mask, pooled.to(dtype))

    @torch.inference_mode()
    def _encode(self, start: UInt8[Tensor, "..."], count: int) -> Int[Tensor, "{count} t h w"]:
        """The tokens of the frames that the videos begin with."""
        size = self.vqvae.image_size
        if not 3 <= start.ndim <= 5 or start.dtype != torch.uint8 or start.shape[-3:] != (3, size, size):
            raise UserError(
                f"start is {str(start.dtype).removeprefix('torch.')} of shape {tuple(start.shape)}, but must be uint8 "
                f"and end in (3, {size}, {size}): read it with t2v.video.read_clip, or resize it."
            )
        clips = start[(None,) * (5 - start.ndim)].to(self.device)
        if len(clips) not in (1, count):
            raise UserError(f"start has {len(clips)} clips for {count} prompts: give one for all, or one a prompt.")
        if not clips.shape[1]:
            raise UserError("start has no frames: give at least one, or leave start out.")
        return self.vqvae.encode(to_model_range(clips)).expand(count, -1, -1, -1)

    @torch.inference_mode()
    def _decode(
        self, tokens: Iterator[Int[Tensor, "b 1 h w"]], given: Int[Tensor, "b t h w"] | None
    ) -> Iterator[UInt8[Tensor, "b 1 c h w"]]:
        """Frames out of the given tokens and then out of those that are drawn."""
        state = None
        for frame in () if given is None else given.split(1, dim=1):
            video, state = self.vqvae.decode_stream(frame, state)
            yield to_uint8(video)
        for frame in tokens:
            video, state = self.vqvae.decode_stream(frame, state)
            yield to_uint8(video)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes everything into a folder of safetensors and JSON, which appears when it is complete.

        Args:
            folder: must not exist yet, or be empty.

        Raises:
            UserError: if it is not so.
        """
        folder = Path(folder)
        check_target(folder)
        settings = {
            "format": FORMAT,
            "t2v_version": version("t2v"),
            "fps": self.fps,
            "frames": self.frames,
            **{name: to_config(getattr(self, name)) for name in MADE},
        }
        partial = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            self.transformer.save_pretrained(partial / "transformer")
            self.vqvae.save_pretrained(partial / "vqvae")
            (partial / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            partial.replace(folder)
        except OSError as error:
            raise UserError(f"Cannot write '{folder}' ({error.strerror or error}): give another folder.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def from_pretrained(cls, folder: str | Path, weights: Weights = "full") -> "TextToVideo":
        """Reads what `save_pretrained` or `python -m t2v export` wrote. No code comes from the folder.

        Args:
            folder: where it is.
            weights: how the transformer's are kept: as they were trained, or in 8 or 4 bits (see
                `t2v.generation.quantization`).

        Raises:
            UserError: if something is missing, damaged or of another version, the parts do not fit each other, or there
                are no such weights.
        """
        folder = Path(folder)
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise UserError(
                f"'{folder}' is no exported model, since it has no {', '.join(missing)}: give a folder that "
                "`python -m t2v export` wrote."
            )
        part = SETTINGS
        try:
            settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            if settings["format"] != FORMAT:
                raise UserError(
                    f"'{folder}' has format {settings['format']}, written by t2v {settings['t2v_version']}, but this "
                    f"is t2v {version('t2v')}, which reads format {FORMAT}: install that version, or export again."
                )
            fps, frames = float(settings["fps"]), int(settings["frames"])
            guidance, sampler, encoder = (from_config(settings[key], kind) for key, kind in MADE.items())
            part = "transformer"
            transformer = VideoTransformer.from_pretrained(folder / part)
            part = "vqvae"
            vqvae = VQVAE.from_pretrained(folder / part)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"'{folder / part}' is damaged, or not written by `python -m t2v export` ({_reason(error)}): export "
                "the model again."
            ) from error
        convert(transformer, weights)
        return cls(transformer, vqvae, encoder, fps, sampler, guidance, frames)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, tokenizer: str | Path | None = None, weights: Weights = "full"
    ) -> "TextToVideo":
        """Reads a checkpoint of stage 2 and the tokenizer it was trained with.

        Args:
            path: the .ckpt file or folder that `fit` of stage 2 wrote. Where training kept a moving average of the
                weights, it is what the checkpoint gives.
            tokenizer: checkpoint or exported folder of the VQ-VAE; by default where it lay in training.
            weights: how the transformer's are kept, as in `from_pretrained`.

        Raises:
            UserError: if there is no such file, it is another tokenizer or text encoder than in training, or there are
                no such weights.
        """
        checkpoint = _load_checkpoint(Path(path))
        try:
            arguments, fingerprint = checkpoint["hyper_parameters"], checkpoint["fingerprint"]
            tokenizer = tokenizer or arguments["tokenizer"]
            fps, frames = float(fingerprint["fps"]), int(arguments["frames"])
            guidance, sampler, encoder = (from_config(arguments[key], kind) for key, kind in MADE.items())
            with torch.device("meta"):  # no time or memory for weights that are replaced
                transformer = VideoTransformer.from_config({**arguments["model"]["init_args"], "device": None})
            state = {
                name.removeprefix("model."): value
                for name, value in checkpoint["state_dict"].items()
                if name.startswith("model.")
            }
            transformer.load_state_dict(state, assign=True)
            transformer.requires_grad_(False)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"'{path}' is not a checkpoint of stage 2, the transformer, that this version can read "
                f"({_reason(error)}): give the path of one."
            ) from error
        if not Path(tokenizer).exists():
            raise UserError(
                f"There is no VQ-VAE at '{tokenizer}', with which '{path}' was trained: say with --tokenizer where it "
                "is."
            )
        vqvae = load_vqvae(str(tokenizer))
        for key, ours in (("tokenizer", vqvae.fingerprint()), ("text_encoder", encoder.name)):
            if fingerprint.get(key) != ours:
                raise UserError(
                    f"The {key} is {ours}, but '{path}' was trained with {fingerprint.get(key)}: give the {key} that "
                    "it was trained with."
                )
        convert(transformer, weights)
        return cls(transformer, vqvae, encoder, fps, sampler, guidance, frames)


def check_parts(transformer: VideoTransformer, vqvae: VQVAE, text_encoder: TextEncoder) -> None:
    """Refuses models and a text encoder that do not fit each other.

    Raises:
        UserError: naming the sizes that differ.
    """
    if (vqvae.codebook_size, vqvae.grid_size) != (transformer.vocab_size, transformer.grid_size):
        raise UserError(
            f"The VQ-VAE has {vqvae.codebook_size} codes on a grid of {vqvae.grid_size}×{vqvae.grid_size}, but the "
            f"transformer has vocab_size={transformer.vocab_size} and grid_size={transformer.grid_size}: they must be "
            "equal."
        )
    if text_encoder.width != transformer.text_dim:
        raise UserError(
            f"The text encoder {text_encoder.name} is {text_encoder.width} wide, but the transformer has "
            f"text_dim={transformer.text_dim}: they must be equal."
        )


def check_target(folder: Path) -> None:
    """Refuses a folder to write to that holds something.

    Raises:
        UserError: naming it.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"'{folder}' exists already and is not an empty folder: give another, or remove it.")


def _load_checkpoint(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(
            f"There is no checkpoint at '{path}': give the path of a .ckpt file that `fit` of stage 2 wrote."
        )
    try:
        return read_checkpoint(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"'{path}' is not a checkpoint, or it is damaged ({_reason(error)}): give the path of a .ckpt file that "
            "`fit` of stage 2 wrote."
        ) from error


def _reason(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
