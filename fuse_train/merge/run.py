"""A merge: inputs are compared, weights streamed into a folder that appears complete or not at all."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuse_train.disk.checksums import file_record
from fuse_train.disk.folders import publish_folder, sweep_beside
from fuse_train.merge.card import merge_card, recipe_record, versions
from fuse_train.merge.inputs import Inputs, open_inputs
from fuse_train.merge.recipe import MergeSettings
from fuse_train.merge.stored_weights import FLOATS
from fuse_train.merge.tensors import Blocks, block_elements, merged_bytes, same_bytes
from fuse_train.merge.written_weights import MAX_FILE_BYTES, NewTensor, write_weights
from store_schema import SCHEMA_VERSION
from store_schema.config import ModelRef, StrictModel
from store_schema.disk.sealed import seal, unseal
from store_schema.disk.storage_errors import storage_errors
from store_schema.errors import ConfigError, CorruptionError, MismatchError
from store_schema.fingerprint import fingerprint
from store_schema.manifest import FileRecord
from store_schema.text.tokenizer import SegmentTokenizer

OnBytes = Callable[[int, int], None]
MERGE_FILE = "merge.json"
_DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_COPIED = ("config.json", "generation_config.json")


class MergeRecord(StrictModel):
    """merge.json: says that the folder is complete, and what it was made from."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    """Of recipe, models and tokenizer."""
    recipe: dict[str, Any]
    """As in the model card."""
    models: dict[str, str]
    """Fingerprint of each model by name, with the base."""
    tokenizer_fingerprint: str
    num_tensors: int
    num_bytes: int
    """Bytes of all tensors."""
    files: dict[str, FileRecord]
    """Size and checksum of the files of weights."""
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Merged:
    """Result of a merge.

    Args:
        record: merge.json of the folder.
        fresh: Whether it was made now; else it was there before.
        seconds: Time that it took.
    """

    record: MergeRecord
    fresh: bool
    seconds: float


def merge_models(
    out: Path,
    recipe: MergeSettings,
    models: Sequence[str],
    base: str | None = None,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_bytes: OnBytes | None = None,
    write_extra: Callable[[Path], object] = lambda place: None,
) -> Merged:
    """Merge models into a folder; does nothing if the folder already holds the same merge.

    Args:
        out: The folder; must not exist, be empty, or hold the same merge.
        recipe: Method and options.
        models: Folders, GGUF files or hub names.
        base: Likewise, for methods that have one.
        max_file_bytes: Most bytes of a file of weights.
        on_bytes: Called with the bytes written since its last call, and the bytes to write in all.
        write_extra: Writes further files into the folder before it is published.

    Raises:
        ConfigError: The recipe does not fit the models, or `out` holds something else.
        ModelError: A model cannot be loaded or does not fit the others, or a weight is not finite.
        TokenizerError: A tokenizer cannot be read.
        MismatchError: `out` holds a merge of other inputs.
        CorruptionError: `out` holds this merge, damaged.
        StorageError: A file cannot be written; nothing is left.
    """
    start = time.monotonic()
    recipe.require_models(len(models), with_base=base is not None)
    sweep_beside(out)
    before = _record_of(out)
    with ExitStack() as files:
        inputs = open_inputs(base, models, files)
        own = merge_fingerprint(recipe, inputs)
        if before is not None:
            _require_same(out, before, own)
            return Merged(before, fresh=False, seconds=time.monotonic() - start)
        made: list[MergeRecord] = []
        publish_folder(
            out,
            lambda place: made.append(
                _fill(place, out.name, recipe, inputs, own, max_file_bytes, on_bytes, write_extra)
            ),
        )
    return Merged(made[0], fresh=True, seconds=time.monotonic() - start)


def merge_fingerprint(recipe: MergeSettings, inputs: Inputs) -> str:
    """Fingerprint of all that shapes a merged folder; names of models do not."""
    content = recipe.content()
    if recipe.kind.weighted:
        content["weights"] = list(recipe.weights_of(len(inputs.models)))
    models = [model.fingerprint for model in inputs.all]
    return fingerprint(
        {"recipe": content, "models": models, "tokenizer": inputs.tokenizer_fingerprint}
    )


def _record_of(out: Path) -> MergeRecord | None:
    """The record of the merge in `out`; None if `out` does not exist or is empty."""
    with storage_errors(str(out)):
        if out.exists() and not out.is_dir():
            raise ConfigError("OUT is a file", where=out, expected="a folder that is not there yet")
        path = out / MERGE_FILE
        if path.is_file():
            return unseal(MergeRecord, path.read_bytes(), where=str(path), hint="delete the folder")
        if out.is_dir() and any(out.iterdir()):
            raise ConfigError(
                "OUT is not empty",
                where=out,
                got=", ".join(sorted(path.name for path in out.iterdir())[:4]),
                hint="give a folder that is not there yet",
            )
    return None


def _require_same(out: Path, record: MergeRecord, own: str) -> None:
    if record.fingerprint != own:
        raise MismatchError(
            "OUT holds a merge of other models, or by another recipe",
            where=out,
            expected=f"fingerprint {own}",
            got=f"fingerprint {record.fingerprint}",
            hint="give another folder, or delete this one",
        )
    with storage_errors(str(out)):
        for name, expected in record.files.items():
            path = out / name
            if not path.is_file() or file_record(path) != expected:
                raise CorruptionError(
                    "file of the merged model changed since it was written",
                    where=path,
                    hint="delete the folder, and merge again",
                )


def _fill(
    place: Path,
    title: str,
    recipe: MergeSettings,
    inputs: Inputs,
    own: str,
    max_file_bytes: int,
    on_bytes: OnBytes | None,
    write_extra: Callable[[Path], object],
) -> MergeRecord:
    """Write all files of a merged folder, merge.json last; return its record."""
    files = write_merged(place, recipe, inputs, max_file_bytes, on_bytes)
    packages = versions()
    _write_config(place, inputs.kept.folder, recipe.dtype)
    kept = ModelRef(model=str(inputs.kept.folder))
    SegmentTokenizer.load(kept, name=inputs.kept.name).save_pretrained(place)
    card = merge_card(title, recipe, inputs, packages)
    (place / "README.md").write_text(card, encoding="utf-8")
    write_extra(place)
    tensors = planned_tensors(recipe, inputs)
    record = MergeRecord(
        fingerprint=own,
        recipe=recipe_record(recipe, inputs),
        models={model.name: model.fingerprint for model in inputs.all},
        tokenizer_fingerprint=inputs.tokenizer_fingerprint,
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        files=files,
        versions=packages,
    )
    (place / MERGE_FILE).write_bytes(seal(record))
    return record


def write_merged(
    place: Path,
    recipe: MergeSettings,
    inputs: Inputs,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_bytes: OnBytes | None = None,
) -> dict[str, FileRecord]:
    """Write the files of merged weights.

    Takes memory of at most three times the largest tensor of the models, whatever their number
    (tests/merge_peak.py measures it).

    Args:
        place: Folder to write into.
        recipe: Method and options.
        inputs: Open models of the same tensors.
        max_file_bytes: Most bytes of a file of weights.
        on_bytes: As for `merge_models`.

    Returns:
        Size and checksum of each file.

    Raises:
        ModelError: A weight is not finite, or the result is beyond what its dtype holds.
        OSError: A file cannot be written.
    """
    tensors = planned_tensors(recipe, inputs)
    total = sum(tensor.num_bytes for tensor in tensors)
    dtypes = {tensor.name: tensor.dtype for tensor in tensors}
    largest = max(model.weights.tensors[t.name].num_bytes for t in tensors for model in inputs.all)
    elements = block_elements(largest, len(inputs.all))

    def content(name: str) -> Iterator[bytes | bytearray | memoryview]:
        pieces: Iterator[Any]
        if inputs.kept.weights.tensors[name].is_float:
            blocks = Blocks(inputs, name, recipe, elements)
            pieces = merged_bytes(blocks, recipe, dtypes[name], name)
        else:
            pieces = same_bytes(inputs, name, elements)
        for piece in pieces:
            yield piece
            if on_bytes is not None:
                on_bytes(len(piece), total)

    return write_weights(place, tensors, content, max_file_bytes)


def planned_tensors(recipe: MergeSettings, inputs: Inputs) -> list[NewTensor]:
    """Tensors of the merged model: those of `inputs.kept`, the widest dtypes first, so that each begins
    at a multiple of its element's size."""
    tensors = []
    for name, stored in inputs.kept.weights.tensors.items():
        dtype, num_bytes = stored.dtype, stored.num_bytes
        if stored.is_float and recipe.dtype != "auto":
            dtype = _DTYPE_NAMES[recipe.dtype]
            num_bytes = stored.num_elements * FLOATS[dtype].itemsize
        tensors.append(NewTensor(name, dtype, stored.shape, num_bytes))
    return sorted(tensors, key=lambda new: -new.num_bytes // max(math.prod(new.shape), 1))


def _write_config(place: Path, folder: Path, dtype: str) -> None:
    """Copy the kept model's configs; unless it is "auto", write `dtype` into config.json."""
    for name in _COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, place / name)
    if dtype == "auto":
        return
    path = place / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
