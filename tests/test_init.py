"""`logitfuse init`: the run file it writes, what it says of models and data, and what it refuses."""

from __future__ import annotations

import gzip
import json
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig

from extract.config import CorpusInput
from extract.corpus.corpus import corpus_location, open_corpus
from extract.corpus.inputs import input_files
from extract.corpus.sample import FirstRows
from extract.estimate.costs import Assumed, at_most_bytes, likely_bytes, source_cost, train_cost
from extract.estimate.models import look_at_model
from first_run.cli import PRESETS as CHOICES
from first_run.cli import init
from first_run.init.wanted import named_models
from logitfuse import main
from store_schema.config import ModelRef, load_run
from store_schema.errors import ConfigError, ModelError
from store_schema.plan.run_plan import open_plan
from store_schema.presets import PRESETS
from tests.chat_shapes import PUBLISHED
from tests.command import call, error_line, ok, refused
from tests.extract_runs import sample_documents, write_jsonl
from tests.tiny import tiny_model, tiny_tokenizer

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me, and you."}]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(models: dict[str, Path], *data: object) -> list[str]:
    """Options for models and data."""
    sources = [f"--source={n}={path}" for n, path in models.items() if n != "target"]
    return [*sources, f"--target={models['target']}", *(f"--data={path}" for path in data), "--yes"]


def facts_of(models: dict[str, Path], *data: object) -> dict[str, Any]:
    """What init finds, without writing."""
    found: dict[str, Any] = json.loads(
        ok("init", "new", *words(models, *data), "--dry-run", "--json")
    )
    assert not Path("new").exists()
    return found


def answered(text: str, *options: object) -> Result:
    return CliRunner().invoke(main, ["init", *map(str, options)], input=text)


def chats(number: int = 5) -> list[dict[str, Any]]:
    return [{"id": f"c{i}", "messages": CHAT} for i in range(number)]


def test_the_run_file_goes_through_the_plan_as_estimated(
    here: Path, tiny_models: dict[str, Path]
) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    out = ok("init", "runs/first", *words(tiny_models, "docs.jsonl"))
    assert "wrote runs/first/run.yaml; next:\n  logitfuse doctor runs/first/run.yaml" in out
    assert out.index("models") < out.index("tokenizers") < out.index("data") < out.index("cost")
    path = here / "runs/first/run.yaml"
    run = load_run(path)
    assert (run.name, run.folder) == ("first", "runs/first")
    assert list(run.sources) == ["code", "prose", "facts"]
    assert run.sections["align"].method == "bytes"  # type: ignore[attr-defined]
    assert run.sections["plan"].max_tokens == 512  # type: ignore[attr-defined]
    ok("corpus", "build", path)
    ok("extract", "plan", path)
    path.unlink()
    found = json.loads(ok("init", "runs/first", *words(tiny_models, "docs.jsonl"), "--json"))
    assert found["written"]
    assert path.exists()
    plan = open_plan(run)
    for name in (*run.sources, "target"):
        exact = sum(shard.num_tokens[name] for shard in plan.shards)
        context = plan.record.settings["context_tokens"].get(name, 0)
        assert found["tokens"]["positions"][name] == pytest.approx(exact)
        assert found["tokens"]["read"][name] == pytest.approx(exact + context)
    assert found["tokens"]["measured"] == ["code", "prose", "facts", "target"]
    train = sum(s.num_tokens["target"] for s in plan.shards if s.split == "train")
    assert found["tokens"]["train"] == pytest.approx(train, rel=0.3)


def test_facts_of_models_and_tokenizers(here: Path, tiny_models: dict[str, Path]) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    found = facts_of(tiny_models, "docs.jsonl")
    code, prose, target = (found["models"][name] for name in ("code", "prose", "target"))
    assert code["architecture"] == "LlamaForCausalLM"
    assert prose["architecture"] == "GPTNeoXForCausalLM"
    assert (code["dtype"], code["context"], code["rows"]) == ("float32", 512, 400)
    assert code["weights_bytes"] == (tiny_models["code"] / "model.safetensors").stat().st_size
    assert code["weights_bytes"] == pytest.approx(4 * code["parameters"], rel=0.02)
    assert code["tokenizer"]["bos"] == ["<s>"]
    assert prose["tokenizer"]["bos"] == []
    assert not code["tokenizer"]["as_target"]
    assert target["tokenizer"]["as_target"]
    assert not code["tokenizer"]["chat_template"]
    assert not [line for line in found["warnings"] if "chat template" in line]


