"""The matrix of operations, precisions and compilation that the documentation shows."""

import re
import subprocess
import sys

import pytest

from tests.support.pipeline import ROOT


@pytest.mark.parametrize("compiled", ["no", pytest.param("yes", marks=pytest.mark.slow)])
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
