"""The judge of the moving digits."""

from dataclasses import asdict

import pytest
import torch

from data.examples.digits_judge import DigitsJudge, _motion, print_accuracy
from data.examples.moving_digits import MOTIONS, draw, make_digits, render
from t2v.errors import UserError
from tests.support.digits import write_mnist


@pytest.fixture(scope="module")
def handwriting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handwriting")
    write_mnist(folder, range(100, 200, 10), range(100, 200, 10))
    return folder


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_motion_is_the_axis_of_the_tracked_place_whatever_uncertain_frames_show(motion):
    maps = torch.full((16, 16, 16), 0.01)
    for t in range(16):
        place = (t, 5) if motion == "up and down" else (5, t)
        maps[t][place] = 0.9
    uncertain = maps[4]
    uncertain.fill_(0.01)
    uncertain[15, 15] = 0.02
    assert _motion(maps) == motion


def test_the_order_of_two_digits_does_not_matter():
    metadata = {"digit": 7, "motion": "up and down", "second_digit": "3", "second_motion": "left and right"}
    judge = DigitsJudge("judge.safetensors", digits=2)
    assert judge.truth(metadata) == {"digits": "3 7", "motions": "left and right, up and down"}
    with pytest.raises(UserError, match=r"The clips have 2 digit\(s\), but the judge is told digits=1"):
        DigitsJudge("judge.safetensors").truth(metadata)


def test_the_detector_is_trained_once_and_kept(tmp_path, handwriting, capsys):
    path = tmp_path / "run/judge.safetensors"
    clip = draw(2, held_out=True, clips=1, seed=0)[0]
    answers = []
    state = torch.get_rng_state()
    for _ in range(2):
        judge = DigitsJudge(str(path), digits=2, handwriting=str(handwriting), steps=3)
        with torch.inference_mode():
            judge.prepare()
            answers.append(judge.recognize(render(clip, held_out=True, handwriting=handwriting)))
    assert torch.equal(torch.get_rng_state(), state)
    assert answers[0] == answers[1]
    assert set(answers[0]) == set(judge.truth(asdict(clip)))
    assert capsys.readouterr().out.count("Training the judge") == 1
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"judge\.safetensors has not the weights of the judge of digits: delete it"):
        judge.prepare()


def test_its_accuracy_on_real_clips_is_printed(tmp_path, handwriting, capsys):
    make_digits(tmp_path / "clips", digits=1, train_clips=1, val_clips=2, num_workers=1, handwriting=handwriting)
    print_accuracy(tmp_path / "clips/val", 1, tmp_path / "judge.safetensors", handwriting, steps=1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("motions: ")
    with pytest.raises(UserError, match=r"have 1 digit\(s\), but the judge is told digits=2"):
        print_accuracy(tmp_path / "clips/val", 2, tmp_path / "judge.safetensors")
    with pytest.raises(UserError, match=r"captions\.csv' does not exist"):
        print_accuracy(tmp_path, 1, tmp_path / "judge.safetensors")