def test_one_vocabulary_needs_no_other_alignment(here: Path, tiny_models: dict[str, Path]) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    models = {"twin": tiny_models["target"], "target": tiny_models["target"]}
    assert "one vocabulary" in ok("init", "one.yaml", *words(models, "docs.jsonl"))
    run = load_run(here / "one.yaml")
    assert run.sections["align"].method == "exact"  # type: ignore[attr-defined]
    assert run.folder == "runs/one"
    models["twin"] = tiny_models["code"]
    ok("init", "two.yml", *words(models, "docs.jsonl"))
    assert load_run(here / "two.yml").sections["align"].method == "bytes"  # type: ignore[attr-defined]


def test_the_target_may_be_a_source(here: Path, tiny_models: dict[str, Path]) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    models = {"code": tiny_models["code"], "base": Path("target"), "target": tiny_models["target"]}
    ok("init", "a", *words(models, "docs.jsonl"))
    assert "  base: target  #" in (here / "a/run.yaml").read_text()
    assert load_run(here / "a/run.yaml").sources["base"].model == str(tiny_models["target"])


def test_questions_for_what_is_missing(here: Path, tiny_models: dict[str, Path]) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    target, code, prose = (tiny_models[name] for name in ("target", "code", "prose"))
    text = f"{target}\ncoder={code}\n{prose}\n\ndocs.jsonl\n\ny\n"
    done = answered(text, "runs/asked")
    assert done.exit_code == 0, done.output
    run = load_run(here / "runs/asked/run.yaml")
    assert list(run.sources) == ["coder", "prose"]
    assert "target: the model to train" in done.stderr
    assert "write runs/asked/run.yaml? [Y/n]" in done.stderr
    assert "source 1" not in done.stdout
    done = answered("docs.jsonl\n\nn\n", "runs/no", f"--source={code}", f"--target={target}")
    assert done.exit_code == 0
    assert done.stdout.endswith("nothing written\n")
    assert not (here / "runs/no").exists()


@pytest.mark.parametrize(
    ("text", "what"), [("", "target"), ("t\n", "source"), ("t\na\n\n", "data")]
)
def test_an_end_of_input_is_one_line(here: Path, text: str, what: str) -> None:
    line = error_line(answered(text, "new"))
    assert line.startswith(f"error: no {what} given in init: expected --{what}")
    assert not (here / "new").exists()


def test_yes_asks_nothing(here: Path) -> None:
    assert "no target given" in refused("init", "new", "--yes")
    assert "no source given" in refused("init", "new", "--yes", "--target", "t")


# ---- data -------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Parquet whose texts are of the type large_string."""
    table = pa.Table.from_pylist(rows)
    fields = [
        pa.field(f.name, pa.large_string() if f.type == pa.string() else f.type)
        for f in table.schema
    ]
    pq.write_table(table.cast(pa.schema(fields)), path)
    return path


