"""What cannot be trained on: one clear line and exit code 2, before any work where that is possible."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fuse_train.cli import train
from fuse_train.data.partial import uncovered_arrays
from fuse_train.data.samples import AlignedSamples
from fuse_train.data.stream import SampleStream
from fuse_train.inputs import open_inputs, stream_options
from fuse_train.loop.objective import FusionObjective
from fuse_train.loop.validation import load_valid, valid_scores
from fuse_train.machine.memory_fit import fitting_size
from fuse_train.publish.done import read_done
from fuse_train.run import train_run
from fuse_train.selectors.features import FEATURES
from store_schema.errors import ConfigError, InputError
from store_schema.fingerprint import fingerprint
from store_schema.model.out_of_memory import is_out_of_memory
from store_schema.text.tokenizer import SegmentTokenizer
from tests import command
from tests.aligned_factory import make_plan, make_run
from tests.test_fuse_train_run import lines_of, same, weights, with_train
from tests.tiny import tiny_model, tiny_tokenizer

QUICK = {"control": False, "max_steps": 2, "eval_every": None, "trackers": []}


def refused(folder: Path, *options: str) -> str:
    """The one error line of the command."""
    return command.refused("train", "run", folder / "run.yaml", *options)


def completed(folder, *options: str) -> None:
    with pytest.raises(SystemExit) as ended:
        train.main(["run", str(folder / "run.yaml"), *options])
    assert ended.value.code == 0


def test_store_of_another_vocabulary(tmp_path) -> None:
    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    other = tiny_tokenizer("byte_level", ["some other text"], 300, bos=True)
    tiny_model(tmp_path / "target", "llama", other)
    line = refused(tmp_path)
    assert "store was aligned to another tokenizer than the target's" in line
    assert SegmentTokenizer(other, name="target").fingerprint in line
    assert "expected" in line


def test_a_source_that_became_another_model(tmp_path) -> None:
    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    line = refused(tmp_path, "--set", "sources.prose.model=made/other")
    assert "made from another model than the run file's source prose" in line
    assert "aligned/prose: expected made/other, got made/prose;" in line
    assert not (tmp_path / "run/final").exists()


def without(folder, source: str, *shards: int) -> None:
    for shard in shards:
        (folder / f"run/aligned/{source}/commits/{shard:05d}.json").unlink()


def test_missing_shards_are_named_or_gone_without(tmp_path) -> None:
    make_run(tmp_path, train=QUICK, segments_per_shard=4)
    without(tmp_path, "code", 1, 2)
    without(tmp_path, "prose", 2)
    line = refused(tmp_path)
    assert "missing: code 2 of 4 shards (1, 2); prose 1 of 4 shards (2)" in line
    assert "--allow-partial" in line
    completed(tmp_path, "--allow-partial")
    assert lines_of(tmp_path, "train")[-1]["step"] == 2


def test_a_source_covers_nothing_in_shards_it_lacks(tmp_path) -> None:
    made = make_run(tmp_path, segments_per_shard=4)
    section = made.sections["train"].model_copy(update={"allow_partial": True})
    whole = open_inputs(made, section)
    assert whole.samples.missing == {}
    without(tmp_path, "code", 1, 2)
    without(tmp_path, "prose", 2)
    without(tmp_path, "facts", 2)
    partial = open_inputs(made, section)
    assert [shard.index for shard in partial.samples.shards] == [0, 1, 3]
    before, after = (
        whole.samples.load(1, with_sources=True),
        partial.samples.load(1, with_sources=True),
    )
    assert before.token_ids.tolist() == after.token_ids.tolist()
    missing, present = after.sources[0], after.sources[1]
    assert missing.keys() == present.keys()
    assert missing["entry_offsets"].max() == 0
    assert (missing["tail_mass"] == 1).all()
    assert all(
        (before.sources[1][name] == present[name]).all() for name in ("entry_ids", "entry_logprobs")
    )
    assert after.features_NMF.shape == (len(after.token_ids), 3, len(FEATURES))
    assert not after.features_NMF[:, 0, FEATURES.index("coverage")].any()
    stream = SampleStream(
        partial.samples, stream_options(made, section), partial.domains, with_sources=True
    )
    order = [ref for step in range(stream.num_samples // 8) for ref in stream.step_refs(step)]
    assert len({(r.shard, r.segment) for r in order}) == len(order)
    alone = partial.samples.load(1, with_sources=False)
    assert alone.token_ids.tolist() == after.token_ids.tolist()


def test_what_is_missing_is_part_of_what_was_trained(tmp_path) -> None:
    made = with_train(make_run(tmp_path, segments_per_shard=4), **QUICK, allow_partial=True)
    without(tmp_path, "code", 1)
    (first,) = train_run(made)
    (again,) = train_run(made)
    assert not again.fresh
    whole = with_train(make_run(tmp_path / "b", segments_per_shard=4), **QUICK, allow_partial=True)
    (other,) = train_run(whole)
    assert other.record.fingerprint != first.record.fingerprint
    assert not same(weights(other.folder), weights(first.folder))


def test_no_source_has_any_shard(tmp_path) -> None:
    make_run(tmp_path, train=QUICK, sources={"code": "code"}, shards={"train": 2, "valid": 1})
    without(tmp_path, "code", 0, 1)
    assert "code 2 of 2 shards" in refused(tmp_path, "--allow-partial")


def test_rows_that_no_source_covers_are_counted_and_train_on_ground_truth(
    tmp_path, monkeypatch
) -> None:
    """No source covers any row: the fused run is the control, and says so."""
    made = make_run(
        tmp_path,
        shards={"train": 1, "valid": 1},
        train=QUICK | {"selector": "uniform", "control": True, "lr": 1e-2},
    )
    original = AlignedSamples.load

    def uncovered(self, position, *, with_sources):
        shard = original(self, position, with_sources=with_sources)
        return replace(shard, sources=tuple(uncovered_arrays(arrays) for arrays in shard.sources))

    monkeypatch.setattr(AlignedSamples, "load", uncovered)
    fused, control = train_run(made)
    assert [line["uncovered"] for line in lines_of(tmp_path, "train")[1:]] == [1.0, 1.0]
    for name, tensor in weights(fused.folder).items():
        torch.testing.assert_close(tensor, weights(control.folder)[name], rtol=1e-5, atol=1e-6)


def test_domain_without_text_to_train_on(tmp_path) -> None:
    made = make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1}, segments_per_shard=2)
    line = refused(tmp_path)  # code and prose in train, facts and code in valid
    assert "domains without text to train on" in line
    assert "no text of facts" in line
    (outcome,) = train_run(with_train(made, allow_partial=True))
    assert set(outcome.record.after) == {"code", "facts"}


def test_domain_of_which_no_byte_is_scored(tmp_path) -> None:
    """One-token texts without BOS: no row has anything before it, and 0 bits per byte would be best."""
    tokenizer = SegmentTokenizer(tiny_tokenizer(), name="target")
    plan = make_plan(tmp_path, tokenizer, shards={"valid": 1})
    valid = load_valid(plan, plan.shards, tokenizer, None)
    cut = replace(
        valid,
        encoded=tuple(
            replace(e, token_ids=e.token_ids[:1], byte_ends=e.byte_ends[:1])
            if domain == "prose"
            else e
            for e, domain in zip(valid.encoded, valid.domains, strict=True)
        ),
    )
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path / "m", "llama", tokenizer.roles)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(InputError, match="prose"):
        valid_scores(model, cut, Accelerator(), batch_segments=4, head_chunk_rows=64)


def test_nothing_that_can_be_trained(tmp_path, monkeypatch) -> None:
    import fuse_train.model.target as place

    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    original = place.load_model

    def frozen(*args, **options):
        return original(*args, **options).requires_grad_(False)

    monkeypatch.setattr(place, "load_model", frozen)
    assert "nothing of the target can be trained" in refused(tmp_path)


def test_segment_longer_than_the_positions_is_found_before_training(tmp_path) -> None:
    from transformers import AutoConfig

    made = make_run(tmp_path, train=QUICK)
    config = AutoConfig.from_pretrained(made.target.model)
    config.max_position_embeddings = 20
    config.save_pretrained(made.target.model)
    line = refused(tmp_path)
    assert "segment is longer than the target's positions" in line
    assert "at most 20 tokens" in line
    assert not (tmp_path / "run/logs/train_steps.jsonl").exists()


def too_large(limit: int):
    """A device that holds no more segments than that."""
    original = FusionObjective.forward

    def forward(self, batch, totals):
        if len(batch.segment_ids) > limit:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
            )
        return original(self, batch, totals)

    return forward


@pytest.mark.parametrize(
    ("limit", "said"), [(8, None), (5, "to 4,"), (1, "to 1,"), (0, "not even one")]
)
def test_a_batch_that_does_not_fit(tmp_path, monkeypatch, limit, said) -> None:
    make_run(tmp_path, train=QUICK | {"selector": "uniform"}, shards={"train": 1, "valid": 1})
    monkeypatch.setattr(FusionObjective, "forward", too_large(limit))
    if said is None:
        completed(tmp_path)
        return
    line = refused(tmp_path)
    assert "micro-batch does not fit in memory in train fused, step 1: got 8 segments" in line
    assert said in line


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("fuse_train.loop.trainer.valid_scores", "evaluation of 8 segments at a time does not fit"),
        ("torch.optim.AdamW.step", "state of optimizer adamw_torch_fused does not fit"),
    ],
)
def test_other_things_that_do_not_fit(tmp_path, monkeypatch, place, said) -> None:
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand so on")

    make_run(tmp_path, train=QUICK | {"selector": "uniform"}, shards={"train": 1, "valid": 1})
    monkeypatch.setattr(place, full)
    line = refused(tmp_path)
    assert said in line
    assert "Tried to allocate 2 GiB;" in line


def test_probing_for_a_size_halves_and_passes_other_errors_on() -> None:
    tried = []

    def attempt(size: int) -> None:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fitting_size(16, attempt) == 2
    assert tried == [8, 4, 2]

    def broken(size: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes"):
        fitting_size(4, broken)
    assert fitting_size(1, attempt) == 0
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP version 1"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_launchers_that_shard_are_refused(tmp_path, monkeypatch, variable, name) -> None:
    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    monkeypatch.setenv(variable, "true")
    line = refused(tmp_path)
    assert "shards the model" in line
    assert f"got {name};" in line
    assert not (tmp_path / "run/checkpoints").exists()


def test_tasks_of_srun_do_not_each_train_the_same(tmp_path, monkeypatch) -> None:
    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    step = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    line = refused(tmp_path)
    assert "srun started 2 tasks, and each would do the same training" in line
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher has told them of one another
    from fuse_train.machine.launchers import check_launcher

    check_launcher()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulates gradients"),
        ("ACCELERATE_DYNAMO_BACKEND", "eager", "compiles the whole loss"),
    ],
)
def test_what_a_launcher_would_do_to_the_loss_is_refused(
    tmp_path, monkeypatch, variable, value, said
) -> None:
    from accelerate.state import AcceleratorState

    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    monkeypatch.setenv(variable, value)
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # the environment is read once a process
    try:
        line = refused(tmp_path)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert said in line
    assert "train." in line


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lr=.inf", "train.lr: "),
        ("train.weight_decay=.nan", "train.weight_decay: "),
        ("train.asn.lr=.nan", "train.asn.lr: "),
        ("train.epochs=.inf", "train.epochs: "),
        ("train.static_weights={code: .nan}", "train.static_weights.code: "),
        ("train.optim_kwargs={eps: .inf}", "train.optim_kwargs: "),
        ("train.optim_kwargs={betas: [0.9]}", "train.optim_kwargs"),
        ("train.optim_kwargs={weight_decay: 0.2}", "use train.weight_decay"),
        ("train.optim_kwargs={lr: 0.2}", "use train.lr"),
    ],
)
def test_numbers_and_options_that_cannot_be(tmp_path, setting, said) -> None:
    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    assert said in refused(tmp_path, "--set", setting)


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def test_a_changed_byte_in_a_checkpoint_is_found(tmp_path) -> None:
    train_options = {"checkpoint_every": 1, "save_total_limit": 3, "max_steps": 2}
    make_run(tmp_path, train=QUICK | train_options, shards={"train": 1, "valid": 1})
    completed(tmp_path)
    run = tmp_path / "run"
    for path in (run / "final").iterdir():
        path.unlink()
    (run / "final").rmdir()
    checkpoint = run / "checkpoints/step-000002"
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    assert {"model.safetensors", "optimizer.safetensors", "state.json"} <= {p.name for p in paths}
    for path in paths:
        kept = path.read_bytes()
        flip(path)
        line = refused(tmp_path)
        assert path.name in line or "files.json" in line
        assert "delete the folder" in line
        path.unlink()
        assert "delete the folder" in refused(tmp_path)
        path.write_bytes(kept)
    completed(tmp_path)
    assert (run / "final/done.json").is_file()


def test_changed_weights_of_the_best_evaluation_are_not_published(tmp_path) -> None:
    options = {"control": False, "max_steps": 8, "eval_every": 1, "trackers": []}
    for lr in (0.03, 0.06, 0.1, 0.3):  # far too high, so that the last weights are seldom the best
        folder = tmp_path / str(lr)
        make_run(folder, train=options | {"lr": lr, "lr_scheduler_type": "constant"})
        completed(folder)
        run = folder / "run"
        step = int(read_done(run / "final").step)
        if step < 8:
            break
    assert 0 < step < 8
    (run / "final").rename(tmp_path / "old")
    flip(run / f"checkpoints/best-{step:06d}/model.safetensors")
    line = refused(folder)
    assert "changed since it was written" in line
    assert f"best-{step:06d}" in line


def test_a_damaged_target_is_one_line(tmp_path) -> None:
    make_run(tmp_path, train=QUICK, shards={"train": 1, "valid": 1})
    weights_file = tmp_path / "target/model.safetensors"
    weights_file.write_bytes(b"\xff" * 8 + weights_file.read_bytes()[8:])
    assert "file of weights is damaged" in refused(tmp_path)


def test_fingerprints_of_whole_stores_do_not_know_of_partial_ones(tmp_path) -> None:
    from fuse_train.run import job_fingerprint

    made = make_run(tmp_path, shards={"train": 1, "valid": 1})
    section = made.sections["train"]
    plain = job_fingerprint(open_inputs(made, section), "fused", section)
    allowed = section.model_copy(update={"allow_partial": True})
    assert job_fingerprint(open_inputs(made, allowed), "fused", allowed) == plain
    assert len(fingerprint("x")) == len(plain)


def test_unknown_tracker_package_is_told(tmp_path) -> None:
    make_run(tmp_path, train=QUICK | {"trackers": ["trackio"]}, shards={"train": 1, "valid": 1})
    assert "tracker is not installed in train.trackers: got trackio" in refused(tmp_path)


def test_a_batch_smaller_than_the_processes_is_refused() -> None:
    from types import SimpleNamespace

    from fuse_train.config import TrainSection
    from fuse_train.machine.launchers import check_accelerator

    def accelerator(kind: str, count: int):
        plain = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value="NO")))
        return SimpleNamespace(
            distributed_type=SimpleNamespace(value=kind),
            num_processes=count,
            gradient_accumulation_steps=1,
            state=plain,
        )

    check_accelerator(accelerator("MULTI_GPU", 4), TrainSection(batch_segments=4))
    with pytest.raises(ConfigError, match="fewer segments"):
        check_accelerator(accelerator("MULTI_GPU", 5), TrainSection(batch_segments=4))
    with pytest.raises(ConfigError, match="shards the model"):
        check_accelerator(accelerator("TP", 1), TrainSection(batch_segments=4))
