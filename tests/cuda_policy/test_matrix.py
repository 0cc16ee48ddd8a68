"""The matrix of operations, precisions and compilation that the documentation shows."""

import re
import subprocess
import sys

import pytest

from tests.cuda_policy.matrix import OPERATIONS, cell
from tests.support.pipeline import ROOT


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("run", OPERATIONS, ids="-".join)
def test_a_run_in_mixed_precision_works_under_the_rules_of_cuda(run):
    assert cell(*run, "bf16-mixed", compiled=False) == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["no", "yes"])
def test_every_run_works_under_the_rules_of_cuda_as_documented(compiled):
    done = subprocess.run(
        [sys.executable, "-m", "tests.cuda_policy.matrix", f"--compiled={compiled}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = re.compile(rf"^\| \w+ \| [^|]+ \| {compiled} \|.*$", re.MULTILINE)
    printed = rows.findall(done.stdout)
    print("\n".join(printed))
    assert printed
    assert rows.findall((ROOT / "docs/reliability.md").read_text(encoding="utf-8")) == printed