def zstd(path: Path, rows: list[dict[str, Any]]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(pa.Codec("zstd").compress(data, asbytes=True))
    return path


def gz(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return path


def json_list(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.zst": zstd,
    "a.jsonl.gz": gz,
    "a.parquet": parquet,
    "a.json": json_list,
}
TEXT = [{"text": f"A text of its own, number {i}."} for i in range(30)]
TOOLS = [
    {"role": "user", "content": "Tide?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "tide", "arguments": "{}"}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "04:10"},
    {"role": "assistant", "content": [{"type": "text", "text": "At ten past four."}]},
]
THOUGHT = [CHAT[0], CHAT[1] | {"reasoning_content": "Hm.", "score": 3}]
SHARE = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me, and you."}]
ROWS: dict[str, tuple[list[dict[str, Any]], str, set[str]]] = {
    "text": (TEXT, "text", set()),
    "sharegpt": ([{"conversations": SHARE}] * 30, "messages", {"from", "value"}),
    "openai": ([{"messages": CHAT}] * 30, "messages", {"role", "content"}),
    "tools": (
        [{"messages": TOOLS}] * 30,
        "messages",
        {"role", "content", "tool_calls", "tool_call_id"},
    ),
    "thoughts": (
        [{"messages": THOUGHT}] * 30,
        "messages",
        {"role", "content", "reasoning_content", "score"},
    ),
    "alpaca": ([{"instruction": "Add 1 and 2.", "input": "", "output": "3"}] * 30, "alpaca", set()),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["text", "sharegpt", "openai"])
def test_every_reader_of_every_shape(
    here: Path, chat_models: dict[str, Path], writer: str, kind: str
) -> None:
    rows, shape, keys = ROWS[kind]
    WRITERS[writer](here / writer, rows)
    [data] = facts_of(chat_models, writer)["data"]
    assert data["shapes"] == {shape: 30}
    assert (data["rows_read"], data["rows"], data["exact"]) == (30, 30, True)
    assert data["documents"] == 30
    assert set(data["keys"]) == keys
    assert data["format"] == {"a.parquet": "parquet"}.get(writer, "jsonl")
    assert data["packed"] == {"a.jsonl.zst": "zstd", "a.jsonl.gz": "gzip"}.get(writer)
    assert data["size_bytes"] == (here / writer).stat().st_size
    assert data["entry"]["domain"] == "a"


@pytest.mark.parametrize("kind", ROWS)
def test_the_corpus_has_the_documents_that_were_found(
    here: Path, chat_models: dict[str, Path], kind: str
) -> None:
    rows, shape, keys = ROWS[kind]
    write_jsonl(here / "a.jsonl", rows)
    ok("init", "r", *words(chat_models, "a.jsonl"))
    [data] = facts_of(chat_models, "a.jsonl")["data"]
    assert data["shapes"] == {shape: len(rows)}
    assert set(data["keys"]) == keys
    ok("corpus", "build", "r/run.yaml")
    ok("extract", "plan", "r/run.yaml")
    record = open_corpus(corpus_location(load_run(here / "r/run.yaml")))
    assert record.num_documents == data["documents"]
    assert dict(record.notes) == data["notes"]
    assert dict(record.unread) == data["unread"]
    sizes = sum(size for domains in record.size_bytes.values() for size in domains.values())
    assert sizes == data["text_bytes"]
    text = (here / "r/run.yaml").read_text()
    assert ("thoughts: context" in text) == (kind == "thoughts")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_found(here: Path, chat_models: dict[str, Path], name: str) -> None:
    row, expected = PUBLISHED[name]
    write_jsonl(here / "a.jsonl", [row])
    [data] = facts_of(chat_models, "a.jsonl")["data"]
    assert data["documents"] == len(expected)
    assert data["dropped"] == {}


@pytest.mark.parametrize("writer", WRITERS)
def test_rows_behind_the_first_thousand_are_estimated(
    here: Path, chat_models: dict[str, Path], writer: str
) -> None:
    WRITERS[writer](here / writer, [{"text": f"{i * 7919 % 10007:05d} " * 40} for i in range(6000)])
    found = facts_of(chat_models, writer)
    [data] = found["data"]
    assert data["rows_read"] == 1000
    assert data["exact"] == (writer != "a.json")
    assert data["rows"] == pytest.approx(6000, rel=0.02 if writer == "a.json" else 0)
    assert found["tokens"]["positions"]["target"] > 5 * data["text_bytes"] / 8


@pytest.mark.parametrize("writer", ["a.jsonl", "a.jsonl.zst", "a.jsonl.gz"])
def test_large_files_go_by_bytes(
    tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extract.corpus.sample.COUNTED_BYTES", 3 << 20)
    noise = random.Random(0)
    rows = [{"text": noise.randbytes(noise.randrange(400, 600)).hex()} for _ in range(12_000)]
    path = WRITERS[writer](tmp_path / writer, rows)
    files = input_files(CorpusInput(path=str(path)))
    first = FirstRows.read(files, ["text"], 1000)
    number, exact = first.estimated()
    assert (first.number, exact) == (1000, False)
    assert number == pytest.approx(12_000, rel=0.1)


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5), limit=st.integers(1, 60))
def test_first_rows_of_many_files(sizes: list[int], limit: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for i, size in enumerate(sizes):
            write_jsonl(Path(folder, f"{i}.jsonl"), [{"text": "The same."}] * size)
        files = input_files(CorpusInput(path=f"{folder}/*.jsonl"))
        first = FirstRows.read(files, ["text"], limit)
        number, exact = first.estimated()
    assert first.number == min(sum(sizes), limit)
    assert not exact or number == sum(sizes)
    assert number == pytest.approx(sum(sizes))


def test_plain_files_and_folders(here: Path, tiny_models: dict[str, Path]) -> None:
    (here / "notes/deep").mkdir(parents=True)
    for i in range(4):
        (here / f"notes/deep/{i}.md").write_text(f"A note, number {i}.\n")
    write_jsonl(here / "notes/a.jsonl", TEXT)
    found = facts_of(tiny_models, "notes")
    jsonl, md = found["data"]
    assert (jsonl["path"], md["path"]) == ("notes/**/*.jsonl", "notes/**/*.md")
    assert (md["format"], md["files"], md["rows"], md["exact"]) == ("text", 4, 4, True)
    assert facts_of(tiny_models, "notes/deep/*.md")["data"][0]["files"] == 4
    ok("init", "r", *words(tiny_models, "notes"))
    ok("corpus", "build", "r/run.yaml")


def test_what_would_be_dropped_is_said(here: Path, chat_models: dict[str, Path]) -> None:
    rows = chats(40)
    rows[3] = {"id": "x", "messages": []}
    rows[4] = {"id": "y", "messages": [{"role": "wizard", "content": "?"}, CHAT[1]]}
    rows[5] = {"id": "z", "messages": CHAT, "split": "holdout"}
    rows[6] |= {"score": 1}
    write_jsonl(here / "a.jsonl", rows)
    out = ok("init", "r", *words(chat_models, "a.jsonl"))
    flat = " ".join(out.split())
    assert "1 of the first 40 rows dropped (bad_messages): no message in document x" in flat
    assert "dropped (unknown_role)" in flat
    assert "1 of the first 40 rows left out, split holdout" in flat
    assert "not read: score 1" in flat
    text = (here / "r/run.yaml").read_text()
    assert "on_bad: drop  # counted; in the rows looked at: bad_messages 1, unknown_role 1" in text
    ok("corpus", "build", "r/run.yaml")


def test_ids_that_repeat_are_not_used(here: Path, chat_models: dict[str, Path]) -> None:
    write_jsonl(here / "same.jsonl", [row | {"id": "0"} for row in chats(3)])
    write_jsonl(here / "b.jsonl", chats(3))
    write_jsonl(here / "c.jsonl", chats(3))
    write_jsonl(here / "float.jsonl", [row | {"id": i + 0.5} for i, row in enumerate(chats(99))])
    found = facts_of(chat_models, "same.jsonl", "b.jsonl", "c.jsonl", "float.jsonl")
    ids = [data["entry"].get("ids", "column") for data in found["data"]]
    assert ids == ["place", "column", "file", "place"]
    assert [data["documents"] for data in found["data"]] == [3, 3, 3, 99]
    ok("init", "r", *words(chat_models, "same.jsonl", "b.jsonl", "c.jsonl", "float.jsonl"))
    ok("corpus", "build", "r/run.yaml")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"content": "A text.", "sha": "abcdefghijklmnop"}, {"text": "content"}),
        ({"what": "A long text of its own.", "by": "me"}, {"text": "what"}),
        ({"talk": CHAT, "by": "me"}, {"messages": "talk"}),
    ],
)
@pytest.mark.parametrize("writer", ["a.jsonl", "a.parquet"])
def test_unknown_columns_are_mapped(
    here: Path, chat_models: dict[str, Path], row: dict[str, Any], columns: Any, writer: str
) -> None:
    WRITERS[writer](here / writer, [row] * 200)
    [data] = facts_of(chat_models, writer)["data"]
    assert data["entry"]["columns"] == columns
    assert data["documents"] == 200
    assert any("no known column" in clause for clause in data["found"])
    ok("init", "r", *words(chat_models, writer))
    ok("corpus", "build", "r/run.yaml")


