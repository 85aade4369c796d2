"""The memory guard: what is needed, what is free, what running out looks like and leads to."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from extract.config import ExtractSection
from extract.engines import memory
from extract.engines.memory import (
    Need,
    check_gpus,
    check_memory,
    free_host_bytes,
    free_memory,
    memory_need,
    require_memory,
    weight_bytes,
)
from extract.engines.pieces import Pieces
from extract.engines.protocol import EngineMemoryError, EngineSpec
from extract.engines.transformers_engine import TransformersEngine
from store_schema.config import ModelRef
from store_schema.errors import ConfigError, ModelError
from store_schema.model.out_of_memory import is_out_of_memory
from store_schema.text.tokenizer import SegmentTokenizer
from tests.engine_contract import check_engine, encoded_samples, spec_of

GB = 10**9
CONFIG = {"hidden_size": 100, "intermediate_size": 400, "dtype": "float32"}


def big_spec(
    folder: Path, *, dtype: str = "float32", longest: int = 4096, **section: Any
) -> EngineSpec:
    """A model of Qwen's vocabulary with 8 MB of float32 weights, of which only the sizes exist."""
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(CONFIG))
        with open(folder / "model.safetensors", "wb") as file:
            file.truncate(8_000_000)
    return EngineSpec(
        source="m",
        folder=folder,
        ref=ModelRef(model=str(folder)),
        section=ExtractSection(**section),
        dtype=dtype,
        vocab_size=151_000,
        model_vocab_size=151_936,
        longest=longest,
    )


def refusal(need: Need, free: int, where: str = "GPU 0") -> str:
    """The line that a user reads."""
    with pytest.raises(ConfigError) as raised:
        require_memory(need, free, where)
    return raised.value.line()


def test_vllm_on_a_gpu_needs_its_steps_rows_beside_its_share(tmp_path: Path) -> None:
    need = memory_need(big_spec(tmp_path, engine="vllm"), on_cpu=False)
    assert (need.rows, need.copies, need.option) == (2048, 3, "max_num_batched_tokens")
    assert need.bytes == 2048 * 151_936 * 3 * 4
    assert refusal(need, 21 * GB // 10) == (
        "not enough memory: logits of 2,048 rows x 151,936 ids in float32, 3 times: 3.73 GB; "
        "free 2.10 GB (GPU 0); set extract.max_num_batched_tokens to at most 1,151"
    )
    assert "lower extract.gpu_memory_utilization" in refusal(need, 10**6)


def test_vllm_steps_hold_no_more_rows_than_an_input(tmp_path: Path) -> None:
    spec = big_spec(tmp_path, engine="vllm", longest=512)
    assert memory_need(spec, on_cpu=False).rows == 512
    assert memory_need(spec, on_cpu=True).rows == 256
    fewer = big_spec(tmp_path, engine="vllm", max_num_batched_tokens=64)
    assert memory_need(fewer, on_cpu=True).rows == 64


def test_on_a_cpu_weights_and_cache_count(tmp_path: Path) -> None:
    need = memory_need(big_spec(tmp_path, engine="vllm", kv_cache_gib=2), on_cpu=True)
    assert need.fixed == (("weights", 8_000_000), ("KV cache", 2 << 30))
    assert need.bytes == 256 * 151_936 * 3 * 4 + 8_000_000 + (2 << 30)
    assert str(need).startswith("weights 8.00 MB, KV cache 2.15 GB, logits of 256")
    assert "free memory, take a machine with more" in refusal(need, GB, "CPU")


