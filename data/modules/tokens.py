"""The LightningDataModule of stage 2: token clips to train on, prompts to generate from."""

from itertools import groupby
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from data.captions import read_metadata
from data.datasets import TokenClips
from data.modules.base import ShardDataModule
from data.modules.prompts import batch_jobs, collate_prompts, number_prompts, read_prompts
from data.plan import Bucket
from data.shards import ShardSet
from t2v.batch import unescape
from t2v.errors import UserError, check_range


class TokenDataModule(ShardDataModule):
    """Token clips of token shards, and prompts to generate from.

    Args:
        train: Training shards: a folder, one tar or a pattern, or a list of these, as written by `predict` of stage 1.
            Not needed to generate from prompts.
        val: Validation shards, at one path or several.
        frames: Length of a clip. Shorter clips are left out, and of longer ones a random window is taken.
        batch_size: Clips or prompts in a batch on each rank.
        num_workers: Processes that read, on each rank.
        prompts: Prompts that `predict` generates from: one, a list, a text file with one prompt a line, or a table
            (.csv or .jsonl) with the column `prompt` and, if needed, `seed`, `start` (the path of a picture or a video
            that the video begins with) and `negative_prompt`.
        samples: Videos that `predict` generates from each prompt.
        seed: Seed of the order of the clips and the random windows; video number i is generated with seed + i.
        buckets: Train on batches of these kinds instead of `batch_size` clips of `frames` frames. Their height and
            width are those of the tokens, and must not be given.
        max_skipped_fraction: Fraction of an epoch's samples that cannot be used above which the run stops. Each is
            listed in `skipped_samples.jsonl` in the run's folder and replaced by another.
        weights: Share of each path of `train` in an epoch, relative to the others'. By default every clip occurs once.

    Raises:
        UserError: If an argument is out of range, shards or prompts are missing, no clip is long enough, or the shards
            were written by different tokenizers.
    """

    command = "python cli.py predict -c CONFIG_OF_STAGE_1 --ckpt_path last"

    def __init__(
        self,
        train: list[str] | str,
        val: list[str] | str,
        frames: int,
        batch_size: int,
        num_workers: int = 2,
        prompts: list[str] | str = [],  # noqa: B006
        samples: int = 1,
        seed: int = 0,
        buckets: list[Bucket] = [],  # noqa: B006
        max_skipped_fraction: float = 0.01,
        weights: list[float] = [],  # noqa: B006
    ) -> None:
        super().__init__(train, val, weights, frames, batch_size, num_workers, seed, buckets, max_skipped_fraction)
        self.save_hyperparameters(logger=False, ignore="buckets")  # checkpoints hold plain values only
        sized = [bucket for bucket in buckets if bucket.height or bucket.width]
        if sized:
            raise UserError(
                f"data.buckets has height={sized[0].height}, width={sized[0].width}, but tokens keep the size with "
                "which they were written: remove height and width."
            )
        check_range(self, "[1, inf)", **{"data.samples": samples})
        self.prompts = unescape(prompts) if isinstance(prompts, str) else [unescape(prompt) for prompt in prompts]
        self.samples = samples

    def setup(self, stage: str) -> None:
        """Open the shards, or read the prompts."""
        super().setup(stage)
        if stage == "predict":
            read_prompts(self.prompts)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """How the shards were written: tokenizer, size, frame rate, text encoder.

        Read from the json of the first intact sample of each shard, since a shard is written by one run.

        Raises:
            UserError: If a shard has no fingerprint, or two shards have different ones.
        """
        fingerprints: dict[str, dict[str, Any]] = {}
        for path in dict.fromkeys((self.train, self.val)):
            intact = (sample for sample in self.shards(path).samples if not sample.flaw)
            for shard, samples in groupby(intact, lambda sample: sample.shard):
                metadata = read_metadata(self.shards(path).read(next(samples), "json"))
                fingerprint = metadata.get("fingerprint")
                fingerprints[shard] = fingerprint if isinstance(fingerprint, dict) else {}
        if not fingerprints:
            raise UserError(
                f"No sample in '{self.train}' or '{self.val}' has a valid json: write the token shards again."
            )
        first, expected = next(iter(fingerprints.items()))
        for shard, fingerprint in fingerprints.items():
            if not fingerprint:
                raise UserError(f"'{shard}' has no fingerprint of its tokenizer: write the token shards again.")
            if fingerprint != expected:
                names = sorted(k for k in expected.keys() | fingerprint.keys() if expected.get(k) != fingerprint.get(k))
                raise UserError(
                    f"'{shard}' and '{first}' differ in {', '.join(names)}: they were written by different tokenizers "
                    "or settings; write all token shards with one of them."
                )
        return expected

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the prompts; if ranks cannot share them equally, the first prompts are repeated."""
        jobs: Any = number_prompts(read_prompts(self.prompts), self.seed, self.samples)
        ranks = self._ranks()
        shared: DistributedSampler[Any] = DistributedSampler(jobs, ranks["num_replicas"], ranks["rank"], shuffle=False)
        own = [jobs[i] for i in shared]
        batches: Any = batch_jobs(own, self.batch_size)
        sampler: DistributedSampler[Any] = DistributedSampler(batches, 1, 0, shuffle=False)  # not shared out again
        return DataLoader(batches, batch_size=None, sampler=sampler, collate_fn=collate_prompts)

    def _open_clips(self, shards: ShardSet, training: bool) -> TokenClips:
        buckets = [Bucket(self.frames, self.batch_size)]
        if training and self.buckets:
            buckets = self.buckets
        return TokenClips(shards, buckets, self._skipped_samples)
