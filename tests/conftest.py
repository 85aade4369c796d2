"""Shared fixtures. Everything is seeded and offline."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.tiny import SAMPLE_TEXTS, tiny_model, tiny_tokenizer

RAM_DISK = Path("/dev/shm")
RAM_DISK_BYTES = 6 << 30
"""Free bytes from which on temporary files go there: removing them from a disk took half the time."""


def _take_ram_disk() -> None:
    """Temporary files of the tests and their processes go to memory, where there is room for them."""
    if "TMPDIR" in os.environ or not os.access(RAM_DISK, os.W_OK):
        return
    no_programs = os.statvfs(RAM_DISK).f_flag & os.ST_NOEXEC  # tests write scripts and run them
    if not no_programs and shutil.disk_usage(RAM_DISK).free >= RAM_DISK_BYTES:
        os.environ["TMPDIR"] = str(RAM_DISK)
        tempfile.tempdir = None  # what it has found before


_take_ram_disk()

settings.register_profile(
    "house", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("house")


def pytest_collection_finish() -> None:
    """What libraries have made by now stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


LONGEST = (
    *("test_published_families.py", "test_slurm_cluster.py", "test_extract_generate_vllm.py"),
    *("test_extract_vllm_engine.py", "test_fuse_train_processes.py", "test_launch_ray.py"),
    *("test_docs_blocks.py", "test_extract_run.py", "test_end_to_end.py", "test_fuse_train_run.py"),
)
"""Files that take minutes: begun first, so that two test processes end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; the order within a file stays."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_unconfigure() -> None:
    """Libraries complain at the end of what is not collected."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every test has an empty cache: it finds by itself what others have found before."""
    folder = tmp_path_factory.getbasetemp() / "caches" / str(next(_numbers))
    monkeypatch.setenv("LOGITFUSE_CACHE", str(folder))


@pytest.fixture(autouse=True)
def _log_levels_stay() -> Iterator[None]:
    """Commands run in this process may silence libraries: not for the tests behind them."""
    loggers = [logging.getLogger(name) for name in ("", "transformers", "vllm", "httpx")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def sample_texts() -> dict[str, list[str]]:
    """Real and odd text by domain."""
    return SAMPLE_TEXTS


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three sources and a target, each with an architecture and a tokenizer of its own."""
    root = tmp_path_factory.mktemp("models")
    return {
        "code": tiny_model(root / "code", "llama", tiny_tokenizer("byte_level", bos=True)),
        "prose": tiny_model(
            root / "prose", "gpt_neox", tiny_tokenizer("byte_level", vocab_size=330), seed=1
        ),
        "facts": tiny_model(
            root / "facts", "mistral", tiny_tokenizer("unigram", vocab_size=420, bos=True), seed=2
        ),
        "target": tiny_model(
            root / "target",
            "llama",
            tiny_tokenizer("metaspace_bpe", vocab_size=500, bos=True),
            seed=3,
        ),
    }


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources and a target with chat templates."""
    from tests.generate_runs import make_chat_models

    return make_chat_models(tmp_path_factory.mktemp("chat_models"))


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A program in place of Python that starts with its libraries loaded."""
    from tests import forked_python

    with forked_python.forked_python(tmp_path_factory.mktemp("forked")) as program:
        yield program


@pytest.fixture(scope="module")
def quick_processes(forked_python: Path) -> Iterator[None]:
    """Processes that this one starts are forks of one that has the libraries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(forked_python))
        yield


@pytest.fixture(scope="module")
def quick_vllm_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As `quick_processes`, with vLLM among the libraries."""
    pytest.importorskip("vllm")
    from tests.forked_python import LIBRARIES, VLLM_LIBRARIES

    with _forks(tmp_path_factory.mktemp("forked"), (*LIBRARIES, *VLLM_LIBRARIES)):
        yield


@pytest.fixture(scope="module")
def quick_bare_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As `quick_processes`, without a module of ours: what is on the path enters our registries."""
    from tests.forked_python import THEIRS

    with _forks(tmp_path_factory.mktemp("forked"), THEIRS):
        yield


@contextmanager
def _forks(folder: Path, libraries: tuple[str, ...]) -> Iterator[None]:
    from tests.forked_python import forked_python

    with forked_python(folder, libraries) as program, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(program))
        yield


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are as wide as without a terminal, also in test processes that are told one's width."""
    monkeypatch.delenv("COLUMNS", raising=False)