def test_domains_of_the_data_are_kept(here: Path, tiny_models: dict[str, Path]) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    [data] = facts_of(tiny_models, "docs.jsonl")["data"]
    assert "domain" not in data["entry"]
    assert data["splits"] == {"train": 6, "valid": 3, "test": 1}
    rows = [row | {"split": "train"} for row in sample_documents()]
    write_jsonl(here / "all.jsonl", rows)
    found = facts_of(tiny_models, "all.jsonl")
    assert any("no text of split valid, test" in line for line in found["warnings"])


def test_chats_need_templates(here: Path, tiny_models: dict[str, Path]) -> None:
    write_jsonl(here / "a.jsonl", chats())
    out = ok("init", "r", *words(tiny_models, "a.jsonl"))
    assert "code has no chat template, but the data has chats" in " ".join(out.split())
    assert "# template: {file: chat.jinja}" in (here / "r/run.yaml").read_text()
    assert "4 bytes a token for code, prose, facts, target" in " ".join(out.split())


def test_segments_are_longer_for_long_contexts(
    here: Path, chat_models: dict[str, Path], tmp_path: Path
) -> None:
    models = {}
    for name, folder in chat_models.items():
        models[name] = Path(shutil.copytree(folder, here / "models" / name))
        config = json.loads((folder / "config.json").read_text())
        (models[name] / "config.json").write_text(
            json.dumps(config | {"max_position_embeddings": 5000})
        )
    long = [{"role": "user", "content": "Why is that? " * 400}, CHAT[1]]
    write_jsonl(here / "a.jsonl", chats(30))
    assert facts_of(models, "a.jsonl")["tokens"]["max_tokens"] == 1024
    write_jsonl(here / "b.jsonl", [{"messages": long}] * 30)
    found = facts_of(models, "b.jsonl")
    assert 1024 < found["tokens"]["max_tokens"] <= 5000
    assert found["tokens"]["dropped"] == {}
    assert found["tokens"]["read"]["target"] > 20 * found["tokens"]["positions"]["target"]