def test_transformers_needs_weights_activations_and_pieces_of_logits(tmp_path: Path) -> None:
    spec = big_spec(tmp_path, engine="transformers", dtype="bfloat16", head_rows=512)
    need = memory_need(spec, on_cpu=False)
    activations = 4096 * (4 * 100 + 3 * 400) * 2
    assert need.bytes == 4_000_000 + activations + 512 * 151_936 * 2 * 4
    assert refusal(need, 300_000_000) == (
        "not enough memory: weights 4.00 MB, activations of 4,096 tokens 13.1 MB, logits of 512 rows "
        "x 151,936 ids in float32, 2 times: 639 MB; free 300 MB (GPU 0); set extract.head_rows "
        "to at most 232"
    )
    one_long = big_spec(tmp_path, engine="transformers", batch_tokens=16, longest=128)
    assert memory_need(one_long, on_cpu=True).tokens == 128
    sampled = dataclasses.replace(
        spec, section=ExtractSection(engine="transformers", estimator="sampled")
    )
    assert memory_need(sampled, on_cpu=True).copies == 4


def test_where_activations_are_the_matter_fewer_tokens_are_asked_for(tmp_path: Path) -> None:
    spec = big_spec(tmp_path, engine="transformers", batch_tokens=10**6, head_rows=64)
    need = memory_need(spec, on_cpu=True)
    line = refusal(need, 5 * GB, "CPU")
    most = int(
        re.findall(r"set extract.batch_tokens to at most ([\d,]+)", line)[0].replace(",", "")
    )
    section = spec.section.model_copy(update={"batch_tokens": most})
    fitting = memory_need(dataclasses.replace(spec, section=section), on_cpu=True)
    require_memory(fitting, 5 * GB, "CPU")
    assert fitting.bytes > 4.9 * GB


def test_logits_that_the_model_changes_exist_for_the_whole_batch(tmp_path: Path) -> None:
    spec = big_spec(tmp_path, engine="transformers", dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"final_logit_softcapping": 30.0}))
    need = memory_need(spec, on_cpu=False)
    assert (need.rows, need.option, need.dtype) == (4096, "batch_tokens", "bfloat16")
    assert need.bytes > 4096 * 151_936 * 2 * 2
    assert "set extract.batch_tokens to at most 1,6" in refusal(need, GB)


@pytest.mark.parametrize("option", ["head_rows", "max_num_batched_tokens"])
def test_the_value_that_is_named_fits_and_the_next_does_not(tmp_path: Path, option: str) -> None:
    engine = "vllm" if option == "max_num_batched_tokens" else "transformers"
    spec = big_spec(tmp_path, engine=engine, **{option: 2000})
    free = 1_234_567_890
    line = refusal(memory_need(spec, on_cpu=False), free)
    most = int(re.findall(rf"{option} to at most ([\d,]+)", line)[0].replace(",", ""))
    for value, fits in ((most, True), (most + 1, False)):
        section = spec.section.model_copy(update={option: value})
        need = memory_need(dataclasses.replace(spec, section=section), on_cpu=False)
        assert (need.bytes <= free) == fits


