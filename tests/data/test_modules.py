import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

import data
from data.plan import Bucket
from t2v.batch import PromptBatch
from t2v.errors import UserError
from t2v.video import encode_mp4
from tests.support.corpus import corrupted_corpus


class Recorder(LightningModule):
    """A model that records the keys of its clips."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated, self.predicted = [], [], []

    def training_step(self, batch, batch_idx):
        self.trained.append((self.current_epoch, batch.keys))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.keys)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        self.predicted.append((dataloader_idx, batch))
        return batch_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **options):
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options)


def video_module(train, val, **options):
    return data.VideoDataModule(
        str(train), str(val), **{"size": 32, "frames": 4, "fps": 8.0, "batch_size": 4, **options}
    )


def token_module(train="none", val="none", **options):
    return data.TokenDataModule(str(train), str(val), **{"frames": 4, "batch_size": 2, "num_workers": 0, **options})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_fit_follows_the_plan(videos, tmp_path, num_workers):
    recorder = Recorder()
    module = video_module(videos, videos, num_workers=num_workers)
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(recorder, module)

    plan = module.train_dataloader().train_sampler.plan
    for epoch in range(2):
        expected = [[f"{draw.sample:03d}" for draw in batch.draws] for batch in plan.batches(epoch)]
        assert [keys for at, keys in recorder.trained if at == epoch] == expected
    assert recorder.trained[:2] != recorder.trained[2:]
    in_order = [f"{i:03d}" for i in range(10)]
    assert [key for keys in recorder.validated for key in keys] == in_order * 2


def test_a_bucket_that_fills_no_batch_is_warned_of(videos, tmp_path):
    buckets = [Bucket(4, 2, height=32, width=32), Bucket(2, 30, height=32, width=32)]
    with pytest.warns(UserWarning, match="The bucket of 30 clips of 2 frames gets 5 of the 10 clips"):
        trainer(tmp_path, max_steps=1).fit(Recorder(), video_module(videos, videos, buckets=buckets))


def test_overfitting_repeats_the_same_batches(videos, tmp_path):
    class Clips(Recorder):
        def training_step(self, batch, batch_idx):
            self.trained.append((batch.keys, batch.video.sum().item()))
            return self.weight * 0

    recorder = Clips()
    module = video_module(videos, videos, num_workers=0, crop=0.5, flip=True, batch_size=2)
    trainer(tmp_path, max_epochs=3, overfit_batches=2).fit(recorder, module)
    first, second, *others = recorder.trained
    assert first != second
    assert others == [first, second] * 2
    assert {tuple(keys) for keys in recorder.validated} == {("000", "001"), ("002", "003")}


def test_fit_takes_batches_of_all_buckets(videos, tmp_path):
    class Shapes(Recorder):
        def training_step(self, batch, batch_idx):
            self.trained.append(tuple(batch.video.shape))
            return self.weight * 0

    recorder = Shapes()
    buckets = [Bucket(frames=6, batch_size=1), Bucket(frames=2, batch_size=3, height=16, width=48)]
    module = video_module(videos, videos, num_workers=0, buckets=buckets)
    trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0).fit(recorder, module)
    assert sorted(recorder.trained) == [(1, 6, 3, 32, 32)] * 10 + [(3, 2, 3, 16, 48)] * 2
    assert [key for keys in recorder.validated for key in keys] == [f"{i:03d}" for i in range(10)] * 2


def test_buckets_of_tokens_have_no_size():
    with pytest.raises(UserError, match=r"height=4, width=None, but tokens"):
        token_module(buckets=[Bucket(frames=2, batch_size=1, height=4)])


def test_skipped_samples_are_listed_in_the_run_folder_and_too_many_stop_the_run(make, tmp_path):
    train = make.shards(tmp_path / "train", [make.video(f"{i:02d}") for i in range(20)])
    val = make.shards(tmp_path / "val", [make.video(key) for key in "abc"])
    for folder, key in ((train, "03"), (train, "11"), (val, "b")):
        make.damage(folder, key)

    def fit(run, fraction):
        module = video_module(train, val, num_workers=1, batch_size=2, max_skipped_fraction=fraction)
        trainer(tmp_path / run, max_epochs=3, num_sanity_val_steps=0).fit(Recorder(), module)

    fit("tolerant", 0.5)
    rows = [json.loads(line) for line in (tmp_path / "tolerant/skipped_samples.jsonl").read_text().splitlines()]
    assert sorted((row["key"], row["shard"].split("/")[-2]) for row in rows) == [
        ("03", "train"),
        ("11", "train"),
        ("b", "val"),
    ]
    with pytest.raises(
        UserError, match=r"2 of 20 clips .*data\.max_skipped_fraction=0\.05; .*skipped_samples\.jsonl: repair"
    ):
        fit("strict", 0.05)


def test_a_corpus_with_every_kind_of_damage_trains_to_the_end(videos, tmp_path):
    folder, bad = corrupted_corpus(tmp_path / "corpus")
    recorder = Recorder()
    module = video_module(folder, videos, num_workers=2, batch_size=2, max_skipped_fraction=1.0)
    trainer(tmp_path / "run", max_epochs=2, num_sanity_val_steps=0).fit(recorder, module)
    rows = [json.loads(line) for line in (tmp_path / "run/skipped_samples.jsonl").read_text().splitlines()]
    assert sorted((row["key"], row["shard"].rsplit("/", 1)[-1]) for row in rows) == sorted(bad)
    assert len(recorder.trained) == 2 * len(module.train_dataloader())
    bad_keys = {key for key, _ in bad} - {"twice"}  # the first of the two is intact
    assert not {key for _, keys in recorder.trained for key in keys} & bad_keys


def test_predict_takes_every_whole_clip_once(videos, make, tmp_path):
    train = make.shards(tmp_path / "train", [make.video(key) for key in "abcd"])
    for key in "ab":
        make.damage(train, key)
    module = video_module(train, videos, batch_size=2, num_workers=1, max_skipped_fraction=0.5)
    recorder = Recorder()
    trainer(tmp_path).predict(recorder, module, return_predictions=False)
    four = ["000", "001", "002", "003"]  # a shard of them
    assert [(split, batch.keys) for split, batch in recorder.predicted[:2]] == [(0, ["c", "d"]), (1, four)]
    assert [key for _, batch in recorder.predicted[1:] for key in batch.keys] == [f"{i:03d}" for i in range(10)]
    assert all(batch.video.shape[1] == 6 for _, batch in recorder.predicted)
    assert module.predict_splits == ("train", "val")
    with pytest.raises(UserError, match=r"2 of 4 clips in .* cannot be used, more than data.max_skipped_fraction=0.01"):
        trainer(tmp_path).predict(Recorder(), video_module(train, videos, batch_size=2, num_workers=0))


def test_only_training_clips_are_cropped_and_mirrored(make, tmp_path):
    picture = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    video = picture.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(4, -1, -1, -1)
    sample = {"mp4": encode_mp4(video, 8.0), "txt": "a ball"}
    shards = make.shards(tmp_path / "shards", [{"__key__": key, **sample} for key in "abcd"])
    plain, module = (
        video_module(shards, shards, num_workers=0, **options) for options in ({}, {"crop": 0.5, "flip": True})
    )
    for one in (plain, module):
        one.setup("fit")
    loaders = ("val_dataloader", "test_dataloader", "train_dataloader")
    same = [
        next(iter(getattr(plain, name)())).video.equal(next(iter(getattr(module, name)())).video) for name in loaders
    ]
    assert same == [True, True, False]
    for one, other in zip(plain.predict_dataloader(), module.predict_dataloader(), strict=True):
        assert next(iter(one)).video.equal(next(iter(other)).video)
    assert next(iter(module.train_dataloader())).video.shape == (4, 4, 3, 32, 32)  # from videos of twice the size


@pytest.mark.parametrize("crop", [0.0, 1.5])
def test_a_crop_out_of_range_is_refused(crop):
    with pytest.raises(UserError, match=f"data.crop={crop} "):
        video_module("a", "b", crop=crop)


def test_the_protocol_counts_the_validation_clips(videos):
    module = video_module(videos, videos)
    assert (
        module.protocol().items()
        >= {
            "shards": str(videos),
            "clips": 10,
            "repeated": 0,
            "corrupt": 0,
            "frames": 40,
            "frames_per_clip": 4,
            "fps": 8,
            "size": 32,
            "seed": 0,
        }.items()
    )
    assert module.protocol(batches=2)["clips"] == 8
    assert module.protocol(batches=3)["clips"] == 10


def test_a_batch_larger_than_the_data_is_refused(videos, tmp_path):
    module = video_module(videos, videos, batch_size=11)
    with pytest.raises(UserError, match=r"10 training clips .*data\.batch_size: 11 clips of 4 frames"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), module)


def test_numbers_out_of_range_are_refused():
    with pytest.raises(UserError, match=r"data\.frames=0 must be greater than 0"):
        video_module("a", "b", frames=0)
    with pytest.raises(UserError, match=r"data\.fps=-1\.0 must be greater than 0"):
        video_module("a", "b", fps=-1.0)


def test_missing_shards_are_reported_before_the_run(tmp_path):
    with pytest.raises(UserError, match="No shards"):
        trainer(tmp_path).validate(Recorder(), video_module("none", tmp_path / "none"))


def test_token_clips_are_trained_on(tokens, tmp_path):
    recorder = Recorder()
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(recorder, token_module(tokens, tokens))
    assert sorted(key for _, keys in recorder.trained for key in keys) == [f"{i:03d}" for i in range(6)]


def test_shards_with_different_fingerprints_are_refused(tokens, make, tmp_path):
    assert token_module(tokens, tokens).fingerprint == make.fingerprint
    other = make.shards(tmp_path / "other", [make.tokens("a", fingerprint={**make.fingerprint, "tokenizer": "def"})])
    with pytest.raises(UserError, match="differ in tokenizer"):
        token_module(tokens, other).fingerprint  # noqa: B018


def test_shards_without_a_fingerprint_are_refused(videos):
    with pytest.raises(UserError, match="has no fingerprint of its tokenizer"):
        token_module(videos, videos).fingerprint  # noqa: B018


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("A red circle, moving left!\n\n  two squares \n", encoding="utf-8")
    recorder = Recorder()
    trainer(tmp_path).predict(recorder, token_module(prompts=str(path), seed=7, batch_size=1), return_predictions=False)
    first, second = (batch[:3] for _, batch in recorder.predicted)
    assert first == (["A red circle, moving left!"], [7], ["0000-a-red-circle-moving-left"])
    assert second == (["two squares"], [8], ["0001-two-squares"])


def test_prompts_from_a_list(tmp_path):
    recorder = Recorder()
    trainer(tmp_path).predict(recorder, token_module(prompts=["a" * 200, "!?"]), return_predictions=False)
    (_, batch) = recorder.predicted[0]
    assert batch.names == [f"0000-{'a' * 60}", "0001"]


def predicted(tmp_path, **arguments) -> list[PromptBatch]:
    recorder = Recorder()
    trainer(tmp_path).predict(recorder, token_module(batch_size=8, **arguments), return_predictions=False)
    return [batch for _, batch in recorder.predicted]


def test_a_prompt_keeps_its_text_and_its_place(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\u2028line\n\ntwo\u0085", encoding="utf-8")
    (batch,) = predicted(tmp_path, prompts=str(tmp_path / "prompts.txt"))
    assert batch.prompts == ["one\u2028line", "two"]
    (batch,) = predicted(tmp_path, prompts=["", "a ${price} tag", "𝒶" * 80])
    assert (batch.prompts[:2], batch.seeds) == (["", "a ${price} tag"], [0, 1, 2])
    assert batch.names[0] == "0000"
    assert len(batch.names[2].encode()) < 100
    assert predicted(tmp_path, prompts="a red circle. A/B")[0].prompts == ["a red circle. A/B"]


def test_several_samples_of_a_prompt(tmp_path):
    (batch,) = predicted(tmp_path, prompts=["a", "b"], samples=2, seed=5)
    assert batch.prompts == ["a", "a", "b", "b"]
    assert batch.seeds == [5, 6, 7, 8]
    assert batch.names == ["0000-a-00", "0000-a-01", "0001-b-00", "0001-b-01"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_of_prompts(kind, tmp_path):
    (tmp_path / "start.png").write_bytes(b"")
    rows = [
        {"prompt": "a, b", "seed": "9"},
        {"prompt": "c", "start": "start.png"},
        {"prompt": "d", "start": "start.png", "negative_prompt": "grey"},
    ]
    path = tmp_path / f"prompts.{kind}"
    if kind == "csv":
        lines = ['"a, b",9,,', "c,,start.png,", "d,,start.png,grey"]
        path.write_text("\n".join(["prompt,seed,start,negative_prompt", *lines]))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    plain, started = predicted(tmp_path, prompts=str(path), samples=2, seed=100)
    assert plain == (["a, b"] * 2, [9, 10], ["0000-a-b-00", "0000-a-b-01"], [None] * 2, [None] * 2)
    assert started.seeds == [102, 103, 104, 105]
    assert started.starts == [str(tmp_path / "start.png")] * 4
    assert started.negatives == [None, None, "grey", "grey"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\na red circle", "row 2 has the unknown column text"),
        ("prompt,seed\na,1.5", "row 2 has seed=1.5, which is not a whole number"),
        ("prompt,seed\na,-1", "seed=-1 must lie in"),
        ("prompt,start\na,gone.png", "there is no file"),
        ("prompt,seed\n,3", "row 2 has no prompt"),
        (
            "prompt,seed\na dog, running, fast",
            "row 2 has more cells than the header: put a prompt with commas in quotes",
        ),
        ('prompt\na\n"b\nc', r"is no CSV table after row 2 .*is a quotation mark not closed"),
    ],
)
def test_mistakes_in_a_table_of_prompts(content, message, tmp_path):
    (tmp_path / "prompts.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        predicted(tmp_path, prompts=str(tmp_path / "prompts.csv"))


def test_a_prompt_of_a_table_that_is_not_text(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": ["a"]}')
    with pytest.raises(UserError, match=r"row 1 has prompt=\['a'\], which is not text"):
        predicted(tmp_path, prompts=str(tmp_path / "prompts.jsonl"))
    (tmp_path / "prompts.jsonl").write_text(r'{"prompt": "\ud800 x"}')
    with pytest.raises(UserError, match="row 1 cannot be used, as its prompt has half of a surrogate pair"):
        predicted(tmp_path, prompts=str(tmp_path / "prompts.jsonl"))


def test_a_line_break_in_a_cell_is_a_space(tmp_path):
    (tmp_path / "prompts.csv").write_bytes(b'prompt,seed\r\n"a red\r\ncircle",3\r\n')
    (batch,) = predicted(tmp_path, prompts=str(tmp_path / "prompts.csv"))
    assert (batch.prompts, batch.seeds) == (["a red circle"], [3])


@pytest.mark.parametrize("prompts", [[], [" "], "", "none.txt"])
def test_missing_prompts_are_refused(prompts, tmp_path):
    with pytest.raises(UserError, match="prompts"):
        trainer(tmp_path).predict(Recorder(), token_module(prompts=prompts))


def test_several_paths_with_weights(make, videos, tmp_path):
    other = make.shards(tmp_path / "other", [make.video(key) for key in "xy"])
    settings = {"val": str(videos), "size": 32, "frames": 4, "fps": 8.0, "batch_size": 4, "num_workers": 0}
    module = data.VideoDataModule([str(videos), str(other)], **settings, weights=[1.0, 3.0])
    keys = [key for batch in module.train_dataloader() for key in batch.keys]
    assert sum(key in "xy" for key in keys) == 9  # of 12
    assert len(keys) == 12
    with pytest.raises(UserError, match=r"data.weights=\[1.0\] must have a number .* for each of the 2 paths"):
        data.VideoDataModule([str(videos), str(other)], **settings, weights=[1.0]).train_dataloader()


def test_clips_of_several_aspect_ratios_go_to_their_buckets(make, tmp_path):
    wide = [{**make.video(key), "mp4": encode_mp4(make.numbered(6)[..., :16, :], 8.0)} for key in "wxyz"]
    shards = make.shards(tmp_path / "shards", [*wide, *(make.video(key) for key in "abcd")])
    buckets = [Bucket(4, 1, height=32, width=32), Bucket(4, 2, height=16, width=32)]
    module = video_module(shards, shards, buckets=buckets, num_workers=0)
    batches = [(tuple(batch.video.shape[-2:]), set(batch.keys)) for batch in module.train_dataloader()]
    assert sorted(len(keys) for _, keys in batches) == [1, 1, 1, 1, 2, 2]
    assert all(keys <= set("wxyz" if size == (16, 32) else "abcd") for size, keys in batches)
