"""Resumable checkpoints: one file per run, replaced atomically, refused by any other run."""

import dataclasses
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from db.errors import DataError
from db.measures import EvaluationRecord
from trainer.outcome import Progress

_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to go on as if it had never stopped.

    Random draws depend on the seed and the step alone, so there is no random state to keep.

    Attributes
    ----------
    model, optimizer, scaler : dict
        State dictionaries.
    best : dict of str to Tensor
        Weights of the best validation; empty before the first.
    progress : Progress
        Counters and measurements.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    best: dict[str, Tensor]
    progress: Progress


class CheckpointFile:
    """The checkpoint of one run.

    Parameters
    ----------
    folder : Path
        Where checkpoints are kept; runs may share it.
    key : str
        Key of the run, with its dataset: another spec has another file.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._key = key
        self.path = folder / f"{key[:32]}.checkpoint"

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the file; a crash at any moment leaves the old one or the new one."""
        content = {
            "version": _VERSION,
            "key": self._key,
            **{
                name: getattr(checkpoint, name) for name in ("model", "optimizer", "scaler", "best")
            },
            "progress": _plain(checkpoint.progress),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.path)
            _sync_folder(self.path.parent)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, device: torch.device) -> Checkpoint | None:
        """What was saved last, on a device; None if there is no file.

        Raises
        ------
        DataError
            The file is damaged, of another version or of another run.
        """
        content = self._read(device)
        if content is None:
            return None
        return Checkpoint(
            model=content["model"],
            optimizer=content["optimizer"],
            scaler=content["scaler"],
            best={name: value.cpu() for name, value in content["best"].items()},
            progress=_progress(content["progress"]),
        )

    def num_steps(self) -> int | None:
        """Steps that the saved run had taken; None if there is no file.

        Raises
        ------
        DataError
            As `load`.
        """
        content = self._read(torch.device("cpu"))
        return None if content is None else int(content["progress"]["step"])

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self.path.unlink(missing_ok=True)

    def _read(self, device: torch.device) -> dict[str, Any] | None:
        try:
            content = torch.load(self.path, map_location=device, weights_only=True)
        except FileNotFoundError:
            return None
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
            raise DataError(
                f"checkpoint {self.path} cannot be read ({type(error).__name__}); delete it to "
                "start the run anew"
            ) from error
        if not isinstance(content, dict) or content.get("version") != _VERSION:
            raise DataError(
                f"checkpoint {self.path} is not of format {_VERSION}; delete it to start the run "
                "anew"
            )
        if content["key"] != self._key:
            raise DataError(
                f"checkpoint {self.path} belongs to run {content['key'][:12]}, not to "
                f"{self._key[:12]}; delete it, or give another folder"
            )
        return content


def _plain(progress: Progress) -> dict[str, Any]:
    """Progress as numbers, texts and lists, which load without running code."""
    return dataclasses.asdict(progress)


def _progress(values: dict[str, Any]) -> Progress:
    records = [EvaluationRecord(**record) for record in values["best_records"]]
    return Progress(**{**values, "best_records": records})


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