@pytest.mark.parametrize(
    "name", ["a $b.jsonl", "it's: #1.jsonl", "ü [x] & y.jsonl", "{a}, b.jsonl"]
)
def test_odd_names_are_read_back(here: Path, tiny_models: dict[str, Path], name: str) -> None:
    write_jsonl(here / name, sample_documents())
    folder = here / f"models {name}"
    shutil.copytree(tiny_models["code"], folder)
    models = {"code": folder, "target": tiny_models["target"]}
    ok("init", f"runs/{name.partition('.')[0]}", *words(models, name))
    [path] = here.glob("runs/*/run.yaml")
    run = load_run(path)
    assert run.sources["code"].model == str(folder)
    assert run.sections["corpus"].inputs[0].path == name  # type: ignore[attr-defined]
    assert run.folder == str(path.parent.relative_to(here))
    ok("corpus", "build", path)


# ---- models -----------------------------------------------------------------------------------------


def test_a_config_alone_is_enough(here: Path, tiny_models: dict[str, Path]) -> None:
    whole = look_at_model("m", ModelRef(model=str(tiny_models["code"])))
    bare = here / "bare"
    shutil.copytree(
        tiny_models["code"], bare, ignore=lambda _, names: {n for n in names if "safetensors" in n}
    )
    facts = look_at_model("m", ModelRef(model=str(bare)))
    assert facts.parameters == whole.parameters
    assert facts.size_bytes is None
    assert "no weights" in facts.notes[0]
    write_jsonl(here / "docs.jsonl", sample_documents())
    found = facts_of({"code": bare, "target": tiny_models["target"]}, "docs.jsonl")
    assert any("no weights" in line for line in found["warnings"])


