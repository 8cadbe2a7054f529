"""What stands at a path: folders, configs of models, and parts of a file together."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from fwt._types import FileFormatError, Model
from fwt.converters import io as _io
from fwt.converters.files import orbax
from fwt.converters.io import Reading

# What a folder of Hugging Face holds beside the weights.
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


def weights_in(path: Path) -> Path:
    """The one file of weights in a folder; the folder itself if there is none."""
    ends = (".safetensors", ".pt", ".pth", ".bin")
    found = sorted(p for p in path.iterdir() if p.name.endswith(ends) and p.is_file())
    found = [p for p in found if not p.name.startswith(NO_WEIGHTS)]
    safe = [p for p in found if p.suffix == ".safetensors"]
    if len(safe) == 1 and all(p.suffix == ".bin" for p in found if p not in safe):
        found = safe  # Hugging Face's two copies of one model
    if len(found) > 1:
        names = ", ".join([*(p.name for p in found[:6]), *(["..."] if len(found) > 6 else [])])
        raise FileFormatError(
            f"{path}: it holds {len(found)} files of weights: give one of {names}"
        )
    return found[0] if found else path


def may_be_replaced(path: Path) -> bool:
    """Whether a folder is sharded weights or one checkpoint, and holds nothing else."""
    names = {p.name for p in path.iterdir()}
    index = [n for n in names if n.endswith((".safetensors.index.json", ".weights.json"))]
    if len(index) != 1:
        return orbax.is_whole(path)
    try:
        where = _io.read_json(path / index[0])["weight_map"].values()
        held = {s for w in where for s in ([w] if isinstance(w, str) else w)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return names == held | set(index)


def read(form: Any, path: Path, how: Reading) -> Model:
    """What a file of a format holds, or several parts of it; a folder that another save replaces
    meanwhile is read again."""
    if isinstance(how.key, tuple):
        variables: dict[str, Any] = {}
        for key in how.key:
            part = read(form, path, dataclasses.replace(how, key=key)).variables
            if key.rpartition("/")[2] == "batch_stats" and set(part) == {"params"}:
                part = {"batch_stats": part["params"]}
            for collection in variables.keys() & part.keys():
                raise FileFormatError(
                    f"{path}: key={list(how.key)!r}: two of the parts are {collection}: load one "
                    "of them"
                )
            variables |= part
        return Model(None, variables)
    folder = path if path.is_dir() else path.parent
    several = path.is_dir() or form.suffixes[0].endswith(".json")
    for _ in range(10):
        before = folder.stat().st_ino
        try:
            model: Model = form.load(path, how)
        except FileFormatError:
            if not several or not folder.exists() or folder.stat().st_ino == before:
                raise
            continue
        if not several or folder.stat().st_ino == before:
            return model
    raise FileFormatError(f"{path}: it is being replaced all the time")


def is_config(path: Path) -> bool:
    """Whether a file is what ``to_json`` of a Keras model gives."""
    if path.suffix != ".json" or path.name.endswith(".index.json") or not path.is_file():
        return False
    try:
        with _io.reading(path):
            found = _io.read_json(path)
    except FileFormatError:  # whose reader says what is wrong
        return False
    return isinstance(found, dict) and isinstance(found.get("config"), dict | list)


def known(path: Path) -> str:
    """What is known of a path of no format that is read, and a way to one; mostly nothing."""
    if is_config(path):
        return (
            "the config of a Keras model, without weights: it says what the weights of a "
            f".weights.h5 or .h5 file are, as architecture={str(path)!r}"
        )
    if (path / "saved_model.pb").is_file() or (path / "saved_model.pbtxt").is_file():
        way = "model.save('net.keras') of the model in Keras 3 writes a file that is read"
        if (path / "keras_metadata.pb").is_file():
            way = (
                f"tf_keras.models.load_model({str(path)!r}).save('net.keras') writes a file that "
                "is read"
            )
        return f"a SavedModel of TensorFlow, which only TensorFlow can run: {way}"
    if path.suffix == ".pt2":
        return (
            "a program of torch.export, which only torch can run: "
            f"torch.save(torch.export.load({str(path)!r}).state_dict, 'weights.pt') writes its "
            "weights to a file that is read"
        )
    stem = re.sub(r"\.(index|data-\d+-of-\d+)$", "", str(path))
    if Path(f"{stem}.index").is_file():
        return (
            "a checkpoint of TensorFlow, which only TensorFlow can read: "
            f"model.load_weights({stem!r}) in Keras 2, or tf.train.Checkpoint(model=model)"
            f".read({stem!r}), and model.save('net.keras') then writes a file that is read"
        )
    return ""
