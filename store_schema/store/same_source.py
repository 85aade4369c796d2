"""Check that a store is of the model that the run file has for its source.

Stages after extraction read stores, not models, so they check here that the model was not exchanged
since. If the model is on this machine, its content is compared: a folder that was moved, or has
another path, is the same source. Otherwise its names in the run file and in the store are compared.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from store_schema.disk.location import open_location
from store_schema.errors import MismatchError
from store_schema.fingerprint import model_fingerprint
from store_schema.manifest import ModelIdentity
from store_schema.model.models import local_copy
from store_schema.store.reader import MANIFEST_FILE, StoreReader
from store_schema.text.tokenizer import SegmentTokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from store_schema.config import ModelRef, RunConfig
    from store_schema.plan.plan import Plan

_PUT_BACK = (
    "put the model back into the run file, or extract the new one under another run name (or remove "
    "the source's stores and run {stages} again)"
)
_SAME_MODEL_MOVED = (
    "; if it is the same model at another place, run {stages} on a machine that has it, to write the "
    "new place into the stores"
)
_STAGES = {"generated": "`logitfuse extract generate`"}
"""Commands that write a store of a kind; all other kinds are written by the following."""
_EXTRACT_ALIGN = "`logitfuse extract run` and `align run`"


def source_identity(
    ref: ModelRef, tokenizer: SegmentTokenizer, *, folder: Path | None
) -> ModelIdentity:
    """The identity of a run file's model, for a manifest.

    Args:
        ref: The model in the run file.
        tokenizer: The model's tokenizer.
        folder: The model's folder; None where only the tokenizer matters.
    """
    return ModelIdentity(
        name=ref.model,
        revision=ref.revision,
        gguf_file=ref.gguf_file,
        bos=ref.bos,
        by_offsets=False,
        model_fingerprint=None if folder is None else model_fingerprint(folder),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
    )


def require_same_source(run: RunConfig, name: str, reader: StoreReader, plan: Plan) -> None:
    """Refuse a store that was made from another model than the run file's source.

    If this machine has the weights, samples of them are compared (`model_fingerprint`); nothing is
    downloaded. The tokenizer is loaded only if the run file names the model differently than when the
    store was made; otherwise its fingerprint in the plan is compared.

    Args:
        run: The run file.
        name: Name of the source.
        reader: Its source, generated or aligned store.
        plan: The run's plan.

    Raises:
        MismatchError: It was made from another model; shows both.
    """
    ref, made_from = run.sources[name], reader.manifest.model
    planned = plan.record.tokenizers.get(name)
    if planned is not None and planned != made_from.tokenizer_fingerprint:
        raise _another(name, reader, f"tokenizer {planned}", _tokenizer(made_from))
    same_name = _same_name(ref, made_from)
    if made_from.model_fingerprint is not None:
        folder = local_copy(ref)
        if folder is None:
            if same_name:
                return
            raise _another(
                name, reader, _shown(ref), _recorded(made_from), hint=_PUT_BACK + _SAME_MODEL_MOVED
            )
        current = model_fingerprint(folder)
        if current != made_from.model_fingerprint:
            expected = f"{_shown(ref)} (model {current})"
            got = f"{_recorded(made_from)} (model {made_from.model_fingerprint})"
            raise _another(name, reader, expected, got)
    if not same_name:
        tokenizer = SegmentTokenizer.load(ref, name=name)
        if tokenizer.fingerprint != made_from.tokenizer_fingerprint:
            expected = f"{_shown(ref)}, tokenizer {tokenizer.fingerprint}"
            raise _another(name, reader, expected, _tokenizer(made_from))


def aligned_stores(run: RunConfig, plan: Plan) -> dict[str, StoreReader]:
    """The run's aligned stores, by source.

    Raises:
        MissingError: A store is not there (yet).
        MismatchError: A store is of another model than the run file's source.
    """
    stores = {name: StoreReader.open(open_location(run.aligned_url(name))) for name in run.sources}
    for name, reader in stores.items():
        require_same_source(run, name, reader, plan)
    return stores


def require_run_sources(run: RunConfig, plan: Plan) -> None:
    """`require_same_source` for all source and aligned stores that a run has.

    Raises:
        MismatchError: A store was made from another model; shows both models of the first such store.
    """
    for name in run.sources:
        for url in (run.store_url(name), run.aligned_url(name)):
            location = open_location(url)
            if location.exists(MANIFEST_FILE):
                require_same_source(run, name, StoreReader.open(location), plan)


def _same_name(ref: ModelRef, made_from: ModelIdentity) -> bool:
    """Whether the run file names the model as when the store was made: folder or hub name, and revision
    and BOS rule if the store has them."""
    same = _place(ref.model, ref.gguf_file) == _place(made_from.name, made_from.gguf_file)
    if made_from.bos is None:
        return same
    return same and (ref.revision, ref.bos) == (made_from.revision, made_from.bos)


def _place(model: str, gguf_file: str | None) -> str:
    return os.path.abspath(os.path.join(model, gguf_file or ""))


def _shown(ref: ModelRef) -> str:
    return _described(ref.model, ref.gguf_file, ref.revision, ref.bos)


def _recorded(made_from: ModelIdentity) -> str:
    return _described(made_from.name, made_from.gguf_file, made_from.revision, made_from.bos)


def _described(model: str, gguf_file: str | None, revision: str | None, bos: str | None) -> str:
    parts = [model]
    parts += [] if gguf_file is None else [f"gguf_file {gguf_file}"]
    parts += [] if revision is None else [f"revision {revision}"]
    parts += [] if bos in (None, "auto") else [f"bos {bos}"]
    return " ".join(parts)


def _tokenizer(made_from: ModelIdentity) -> str:
    return f"{_recorded(made_from)}, tokenizer {made_from.tokenizer_fingerprint}"


def _another(
    name: str, reader: StoreReader, expected: str, got: str, hint: str = _PUT_BACK
) -> MismatchError:
    return MismatchError(
        f"the store was made from another model than the run file's source {name}",
        where=reader.location.url,
        expected=expected,
        got=got,
        hint=hint.format(stages=_STAGES.get(reader.manifest.kind, _EXTRACT_ALIGN)),
    )
