import platform
import subprocess
import sys
from pathlib import Path

import pytest

from cli import T2VCLI, main
from t2v.training import startup
from tests.support import forked

ROOT = Path(__file__).parents[2]
DEFERRED = """
import sys, cli
loaded = {"transformers", "torchvision", "scipy", "matplotlib"} & set(sys.modules)
assert not loaded, f"importing cli imports {loaded}"
import torchmetrics
from torchmetrics.image import StructuralSimilarityIndexMeasure
metric = torchmetrics.MeanMetric()
metric.update(3.0)
assert metric.plot()[1].get_ylabel() == "MeanMetric"
assert metric.compute() == 3 and isinstance(metric, torchmetrics.Metric)
assert torchmetrics.image.StructuralSimilarityIndexMeasure is StructuralSimilarityIndexMeasure
assert torchmetrics.utilities.plot.plot_curve
assert torchmetrics.functional.accuracy and not hasattr(torchmetrics, "nothing")
"""


@pytest.mark.parametrize("command", T2VCLI.subcommands())
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_of_a_command_fits_a_screen_and_is_true(command, flag, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "-c", "configs/vqvae/shapes.yaml", flag])
    lines = capsys.readouterr().out.splitlines()
    assert not end.value.code
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    words = [word for line in lines for word in line.split()]
    assert all((ROOT / word).exists() for word in words if word.startswith("configs/"))
    with pytest.raises(SystemExit):
        main([command, "--help", "all"])
    options = capsys.readouterr().out.split()
    flags = {word.rstrip(",") for word in words if word.startswith("--") and word not in ("--KEY", "--help")}
    assert flags <= {option.rstrip(",") for option in options}


def test_all_commands_have_help(capsys):
    assert set(startup.SCREENS) == set(T2VCLI.subcommands())
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = capsys.readouterr().out
    assert not end.value.code
    assert all(f"\n  {command} " in shown for command in T2VCLI.subcommands())
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(("args", "message"), [([], "give a subcommand"), (["prediction"], "did you mean predict?")])
def test_a_missing_or_misspelled_command_is_answered_without_the_imports(args, message):
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "cli.py", *args], cwd=ROOT, capture_output=True, text=True
    )
    errors = [line for line in process.stderr.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert "torch" not in {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}


@pytest.mark.slow
def test_torchmetrics_is_imported_on_first_use():
    subprocess.run([sys.executable, "-c", DEFERRED], cwd=ROOT, check=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc's memory")
def test_freed_memory_is_kept_for_new_tensors():
    """Each page that the system gives to a process is a page fault: 10,240 for each of these tensors."""
    script = """
import resource, torch
from t2v.training.startup import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
page_faults()
assert page_faults() < 10240
"""
    done = forked.run("-c", script)
    assert done.returncode == 0, done.stderr
