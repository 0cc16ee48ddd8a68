"""8-bit optimizers: exact resuming of bitsandbytes' from YAML, and the compiled step of torchao's."""

import shutil

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torchao.optim import AdamW8bit

from t2v.training.optimization import configure_optimization
from tests.support.pipeline import differences, resumable, training_state

EIGHT_BIT = """
model:
  init_args:
    optimizer:
      class_path: bitsandbytes.optim.AdamW8bit
      init_args: {lr: 1.0e-3, weight_decay: 0.05, min_8bit_size: 512}
"""


class Stop(Callback):
    """Stops the run in the middle of its sixth step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("stopped by the test")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["vqvae", "transformer"])
def test_a_resumed_run_with_8_bit_state_equals_an_uninterrupted_one(copy_pipeline, stage, capfd):
    pipeline = copy_pipeline()
    (pipeline.folder / "8bit.yaml").write_text(EIGHT_BIT)
    fit, checkpoint = (
        [*resumable(pipeline, stage), "-c", str(pipeline.folder / "8bit.yaml")],
        pipeline.checkpoint(stage),
    )
    shutil.rmtree(checkpoint.parent)
    pipeline.main(*fit)
    uninterrupted = training_state(checkpoint)

    shutil.rmtree(checkpoint.parent)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        pipeline.main(*fit, f"--trainer.callbacks+={__name__}.Stop")
    capfd.readouterr()
    pipeline.main(*fit)
    assert "at step 4" in capfd.readouterr().out
    assert not differences(uninterrupted, training_state(checkpoint))
    states = {value.dtype for name, value in uninterrupted.items() if name.endswith(("/state1", "/state2"))}
    assert states == {torch.uint8, torch.float32}  # matrices, and vectors


class Compiling(BoringModel):
    """Trained with an optimizer whose step is compiled."""

    def configure_optimizers(self):
        return configure_optimization(self, self.layer, AdamW8bit, warmup_steps=0)


def test_the_compiled_step_of_torchao_is_cached_for_the_instructions_in_use():
    """With code for AVX-512 from the cache, a run with AVX2 had other weights."""
    widths = {"AVX2": 256, "AVX512": 512}
    trainer = Trainer(fast_dev_run=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    with torch._inductor.config.patch({"cpp.simdlen": None}), torch.compiler.set_stance("force_eager"):
        trainer.fit(Compiling())
        assert torch._inductor.config.cpp.simdlen == widths.get(torch.backends.cpu.get_cpu_capability())