def test_weights_are_those_that_are_loaded(tmp_path: Path) -> None:
    for name, size in (("a.safetensors", 100), ("b.safetensors", 60), ("old.bin", 900)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weight_bytes(tmp_path, {"dtype": "float32"}, "float32") == 160
    (tmp_path / "model.safetensors").write_bytes(bytes(40))  # others are copies in other layouts
    assert weight_bytes(tmp_path, {"torch_dtype": "bfloat16"}, "float32") == 80
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_bytes(tmp_path, {"dtype": "torch.float32"}, "bfloat16") == 80
    quantised = {"dtype": "bfloat16", "quantization_config": {}}
    assert weight_bytes(tmp_path, quantised, "float32") == 160
    assert weight_bytes(tmp_path, {}, "float32") == 160


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       2000 kB\nMemAvailable:   1000 kB\n"}
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 << 10),
        ({"proc/self/cgroup": "0::/\n"}, 1000 << 10),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                f"{V2}/job/step/memory.max": "max\n",
                f"{V2}/job/memory.max": "500000\n",
                f"{V2}/job/memory.current": "300000\n",
                f"{V2}/job/memory.stat": "anon 5\ninactive_file 100000\n",
            },
            300_000,
        ),
        (
            {  # a container that sees its own group at the mount, and the host's path
                "proc/self/cgroup": "0::/docker/abc\n",
                f"{V2}/memory.max": "500000\n",
                f"{V2}/memory.current": "600000\n",
                f"{V2}/memory.stat": "inactive_file 0\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/slurm/job_1\n3:pids:/x\n",
                f"{V1}/slurm/job_1/memory.limit_in_bytes": "400000\n",
                f"{V1}/slurm/job_1/memory.usage_in_bytes": "100000\n",
                f"{V1}/slurm/job_1/memory.stat": "inactive_file 9\ntotal_inactive_file 50000\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "1\n",
                f"{V1}/memory.stat": "\n",
            },
            350_000,
        ),
    ],
)
def test_free_memory_is_what_kernel_and_groups_leave(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert free_host_bytes(write(tmp_path, MEMINFO | files)) == expected


def test_a_system_that_tells_nothing_refuses_nothing(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) == sys.maxsize


def test_free_memory_of_this_machine_is_a_number() -> None:
    assert 10**7 < free_host_bytes() <= sys.maxsize


def test_gpu_memory_beside_vllm_is_that_of_the_fullest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {0: 70 * GB, 1: 60 * GB, 2: 1 * GB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80 * GB))
    spec = big_spec(tmp_path, engine="vllm", tensor_parallel_size=2, gpu_memory_utilization=0.5)
    assert free_memory(spec, on_cpu=False) == (
        20 * GB, "GPU 1, beside extract.gpu_memory_utilization"
    )  # fmt: skip
    plain = big_spec(tmp_path, engine="transformers")
    assert free_memory(plain, on_cpu=False) == (70 * GB, "GPU 0")
    full = big_spec(tmp_path, engine="vllm", gpu_memory_utilization=0.95)
    assert free_memory(full, on_cpu=False)[0] == 0


