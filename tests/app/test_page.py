"""The page to play with, by Gradio's own client; Gradio is imported where it is used, since that takes seconds."""

import re

import pytest
import torch

from t2v.video import probe, read_clip, read_frames, write_mp4

pytestmark = pytest.mark.slow  # Gradio's import alone takes seconds
DEFAULTS = {"frames": 4, "seed": 0, "guidance": None, "temperature": None, "top_k": None, "top_p": None, "start": None}


def connect(page: str):
    from gradio_client import Client

    return Client(page, verbose=False, httpx_kwargs={"timeout": 60})


def ask(client, prompt: str, **changes: object):
    """Submit a prompt; the job's outputs are one per frame and the last with the file."""
    values = [prompt, *{**DEFAULTS, **changes}.values()]
    return client.submit(*values, 1, api_name="/generate")


def test_two_people_get_their_own_videos(page, model, tmp_path):
    clients = [connect(page) for _ in range(2)]
    jobs = [
        ask(client, prompt, seed=i) for i, (client, prompt) in enumerate(zip(clients, ["red", "blue"], strict=True))
    ]
    for i, (job, prompt) in enumerate(zip(jobs, ["red", "blue"], strict=True)):
        *_, (_, video, status, *_) = job.result(timeout=60), job.outputs()[-1]
        file = video["video"] if isinstance(video, dict) else video
        expected = tmp_path / f"{prompt}.mp4"
        write_mp4(expected, model.generate(prompt, 4, seed=i)[0], 8.0)
        assert torch.equal(read_frames(file, range(4)), read_frames(expected, range(4)))
        assert probe(file).fps == 8
        assert status == f"{prompt}: 4 frames, seed {i}"
        assert len(job.outputs()) == 5


def test_the_page_begins_from_a_picture_or_video(page, model, tmp_path):
    from gradio_client import handle_file

    clip = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    write_mp4(tmp_path / "start.mp4", clip, 8.0)
    job = ask(connect(page), "red", start=handle_file(tmp_path / "start.mp4"))
    start = read_clip(tmp_path / "start.mp4", 1, 16, 8.0)
    write_mp4(tmp_path / "expected.mp4", model.generate("red", 4, start=start)[0], 8.0)
    assert torch.equal(
        read_frames(job.result(timeout=60)[1], range(4)), read_frames(tmp_path / "expected.mp4", range(4))
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames=0 must be at least 1"),
        ({"frames": 2.5}, "Frames is 2.5: give a whole number."),
        ({"seed": None}, "Seed is empty: give a whole number."),
        ({"top_p": 7}, "top_p=7.0"),
        ({"guidance": "much"}, "Guidance scale is 'much': give a number, or leave the field empty."),
        ({"start": "README.md"}, "is not a video or picture that can be read"),
    ],
    ids=["no frames", "half a frame", "no seed", "top_p", "no number", "start"],
)
def test_an_error_is_a_sentence(page, changes, message):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    if "start" in changes:
        changes = {"start": handle_file(changes["start"])}
    job = ask(connect(page), "red", **changes)
    with pytest.raises(AppError, match=re.escape(message)):
        job.result(timeout=60)
    assert message in job.outputs()[-1][2]
