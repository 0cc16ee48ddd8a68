"""Modules are set up where new tensors are on the GPU by default, as Lightning does without a moving average."""

import pytest

from tests.cuda_policy.toys import data_for, lit_transformer, lit_vqvae, trainer
from tests.support.cuda_policy import fake_cuda, to_fake_cuda


@pytest.mark.parametrize("build", [lit_vqvae, lit_transformer])
def test_a_run_without_callbacks_takes_a_step(build, tmp_path):
    module = build()
    with fake_cuda():
        to_fake_cuda(module)
        for part in (*getattr(module, "metrics", ()), *getattr(module, "_tokenizer", ())):
            to_fake_cuda(part, "cpu")
        runner = trainer("bf16-mixed", tmp_path, fake=True, max_steps=1, limit_val_batches=0, logger=False)
        runner.fit(module, datamodule=data_for(module, "cuda"))
    assert runner.global_step == 1
