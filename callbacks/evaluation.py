"""What ``test`` of stage 2 measures: videos generated for held-out captions, beside real and reconstructed clips."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed
from jaxtyping import Int, UInt8
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.logging import log_gif
from callbacks.progress import ProgressPrinter
from callbacks.report import MetricsReport
from data.captions import read_metadata
from data.datasets import VideoClips
from data.examples.judge import ClipJudge
from data.plan import Bucket
from data.shards import ShardSet
from t2v.batch import PromptBatch
from t2v.errors import UserError, check_range
from t2v.metrics import I3D, LinearProbe, frechet_distance, kernel_distance
from t2v.metrics.distances import clips_protocol, missing_from_report
from t2v.metrics.probe import Accuracy, Attributes, accuracies
from t2v.vqvae.model import to_model_range, to_uint8

_SHOWN = 4
"""Clips in the comparison that TensorBoard shows."""
_DISTANCES = {"fvd": frechet_distance, "kvd": kernel_distance}


@dataclass
class _Measured:
    """What is known of the clips of a rank, by kind: real, reconstruction, generated, last_window, training."""

    pooled: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """The features of I3D before its logits."""
    truths: dict[str, list[Attributes]] = field(default_factory=lambda: defaultdict(list))
    """What the captions state."""
    judged: list[Attributes] = field(default_factory=list)
    """What the real held-out clips show, in the words of the judge."""
    answers: dict[str, list[Attributes]] = field(default_factory=lambda: defaultdict(list))
    """What the judge recognizes."""
    shown: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    """Time of generation."""


class GenerationEvaluation(MetricsReport):
    """Generates videos for held-out captions in ``test``, and reports them in a JSON file and in TensorBoard.

    - `test/fvd` and `test/kvd`: distances of the generated videos from the real held-out clips. With `_reconstruction`
      those of the tokenizer's reconstructions (the ceiling), with `_training` those of as many real training clips (the
      floor), with `_last_window` those of the last frames of generated videos that are longer than I3D's frames.
    - `test/probe_NAME`: fraction of videos with the right attribute, by a linear map from I3D's features that is fitted
      on the real training clips. `test/judge_NAME`: the same by the judge. `_real` and `_reconstruction` are the
      ceilings. The file has their intervals of 95 % confidence.
    - `test/nll`: negative log-likelihood of a held-out token in nats; `test/nll_fraction`: divided by the logarithm of
      the codebook's size.
    - `test/videos_per_second`; and `test/passes_per_frame`, through the transformer, unless generation is compiled.

    It does nothing in ``fit`` and ``validate``.

    Args:
        path: The JSON file; an older one is replaced.
        train: Video shards of the training clips.
        val: Video shards of the held-out clips, whose first captions are the prompts.
        attributes: Entries of the clips' metadata that their captions state.
        judge: Recognizes attributes from pixels.
        clips: Number of held-out clips, evenly spread; by default all. As many training clips are compared.
        batch_size: Videos that are generated together.
        frames: Frames of a clip that I3D sees, at least 9.
        probe_clips: Number of training clips that the linear map is fitted on, evenly spread, at least as many as are
            compared, which is the default: all of them if there are fewer.
    """

    def __init__(
        self,
        path: str,
        train: str,
        val: str,
        attributes: list[str] = [],  # noqa: B006
        judge: ClipJudge | None = None,
        clips: int | None = None,
        batch_size: int = 16,
        frames: int = 16,
        probe_clips: int | None = None,
    ) -> None:
        super().__init__(path)
        check_range(self, "[1, inf)", batch_size=batch_size)
        check_range(self, "[2, inf)", clips=clips)
        check_range(self, "[9, inf)", frames=frames)
        check_range(self, "[2, inf)", probe_clips=probe_clips)
        if probe_clips is not None and not attributes:
            raise UserError(
                f"probe_clips={probe_clips} has no effect without attributes: set attributes of GenerationEvaluation "
                "to what the linear map shall recognize, or remove probe_clips."
            )
        _check_probe_clips(probe_clips, clips or 0)
        self.train, self.val, self.attributes, self.judge = train, val, attributes, judge
        self.clips, self.batch_size, self.frames, self.probe_clips = clips, batch_size, frames, probe_clips
        self._passes = 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load the network, so that a mistake is reported before anything is generated."""
        if stage != "test":
            return
        super().setup(trainer, pl_module, stage)
        if pl_module.generation.frames < self.frames:
            raise UserError(
                f"model.generation.frames={pl_module.generation.frames} is less than the {self.frames} frames that I3D "
                "sees: raise it."
            )
        if self._describe_run(trainer)["seed"] is None:
            raise UserError("seed_everything is not set, without which the report would not be comparable: set it.")
        self._network = I3D(self.frames)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write nothing after ``validate``."""

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the clips and read the first of each, so that a mistake is reported before the likelihoods are computed.

        Raises:
            UserError: If there are too few clips, or clips without what the attributes or the judge need.
        """
        self._real, self._training = real, training = [self._open(path, pl_module) for path in (self.val, self.train)]
        ranks, available = trainer.world_size, min(len(real), len(training))
        if available < max(2, ranks):
            raise UserError(
                f"{len(real)} clips in '{self.val}' and {len(training)} in '{self.train}' are too few: at least 2, and "
                "one for each rank, are needed."
            )
        if self.clips is not None and self.clips > available:
            raise UserError(
                f"clips={self.clips} is more than there are: '{self.val}' has {len(real)} clips and '{self.train}' "
                f"{len(training)}; lower clips of GenerationEvaluation, or leave it out to compare {available}."
            )
        self._count = (self.clips or available) // ranks * ranks
        _check_probe_clips(self.probe_clips, self._count)
        for clips in (training, real):
            _, _, [metadata] = self._load(clips, np.zeros(1, dtype=int))
        if self.judge is not None:
            self.judge.truth(metadata)
            self.judge.prepare()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Generate and measure."""
        nll = pl_module.loss.compute().item()
        values = {"nll": nll, "nll_fraction": nll / math.log(pl_module.model.vocab_size)}
        self._network.to(pl_module.device)
        real, training, count, ranks = self._real, self._training, self._count, trainer.world_size
        fitted = min(self.probe_clips or count, len(training)) // ranks * ranks
        mine = slice(trainer.global_rank, None, ranks)
        measured = _Measured()
        self._passes = 0
        hook = pl_module.model.norm.register_forward_hook(self._count_pass)
        try:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self._measure_held_out(pl_module, real, _spread(len(real), count)[mine], measured)
                self._measure_training(pl_module, training, _spread(len(training), fitted)[mine], measured)
        finally:
            hook.remove()
        fps = float(pl_module.fingerprint["fps"])
        log_gif(trainer, "test: real, reconstructed, generated", torch.cat(measured.shown, -1), fps)
        measured = _gather(measured, ranks)
        scores = self._scores(measured)
        values |= self._distances(measured, count) | {name: accuracy.value for name, accuracy in scores.items()}
        values["videos_per_second"] = count / measured.seconds
        if self._passes:
            batches = math.ceil(count / ranks / self.batch_size)
            values["passes_per_frame"] = self._passes / batches / pl_module.generation.frames
        self._details = {
            **self._network.protocol(),
            **clips_protocol(count, self._network.num_features),
            "split": {"held_out": self.val, "training": self.train},
            "probe_clips": len(measured.truths["training"]) if self.attributes else 0,
            "fps": fps,
            "pixels": pl_module.tokenizer.image_size,
            "generated_frames": pl_module.generation.frames,
            "candidates": pl_module.generation.candidates,
            "seed": self._describe_run(trainer)["seed"],
            "accuracies": {name: accuracy._asdict() for name, accuracy in scores.items()},
        }
        assert not missing_from_report(self._details)
        for name, value in values.items():
            pl_module.log(f"test/{name}", value)
        if trainer.is_global_zero:
            print(f"Measured     {count} clips a side; {self._details.get('remark', 'enough for a Fréchet distance')}.")

    def details(self) -> dict[str, Any]:
        """Return how the distances and accuracies were measured, and the intervals of the accuracies."""
        return {"evaluation": self._details}

    def _open(self, path: str, pl_module: Any) -> VideoClips:
        size = pl_module.tokenizer.image_size
        return VideoClips(
            ShardSet(path), [Bucket(self.frames, 1, height=size, width=size)], float(pl_module.fingerprint["fps"])
        )

    def _load(
        self, clips: VideoClips, numbers: Int[np.ndarray, " n"]
    ) -> tuple[UInt8[Tensor, "b t c height width"], list[str], list[dict[str, Any]]]:
        """Return the first frames of clips, their first captions, and their metadata."""
        videos, captions, found = [], [], []
        for number in numbers.tolist():
            clip, sample = clips.load(number, clips.buckets[0], rng=None), clips.samples[number]
            if clip is None:
                raise UserError(f"Clip {sample.key} of '{sample.shard}' is damaged: make the shards again.")
            metadata = read_metadata(clips.shards.read(sample, "json"))
            if absent := [name for name in self.attributes if name not in metadata]:
                raise UserError(
                    f"Clip {sample.key} of '{sample.shard}' has no {', '.join(absent)} in its metadata, which has "
                    f"{', '.join(metadata)}: correct attributes of GenerationEvaluation."
                )
            videos.append(clip.video[: self.frames])
            captions.append(clip.captions[0])
            found.append(metadata)
        return torch.stack(videos), captions, found

    def _attributes(self, metadata: dict[str, Any]) -> Attributes:
        return {name: str(metadata[name]) for name in self.attributes}

    def _measure_held_out(
        self, pl_module: Any, real: VideoClips, numbers: Int[np.ndarray, " n"], measured: _Measured
    ) -> None:
        progress = ProgressPrinter("Held-out clip")
        for start in range(0, len(numbers), self.batch_size):
            batch = numbers[start : start + self.batch_size]
            videos, captions, metadata = self._load(real, batch)
            videos = videos.to(pl_module.device)
            began = time.monotonic()
            prompts = PromptBatch(captions, batch.tolist(), [str(number) for number in batch])
            generated = torch.cat(list(pl_module.generate_videos(prompts).frames), dim=1)
            measured.seconds += time.monotonic() - began
            reconstruction = to_uint8(pl_module.tokenizer(to_model_range(videos)).reconstruction)
            kinds = {"real": videos, "reconstruction": reconstruction, "generated": generated[:, : self.frames]}
            if start == 0:
                pairs = zip(*(clips[:_SHOWN] for clips in kinds.values()), strict=True)
                measured.shown = [torch.cat(list(pair), dim=-2) for pair in pairs]
            if generated.shape[1] > self.frames:
                kinds["last_window"] = generated[:, -self.frames :]
            for kind, clips in kinds.items():
                measured.pooled[kind].append(self._network.pool(to_model_range(clips)))
                if self.judge is not None:
                    measured.answers[kind] += [self.judge.recognize(clip.cpu()) for clip in clips]
            measured.truths["real"] += [self._attributes(each) for each in metadata]
            if self.judge is not None:
                measured.judged += [self.judge.truth(each) for each in metadata]
            progress.update(start + len(batch), len(numbers))

    def _measure_training(
        self, pl_module: Any, training: VideoClips, numbers: Int[np.ndarray, " n"], measured: _Measured
    ) -> None:
        progress = ProgressPrinter("Training clip")
        for start in range(0, len(numbers), self.batch_size):
            videos, _, metadata = self._load(training, numbers[start : start + self.batch_size])
            measured.pooled["training"].append(self._network.pool(to_model_range(videos.to(pl_module.device))))
            measured.truths["training"] += [self._attributes(each) for each in metadata]
            progress.update(len(measured.truths["training"]), len(numbers))

    def _count_pass(self, *_: Any) -> None:
        self._passes += 1

    def _distances(self, measured: _Measured, count: int) -> dict[str, float]:
        """Return the distances from the real held-out clips."""
        network = self._network.cpu()
        pooled = {kind: torch.cat(each).float() for kind, each in measured.pooled.items()}
        pooled["training"] = pooled["training"][_spread(len(pooled["training"]), count)]
        logits = {kind: network.to_logits(each) for kind, each in pooled.items()}
        values = {}
        for name, distance in _DISTANCES.items():
            for kind in ("generated", "reconstruction", "training", "last_window"):
                if kind in logits:
                    suffix = "" if kind == "generated" else f"_{kind}"
                    values[f"{name}{suffix}"] = distance(logits["real"], logits[kind]).item()
        return values

    def _scores(self, measured: _Measured) -> dict[str, Accuracy]:
        """Return the accuracy of each attribute in each kind of clip, by the linear map and by the judge."""
        answers: dict[str, dict[str, list[Attributes]]] = {}
        truths = {"probe": measured.truths["real"], "judge": measured.judged}
        if self.attributes:
            pooled = {kind: torch.cat(each) for kind, each in measured.pooled.items()}
            probe = LinearProbe(pooled.pop("training"), measured.truths["training"])
            answers["probe"] = {kind: probe.predict(each) for kind, each in pooled.items()}
        if self.judge is not None:
            answers["judge"] = dict(measured.answers)
        return {
            f"{by}_{name}{'' if kind == 'generated' else f'_{kind}'}": accuracy
            for by, kinds in answers.items()
            for kind, recognized in kinds.items()
            for name, accuracy in accuracies(recognized, truths[by]).items()
        }


def _check_probe_clips(probe_clips: int | None, clips: int) -> None:
    if probe_clips is not None and probe_clips < clips:
        raise UserError(
            f"probe_clips={probe_clips} is less than the {clips} clips that are compared: raise it, or leave it out."
        )


def _spread(length: int, count: int) -> Int[np.ndarray, " n"]:
    """Return `count` different numbers from 0 to `length` - 1, evenly spread."""
    return np.linspace(0, length - 1, count).round().astype(int)


def _gather(measured: _Measured, ranks: int) -> _Measured:
    """Return what all ranks measured, on the CPU; the time is that of the slowest."""
    measured.pooled = {kind: [each.cpu() for each in tensors] for kind, tensors in measured.pooled.items()}
    if ranks == 1:
        return measured
    of_ranks: list[Any] = [None] * ranks
    mine = dict(measured.pooled), dict(measured.truths), dict(measured.answers), measured.judged, measured.seconds
    torch.distributed.all_gather_object(of_ranks, mine)
    merged = _Measured(seconds=max(seconds for *_, seconds in of_ranks))
    for pooled, truths, answers, judged, _ in of_ranks:
        merged.judged += judged
        for kind, tensors in pooled.items():
            merged.pooled[kind] += tensors
        for kind, each in truths.items():
            merged.truths[kind] += each
        for kind, each in answers.items():
            merged.answers[kind] += each
    return merged
