"""A folder in which the commands of the documentation run: a small finished run that has everything.

Its sources are `code`, `prose` and the target before training; pages that call theirs `coder` and
`writer`, or leave a name open, get these (`stand_in`). One run serves as run.yaml, as the demo and as
the run whose sources answer prompts.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from store_schema.config import load_run
from store_schema.plan.run_plan import open_plan
from tests.command import ok
from tests.fake_slurm import fake_tools
from tests.generate_runs import CHAT_TEMPLATE
from tests.judge_runs import make_models, reward_model, say
from tests.tiny import SAMPLE_TEXTS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STAGES = (
    *("corpus build", "extract plan", "extract run", "align run", "eval pool", "train run"),
    *("judge", "eval run", "eval answers", "eval advantage", "report"),
)
SPLITS = ("train", "valid", "test")
SECTIONS: dict[str, Any] = {
    "plan": {"max_tokens": 96, "shard_tokens": 1500},
    "extract": {"engine": "transformers", "top_k": 16, "device": "cpu"},
    "generate": {"max_tokens": 24, "answers": 2},
    "judge": {"judges": ["exact_answer"]},
    "train": {
        "max_steps": 2,
        "batch_segments": 4,
        "micro_batch_segments": 4,
        "eval_every": None,
        "trackers": [],
        "precision": "float32",
        "asn": {"pretrain_steps": 2},
    },
    "evaluate": {
        "bootstrap_samples": 200,
        "device": "cpu",
        "pool_selectors": ["uniform", "min_ce"],
        "answers": {"max_tokens": 8},
    },
}
STAND_INS = (
    (r"\bcoder-and-writer\b|(?<=runs/)(?:x|base|real|NAME|answers|ask)\b", "demo"),
    (r"\bcoder\b|\bNAME\b", "code"),
    (r"\bwriter\b|\bchat(?=, math\])", "prose"),
    (r"\bmath(?=\])", "base"),
    (r"\b(?:RUN\.yaml|TARGET)\b", "run.yaml"),
    (r"\bRUN(?=/)", "runs/demo"),
    (r"\bRUN\b", "run.yaml"),
    (r"\b(?:FROM|STORE)\b", "runs/demo/stores/code"),
    (r"\bTO\b", "copied"),
    (r"\bOUT\b", "exported"),
    (r"s3://bucket|/mnt/archive", "archive"),
    (r"d17#0|code-48#0", "ID"),
    (r"tools-test-000", "chat-test/turn-0"),
    (r"<commit>", "main"),
)
"""What the pages call something, as a regular expression, and what it is called here."""


def stand_in(text: str) -> str:
    """A command or a run file with the names of this folder."""
    for pattern, name in STAND_INS:
        text = re.sub(pattern, name, text)
    return text


def make_world(folder: Path) -> Path:
    """Fill the folder, which must be the working directory: run files use paths relative to it."""
    models = make_models(folder / "models")
    for name, model in (("code", "coder"), ("prose", "writer")):
        models[name] = models.pop(model).rename(folder / "models" / name)
    for model in models.values():
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    target = models["target"]
    for name in ("models/pivot", "models/other", "runs/with-qwen/final", "runs/with-gemma/final"):
        shutil.copytree(target, folder / name)
    reward_model(folder / "models/reward")
    _write_inputs(folder)
    run = {
        "name": "demo",
        "sources": {n: {"model": f"models/{n}", "dtype": "float32"} for n in ("code", "prose")}
        | {"base": {"model": "models/target", "dtype": "float32"}},
        "target": {"model": "models/target", "dtype": "float32"},
        "corpus": {"inputs": [{"path": "text.jsonl"}]},
    } | SECTIONS
    (folder / "examples").mkdir()
    for name in ("cluster", "study-cluster"):
        shutil.copy(EXAMPLES / f"{name}.yaml", folder / "examples")
    for name in ("run", "examples/demo", "examples/chat", "ours", "min_ce", "other", "ask"):
        write(folder / f"{name}.yaml", run)
    answers = run | {"name": "answers", "corpus": {"inputs": [{"path": "answers.jsonl"}]}}
    write(folder / "answers.yaml", answers)
    write(folder / "new.yaml", run | {"name": "new"})
    write(folder / "imported.yaml", run | {"name": "imported"})
    second = {"name": "other-target", "data_dir": "runs/demo", "target": {"model": "models/other"}}
    write(folder / "second.yaml", run | second)
    pairwise = {"pivot": "base", "merge": {"method": "linear"}}
    train = SECTIONS["train"] | {"selector": "min_ce", "pairwise": pairwise}
    write(folder / "pairs.yaml", run | {"name": "pairs", "data_dir": "runs/demo", "train": train})
    _write_study(folder)
    fake_tools(folder / "bin", sbatch="echo 4711", squeue="", scontrol="echo MaxArraySize = 1001")
    return folder


def _write_study(folder: Path) -> None:
    """Two trainings that take a moment."""
    plain = {"train.selector": "uniform", "train.clm_weight": 1, "train.fusion_gate.kind": "none"}
    few = {"train.eval_every": 1, "evaluate.pool_selectors": ["uniform"]}
    setting = {"run": "run.yaml", "seeds": [0], "tune": [{"train.lr": 0.001}], "set": few}
    study = {
        "name": "small",
        "control": "control",
        "ours": "ours",
        "bootstrap_samples": 200,
        "settings": {"base": setting},
        "rows": {"control": {"set": plain}, "ours": {}},
    }
    for name in ("examples/study", "study"):
        write(folder / f"{name}.yaml", study)


def finish(folder: Path) -> None:
    """Run every stage on run.yaml."""
    for stage in STAGES:
        if stage == "judge":
            for name, right in (("code", True), ("prose", False), ("base", False)):
                say(
                    folder / "run.yaml", name, lambda _, n, right=right: "7" if right != n else "91"
                )
        ok(*stage.split(), folder / "run.yaml")
    for name in ("corpus build", "extract plan"):
        ok(*name.split(), folder / "new.yaml")


def segment(folder: Path) -> str:
    """Id of a segment whose document has a prompt."""
    plan = open_plan(load_run(folder / "run.yaml"))
    return next(s.segment_id for shard in plan.shards for s in plan.segments(shard) if s.has_prompt)


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write YAML."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def _documents() -> Iterator[dict[str, Any]]:
    for split in SPLITS:
        for domain in ("code", "prose"):
            for i, text in enumerate(SAMPLE_TEXTS[domain][:2]):
                yield {
                    "id": f"{domain}-{split}-{i}",
                    "text": text,
                    "domain": domain,
                    "split": split,
                }
        question = {"prompt": "What is 3 + 4?", "response": "3 + 4 is 7."}
        yield {"id": f"sum-{split}", "domain": "sums", "split": split} | question
        yield chat(f"chat-{split}") | {"split": split}


def chat(name: str) -> dict[str, Any]:
    """A chat whose answer a program can check."""
    messages = [
        {"role": "user", "content": "Hi, what is 2 + 5?"},
        {"role": "assistant", "content": "7"},
    ]
    return {"id": name, "messages": messages, "domain": "chat"}


def _write_inputs(folder: Path) -> None:
    """The files that corpora of the pages name."""
    documents = list(_documents())
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    texts = "".join(json.dumps(d) + "\n" for d in documents if "text" in d)
    questions = [d for d in documents if "prompt" in d]
    (folder / "text.jsonl").write_text(lines)
    for name in ("data/code", "shards", "notes/deep"):
        (folder / name).mkdir(parents=True)
    (folder / "data/code/a.jsonl.gz").write_bytes(gzip.compress(texts.encode()))
    (folder / "shards/a.jsonl.zst").write_bytes(
        pa.Codec("zstd").compress(texts.encode(), asbytes=True)
    )
    (folder / "notes/deep/a.md").write_text("A note.\n")
    count = len(SPLITS)
    table = pa.table(
        {
            "sha": [f"a{i}" for i in range(count)],
            "content": [f"x = {i}\n" for i in range(count)],
            "domain": ["code"] * count,
            "split": SPLITS,
        }
    )
    for name in ("code.parquet", "data/code/a.parquet"):
        pq.write_table(table, folder / name)
    talk = (
        {"who": "caller", "said": "What is 2 + 5?"},
        {"who": "desk", "said": "7", "why": "A sum."},
    )
    calls = {"talk": talk, "rules": "Be brief.", "abilities": []}
    for name, rows in {
        "chats.jsonl": [chat(f"chat-{split}") | {"split": split} for split in SPLITS],
        "data/chat.jsonl": [{"conversation": chat("c")["messages"]}],
        "qa.jsonl": questions,
        "prompts.jsonl": questions,
        "calls.jsonl": [calls | {"id": f"call-{split}", "split": split} for split in SPLITS],
    }.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    best = [q | {"id": f"{q['id']}/code/0", "author": "code"} for q in questions]
    pq.write_table(pa.Table.from_pylist(best), folder / "best.parquet")
    (folder / "prose.jinja").write_text(CHAT_TEMPLATE)
