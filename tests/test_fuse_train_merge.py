"""`logitfuse merge`: the folder that it writes, what it refuses, kills, and memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fuse_train.disk import folders
from fuse_train.merge import MERGES, run
from fuse_train.merge.recipe import parse_recipe
from fuse_train.merge.stored_weights import StoredWeights
from fuse_train.merge.written_weights import NewTensor, write_weights
from store_schema.errors import ModelError
from tests.command import ok, refused
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_gguf import write_gguf

REPOSITORY = Path(__file__).resolve().parent.parent
SCE = ("--method", "sce")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of one shape, `base`, `one` and `two`."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer(bos=True)
    for seed, name in enumerate(("base", "one", "two")):
        tiny_model(root / name, "llama", tokenizer, seed=seed)
    return root


@pytest.fixture
def models(folder: Path, tmp_path: Path) -> Path:
    """Copies of these, to be spoiled."""
    return Path(shutil.copytree(folder, tmp_path / "models"))


def words(folder: Path, *more: str, method: str = "sce") -> list[str]:
    """Of a merge of `one` and `two`."""
    base = ["--base", str(folder / "base")] if MERGES[method].needs_base else []
    return ["--method", method, *base, *more, str(folder / "one"), str(folder / "two")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put other tensors into a model's file; None takes one out. `__` stands for a dot."""
    found = weights(folder)
    for key, tensor in tensors.items():
        name = key.replace("__", ".")
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ------------------------------------------------------------------------------ what is written


@pytest.mark.parametrize("method", MERGES.names())
def test_a_merged_model_loads_and_computes(method: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "merged"
    shown = ok("merge", out, *words(folder, method=method))
    assert shown.startswith(f"merged by {method}: 21 tensors, ")
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer("def add(a, b):")["input_ids"]])
    assert model(ids).logits.isfinite().all()
    assert ids[0, 0] == tokenizer.bos_token_id
    first = folder / ("base" if MERGES[method].needs_base else "one")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (first / name).read_bytes()
    assert {path.name for path in out.parent.iterdir()} == {"merged"}


def test_a_mean_is_the_mean(folder: Path, tmp_path: Path) -> None:
    ok("merge", tmp_path / "out", *words(folder, "--weights", "3,1", method="linear"))
    one, two, got = weights(folder / "one"), weights(folder / "two"), weights(tmp_path / "out")
    assert got.keys() == one.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, 0.75 * one[name] + 0.25 * two[name])


