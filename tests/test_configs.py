"""Every shipped config can be parsed, and its objects can be built."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule

import cli
from tests.support.configs import read

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path for path in ROOT.glob("configs/*/*.yaml") if path.parent.name not in ("cluster", "debug"))


@pytest.fixture
def build(monkeypatch):
    """Return a function that builds the objects of a config on the meta device, without running them."""
    monkeypatch.setattr(cli.T2VCLI, "_run_subcommand", lambda self, subcommand: None)

    def build(path):
        with torch.device("meta"):
            return cli.main(["fit", "--config", str(path), "--trainer.accelerator=cpu"])

    return build


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_objects_of_a_config_can_be_built(path, build):
    built = build(path)
    assert isinstance(built.model, LightningModule)
    assert isinstance(built.datamodule, LightningDataModule)
    assert all(parameter.is_meta for parameter in built.model.model.parameters())


def test_a_config_with_lpips_names_the_damaged_file(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    damaged = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"<html>not found</html>")
    with pytest.raises(SystemExit):
        build(ROOT / "configs/vqvae/512.yaml")
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert f"{damaged} is damaged" in message


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_has_a_title_and_can_be_resumed(path):
    assert path.read_text().startswith("# Stage ")
    trainer = read(path)["trainer"]
    options = {callback["class_path"]: callback.get("init_args", {}) for callback in trainer["callbacks"]}
    assert options["ModelCheckpoint"]["save_last"]
    assert "dirpath" in options["ModelCheckpoint"]
    assert trainer["logger"]["init_args"]["version"] == ""


@pytest.mark.parametrize(("name", "count", "within"), [("8b", 8.0e9, 0.02), ("1b", 1.0e9, 0.1), ("300m", 0.3e9, 0.1)])
def test_a_config_has_the_named_size_and_starts_on_the_meta_device(name, count, within, monkeypatch):
    monkeypatch.setattr(cli.T2VCLI, "_run_subcommand", lambda self, subcommand: None)
    path = ROOT / f"configs/transformer/{name}.yaml"
    model = cli.main(["fit", "--config", str(path), "--trainer.accelerator=cpu"]).model.model
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(count, rel=within)


@pytest.mark.parametrize(("first", "second"), [("512", "8b"), ("256", "1b"), ("128", "300m")])
def test_the_transformer_of_each_size_matches_its_vqvae(first, second):
    vqvae, transformer = (read(ROOT / f"configs/{path}.yaml") for path in (f"vqvae/{first}", f"transformer/{second}"))
    tokenizer, given = vqvae["model"]["init_args"]["model"]["init_args"], transformer["model"]["init_args"]
    stride = tokenizer["patch_size"] * tokenizer["latent_patch_size"] * 2 ** (len(tokenizer["channel_multipliers"]) - 1)
    assert given["model"]["init_args"]["grid_size"] == tokenizer["image_size"] / stride
    assert given["model"]["init_args"]["vocab_size"] == tokenizer["quantizer"]["init_args"]["codebook_size"]
    assert transformer["trainer"]["default_root_dir"] == vqvae["trainer"]["default_root_dir"]
    writer = next(c for c in vqvae["trainer"]["callbacks"] if c["class_path"] == "callbacks.TokenShardWriter")
    assert given["text_encoder"] == writer["init_args"]["text_encoder"]


def test_the_stages_of_the_demo_match(build):
    first, second = (build(ROOT / f"configs/{stage}/shapes.yaml") for stage in ("vqvae", "transformer"))
    vqvae, transformer = first.model.model, second.model.model
    assert (transformer.vocab_size, transformer.grid_size) == (vqvae.codebook_size, vqvae.grid_size)
    assert transformer.text.dim == second.model.text_encoder.width
    folder = Path(first.trainer.checkpoint_callback.dirpath)
    assert Path(second.model.tokenizer_path).absolute() == folder / "last.ckpt"
    writer = next(callback for callback in first.trainer.callbacks if hasattr(callback, "text_encoder"))
    assert writer.text_encoder.name == second.model.text_encoder.name
    splits = [str(writer.output_dir / split) for split in first.datamodule.predict_splits]
    assert splits == [second.datamodule.train, second.datamodule.val]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_can_be_planned_without_weights(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights for LPIPS
    cli.main(["plan", "--config", str(path)])
    output = capsys.readouterr().out
    assert "recommended  " in output
    assert not [line for line in output.splitlines() if "FSDP2" in line and "bitsandbytes" in line]
