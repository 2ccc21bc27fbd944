"""Trained models on disk: kept after a run, exported with their items, and started from again.

A kept model is one safetensors file. An exported one is a folder that can be served without
srsweep: `model.safetensors` (weights), `model.json` (what they are) and `items.json` (the original
id of each row).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from db.errors import DataError, SpecError, SrsweepError
from db.measures import RunResult
from db.spec import RunSpec
from trainer.models.build import build_model
from trainer.models.network import SequenceModel

_FORMAT = 1
_ITEM_TABLES = ("item_embedding", "head_weight", "head_bias")
"""Parameters with a row per item."""
_SHARED_FIELDS = ("model", "embedding_dim", "num_blocks", "num_heads")
"""Fields that a run must share with the model that it starts from."""


class _Catalog(Protocol):
    """What is taken from a dataset (`trainer.data.dataset.Dataset`)."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def num_items(self) -> int: ...
    @property
    def item_ids(self) -> npt.NDArray[Any]: ...


@dataclass(frozen=True)
class SavedModel:
    """A trained model as it was read from disk.

    Attributes
    ----------
    spec : RunSpec
        How it was trained.
    fingerprint : str
        Of the dataset that it was trained on.
    num_items : int
        Catalog size V.
    measured : dict of str to float
        Test and validation metrics of its run, by column name.
    weights : dict of str to Tensor
        Parameters by name.
    item_ids : ndarray, shape (V,), optional
        Original ids; a kept model has none.
    """

    spec: RunSpec
    fingerprint: str
    num_items: int
    measured: dict[str, float | None]
    weights: dict[str, Tensor]
    item_ids: npt.NDArray[Any] | None = None

    def restore(self) -> SequenceModel:
        """Network with the saved weights, in evaluation mode."""
        model = build_model(self.spec, self.num_items)
        model.load_state_dict(self.weights)
        return model.eval()

    def digest(self) -> str:
        """Hexadecimal digest of the weights, to tell models apart."""
        found = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.weights.items()):
            found.update(name.encode())
            found.update(value.contiguous().numpy().tobytes())
        return found.hexdigest()


def keep_model(
    path: Path, model: SequenceModel, spec: RunSpec, dataset: _Catalog, result: RunResult
) -> None:
    """Write a model and how it was trained to one file, replacing an older one at once.

    Parameters
    ----------
    path : Path
        File to write.
    model : SequenceModel
        With the weights to keep.
    spec : RunSpec
        Of its run.
    dataset : Dataset
        That it was trained on.
    result : RunResult
        Of its run.
    """
    validation = {f"validation_{name}": value for name, value in result.validation.items()}
    about = {
        "format": _FORMAT,
        "spec": spec.to_dict(),
        "fingerprint": dataset.fingerprint,
        "num_items": dataset.num_items,
        "measured": dict(result.test) | validation,
    }
    weights = {n: v.detach().cpu().contiguous() for n, v in model.state_dict().items()}
    _write_weights(path, weights, {"srsweep": json.dumps(about, sort_keys=True)})


def load_kept_model(path: Path) -> SavedModel:
    """Read a file that `keep_model` wrote.

    Raises
    ------
    DataError
        There is no such file, or it is none of ours.
    """
    weights, metadata = _read_weights(path)
    if "srsweep" not in metadata:
        raise DataError(
            f"{path} was not written by srsweep; give a file made with 'srsweep train --keep-model'"
        )
    return _saved_model(path, json.loads(metadata["srsweep"]), weights)


