"""Every shipped config: it parses, and what it describes can be built."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

import cli

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.yaml") if path.parent.name != "cluster")


@pytest.fixture
def build(monkeypatch):
    """Builds what a config describes, with weights that take no memory, and runs nothing."""
    monkeypatch.setattr(cli.T2VCLI, "_run_subcommand", lambda self, subcommand: None)

    def build(path):
        with torch.device("meta"):
            return cli.main(["fit", "--config", str(path), "--trainer.accelerator=cpu"])

    return build


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_a_config_describes_can_be_built(path, build, tmp_path):
    offline = tmp_path / path.name  # LPIPS has weights that are no package's
    offline.write_text(path.read_text().replace("LPIPSLoss", "MobileNetLoss"))
    built = build(offline)
    assert isinstance(built.model, LightningModule)
    assert isinstance(built.datamodule, LightningDataModule)
    assert all(parameter.is_meta for parameter in built.model.model.parameters())


def test_a_config_with_lpips_says_which_file_it_lacks(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        build(ROOT / "configs/vqvae/512.yaml")
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert f"{tmp_path}/hub/checkpoints/vgg16-397923af.pth" in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_says_what_it_is_and_can_be_resumed(path):
    assert path.read_text().startswith("# Stage ")
    trainer = yaml.safe_load(path.read_text())["trainer"]
    options = {callback["class_path"]: callback.get("init_args", {}) for callback in trainer["callbacks"]}
    assert options["ModelCheckpoint"]["save_last"]
    assert "dirpath" in options["ModelCheckpoint"]
    assert trainer["logger"]["init_args"]["version"] == ""


@pytest.mark.parametrize(("name", "count", "within"), [("8b", 8.0e9, 0.02), ("1b", 1.0e9, 0.1), ("300m", 0.3e9, 0.1)])
def test_a_size_is_what_the_name_says_and_begins_without_memory(name, count, within, monkeypatch):
    monkeypatch.setattr(cli.T2VCLI, "_run_subcommand", lambda self, subcommand: None)
    path = ROOT / f"configs/transformer/{name}.yaml"
    model = cli.main(["fit", "--config", str(path), "--trainer.accelerator=cpu"]).model.model
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(count, rel=within)


@pytest.mark.parametrize(("first", "second"), [("512", "8b"), ("256", "1b"), ("128", "300m")])
def test_a_size_fits_the_tokens_it_names(first, second):
    vqvae, transformer = (
        yaml.safe_load((ROOT / f"configs/{path}.yaml").read_text())
        for path in (f"vqvae/{first}", f"transformer/{second}")
    )
    tokenizer, given = vqvae["model"]["init_args"]["model"]["init_args"], transformer["model"]["init_args"]
    stride = tokenizer["patch_size"] * tokenizer["latent_patch_size"] * 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    assert given["model"]["init_args"]["grid_size"] == tokenizer["image_size"] / stride
    assert given["model"]["init_args"]["vocab_size"] == tokenizer["quantizer"]["init_args"]["codebook_size"]
    assert transformer["trainer"]["default_root_dir"] == vqvae["trainer"]["default_root_dir"]
    writer = next(c for c in vqvae["trainer"]["callbacks"] if c["class_path"] == "callbacks.TokenShardWriter")
    assert given["text_encoder"] == writer["init_args"]["text_encoder"]


def test_the_stages_of_the_demo_fit_each_other(build):
    first, second = (build(ROOT / f"configs/{stage}/shapes.yaml") for stage in ("vqvae", "transformer"))
    vqvae, transformer = first.model.model, second.model.model
    assert (transformer.vocab_size, transformer.grid_size) == (vqvae.codebook_size, vqvae.grid_size)
    assert transformer.text_dim == second.model.text_encoder.width
    folder = Path(first.trainer.checkpoint_callback.dirpath)
    assert Path(second.model.tokenizer_path).absolute() == folder / "last.ckpt"
    writer = next(callback for callback in first.trainer.callbacks if hasattr(callback, "text_encoder"))
    assert writer.text_encoder.name == second.model.text_encoder.name
    splits = [str(writer.output_dir / split) for split in first.datamodule.predict_splits]
    assert splits == [second.datamodule.train, second.datamodule.val]