def test_the_card_has_the_recipe_and_the_models(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("merge", out, *words(folder, "--option", "density=0.3", "--weights", "1,0.5", method="ties"))
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(front)
    names = [str(folder / name) for name in ("base", "one", "two")]
    assert fields["base_model"] == names
    assert fields["tags"] == ["logitfuse", "merge"]
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe == {
        "base": names[0], "models": names[1:], "method": "ties", "weights": [1.0, 0.5], "dtype": "auto",
        "ties": {"density": 0.3, "scale": 1.0, "normalize": True},
    }  # fmt: skip
    record = json.loads((out / "merge.json").read_text())
    for name in names:
        assert f"`{record['models'][name]}`" in text
    assert "arXiv 2306.01708" in text
    assert f"torch {torch.__version__}" in text


def test_json_says_what_was_made(folder: Path, tmp_path: Path) -> None:
    shown = json.loads(ok("merge", tmp_path / "out", "--json", *words(folder)))
    assert shown["fresh"] is True
    assert shown["num_tensors"] == 21
    assert shown["num_bytes"] == sum(t.numel() * 4 for t in weights(tmp_path / "out").values())
    assert shown["recipe"]["sce"] == {"density": 0.1, "select_for": "all"}
    again = json.loads(ok("merge", tmp_path / "out", "--json", *words(folder)))
    assert (again["fresh"], again["fingerprint"]) == (False, shown["fingerprint"])


def test_a_merge_that_is_there_is_left_alone(folder: Path, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("merge", out, *words(folder))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert ok("merge", out, *words(folder)).startswith("merge: complete, nothing to do: 21 tensors")
    assert "nothing to do" in ok("merge", out, *words(models))  # copies of the same models
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    other = refused("merge", out, *words(folder, "--option", "density=0.2"))
    assert "OUT holds a merge of other models, or by another recipe" in other
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "file of the merged model changed" in refused("merge", out, *words(folder))


def test_seeds_are_part_of_a_merge_that_draws_only(folder: Path, tmp_path: Path) -> None:
    ok("merge", tmp_path / "dare", *words(folder, method="dare_linear"))
    assert "another recipe" in refused(
        "merge", tmp_path / "dare", *words(folder, "--seed", "1", method="dare_linear")
    )
    ok("merge", tmp_path / "ties", *words(folder, method="ties"))
    assert "nothing to do" in ok(
        "merge", tmp_path / "ties", *words(folder, "--seed", "1", method="ties")
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16", "float64"])
def test_another_dtype_is_written_and_said(dtype: str, folder: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    ok("merge", plain, *words(folder))
    ok("merge", out, *words(folder, "--dtype", dtype))
    full = {"fp16": "float16"}.get(dtype, dtype)
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == full
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, weights(plain)[name].to(getattr(torch, full)))
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, full)


def test_dtypes_of_the_base_stay_tensor_by_tensor(models: Path, tmp_path: Path) -> None:
    for name in ("base", "one"):
        found = {
            key: tensor if "norm" in key else tensor.bfloat16()
            for key, tensor in weights(models / name).items()
        }
        save_file(found, models / name / "model.safetensors", {"format": "pt"})
    ok("merge", tmp_path / "out", *words(models))
    for key, tensor in weights(tmp_path / "out").items():
        assert tensor.dtype == (torch.float32 if "norm" in key else torch.bfloat16)


def test_shards_are_read_and_written(
    models: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "two"):
        model = AutoModelForCausalLM.from_pretrained(models / name)
        (models / name / "model.safetensors").unlink()
        model.save_pretrained(models / name, max_shard_size="150KB")
        assert len(list((models / name).glob("*.safetensors"))) > 2
    ok("merge", tmp_path / "plain", *words(folder))
    recipe = parse_recipe({"method": "sce"})
    given = [str(models / name) for name in ("one", "two")]
    run.merge_models(tmp_path / "out", recipe, given, str(models / "base"), max_file_bytes=120_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    plain = weights(tmp_path / "plain")
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, plain[name])


def test_what_is_written_is_as_the_library_writes_it(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7),
        "c": torch.tensor(2.5, dtype=torch.bfloat16),
        "d": torch.zeros(0, 4),
        "é": torch.randn(9).half(),
    }
    dtypes = {"a": "F32", "b": "I64", "c": "BF16", "d": "F32", "é": "F16"}
    new = [
        NewTensor(name, dtypes[name], tuple(t.shape), t.numel() * t.element_size())
        for name, t in tensors.items()
    ]

    def content(name: str) -> list[bytes]:
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if name != "d" else b""
        return [data[:3], data[3:]]

    write_weights(tmp_path, new, content)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
    (tmp_path / "config.json").write_text("{}")
    with StoredWeights(tmp_path, name="own") as own:
        assert torch.equal(own.read("a", 4, 6), tensors["a"].reshape(-1)[4:10])
        assert own.tensors["é"].shape == (9,)


# --------------------------------------------------------------------------- kinds of models


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("base", "one", "two")):
        tiny_model(tmp_path / name, "qwen2", tokenizer, seed=seed)
        set_config(tmp_path / name, tie_word_embeddings=True)
        change(tmp_path / name, lm_head__weight=None)
    plain = tmp_path / "plain"
    ok("merge", plain, *words(tmp_path))
    assert "lm_head.weight" not in weights(plain)
    model = AutoModelForCausalLM.from_pretrained(plain)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # One that stores its head all the same is the same model; so is a base that does.
    change(tmp_path / "one", lm_head__weight=weights(tmp_path / "one")["model.embed_tokens.weight"])
    ok("merge", tmp_path / "again", *words(tmp_path))
    head = weights(tmp_path / "base")["model.embed_tokens.weight"]
    change(tmp_path / "base", lm_head__weight=head)
    ok("merge", tmp_path / "head", *words(tmp_path))
    got = weights(tmp_path / "head")
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    for name, tensor in weights(plain).items():
        assert torch.equal(tensor, weights(tmp_path / "again")[name])
        assert torch.equal(tensor, got[name])


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")
def test_gguf_files_are_models_too(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITFUSE_CACHE", str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    for seed, name in enumerate(("base", "one", "two")):
        tiny_model(tmp_path / name, "llama", tokenizer, seed=seed)
        write_gguf(tmp_path / name, tmp_path / f"{name}.gguf", quantization="F32")
    files = [str(tmp_path / f"{name}.gguf") for name in ("base", "one", "two")]
    ok("merge", tmp_path / "out", *SCE, "--base", *files)
    ok("merge", tmp_path / "plain", *words(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-4)


def test_buffers_of_whole_numbers_are_copied(models: Path, tmp_path: Path) -> None:
    for name in ("base", "one", "two"):
        change(models / name, steps=torch.arange(5), mask=torch.tensor([True, False]))
    ok("merge", tmp_path / "out", *words(models))
    assert torch.equal(weights(tmp_path / "out")["steps"], torch.arange(5))
    change(models / "two", steps=torch.arange(1, 6))
    assert "two has other whole numbers" in refused("merge", tmp_path / "other", *words(models))
    assert not (tmp_path / "other").exists()


def test_other_templates_and_lengths_are_told_and_the_bases_kept(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (models / "one" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    set_config(models / "two", max_position_embeddings=1024)
    ok("merge", tmp_path / "out", *words(models))
    assert "one differs from" in caplog.text
    assert "in max_position_embeddings" in caplog.text
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert "differs in max_position_embeddings" in (tmp_path / "out" / "README.md").read_text()


# --------------------------------------------------------------------------------- bad input


def spoil_shape(models: Path) -> None:
    change(models / "two", model__norm__weight=torch.ones(32))


def spoil_tokenizer(models: Path) -> None:
    texts = ["entirely other words to learn from, again and again"]
    tiny_tokenizer(texts=texts, vocab_size=420).save_pretrained(models / "two")


def spoil_architecture(models: Path) -> None:
    set_config(models / "two", model_type="mistral", architectures=["MistralForCausalLM"])


def spoil_heads(models: Path) -> None:
    for name in ("base", "one", "two"):
        set_config(models / name, num_attention_heads=2, head_dim=32)
    set_config(models / "two", num_attention_heads=4, num_key_value_heads=4, head_dim=16)


def spoil_nan(models: Path) -> None:
    tensor = weights(models / "two")["model.layers.1.mlp.up_proj.weight"]
    tensor[5, 7] = float("nan")
    change(models / "two", model__layers__1__mlp__up_proj__weight=tensor)


def spoil_infinite(models: Path) -> None:
    change(models / "base", model__norm__weight=torch.full((64,), float("-inf")))


def spoil_missing(models: Path) -> None:
    change(models / "two", model__norm__weight=None)


def spoil_extra(models: Path) -> None:
    change(models / "two", model__layers__1__mlp__up_proj__bias=torch.ones(3))


def spoil_quantised(models: Path) -> None:
    set_config(models / "two", quantization_config={"quant_method": "fp8"})


def spoil_dtype(models: Path) -> None:
    change(models / "two", model__norm__weight=torch.ones(64).to(torch.float8_e4m3fn))


def spoil_cut(models: Path) -> None:
    file = models / "two" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def spoil_bin(models: Path) -> None:
    torch.save(weights(models / "two"), models / "two" / "pytorch_model.bin")
    (models / "two" / "model.safetensors").unlink()


def spoil_gone(models: Path) -> None:
    shutil.rmtree(models / "two")


def spoil_no_tokenizer(models: Path) -> None:
    for path in (models / "two").glob("tokenizer*"):
        path.unlink()


BAD = {
    "shape": (spoil_shape, "model.norm.weight of [64]"),
    "tokenizer": (spoil_tokenizer, "two has another tokenizer"),
    "architecture": (spoil_architecture, "two has another architecture"),
    "heads": (spoil_heads, "two has another architecture"),
    "nan": (spoil_nan, "NaN or infinity in model.layers.1.mlp.up_proj.weight"),
    "infinite": (spoil_infinite, "NaN or infinity in model.norm.weight"),
    "missing": (spoil_missing, "model.norm.weight"),
    "extra": (spoil_extra, "model.layers.1.mlp.up_proj.bias"),
    "quantised": (spoil_quantised, "two are quantised"),
    "dtype": (spoil_dtype, "model.norm.weight in F8_E4M3"),
    "cut": (spoil_cut, "damaged or cut short"),
    "bin": (spoil_bin, "no safetensors"),
    "gone": (spoil_gone, "model folder not found"),
    "no tokenizer": (spoil_no_tokenizer, "has no tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_refused_in_one_line(name: str, models: Path, tmp_path: Path) -> None:
    spoil, says = BAD[name]
    spoil(models)
    assert says in refused("merge", tmp_path / "out", *words(models))
    assert {path.name for path in tmp_path.iterdir()} == {"models"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--method", "ties", "--option", "density=2", "--base", "{base}"], "ties.density"),
        (["--method", "ties", "--option", "density=many", "--base", "{base}"], "ties.density"),
        (["--method", "ties", "--option", "top=2", "--base", "{base}"], "unknown key"),
        (["--method", "ties", "--option", "density", "--base", "{base}"], "key=value"),
        (["--method", "ties", "--option", "density=[", "--base", "{base}"], "not YAML"),
        (["--method", "ties", "--option", "density=.nan", "--base", "{base}"], "finite"),
        (["--method", "varm", "--option", "density=1", "--base", "{base}"], "has no options"),
        (["--method", "linear", "--weights", "1,b"], "numbers such as"),
        (["--method", "linear", "--weights", "1"], "2, one for each model"),
        (["--method", "linear", "--weights", "1,nan"], "weights"),
        (["--method", "linear", "--dtype", "int4"], "must be one of"),
        (["--method", "linear", "--seed", "-1"], "seed"),
        (["--method", "linear", "--base", "{base}"], "has no base"),
        (["--method", "ties"], "--base"),
        (["--method", "median"], "Invalid value"),
        ([], "Missing option"),
    ],
)
def test_bad_options_are_refused_in_one_line(
    more: list[str], says: str, folder: Path, tmp_path: Path
) -> None:
    given = [word.format(base=folder / "base") for word in more]
    line = refused("merge", tmp_path / "out", *given, folder / "one", folder / "two")
    assert says in line
    assert not (tmp_path / "out").exists()


def test_too_few_models_are_refused(folder: Path, tmp_path: Path) -> None:
    base, one = folder / "base", folder / "one"
    assert "got 1" in refused("merge", tmp_path / "out", "--method", "linear", one)
    assert "got 1" in refused("merge", tmp_path / "out", *SCE, "--base", base, one)
    assert "got 3" in refused("merge", tmp_path / "out", "--method", "slerp", one, base, one)


@pytest.mark.parametrize("name", ["", "$NO_SUCH_VARIABLE/model", "./nothing", "a/b/c"])
def test_names_of_no_model_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    refused("merge", tmp_path / "out", "--method", "linear", folder / "one", name)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "note.txt").write_text("mine")
    assert "OUT is not empty" in refused("merge", out, *words(folder))
    assert (out / "note.txt").read_text() == "mine"
    assert "OUT is a file" in refused("merge", out / "note.txt", *words(folder))
    assert "OUT is not empty" in refused("merge", folder / "one", *words(folder))
    (out / "note.txt").unlink()
    ok("merge", out, *words(folder))


def test_what_a_dtype_cannot_hold_is_refused(models: Path, tmp_path: Path) -> None:
    for name in ("base", "one", "two"):
        change(models / name, model__norm__weight=torch.full((64,), 1e6))
    line = refused("merge", tmp_path / "out", *words(models, "--dtype", "float16"))
    assert "model.norm.weight: " in line
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_merged", full)
    assert "free space" in refused("merge", tmp_path / "out", *words(folder))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ kills, memory


SLOW = """
import sys, time
from fuse_train.merge import tensors
plain = tensors.Blocks._read
def slow(self, *args):
    if self._name.endswith("layers.1.mlp.up_proj.weight"):
        print("half", flush=True)
        time.sleep(60)
    return plain(self, *args)
tensors.Blocks._read = slow
import logitfuse
logitfuse.main(sys.argv[1:])
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_in_the_middle_leaves_no_model(
    sent: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / ".mine.tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "merge", str(out), *words(folder)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    (half,) = (path for path in tmp_path.iterdir() if path.name.startswith(".out."))
    folders.sweep_beside(out)
    assert half.is_dir()  # it is being filled
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert not out.exists()
    if sent == signal.SIGTERM:
        assert process.returncode == 143
        assert errors.strip().splitlines()[-1].startswith("error: stopped by SIGTERM")
    else:
        assert half.is_dir()
    ok("merge", out, *words(folder))
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".mine.tmp"}


def test_a_merge_that_was_replaced_in_a_kill_comes_back(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("merge", out, *words(folder))
    out.rename(tmp_path / f".out.{'0' * 32}.old")
    assert "nothing to do" in ok("merge", out, *words(folder))


def peak(*arguments: object) -> str:
    """Output of tests.merge_peak in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.merge_peak", *map(str, arguments)], cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Checkpoints of 320 MB, removed at the end."""
    root = tmp_path_factory.mktemp("large")
    peak(root)
    yield root
    shutil.rmtree(root)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["linear", "ties", "della", "sce"])
def test_memory_is_a_few_tensors_whatever_the_model(method: str, large: Path) -> None:
    found = json.loads(peak(large, method))
    assert found["ratio"] <= 3, found


def test_a_file_that_ends_while_it_is_read_is_named(models: Path) -> None:
    with StoredWeights(models / "one", name="one") as own:
        last = max(own.tensors, key=lambda name: own.tensors[name].offset)
        os.truncate(models / "one" / "model.safetensors", own.tensors[last].offset + 4)
        with pytest.raises(ModelError, match="ends too soon"):
            own.read(last, 0, own.tensors[last].num_elements)


def test_help_is_quick_and_names_the_methods() -> None:
    start = time.monotonic()
    code = (
        "import sys, logitfuse\ntry: logitfuse.main(['merge', '--help'])\n"
        "finally: print('LOADED', 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "LOADED False False" in done.stdout
    assert all(name in done.stdout for name in MERGES.names())
    assert time.monotonic() - start < 10
