"""The run file: strict everywhere, every complaint names its key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from store_schema.config import (
    ModelRef,
    RunConfig,
    SectionModel,
    load_run,
    section_models,
)
from store_schema.errors import ConfigError
from store_schema.papers import preset_names, preset_text, preset_title

HEAD: dict[str, Any] = {
    "name": "demo",
    "sources": {"code": {"model": "models/code"}, "prose": {"model": "models/prose"}},
    "target": {"model": "models/target"},
    "corpus": {"inputs": [{"path": "text.jsonl"}]},
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(HEAD))
    return path


def test_every_section_is_announced_and_checked(file: Path) -> None:
    assert set(section_models()) == {
        *("store", "corpus", "plan", "extract", "generate", "judge", "launch", "align", "train"),
        "evaluate",
    }
    run = load_run(file)
    assert set(run.sections) == set(section_models())
    for name, model in section_models().items():
        assert isinstance(run.section(name, model), model)


def test_defaults(file: Path) -> None:
    run = load_run(file)
    assert run.folder == "runs/demo"
    assert run.seed == 0
    assert run.store_url("code") == "runs/demo/stores/code"
    assert run.generated_url("code") == "runs/demo/generated/code"
    assert run.aligned_url("code") == "runs/demo/aligned/code"
    moved = load_run(file, ("run_dir=s3://bucket/x/",))
    assert moved.folder == "s3://bucket/x"


def test_all_that_is_wrong_is_named_with_what_may_be_meant(file: Path) -> None:
    wrong = ("trian.lr=1", "train.selector=asnn", "train.asn.hiden_size=3", "align.method=byte")
    with pytest.raises(ConfigError) as caught:
        load_run(file, (*wrong, "train.lr=-1"))
    line = caught.value.line()
    for words in (
        *("trian: unknown key", "did you mean train?"),
        *("train.selector: Input should be 'uniform'", "(got 'asnn'), did you mean asn?"),
        *("train.asn.hiden_size: unknown key (got 3), did you mean hidden_size?",),
        *("align.method: ", "(got 'byte'), did you mean bytes?"),
        "train.lr: Input should be greater than 0 (got -1)",
    ):
        assert words in line


def test_resolved_file_is_the_same_run(file: Path, tmp_path: Path) -> None:
    run = load_run(file, ("train.lr=0.002", "name=ünï".replace("ünï", "other")))
    again = tmp_path / "resolved.yaml"
    again.write_text(run.resolved(), encoding="utf-8")
    assert load_run(again) == run
    assert load_run(again, ("sources.code.by_offsets=false",)) == run  # as files of before say


@pytest.mark.parametrize(
    "key",
    ["surprise", "sections", "sources.code.modle", "target.quantize", "train.learning_rate",
     "train.asn.hidden", "evaluate.splt", "corpus.input", "plan.x", "extract.topk", "align.metod"],
)  # fmt: skip
def test_unknown_key_anywhere_is_named(file: Path, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(file, (f"{key}=1",))
    line = caught.value.line()
    assert key.rsplit(".", 1)[-1] in line
    assert "unknown key" in line
    assert str(file) in line
    assert f"{key}: unknown key" in line or key == "sections"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=a b", "name"),
        ("name=../up", "name"),
        ("name=''", "name"),
        ("seed=-1", "seed"),
        ("seed=2147483648", "seed"),
        ("seed=x", "seed"),
        ("sources={}", "sources"),
        ("sources=7", "sources"),
        ("sources={'a b': {model: m}}", "a b"),
        ("sources={'é': {model: m}}", "é"),
        ("sources={fused: {model: m}}", "taken"),
        ("sources={target: {model: m}}", "taken"),
        ("sources.code.model=''", "sources.code.model"),
        ("sources.code=null", "sources.code"),
        ("target={}", "target.model"),
        ("target.trust_remote_code=perhaps", "target.trust_remote_code"),
        (
            "target.by_offsets=true",
            "target: by_offsets was removed: a tokenizer must not change text",
        ),
        ("train=7", "train"),
    ],
)
def test_each_constraint_of_the_head(file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(file, (override,))
    assert words in caught.value.line()
    assert "\n" not in caught.value.line()


def test_all_complaints_are_told_at_once(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(file, ("seed=-1", "name=a b", "wrong=1"))
    for word in ("seed", "name", "wrong"):
        assert word in caught.value.line()


def test_overrides(file: Path) -> None:
    run = load_run(
        file,
        (
            "seed=3",
            "sources.code.revision=abc",
            "sources.third={model: m3}",
            "target.dtype=float32",
        ),
    )
    assert run.seed == 3
    assert run.sources["code"] == ModelRef(model="models/code", revision="abc")
    assert run.sources["third"].model == "m3"
    assert run.target.dtype == "float32"
    # A value may hold '='; the last of two wins.
    assert load_run(file, ("target.model=a=b", "seed=1", "seed=2")).target.model == "a=b"


@pytest.mark.parametrize(
    "override", ["seed", "=1", "name.first=1", "seed=[", "sources.code.model.x=1"]
)
def test_bad_overrides(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set|name"):
        load_run(file, (override,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a mapping"),
        ("- a", "not a mapping"),
        ("a: [", "cannot be read"),
        ("a: !!python/object:os.system x", "cannot be read"),
        ("\x00", "cannot be read"),
        ("1: 2", "name"),
    ],
)
def test_what_is_no_run_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_run(path)


def test_key_written_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(HEAD) + "seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="seed"):
        load_run(path)
    path.write_text(yaml.safe_dump(HEAD) + "train:\n  lr: 0.1\n  lr: 0.2\n")
    with pytest.raises(ConfigError, match="lr"):
        load_run(path)


def test_file_missing_folder_and_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        load_run(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path / "latin.yaml")


def test_values_are_frozen(file: Path) -> None:
    run = load_run(file)
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 1  # type: ignore[misc]


def test_runtime_fields_stay_out_of_content() -> None:
    for name, model in section_models().items():
        assert model.runtime_fields <= set(model.model_fields), name


def test_section_asked_as_another_is_a_mistake_of_ours() -> None:
    run = RunConfig(name="x", sources={"a": ModelRef(model="m")}, target=ModelRef(model="t"))

    class Small(SectionModel):
        size: int = 3

    assert run.section("small", Small).size == 3
    with_it = run.model_copy(update={"sections": {"small": SectionModel()}})
    with pytest.raises(TypeError, match="small"):
        with_it.section("small", Small)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("auto", "auto"),
        ("bf16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("half", "float16"),
        ("fp16", "float16"),
        ("float", "float32"),
        ("fp32", "float32"),
        ("double", "float64"),
    ],
)
def test_dtypes_by_their_usual_names(given: str, read: str) -> None:
    assert ModelRef(model="m", dtype=given).dtype == read


@pytest.mark.parametrize("given", ["int8", "b16", "", "bfloat", "torch", "float8_e4m3fn"])
def test_other_dtypes_are_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="must be one of auto, bfloat16"):
        ModelRef(model="m", dtype=given)


def test_a_preset_stands_under_the_file(file: Path) -> None:
    file.write_text(
        yaml.safe_dump(
            {
                "name": "p",
                "preset": "fusellm-mince",
                "sources": {"code": {"model": "models/code"}},
                "target": {"model": "models/target", "dtype": "bf16"},
                "train": {"lr": 0.01, "optim_kwargs": {"eps": 1e-6}},
            }
        )
    )
    run = load_run(file)
    train = run.sections["train"].model_dump()
    assert (train["selector"], train["clm_weight"], train["lr"]) == ("min_ce", 0.9, 0.01)
    assert train["optim_kwargs"] == {"betas": [0.9, 0.95], "eps": 1e-6}
    assert list(run.sources) == ["code", "base"]
    assert run.sources["base"] == run.target
    assert list(load_run(file, ("sources.base=null",)).sources) == ["code"]
    assert run.preset == "fusellm-mince"
    file.write_text(run.resolved())
    assert load_run(file) == run


@pytest.mark.parametrize("name", preset_names())
def test_every_value_of_a_preset_says_where_it_comes_from(name: str, file: Path) -> None:
    head = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(head | {"preset": name}))
    load_run(file)  # every value is one that a run file takes
    unexplained = [
        line
        for line in preset_text(name).splitlines()
        if line.strip() and not line.rstrip().endswith(":") and "#" not in line
    ]
    assert unexplained == []
    said = re.findall(r"# (\w+)", preset_text(name).partition("\n\n")[2])
    assert set(said) <= {"paper", "code", "ours", "as"}
    assert "arXiv:" in preset_title(name)


def test_a_preset_that_there_is_not(file: Path) -> None:
    with pytest.raises(ConfigError, match="fusellm-mince"):
        load_run(file, ("preset=fusellm",))
    with pytest.raises(ConfigError, match="no such preset"):
        load_run(file, ("preset=[fusellm-mince]",))