def test_a_mixture_of_experts_uses_a_part_of_itself(here: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(**size, **heads, num_local_experts=8, num_experts_per_tok=2)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(here / "moe")
    facts = look_at_model("moe", ModelRef(model="moe"))
    experts = 2 * 8 * 3 * 16 * 32
    assert facts.parameters is not None
    assert facts.parameters > experts
    assert facts.active == facts.parameters - experts * 6 // 8


def test_a_hub_model_that_cannot_be_reached_is_a_warning(
    here: Path, tiny_models: dict[str, Path]
) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    models = {
        "code": tiny_models["code"],
        "far": Path("owner/far"),
        "target": tiny_models["target"],
    }
    found = json.loads(ok("init", "r", *words(models, "docs.jsonl"), "--json"))
    assert "not available" in found["models"]["far"]["problem"] or "hub" in found["warnings"][0]
    assert found["costs"]["gpu_hours"] is None
    assert found["align_method"] == "bytes"
    assert "far" not in found["tokens"]["measured"]
    text = (here / "r/run.yaml").read_text()
    assert "# revision: the commit" in text
    assert load_run(here / "r/run.yaml").sources["far"].model == "owner/far"


def test_a_gguf_file_is_not_unpacked(here: Path, tiny_models: dict[str, Path]) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    (here / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    models = {"packed": Path("m.gguf"), "target": tiny_models["target"]}
    found = facts_of(models, "docs.jsonl")
    assert found["models"]["packed"]["weights_bytes"] == 104
    assert found["models"]["packed"]["place"] == "GGUF file"
    with pytest.raises(ModelError, match="GGUF file of m not found"):
        look_at_model("m", ModelRef(model="other.gguf"))


def test_names_are_made_from_models() -> None:
    target = ModelRef(model="t")
    made = named_models(
        ["Qwen/Qwen2.5-7B", "x/qwen2.5-7b/", "a=m", "runs/m/target", "q.gguf"], target
    )
    assert list(made) == ["qwen2-5-7b", "qwen2-5-7b-2", "a", "target-2", "q"]
    for name in made:
        assert name.replace("-", "").replace("_", "").isalnum()
    with pytest.raises(ConfigError, match="two sources of one name"):
        named_models(["a=m", "a=n"], target)
    for wrong in ("a=", "=m"):
        with pytest.raises(ConfigError, match="expected NAME=MODEL"):
            named_models([wrong], target)


# ---- refusals ---------------------------------------------------------------------------------------


def test_a_run_file_is_never_replaced(here: Path, tiny_models: dict[str, Path]) -> None:
    (here / "r").mkdir()
    (here / "r/run.yaml").write_text("mine\n")
    line = refused("init", "r", *words(tiny_models, "docs.jsonl"))
    assert "there is a run file already, which stays as it is in r/run.yaml" in line
    assert (here / "r/run.yaml").read_text() == "mine\n"
    (here / "notes.txt").write_text("x")
    assert "not a folder and not a YAML file" in refused("init", "notes.txt", "--yes")


def test_bad_input_is_one_line(here: Path, tiny_models: dict[str, Path]) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    good = dict(tiny_models)

    def line(*data: str, **models: Path) -> str:
        text = refused("init", "r", *words(good | models, *(data or ("docs.jsonl",))))
        assert not (here / "r").exists()
        return text

    assert "model folder of code not found in /no/where" in line(code=Path("/no/where"))
    assert "`model` of code is a file" in line(code=Path("docs.jsonl"))
    assert "input file not found" in line("no.jsonl")
    assert "no file matches" in line("no/*.jsonl")
    assert "corpus inputs are read from disk" in line("s3://bucket/a.jsonl")
    (here / "empty").mkdir()
    assert "folder has no file that can be read in empty" in line("empty")
    write_jsonl(here / "numbers.jsonl", [{"a": 1}, {"a": 2}])
    assert "none of the first 2 rows can be used in numbers.jsonl" in line("numbers.jsonl")
    (here / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-20])
    assert "input cannot be read in cut.jsonl.gz" in line("cut.jsonl.gz")
    (here / "adapter").mkdir()
    (here / "adapter/adapter_config.json").write_text("{}")
    assert "folder has an adapter, not a model" in line(code=Path("adapter"))
    bert = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (here / "bert").mkdir()
    (here / "bert/config.json").write_text(json.dumps(bert))
    assert "code is no causal language model" in line(code=Path("bert"))
    assert "is taken by the report" in line(fused=tiny_models["code"])


def test_defaults_are_those_of_the_estimate() -> None:
    defaults = {option.name: option.default for option in init.params}
    assert (defaults["tflops"], defaults["rate"]) == (Assumed().tflops, Assumed().rate)
    assert set(CHOICES) == set(PRESETS)


def test_options_are_checked(here: Path) -> None:
    assert "--preset" in error_line(call("init", "r", "--preset", "huge"))
    assert "--rate" in error_line(call("init", "r", "--rate", "-1"))
    assert "--tflops" in error_line(call("init", "r", "--tflops", "0"))


# ---- costs ------------------------------------------------------------------------------------------


@given(
    positions=st.floats(0, 1e12),
    entries=st.integers(1, 1 << 12),
    preset=st.sampled_from(sorted(PRESETS)),
)
def test_a_preset_never_takes_more_than_the_bound(
    positions: float, entries: int, preset: Any
) -> None:
    most, likely = at_most_bytes(positions, entries), likely_bytes(positions, entries, preset)
    assert 0 <= likely <= most == positions * (24 + 8 * entries)
    assert likely_bytes(positions, entries, "exact") == most
    sizes = [likely_bytes(positions, entries, name) for name in ("tiny", "compact", "fine")]
    assert sizes == sorted(sizes)


@given(tokens=st.floats(1, 1e12), size=st.integers(10**9, 10**12), tflops=st.floats(1, 2000))
def test_costs_by_hand(tokens: float, size: int, tflops: float) -> None:
    cost = source_cost("a", (tokens, 2 * tokens), size, entries=64, preset="fine", tflops=tflops)
    assert cost.gpu_hours is not None
    flop = 2 * size * 2 * tokens
    assert cost.gpu_hours >= 0.999 * flop / (tflops * 1e12) / 3600
    trained = train_cost(size, size, tokens, epochs=2, recompute=True, tflops=tflops)
    assert trained.gpu_hours == pytest.approx(8 * size * tokens * 2 * 2 / (tflops * 1e12) / 3600)
    assert trained.gpus == max(1, math.ceil(size * 16 / 60e9))
    assert trained.bytes == 2 * size * (3 * 12 + 2 * 4)
    unknown = source_cost("a", (1.0, 1.0), None, entries=1, preset="exact", tflops=1)
    assert (unknown.tokens_per_s, unknown.gpu_hours) == (None, None)
    assert train_cost(None, None, 1.0, epochs=1, recompute=False, tflops=1).gpu_hours is None


def test_money_and_a_full_disk(
    here: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(here / "docs.jsonl", sample_documents())
    options = [*words(tiny_models, "docs.jsonl"), "--json", "--dry-run"]
    found = json.loads(ok("init", "r", *options, "--rate", "36000"))
    assert found["costs"]["money"] == pytest.approx(36000 * found["costs"]["gpu_hours"])
    stores = sum(source["bytes"] for source in found["costs"]["sources"])
    assert found["costs"]["disk_bytes"] > stores + found["costs"]["aligned_bytes"]
    assert not [line for line in found["warnings"] if "on disk" in line]
    monkeypatch.setattr("first_run.init.findings.free_bytes", lambda folder: 1000)
    full = json.loads(ok("init", "r", *options))
    [line] = [line for line in full["warnings"] if "on disk" in line]
    assert "1.00 kB are free: give another --run-dir" in line
    away = json.loads(ok("init", "r", *options, "--run-dir", "s3://bucket/r"))
    assert away["run_dir"] == "s3://bucket/r"


def test_a_large_target_gets_what_large_targets_need(
    here: Path, tiny_models: dict[str, Path]
) -> None:
    folder = here / "large"
    tokenizer = tiny_tokenizer()
    tiny_model(folder, "llama", tokenizer)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    wide = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128}
    length = {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config | wide | heads | length))
    write_jsonl(here / "docs.jsonl", sample_documents())
    out = ok("init", "r", *words({"code": tiny_models["code"], "target": folder}, "docs.jsonl"))
    assert "6.48 G" in out
    run = yaml.safe_load((here / "r/run.yaml").read_text())
    assert run["train"]["parallel"] == "fsdp2"
    assert run["train"]["gradient_checkpointing"] is True
    assert run["train"]["lr"] == 0.00001
    assert run["train"]["micro_batch_segments"] == 32
    assert "torchrun --nproc-per-node" in out


def test_it_fits_80_columns(here: Path, chat_models: dict[str, Path]) -> None:
    for name, folder in chat_models.items():
        shutil.copytree(folder, here / name)
    write_jsonl(here / "a.jsonl", chats(30))
    models = {name: Path(name) for name in chat_models}
    out = ok("init", "r", *words(models, "a.jsonl"))
    assert not [line for line in out.splitlines() if len(line) > 80]
