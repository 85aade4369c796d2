"""`train.parallel: fsdp2`: real processes with a part each train what one process with all trains."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fuse_train.model.target import load_trained
from fuse_train.run import train_run
from store_schema.config import ModelRef
from tests.aligned_factory import make_run
from tests.test_fuse_train_processes import launch
from tests.test_fuse_train_run import lines_of, same, timeless, weights

pytestmark = pytest.mark.usefixtures("quick_processes")

SETTINGS = {
    "max_steps": 20,
    "batch_segments": 7,  # processes have different numbers of micro-batches
    "micro_batch_segments": 2,
    "checkpoint_every": 4,
    "eval_every": 10,
    "eval_segments": 9,  # and of evaluated batches
    "feedback_weight": 0.1,
    "control": False,
    "trackers": [],
}
SPREAD = SETTINGS | {"parallel": "fsdp2"}


def worst_weight(ours: Path, theirs: Path) -> float:
    """Largest relative difference of a tensor of two final folders."""
    a, b = weights(ours), weights(theirs)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)


def worst_loss(ours: Path, theirs: Path) -> float:
    """Largest relative difference of a step's loss or an evaluation of two runs."""
    worst = 0.0
    for a, b in zip(lines_of(ours, "train"), lines_of(theirs, "train"), strict=True):
        assert a["step"] == b["step"]
        pairs = [(a[name], b[name]) for name in ("loss", "clm", "pool", "grad_norm") if name in b]
        pairs += [(a["valid_bpb"][d], bpb) for d, bpb in b.get("valid_bpb", {}).items()]
        assert all(math.isfinite(x) for x, _ in pairs)
        worst = max([worst, *(abs(x - y) / abs(y) for x, y in pairs)])
    return worst


def texts(folder: Path) -> dict[int, set[str]]:
    """Segments of each step over all processes; a step that was taken again had the same."""
    found: dict[int, set[str]] = {}
    for path in (folder / "notes").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            step, names = json.loads(line)
            found.setdefault(step, set()).update(names)
    return found


def trained(folder: Path, count: int, train: dict, launcher: str = "torchrun", **environment):
    """A new run, or the rest of one that is there, in `count` processes."""
    if not (folder / "run").exists():
        make_run(folder, train=train)
        (folder / "notes").mkdir()
    environment.setdefault("TRAIN_DRIVER_NOTES", str(folder / "notes"))
    return launch(folder, launcher if count > 1 else "alone", count=count, **environment)