def test_check_looks_at_the_device_that_will_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GB, 80 * GB))
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 3 * GB)
    on_gpu = big_spec(tmp_path, engine="transformers")
    assert check_memory(on_gpu).endswith("; free 2.00 GB (GPU 0)")
    on_cpu = big_spec(tmp_path, engine="transformers", device="cpu")
    assert check_memory(on_cpu).endswith("; free 3.00 GB (CPU)")
    with pytest.raises(ConfigError, match=r"free 0 B \(GPU 0, beside"):
        check_memory(big_spec(tmp_path, engine="vllm"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_running_out_is_known_whatever_says_it(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = ValueError("the engine died")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


def test_other_errors_are_not_running_out() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory of its own"))
    beside = KeyError("raised while handling it")
    beside.__context__ = MemoryError()
    assert is_out_of_memory(beside)
    beside.__suppress_context__ = True  # "from None"
    assert not is_out_of_memory(beside)


class SmallMemory(TransformersEngine):
    """Runs out of memory above so many tokens of a forward pass or rows of logits."""

    def __init__(self, spec: EngineSpec, *, tokens: int = 10**9, rows: int = 10**9) -> None:
        super().__init__(spec)
        self.most_tokens, self.most_rows = tokens, rows
        self.failures = 0

    def _states(self, fed: Sequence[npt.NDArray[np.int64]], T: int) -> torch.Tensor:
        if len(fed) * T > self.most_tokens:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super()._states(fed, T)

    def _kept(self, logits_RV: torch.Tensor, *rest: Any) -> Any:
        if len(logits_RV) > self.most_rows:
            self.failures += 1
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return super()._kept(logits_RV, *rest)


@pytest.mark.parametrize(("limits", "failures"), [({"tokens": 200}, 2), ({"rows": 40}, 2)])
def test_a_batch_that_is_too_large_is_done_in_halves(
    tiny_models: dict[str, Path],
    limits: dict[str, int],
    failures: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = spec_of(tiny_models["code"], "transformers", head_rows=160, batch_tokens=1000)
    engine = SmallMemory(spec, **limits)
    check_engine(engine, spec)
    assert engine.failures == failures  # all at first: the size stays
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert re.fullmatch(
        r"m: memory ran out; going on with extract.batch_tokens [\d,]+ and extract.head_rows \d+",
        record.getMessage(),
    )


def test_one_segment_that_does_not_fit_is_one_clear_error(tiny_models: dict[str, Path]) -> None:
    spec = spec_of(tiny_models["code"], "transformers")
    segments = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
    for limits in ({"tokens": 100}, {"rows": 15}):
        with pytest.raises(
            EngineMemoryError,
            match=r"on one segment of 128 tokens in source m: got 16 rows|256 rows",
        ):
            list(SmallMemory(spec, **limits).score(segments))


def test_other_errors_of_a_batch_are_not_tried_again(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tiny_models["code"], "transformers")
    engine = TransformersEngine(spec)

    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(engine, "_states", broken)
    segments = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(engine.score(segments))


def test_what_ran_out_is_halved() -> None:
    pieces = Pieces(4096, 256)
    assert pieces.shrink(False, num_segments=3, longest=100, num_rows=300)
    assert (pieces.batch_tokens, pieces.head_rows) == (150, 256)
    assert pieces.shrink(True, num_segments=1, longest=100, num_rows=99)
    assert (pieces.batch_tokens, pieces.head_rows) == (150, 49)
    assert pieces.shrink(True, num_segments=1, longest=100, num_rows=99)
    assert pieces.shrink(True, num_segments=1, longest=100, num_rows=99)
    assert pieces.head_rows == 16
    assert not pieces.shrink(True, num_segments=1, longest=100, num_rows=99)
    assert not Pieces(1, 256).shrink(False, num_segments=1, longest=100, num_rows=99)


CHILD = """
import resource, sys
from pathlib import Path
import numpy as np
from extract.engines.transformers_engine import TransformersEngine
from store_schema.text.tokenizer import EncodedSegment
from tests.engine_contract import spec_of

spec = spec_of(Path(sys.argv[1]), "transformers", threads=1, batch_tokens=1 << 22)
engine = TransformersEngine(spec)
ids = np.arange(3, 127, dtype=np.uint32)
# Texts with ends of their own: of equal ones only one would be read.
ends = [np.array(divmod(i, 200), np.uint32) + 3 for i in range(int(sys.argv[2]))]
segments = [EncodedSegment((1,), np.append(ids[:-2], end), ids) for end in ends]
list(engine.score(segments[:2]))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[3]) << 20), resource.RLIM_INFINITY))
rows = dict(engine.score(segments))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
assert len(rows) == len(segments)
same = all(np.array_equal(rows[0].ids[:-1], row.ids[:-1]) for row in rows.values())
print(engine._pieces.batch_tokens < 1 << 22, same)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of Linux")
def test_memory_that_really_runs_out(tiny_models: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny_models["code"]), "1024", "100"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["True", "True"]
    assert "memory ran out; going on with" in done.stderr


def test_reduced_pieces_give_the_same_to_rounding(tiny_models: dict[str, Path]) -> None:
    spec = spec_of(tiny_models["code"], "transformers")
    segments = encoded_samples(SegmentTokenizer.load(spec.ref, name="m"))
    whole = dict(TransformersEngine(spec).score(segments))
    halves = dict(SmallMemory(spec, tokens=200, rows=40).score(segments))
    for i, rows in whole.items():
        np.testing.assert_allclose(rows.logprobs, halves[i].logprobs, atol=2e-5)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}'])
def test_an_index_of_weights_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index of weights is unreadable in \S+index.json"):
        memory.weight_bytes(tmp_path, {}, "float32")


def test_a_model_that_has_no_room_is_no_damaged_model(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes")

    spec = spec_of(tiny_models["code"], "transformers")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(EngineMemoryError, match=r"cannot be loaded.*; load a smaller dtype"):
        TransformersEngine(spec)


def test_a_process_that_does_not_see_its_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check_gpus(0)
    check_gpus(1)
    with pytest.raises(ConfigError, match=r"does not see its GPUs.*expected 2, got 1"):
        check_gpus(2)
