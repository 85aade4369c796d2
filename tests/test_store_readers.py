"""What programs other than ours read: stores of every preset, and exports, each by its reader alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.environments import UnavailableError, environment
from store_schema.disk.location import open_location
from store_schema.presets import PRESETS
from store_schema.store.reader import StoreReader
from store_schema.store.writer import StoreWriter
from store_tools.export import export_store
from tests import store_factory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DOCS = Path(__file__).resolve().parent.parent / "docs/store.md"
VOCAB = 300
EXPORT = "export --format zarr"

READ = """
import hashlib, json, pathlib, sys, warnings
warnings.simplefilter("ignore")
reader, found = sys.argv[1], {}
if reader == "tensorstore":
    import tensorstore
    def read(path):
        store = {"driver": "file", "path": f"{path}/"}
        return tensorstore.open({"driver": "zarr3", "kvstore": store}).result().read().result()
else:
    import zarr
    if reader == "zarrs":
        import zarrs
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
                         "codec_pipeline.strict": True})
    def read(path):
        return zarr.open_array(path, mode="r")[:]
for folder in sys.argv[2:]:
    for path in sorted(pathlib.Path(folder).glob("*/zarr.json")):
        try:
            array = read(path.parent)
            value = [str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()]
        except Exception as error:
            value = f"{type(error).__name__}: {error}"
        found[str(path.parent)] = value
print(json.dumps(found))
"""
PACKAGES = {"zarr-python": None, "zarrs": "0.2.3", "tensorstore": "0.1.86"}
READS_PCODEC = ("zarr-python", "zarrs")


def python_of(package: str, version: str | None) -> Path:
    """Python that has the package; skips where it cannot be had."""
    if version is None:
        return Path(sys.executable)
    try:
        return environment(package, version, package)
    except UnavailableError as error:
        if os.environ.get("LOGITFUSE_REQUIRE_READERS"):
            raise
        pytest.skip(f"no {package}: {error}")


def run_script(python: Path, script: str, *words: object) -> Any:
    """What a script prints as JSON, without our code in reach."""
    done = subprocess.run(
        [str(python), "-c", script, *map(str, words)],
        capture_output=True, text=True, check=False, cwd="/",
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of arrays: a shard of an aligned store of each preset, and an export of one."""
    root, folders = tmp_path_factory.mktemp("stores"), {}
    for name, encoding in PRESETS.items():
        writer = StoreWriter.open(
            open_location(root / name),
            store_factory.manifest("aligned", vocab_size=VOCAB, top_k=30, encoding=encoding),
            store_factory.vocabulary(),
        )
        arrays = store_factory.arrays("aligned", (900, 0, 30), top_k=30, vocab_size=VOCAB)
        folders[name] = root / name / writer.write(store_factory.shard_record(), arrays).path
    reader = StoreReader.open(open_location(root / "fine"))
    export_store(reader, open_location(root / "out"), "zarr")
    folders[EXPORT] = root / "out/00000.zarr"
    return folders


def digest(array: np.ndarray) -> list[str]:
    return [str(array.dtype), sha256(array.tobytes()).hexdigest()]


@pytest.mark.parametrize("package", PACKAGES)
def test_who_reads_what(package: str, stores: dict[str, Path]) -> None:
    python = python_of(package, PACKAGES[package])
    found = run_script(python, READ, package, *stores.values())
    plain = run_script(Path(sys.executable), READ, "zarr-python", *stores.values())
    exported = StoreReader.open(open_location(stores["fine"].parents[1])).read(0)
    for name, folder in stores.items():
        here = {Path(k).name: v for k, v in found.items() if Path(k).parent == folder}
        assert len(here) > 9
        if name == EXPORT:
            assert here == {key: digest(array) for key, array in exported.items()}
        elif package in READS_PCODEC:
            assert here == {Path(k).name: v for k, v in plain.items() if Path(k).parent == folder}
            assert all(isinstance(value, list) for value in here.values())
        else:
            assert all("pcodec" in str(value) for value in here.values()), here


def test_the_page_says_so() -> None:
    text = DOCS.read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| (zarr-python|zarrs|TensorStore) [^|]*\| (yes|no)\b", text, re.M))
    assert table == {"zarr-python": "yes", "zarrs": "yes", "TensorStore": "no"}
    for package, version in PACKAGES.items():
        assert version is None or version in text, package


DATASETS = """
import json, sys
from datasets import load_dataset
made = load_dataset("parquet", data_files=sys.argv[1] + "/*.parquet", split="train",
                    cache_dir=sys.argv[2])
print(json.dumps([made.num_rows, made.column_names, made[[3, 40, 929]]], default=str))
"""


def test_datasets_reads_the_parquet_export(stores: dict[str, Path], tmp_path: Path) -> None:
    python = python_of("datasets", "5.2.0")
    reader = StoreReader.open(open_location(stores["fine"].parents[1]))
    export_store(reader, open_location(tmp_path / "out"), "parquet")
    rows, names, some = run_script(python, DATASETS, tmp_path / "out", tmp_path / "cache")
    arrays = reader.read(0)
    assert rows == len(arrays["token_ids"]) == 930
    assert {"segment_id", "token_id", "entry_ids", "entry_logprobs", "tail_mass"} <= set(names)
    for at, ids, logprobs in zip(
        (3, 40, 929), some["entry_ids"], some["entry_logprobs"], strict=True
    ):
        part = slice(*arrays["entry_offsets"][at : at + 2])
        assert ids == arrays["entry_ids"][part].tolist()
        np.testing.assert_array_equal(np.float32(logprobs), arrays["entry_logprobs"][part])
