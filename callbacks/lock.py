"""Keeps two runs from writing to one folder."""

import json
import os
import socket
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from t2v.checkpoints.lookup import is_local
from t2v.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


class RunLock(Callback):
    """Refuses to train if another run is writing checkpoints to the same folder.

    The lock is one of the operating system's on the file ``.lock`` in the folder, so it ends with the process that
    holds it, however that ends. It also holds between the machines of a network file system that supports it.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Path, TextIOWrapper]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lock the folders of all checkpoints.

        Raises:
            UserError: If another run holds one of the locks.
        """
        if stage != "fit":
            return
        refused = ""
        if trainer.is_global_zero and fcntl is not None:
            folders = {each.dirpath for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)}
            local = [folder for folder in folders if folder and is_local(folder)]
            refused = next(filter(None, map(self._lock, map(Path, local))), "")
        if refused := trainer.strategy.broadcast(refused):
            self._release()
            raise UserError(refused)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the locks, and remove their files."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the locks."""
        self._release()

    def _lock(self, folder: Path) -> str:
        """Lock a folder and return an empty string, or return the message if another process holds the lock."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAME
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or path.stat().st_ino != os.fstat(file.fileno()).st_ino:  # just removed by its holder
                file.close()
                return self._lock(folder)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "{}"
            file.close()
            return _describe(folder, holder)
        except OSError as error:
            file.close()
            rank_zero_warn(f"{folder} cannot be locked ({error.strerror}): start only one run in it at a time.")
            return ""
        file.truncate(0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": started}))
        file.flush()
        self._held.append((path, file))
        return ""

    def _release(self) -> None:
        while self._held:
            path, file = self._held.pop()
            path.unlink(missing_ok=True)
            file.close()


def _describe(folder: Path, holder: str) -> str:
    try:
        found = json.loads(holder)
        who = f"process {found['process']} on {found['host']}, since {found['started']}"
    except (ValueError, KeyError):  # it is being written
        who = "another process"
    return (
        f"Another run is writing checkpoints to {folder} ({who}): wait until it ends, stop it, or give this run "
        "another folder, for example by --trainer.default_root_dir."
    )
