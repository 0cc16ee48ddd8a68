"""What commands say about errors: one sentence for those that are expected, a short traceback for bugs."""

import errno
import shutil
import sys

import pytest
from torch.utils.tensorboard import SummaryWriter

from t2v.errors import UserError, check_range, exit_on_expected_error, explain, shorten_tracebacks


@pytest.mark.parametrize(
    ("interval", "value"),
    [
        ("[0, 1)", 0),
        ("[0, 1)", 0.99),
        ("(0, 1]", 1),
        ("[1, inf)", 10**30),
        ("(0, inf]", float("inf")),
        ("[1, inf)", None),
        ("[1, inf)", [1, 2]),
        ("(-inf, inf)", -5.0),
    ],
)
def test_values_in_range(interval, value):
    check_range("Thing", interval, x=value)


@pytest.mark.parametrize(
    ("interval", "value", "message"),
    [
        ("[0, 1)", 1, "x=1 must lie in [0, 1) (Thing)."),
        ("(0, 1]", 0.0, "x=0.0 must lie in (0, 1] (Thing)."),
        ("[1, inf)", 0, "x=0 must be at least 1 (Thing)."),
        ("(-inf, 2]", 3, "x=3 must be at most 2 (Thing)."),
        ("(0, inf)", float("nan"), "x=nan must be greater than 0 (Thing)."),
        ("[0, inf)", float("inf"), "x=inf must be at least 0 and finite (Thing)."),
        ("(-inf, inf)", float("inf"), "x=inf must be a finite number (Thing)."),
        ("[1, inf)", [], "x=[] must not be empty (Thing)."),
        ("[1, inf)", (2, 0), "x=[2, 0] must be at least 1 (Thing)."),
    ],
)
def test_values_out_of_range(interval, value, message):
    with pytest.raises(UserError) as error:
        check_range("Thing", interval, x=value)
    assert str(error.value) == message


def test_the_message_names_all_arguments_that_are_out_of_range():
    with pytest.raises(UserError, match=r"a=0 and c=-1 must be at least 1 \(Thing\)"):
        check_range("Thing", "[1, inf)", a=0, b=1, c=-1)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """Return an error with a traceback and a cause."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "run/last.ckpt"),
            "'run/last.ckpt' (No space left on device)",
        ),
        (OSError(errno.EROFS, "Read-only file system", "run"), "choose a place that can be written to"),
        (PermissionError(errno.EACCES, "Permission denied", "run"), "give yourself the permission"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "(No module named 'wandb'): install it"),
        (MemoryError(), "lower data.batch_size"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "free space on the disk"),
        (RuntimeError("PytorchStreamReader failed reading file data/137"), "A file is damaged"),
        (RuntimeError("Error(s) in loading state_dict for X:\n\tsize mismatch"), "does not fit the model"),
    ],
)
def test_expected_errors_are_one_line(error, message):
    explained = explain(raised(RuntimeError("in a library"), raised(error)))
    assert message in explained
    assert "\n" not in explained


def test_an_error_of_tensorboards_thread_is_one_line(tmp_path, capfd):
    logs = tmp_path / "logs"
    writer = SummaryWriter(str(logs))
    writer.flush()
    shutil.rmtree(logs)
    writer.add_scalar("loss", 1.0)
    with pytest.raises(SystemExit) as exit_, exit_on_expected_error():
        writer.close()
    assert exit_.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: The system refuses a file '{logs}/")


@pytest.mark.parametrize("error", [ValueError("own"), KeyError("step"), ImportError("x", name="t2v.vqvae")])
def test_bugs_are_not_explained(error):
    assert explain(raised(error)) is None
    with pytest.raises(type(error)), exit_on_expected_error():
        raise error


def test_a_bug_is_not_hidden_by_an_error_before_it():
    bug = KeyError("bug")
    bug.__context__ = OSError(errno.ENOSPC, "full")
    assert explain(bug) is None


def test_an_uncaught_bug_prints_its_own_lines_and_where_the_rest_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shorten_tracebacks()
    try:
        __import__("json").loads("{")
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert str(file) in printed
    assert "test_errors.py" in printed
    assert "json/__init__.py" not in printed.splitlines()[-4]
    assert "JSONDecodeError" in printed
    assert "json/__init__.py" in file.read_text()
