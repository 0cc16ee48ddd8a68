"""Prompts as people type them, on the model of the moving shapes.

`python -m tests.benchmarks.typed_prompts RUN` reads the run folder of `make demo`, generates a video for each prompt
below, and prints how many show the prompt's colour, shape and direction: by the oracle, and by the strict judge
(data/examples/oracle.py). Most prompts differ from the training captions in capitals, punctuation, politeness or words;
combinations that training shows are among them, and held-out ones. None was changed or left out because of its videos.
"""

from pathlib import Path

import numpy as np

from data.examples.oracle import Answer, passes, recognize
from data.examples.shapes import FRAMES
from t2v.errors import run_tool
from t2v.generation.text_to_video import TextToVideo

PROMPTS = {
    "a green box moves left": "green square left",
    "RED SQUARE MOVES DOWN": "red square down",
    "please show me a small yellow circle going left": "yellow circle left",
    "blue ball flying up": "blue circle up",
    "Show me a white triangle moving to the right please": "white triangle right",
    "I want a big red triangle that goes up": "red triangle up",
    "can you make a video of a green circle moving down?": "green circle down",
    "A LARGE BLUE SQUARE GOING RIGHT FAST": "blue square right",
    "Yellow triangle, moving left.": "yellow triangle left",
    "the purple square is travelling upwards": "purple square up",
    "tiny white ball drifting right": "white circle right",
    "a red circle going to the left": "red circle left",
    "green triangle stays still": "green triangle still",
    "a white square that doesn't move": "white square still",
    "a blue triangle moving downward quickly": "blue triangle down",
    "Purple circle moving right": "purple circle right",
    "video of a yellow square sliding to the bottom": "yellow square down",
    "little red box goes right": "red square right",
    "a huge green square, it moves up": "green square up",
    "white circle moves up slowly": "white circle up",
    "blue circle moving left": "blue circle left",
    "a purple triangle heading down": "purple triangle down",
    "yellow ball goes up": "yellow circle up",
    "red triangle to the right": "red triangle right",
    "green disc moving leftwards": "green circle left",
    "blue box stands still": "blue square still",
    "a white triangle goes down": "white triangle down",
    "generate a purple box moving left": "purple square left",
    "Yellow circle not moving": "yellow circle still",
    "animate a red ball falling down": "red circle down",
    "a small green triangle drifts to the right": "green triangle right",
    "a blue square travels towards the top": "blue square up",
    "white box moving left fast": "white square left",
    "a big purple ball that stays where it is": "purple circle still",
    "yellow triangle flies up": "yellow triangle up",
    "RED CIRCLE RIGHT": "red circle right",
    "Green Square Moves Right": "green square right",
    "blue triangle left": "blue triangle left",
    "a white disc moves down gently": "white circle down",
    "hi, could I get a purple square sinking to the bottom": "purple square down",
    "one yellow square, sliding right": "yellow square right",
    "a motionless red triangle": "red triangle still",
    "Small Blue Circle Moving Down!": "blue circle down",
    "the green ball rises": "green circle up",
    "white triangle moves to the left side": "white triangle left",
    "purple triangle goes up fast": "purple triangle up",
    "there's a yellow box and it moves up": "yellow square up",
    "a red square travelling left, slowly": "red square left",
    "blue square going down": "blue square down",
    "GREEN TRIANGLE GOES DOWN QUICKLY": "green triangle down",
    "an image of a white ball that is still": "white circle still",
    "purple disc going up": "purple circle up",
    "a yellow circle moving rightwards": "yellow circle right",
    "big red box moving up": "red square up",
}


def main(run: Path, seeds: int = 3, candidates: int = 1) -> None:
    """Print how many videos are right, and those that are not.

    Args:
        run: Folder with vqvae/checkpoints/last.ckpt and transformer/checkpoints/last.ckpt.
        seeds: Videos of each prompt.
        candidates: Candidates of each video, of which the best one is judged.
    """
    last = "checkpoints/last.ckpt"
    model = TextToVideo.from_checkpoint(run / "transformer" / last, run / "vqvae" / last)
    right, strictly = 0, 0
    for repetition in range(seeds):
        videos = model.generate(list(PROMPTS), frames=FRAMES, seed=repetition * len(PROMPTS), candidates=candidates)
        clips: list[np.ndarray] = list(videos.permute(0, 1, 3, 4, 2).numpy())
        for video, (prompt, attributes) in zip(clips, PROMPTS.items(), strict=True):
            truth, answer = Answer(*attributes.split()), recognize(video)
            passed = passes(video, truth)
            right += answer == truth
            strictly += passed
            if answer != truth or not passed:
                print(f"{prompt!r}: {' '.join(answer)}{'' if passed else ', fails the strict judge'}")
    total = seeds * len(PROMPTS)
    print(
        f"{total} videos of {len(PROMPTS)} prompts: {right / total:.1%} by the oracle, {strictly / total:.1%} strictly"
    )


if __name__ == "__main__":
    run_tool(main)
