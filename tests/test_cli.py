import shlex
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cli import main
from t2v.errors import UserError
from tests.support import forked


class Network(nn.Module):
    def __init__(self, width: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


class LitToy(LightningModule):
    def __init__(self, network: Network, scale: float = 1.0, optimizer: OptimizerCallable = torch.optim.AdamW) -> None:
        super().__init__()
        self.network, self.scale, self.optimizer = network, scale, optimizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.network.layers(batch).square().mean() * self.scale

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.network.layers(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


class LitOther(LitToy):
    pass


LitSame = LitToy


class ForbiddenNetwork(Network):
    def __init__(self, width: int = 4) -> None:
        raise UserError(f"width is {width}, but only 5 will do: set network.width.")


class Noise(Dataset):
    def __init__(self, width: int, corrupt: bool) -> None:
        self.width, self.corrupt = width, corrupt

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> torch.Tensor:
        if self.corrupt:
            raise UserError("All clips are corrupt.")
        return torch.full((self.width,), float(i))


class ToyData(LightningDataModule):
    def __init__(self, width: int = 4, batch_size: int = 4, num_workers: int = 0, corrupt: bool = False) -> None:
        super().__init__()
        self.width, self.batch_size, self.num_workers, self.corrupt = width, batch_size, num_workers, corrupt

    def train_dataloader(self) -> DataLoader:
        noise = Noise(self.width, self.corrupt)
        return DataLoader(noise, batch_size=self.batch_size, num_workers=self.num_workers)

    val_dataloader = predict_dataloader = train_dataloader


CONFIG = f"""
trainer:
  accelerator: cpu
  max_steps: 4
  enable_progress_bar: false
  logger:
    class_path: lightning.pytorch.loggers.TensorBoardLogger
    init_args: {{save_dir: "${{trainer.default_root_dir}}", name: "", version: ""}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        dirpath: ${{trainer.default_root_dir}}/checkpoints
        save_last: true
        monitor: val/loss
model:
  class_path: {__name__}.LitToy
  init_args:
    network: {{class_path: {__name__}.Network, init_args: {{width: 6}}}}
data:
  class_path: {__name__}.ToyData
  init_args: {{width: "${{model.init_args.network.init_args.width}}"}}
"""


@pytest.fixture
def config(tmp_path) -> list[str]:
    """Return the flags of a config file and of the run folder."""
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG)
    return ["-c", str(path), f"--trainer.default_root_dir={tmp_path / 'run'}"]


def last(tmp_path: Path) -> Path:
    return tmp_path / "run/checkpoints/last.ckpt"


def fails(capsys, *args: str) -> str:
    """Run a command line that must fail, and return its error message."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_a_flag_reaches_every_interpolation_of_its_key(config, tmp_path):
    cli = main(["fit", *config, "--model.network.width", "5"])
    assert cli.datamodule.width == 5
    assert Path(cli.trainer.log_dir) == tmp_path / "run"
    assert last(tmp_path).is_file()


def test_a_later_config_reaches_every_interpolation_too(config, tmp_path):
    (tmp_path / "wide.yaml").write_text("model: {init_args: {network: {init_args: {width: 7}}}}")
    assert main(["fit", *config, "-c", str(tmp_path / "wide.yaml")]).datamodule.width == 7


def test_an_interpolation_can_refer_to_a_default(config, tmp_path):
    (tmp_path / "steps.yaml").write_text("trainer: {max_steps: '${data.init_args.batch_size}'}")
    assert main(["fit", *config, "-c", str(tmp_path / "steps.yaml")]).trainer.max_steps == 4


def test_a_config_may_come_before_the_command(config, tmp_path):
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"fit": {"trainer": {"max_steps": 6}}}))
    main(["fit", *config])
    main(["-c", str(tmp_path / "all.yaml"), "predict", *config, "--ckpt_path", str(last(tmp_path))])
    cli = main(["-c", str(tmp_path / "all.yaml"), "fit", *config, "--ckpt_path", "last"])
    assert cli.trainer.ckpt_path == str(last(tmp_path))


def test_last_starts_a_run_then_resumes_it(config, tmp_path, capsys):
    main(["fit", *config, "--ckpt_path", "last"])
    assert f"No checkpoint in {tmp_path}/run/checkpoints, starting at step 0" in capsys.readouterr().out
    cli = main(["fit", *config, "--ckpt_path", "last", "--trainer.max_steps", "6"])
    assert f"Resuming from {last(tmp_path)} at step 4" in capsys.readouterr().out
    assert cli.trainer.global_step == 6
    main(["fit", *config])
    assert "--ckpt_path last would resume it" in capsys.readouterr().out


def test_the_next_command_is_printed_and_runs(config, tmp_path, capsys, monkeypatch):
    main(["fit", *config, "--ckpt_path", "last"])
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Next"))
    command = shlex.split(printed)[3:]
    assert command == ["predict", *config, "--ckpt_path", "last"]
    cli = main(command)
    assert cli.trainer.predict_loop.predictions == []
    assert cli.config_init.predict.return_predictions is False
    assert f"Checkpoint   {last(tmp_path)}" in capsys.readouterr().out


def test_no_next_command_without_a_last_checkpoint(config, tmp_path, capsys):
    main(["fit", *config, "--trainer.callbacks=[]", f"--trainer.default_root_dir={tmp_path}"])
    assert "Next" not in capsys.readouterr().out


def test_a_command_that_would_measure_nothing_is_refused(config, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["validate", *config, "--trainer.limit_val_batches=0"])
    assert "trainer.limit_val_batches=0 leaves nothing to measure" in capsys.readouterr().err


def test_configs_and_flags_override_the_checkpoint(config, tmp_path):
    main(["fit", *config, "--model.network.depth", "2", "--model.scale", "3"])
    flags = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    data = ["--data", f"{__name__}.ToyData", "--data.width", "6"]

    bare = main(["predict", "--ckpt_path", str(last(tmp_path)), *data, *flags]).model
    assert (len(bare.network.layers), bare.scale) == (2, 3.0)

    flag = main(["predict", "--ckpt_path", str(last(tmp_path)), *data, *flags, "--model.scale", "5"]).model
    assert (len(flag.network.layers), flag.scale) == (2, 5.0)

    (tmp_path / "scale.yaml").write_text("model: {init_args: {scale: 7.0}}")
    (tmp_path / "run.yaml").write_text(CONFIG.split("model:")[0])
    run = ["-c", str(tmp_path / "run.yaml"), config[-1], *data]
    without_model = main(["predict", *run, "--ckpt_path", "last"]).model
    assert (len(without_model.network.layers), without_model.scale) == (2, 3.0)

    file = main(["fit", *config, "-c", str(tmp_path / "scale.yaml"), "--ckpt_path", "last"]).model
    assert (len(file.network.layers), file.scale) == (2, 7.0)


def test_a_checkpoint_loads_without_pickles_and_rebuilds_its_model(config, tmp_path):
    main(["fit", *config, "--model.optimizer.lr", "0.5"])
    saved = torch.load(last(tmp_path), weights_only=True)["hyper_parameters"]
    assert saved["_class_path"] == f"{__name__}.LitToy"
    assert saved["network"] == {"class_path": f"{__name__}.Network", "init_args": {"width": 6, "depth": 1}}
    model = LitToy.load_from_checkpoint(last(tmp_path))
    assert model.configure_optimizers().defaults["lr"] == 0.5


def test_only_fit_saves_the_config(config, tmp_path):
    main(["fit", *config])
    saved = tmp_path / "run/config.yaml"
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["network"]["init_args"]["width"] == 6
    before = saved.read_bytes()
    for command in ("validate", "predict"):
        main([command, *config, "--ckpt_path", "last", "--model.scale", "9"])
    assert saved.read_bytes() == before
    main(["fit", *config, "--ckpt_path", "last", "--model.scale", "9", "--trainer.max_steps", "6"])
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["scale"] == 9.0


def test_arguments_may_be_a_dictionary(tmp_path):
    tree = yaml.safe_load(CONFIG)
    tree["trainer"]["default_root_dir"] = str(tmp_path / "run")
    cli = main({"fit": tree})
    assert cli.trainer.global_step == 4
    tree["ckpt_path"] = "last"
    assert main({"subcommand": "predict", "predict": tree}).trainer.ckpt_path == str(last(tmp_path))


def test_a_sharded_checkpoint_contains_its_model_config(config, tmp_path, capsys):
    main(["fit", *config, "--model.network.depth", "2"])
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    folder = tmp_path / "sharded.ckpt"
    folder.mkdir()
    torch.save({key: value for key, value in checkpoint.items() if key != "state_dict"}, folder / "meta.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["predict", "--ckpt_path", str(folder), "--data", f"{__name__}.ToyData", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]["init_args"]["depth"] == 2


def test_predict_without_a_last_checkpoint(config, tmp_path, capsys):
    error = fails(capsys, "predict", *config, "--ckpt_path", "last")
    assert f"no last.ckpt in {tmp_path}/run/checkpoints" in error


def test_last_without_a_checkpoint_folder(config, capsys):
    assert "ModelCheckpoint with dirpath" in fails(
        capsys, "fit", *config, "--trainer.callbacks=null", "--ckpt_path", "last"
    )


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_missing_checkpoint(config, capsys, command):
    assert "no checkpoint at nowhere.ckpt" in fails(capsys, command, *config, "--ckpt_path", "nowhere.ckpt")


def test_a_file_that_is_not_a_checkpoint(config, capsys):
    error = fails(capsys, "predict", *config, "--ckpt_path", config[1])
    assert f"{config[1]} is not a checkpoint of this program" in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_another_model(config, tmp_path, capsys):
    main(["fit", *config])
    capsys.readouterr()
    error = fails(capsys, "predict", *config, "--ckpt_path", "last", "--model", f"{__name__}.LitOther")
    assert f"{last(tmp_path)} holds a LitToy, but this run's config asks for a LitOther" in error


def test_a_model_class_may_have_two_names(config, tmp_path):
    main(["fit", *config, "--model.network.depth", "2", "--model.scale", "3"])
    (tmp_path / "same.yaml").write_text(CONFIG.replace("LitToy", "LitSame"))
    model = main(["predict", "-c", str(tmp_path / "same.yaml"), config[-1], "--ckpt_path", "last"]).model
    assert (len(model.network.layers), model.scale) == (2, 3.0)


def test_a_checkpoint_that_does_not_match(config, capsys):
    main(["fit", *config])
    error = fails(capsys, "fit", *config, "--ckpt_path", "last", "--model.network.width", "5")
    assert "The checkpoint does not fit the model" in error
    assert "size mismatch for network.layers.0.weight" in error


def test_an_error_in_a_class_of_the_config(config, capsys):
    error = fails(capsys, "fit", *config, "--model.network", f"{__name__}.ForbiddenNetwork")
    assert error == "error: width is 6, but only 5 will do: set network.width.\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_loader(config, capsys, workers):
    error = fails(capsys, "fit", *config, "--data.corrupt=true", f"--data.num_workers={workers}")
    assert error.endswith("error: All clips are corrupt.\n")


def test_the_process_exits_with_status_2(config):
    done = forked.run("cli.py", "predict", *config, "--ckpt_path", "last")
    assert done.returncode == 2
    assert done.stderr.startswith("error: There is no last.ckpt")
    assert done.stdout == ""
