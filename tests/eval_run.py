"""A small run, planned, scored, aligned and 'trained' by hand: what fuse_eval starts from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from align.run import align_source
from launch.signals import StopFlag
from launch.work import Part
from store_schema.config import ModelRef, RunConfig, load_run
from store_schema.disk.location import open_location
from store_schema.fingerprint import model_fingerprint
from store_schema.layout import Arrays
from store_schema.manifest import Manifest, ModelIdentity
from store_schema.plan.plan import Plan, Segment, write_plan
from store_schema.store.writer import StoreWriter
from store_schema.text.tokenizer import SegmentTokenizer
from tests.run_file import write_run_file

TOP_K = 16


def make_run(
    folder: Path, models: Mapping[str, Path], texts: Mapping[str, list[str]], **sections: object
) -> RunConfig:
    """Everything up to the aligned stores, in `folder`.

    Args:
        folder: Of the run.
        models: Folders of the sources and of 'target'.
        texts: By domain; each is a document of the splits train and test.
        sections: More of the run file.
    """
    loaded = {name: {"model": str(path), "dtype": "float32"} for name, path in models.items()}
    given = {"corpus": {"inputs": [{"path": "unused.jsonl"}]}, "store": {"preset": "exact"}}
    run = load_run(write_run_file(folder, loaded, run_dir=str(folder), **(given | sections)))
    refs: dict[str, ModelRef] = {**run.sources, "target": run.target}
    tokenizers = {name: SegmentTokenizer.load(ref, name=name) for name, ref in refs.items()}
    plan = _plan(run, tokenizers, texts)
    for source in run.sources:
        _score(run, plan, source, tokenizers[source])
        align_source(run, source, Part(), StopFlag())
    return run


def pretend_training(run: RunConfig, *, better: float = 0.02, worse: float = 0.2) -> None:
    """Final folders: the target with noise on its weights, less of it for the fused one."""
    for folder, scale in (("final", better), ("control/final", worse)):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(run.target.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)
        path = Path(run.folder) / folder
        model.save_pretrained(path)
        for file in Path(run.target.model).glob("tokenizer*"):
            shutil.copy(file, path)


def _plan(
    run: RunConfig, tokenizers: Mapping[str, SegmentTokenizer], texts: Mapping[str, list[str]]
) -> Plan:
    shards, index = [], 0
    for split in ("train", "test"):
        segments = []
        for domain in sorted(texts):
            for i, text in enumerate(texts[domain]):
                name = f"{split}-{domain}-{i}"
                size = len(text.encode())
                segments.append(
                    Segment(index, f"{name}#0", name, domain, split, 0, size, True, None, text)
                )
                index += 1
        counts = {
            name: sum(len(ids) for ids in t.encode_text([s.text for s in segments]))
            for name, t in tokenizers.items()
        }
        shards.append((segments, counts))
    return write_plan(
        open_location(f"{run.folder}/plan"),
        shards,
        corpus_fingerprint="c" * 32,
        request_fingerprint="r" * 32,
        tokenizers={name: t.fingerprint for name, t in tokenizers.items()},
        settings={},
    )


def _score(run: RunConfig, plan: Plan, source: str, tokenizer: SegmentTokenizer) -> None:
    identity = ModelIdentity(
        name=run.sources[source].model,
        model_fingerprint=model_fingerprint(Path(run.sources[source].model)),
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
    )
    manifest = Manifest(
        kind="source",
        source=source,
        model=identity,
        corpus_fingerprint=plan.record.corpus_fingerprint,
        plan_fingerprint=plan.fingerprint,
        top_k=TOP_K,
        vocabulary_fingerprint=tokenizer.vocabulary.fingerprint,
    )
    writer = StoreWriter.open(open_location(run.store_url(source)), manifest, tokenizer.vocabulary)
    model = AutoModelForCausalLM.from_pretrained(run.sources[source].model).eval()
    for shard in plan.shards:
        writer.write(shard, _arrays(model, tokenizer, plan.segments(shard)))


@torch.no_grad()
def _arrays(model: torch.nn.Module, tokenizer: SegmentTokenizer, segments: list[Segment]) -> Arrays:
    ids, ends, counts, entries, logprobs, tails, labels = [], [], [], [], [], [], []
    encoded = tokenizer.encode(segments)
    for one in encoded:
        logits = model(torch.tensor([one.input_ids])).logits[0].double()
        rows = torch.log_softmax(logits[:, : tokenizer.vocab_size], -1)
        known_from = 0 if one.context_ids else 1
        shift = len(one.context_ids) - 1
        for i, token in enumerate(one.token_ids.tolist()):
            if i < known_from:
                counts.append(0)
                tails.append(1.0)
                labels.append(np.nan)
                continue
            top = rows[i + shift].topk(TOP_K)
            counts.append(TOP_K)
            entries.append(top.indices.numpy())
            logprobs.append(np.minimum(top.values.numpy(), 0))
            tails.append(max(1 - float(np.exp(logprobs[-1]).sum()), 0.0))
            labels.append(float(rows[i + shift, token]))
        ids.append(one.token_ids)
        ends.append(one.byte_ends)
    return {
        "segment_ids": np.asarray([s.index for s in segments], "<i8"),
        "token_offsets": np.cumsum([0, *map(len, ids)]).astype("<i8"),
        "token_ids": np.concatenate(ids).astype("<u4"),
        "byte_ends": np.concatenate(ends).astype("<u4"),
        "entry_offsets": np.cumsum([0, *counts]).astype("<i8"),
        "entry_ids": np.concatenate(entries).astype("<u4"),
        "entry_logprobs": np.concatenate(logprobs).astype("<f4"),
        "tail_mass": np.asarray(tails, "<f4"),
        "label_logprobs": np.asarray(labels, "<f4"),
    }