def export_model(saved: SavedModel, dataset: _Catalog, folder: Path) -> None:
    """Write the folder of a model that is to be served or started from.

    Parameters
    ----------
    saved : SavedModel
        A kept model.
    dataset : Dataset
        That it was trained on; gives the item ids.
    folder : Path
        New or empty folder.

    Raises
    ------
    DataError
        The dataset is another one, or the folder holds something.
    """
    if saved.fingerprint != dataset.fingerprint:
        raise DataError(
            f"the model was trained on {saved.spec.dataset!r} with fingerprint "
            f"{saved.fingerprint[:12]}, this dataset has {dataset.fingerprint[:12]}: its items may "
            "stand in another order; give the dataset that the model was trained on"
        )
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "format": _FORMAT,
        "spec": saved.spec.to_dict(),
        "fingerprint": saved.fingerprint,
        "num_items": saved.num_items,
        "measured": saved.measured,
        "scores": "hidden state of the last position times item vectors"
        + (", plus head_bias" if "head_bias" in saved.weights else ""),
    }
    _write_weights(folder / "model.safetensors", saved.weights, {"format": "pt"})
    (folder / "items.json").write_text(json.dumps(dataset.item_ids.tolist(), ensure_ascii=False))
    (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")


def load_exported_model(folder: Path) -> SavedModel:
    """Read a folder that `export_model` wrote.

    Raises
    ------
    DataError
        A file is missing or unreadable, or items and weights do not fit each other.
    """
    try:
        about = json.loads((folder / "model.json").read_text())
        ids = json.loads((folder / "items.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} is not an exported model ({error}); make one with 'srsweep export-model'"
        ) from None
    weights, _ = _read_weights(folder / "model.safetensors")
    saved = _saved_model(folder, about, weights)
    if len(ids) != saved.num_items:
        raise DataError(
            f"{folder / 'items.json'} lists {len(ids):,} items, the model has "
            f"{saved.num_items:,}; export it again"
        )
    texts = bool(ids) and isinstance(ids[0], str)
    kind = np.dtypes.StringDType() if texts else np.dtype(np.int64)
    return dataclasses.replace(saved, item_ids=np.array(ids, dtype=kind))


def start_from(
    model: SequenceModel, spec: RunSpec, saved: SavedModel, item_ids: npt.NDArray[Any]
) -> int:
    """Take over the weights of an exported model, item by item.

    Items that the saved model does not know keep the weights that were drawn for them; items that
    are gone are left out. Positions are counted from the window's end, so its length may differ.

    Parameters
    ----------
    model : SequenceModel
        Of the new run; its weights are drawn.
    spec : RunSpec
        Of the new run.
    saved : SavedModel
        With item ids.
    item_ids : ndarray, shape (V,)
        Original ids of the new catalog.

    Returns
    -------
    int
        Items that the saved model did not know.

    Raises
    ------
    SpecError
        The networks differ, or the ids of the two catalogs are of different kinds.
    """
    for name in _SHARED_FIELDS:
        ours, theirs = getattr(spec, name), getattr(saved.spec, name)
        if ours != theirs:
            raise SpecError(
                f"{name}={ours!r} cannot start from a model with {name}={theirs!r}; use the same"
            )
    rows, known = _match_items(saved, item_ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            old = saved.weights[name].to(parameter.device)
            if name in _ITEM_TABLES:
                parameter[known.to(parameter.device)] = old[rows.to(parameter.device)]
            elif name == "position_embedding":
                shared = min(len(old), len(parameter))
                parameter[-shared:] = old[-shared:]
            else:
                parameter.copy_(old)
    return len(item_ids) - len(known)


def _match_items(saved: SavedModel, item_ids: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Rows of the saved model, and those of the new one that they go to."""
    old = saved.item_ids
    if old is None:
        raise SpecError("the model carries no item ids; export it with 'srsweep export-model'")
    old_ids, new_ids = old.tolist(), item_ids.tolist()
    if isinstance(old_ids[0], str) != isinstance(new_ids[0], str):
        kinds = ["texts" if isinstance(ids[0], str) else "numbers" for ids in (old_ids, new_ids)]
        raise SpecError(
            f"item ids of the model are {kinds[0]}, those of the dataset {kinds[1]}; prepare the "
            "new data with ids of the same type"
        )
    row_of_id = {item: row for row, item in enumerate(old_ids)}
    rows = torch.tensor([row_of_id.get(item, -1) for item in new_ids])
    known = (rows >= 0).nonzero().squeeze(1)
    if not len(known):
        raise SpecError(
            f"none of the dataset's {len(new_ids):,} items is among the {len(old_ids):,} of the "
            "model; they come from different catalogs"
        )
    return rows[known], known


def _saved_model(where: Path, about: Mapping[str, Any], weights: dict[str, Tensor]) -> SavedModel:
    try:
        if about["format"] != _FORMAT:
            raise DataError(
                f"{where} has model format {about['format']}, this srsweep reads {_FORMAT}; "
                "update srsweep"
            )
        spec = RunSpec.from_mapping(about["spec"])
        num_items = int(about["num_items"])
        saved = SavedModel(spec, about["fingerprint"], num_items, about["measured"], weights)
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} does not describe a model: {error} is missing") from None
    expected = {n: v.shape for n, v in build_model(spec, num_items).state_dict().items()}
    found = {name: value.shape for name, value in weights.items()}
    if found != expected:
        differing = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
        raise DataError(f"{where} holds other weights than its description: {differing[0]}")
    return saved


def _write_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(weights, partial, metadata=metadata)
        partial.replace(path)
    except OSError as error:
        raise SrsweepError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return weights, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as a model: {error}") from None