def tie(run) -> None:
    """Make the target's head its embedding."""
    place = run.target.model
    model = AutoModelForCausalLM.from_pretrained(place)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    shutil.rmtree(Path(place) / "model.safetensors", ignore_errors=True)
    model.save_pretrained(place)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run in one process."""
    folder = tmp_path_factory.mktemp("one")
    done = trained(folder, 1, SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The run in two processes with a part each."""
    folder = tmp_path_factory.mktemp("two")
    done = trained(folder, 2, SPREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_with_a_part_each_equal_one(one, two) -> None:
    assert worst_loss(two, one) < 1e-5
    assert worst_weight(two / "run/final", one / "run/final") < 1e-5
    assert texts(two) == texts(one)
    checkpoint = two / "run/checkpoints/step-000020"
    assert not list(checkpoint.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in checkpoint.glob("parts/*.safetensors")]
    assert len(sizes) == 2
    assert {step: len(names) for step, names in texts(two).items()} == dict.fromkeys(range(20), 7)
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.slow
def test_a_checkpoint_in_parts_can_be_shown(two) -> None:
    """As `train explain` loads it: here of the last step, which is also the best."""
    checkpoint = two / "run/checkpoints/step-000020"
    ref = ModelRef(model=str(two / "target"))
    model = load_trained(ref, checkpoint, adapters=False, dtype=torch.float32)
    final = weights(two / "run/final")
    assert all(torch.equal(p, final[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path, one) -> None:
    done = trained(tmp_path, 4, SPREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    assert worst_loss(tmp_path, one) < 1e-5
    assert worst_weight(tmp_path / "run/final", one / "run/final") < 1e-5


@pytest.mark.slow
def test_killed_and_resumed_in_the_same_layout_gives_the_same_bits(tmp_path, two) -> None:
    first = trained(tmp_path, 2, SPREAD, TRAIN_DRIVER_SIGNAL=f"10 1 {signal.SIGKILL:d}")
    assert first.returncode == 1
    assert not (tmp_path / "run/final").exists()
    second = trained(tmp_path, 2, SPREAD)
    assert second.returncode == 0, second.stderr[-3000:]
    assert same(weights(tmp_path / "run/final"), weights(two / "run/final"))
    assert timeless(lines_of(tmp_path, "train")) == timeless(lines_of(two, "train"))
    for path in (two / "run/checkpoints/step-000020/parts").glob("*.safetensors"):
        ours = tmp_path / "run/checkpoints/step-000020/parts" / path.name
        assert ours.read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 1), (1, 4), (4, 2)])
def test_resumed_in_another_number_of_processes(tmp_path, one, counts) -> None:
    before, after = counts
    first = trained(tmp_path, before, SPREAD, TRAIN_DRIVER_SIGNAL=f"9 0 {signal.SIGKILL:d}")
    assert first.returncode != 0
    second = trained(tmp_path, after, SPREAD)
    assert second.returncode == 0, second.stderr[-3000:]
    assert worst_loss(tmp_path, one) < 1e-5
    assert worst_weight(tmp_path / "run/final", one / "run/final") < 1e-5
    assert texts(tmp_path) == texts(one)


@pytest.mark.slow
def test_resumed_with_the_whole_in_every_process(tmp_path, one) -> None:
    """Stopped with parts, resumed as DDP."""
    first = trained(tmp_path, 2, SPREAD, TRAIN_DRIVER_SIGNAL=f"9 1 {signal.SIGTERM:d}")
    assert first.stderr.count("error: stopped by SIGTERM") == 1, first.stderr[-3000:]
    assert (tmp_path / "run/checkpoints/step-000010/parts").is_dir()
    text = (tmp_path / "run.yaml").read_text()
    (tmp_path / "run.yaml").write_text(text.replace("parallel: fsdp2", "parallel: ddp"))
    second = trained(tmp_path, 2, SETTINGS)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (tmp_path / "run/checkpoints/step-000020/model.safetensors").is_file()
    assert worst_loss(tmp_path, one) < 1e-5
    assert worst_weight(tmp_path / "run/final", one / "run/final") < 1e-5


@pytest.mark.slow
def test_adapters_with_a_frozen_base(tmp_path) -> None:
    """LoRA, killed on the way; `final/` is merged from files, `adapter/` beside it."""
    lora = {"lora": {"r": 4, "alpha": 8.0}, "lr": 1e-2, "max_steps": 8, "eval_every": 4}
    expected = make_run(tmp_path / "one", train=SETTINGS | lora)
    train_run(expected)
    kill = {"TRAIN_DRIVER_SIGNAL": f"6 0 {signal.SIGKILL:d}"}
    assert trained(tmp_path / "two", 2, SPREAD | lora, **kill).returncode == 1
    done = trained(tmp_path / "two", 2, SPREAD | lora)
    assert done.returncode == 0, done.stderr[-3000:]
    assert worst_loss(tmp_path / "two", tmp_path / "one") < 1e-5
    for name in ("final", "adapter"):
        files = {path.name for path in (tmp_path / "one/run" / name).iterdir()}
        assert {path.name for path in (tmp_path / "two/run" / name).iterdir()} == files
    assert worst_weight(tmp_path / "two/run/final", tmp_path / "one/run/final") < 1e-5


@pytest.mark.slow
def test_tied_embeddings_and_activation_checkpointing(tmp_path) -> None:
    options = {"max_steps": 8, "eval_every": 4, "gradient_checkpointing": True}
    run = make_run(tmp_path / "one", train=SETTINGS | options)
    tie(run)
    train_run(run)
    tie(make_run(tmp_path / "two", train=SPREAD | options))
    (tmp_path / "two/notes").mkdir()
    done = trained(tmp_path / "two", 2, SPREAD | options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert worst_loss(tmp_path / "two", tmp_path / "one") < 1e-5
    assert "lm_head.weight" not in weights(tmp_path / "two/run/final")
    assert worst_weight(tmp_path / "two/run/final", tmp_path / "one/run/final") < 1e-5


@pytest.mark.slow
def test_bfloat16_products_of_float32_parts(tmp_path, one) -> None:
    done = trained(tmp_path, 2, SPREAD | {"precision": "bfloat16"})
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(
        lines_of(tmp_path, "train")[1:], lines_of(one, "train")[1:], strict=True
    ):
        assert ours["clm"] == pytest.approx(theirs["clm"], rel=0.02)
    assert {t.dtype for t in weights(tmp_path / "run/final").values()} == {torch.float32}
    assert worst_weight(tmp_path / "run/final", one / "run/final") > 1e-4  # it was not float32


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["changed", "gone", "index"])
def test_a_broken_part_is_named_and_nothing_is_trained(tmp_path, two, damage) -> None:
    shutil.copytree(two, tmp_path / "run", symlinks=True)
    place = tmp_path / "run"
    text = (place / "run.yaml").read_text().replace(str(two), str(place))
    (place / "run.yaml").write_text(text)
    shutil.rmtree(place / "run/final")
    parts = place / "run/checkpoints/step-000020/parts"
    broken = parts / ("parts.json" if damage == "index" else "00001-of-00002.safetensors")
    if damage == "gone":
        broken.unlink()
    else:
        content = bytearray(broken.read_bytes())
        content[len(content) // 2] ^= 1
        broken.write_bytes(content)
    before = lines_of(place, "train")
    done = trained(place, 2, SPREAD)
    assert done.returncode == 1  # torchrun hides 2
    assert "exitcode  : 2" in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert str(broken) in lines[0]
    assert lines_of(place, "train") == before
    assert not (place / "run/final").exists()


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["sgd", "adagrad", "rmsprop"])
def test_other_optimizers(tmp_path, optim) -> None:
    options = {"optim": optim, "max_steps": 4, "eval_every": None, "checkpoint_every": 2}
    options |= {"keep_best": False, "fusion_gate": {"kind": "none"}}
    train_run(make_run(tmp_path / "one", train=SETTINGS | options))
    kill = {"TRAIN_DRIVER_SIGNAL": f"3 0 {signal.SIGKILL:d}"}
    assert trained(tmp_path / "two", 2, SPREAD | options, **kill).returncode == 1
    done = trained(tmp_path / "two", 2, SPREAD | options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert worst_weight(tmp_path / "two/run/final", tmp_path / "one/run/final") < 1e-5


@pytest.mark.slow
def test_config_of_accelerate_for_version_2(tmp_path, one) -> None:
    """`accelerate launch` with an FSDP config: the run file need not say it again."""
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    done = trained(tmp_path, 2, SETTINGS | {"max_steps": 4}, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/checkpoints/step-000004/parts").is_dir()
    line, expected = lines_of(tmp_path, "train")[1], lines_of(one, "train")[1]
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
