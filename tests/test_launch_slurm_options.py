"""Options of sbatch: from the command line and the run file, merged, refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from launch.config import LaunchSection
from launch.slurm.options import gpus_of, options_of, parse_options
from launch.slurm.processes import training_processes
from launch.stages import parse_workers
from store_schema.config import load_run
from store_schema.errors import ConfigError
from tests import planned_store


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (
            ["partition=gpu,gpus=1,time=4:00:00"],
            {"partition": "gpu", "gpus": "1", "time": "4:00:00"},
        ),
        (["nodelist=n1,n2,gpus=2"], {"nodelist": "n1,n2", "gpus": "2"}),
        (["export=ALL,HOME"], {"export": "ALL,HOME"}),
        (["exclusive", "gpus=1"], {"exclusive": True, "gpus": "1"}),
        (["exclusive,gpus=1"], {"exclusive": True, "gpus": "1"}),
        (["gpus=1", "gpus="], {"gpus": None}),
        (["constraint=a&b|[c*2]"], {"constraint": "a&b|[c*2]"}),
    ],
)
def test_options_of_the_command_line(texts: list[str], expected: Mapping[str, object]) -> None:
    assert parse_options(texts) == {"all": expected}
    assert parse_options([f"align:{text}" for text in texts]) == {"align": expected}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a long option"),
        ("Gpus=1", "not a long option"),
        ("-p=gpu", "not a long option"),
        ("gpu s=1", "not a long option"),
        ("align:", "not a long option"),
        ("other:gpus=1", "not a long option"),
        ("comment=a\nb", "character that a script cannot contain"),
        ("comment=a b", "character that a script cannot contain"),
        ("comment='a'", "character that a script cannot contain"),
        ("comment=a#b", "character that a script cannot contain"),
        ("comment=$(reboot)", "character that a script cannot contain"),
        ("array=0-3", "set by submit"),
        ("dependency=afterok:1", "set by submit"),
        ("output=x", "set by submit"),
        ("no-requeue", "set by submit"),
        ("nodes=2", "can only be 1"),
        ("ntasks=4", "can only be 1"),
        ("extract:nodes=2", "can only be 1: a worker is one process"),
        ("train:ntasks=2", "can only be 1: one torchrun on each node"),
        ("train:ntasks-per-node=4", "can only be 1: one torchrun on each node"),
        ("train:nodes=2-4", "nodes can only be one number"),
        ("train:nodes=0", "nodes can only be one number"),
        ("train:nodes", "nodes needs a value"),
        ("signal=USR1@60", "B:USR1@SECONDS"),
        ("signal=B:TERM@60", "B:USR1@SECONDS"),
    ],
)
def test_options_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_options([text])
    assert "\n" not in caught.value.line()


def test_options_that_say_what_is_so_are_allowed() -> None:
    assert parse_options(["nodes=1,ntasks=1,signal=B:USR1@600"])


def test_the_command_line_stands_over_the_file_and_a_stage_over_all() -> None:
    file = {"all": {"partition": "p", "gpus": 4, "exclusive": True}, "align": {"gpus": 0}}
    assert options_of("extract", file, {}) == {
        "signal": "B:USR1@120",
        "partition": "p",
        "gpus": "4",
        "exclusive": "",
    }
    assert options_of("align", file, {})["gpus"] == "0"
    given_line = parse_options(["gpus=2", "train:gpus=8", "align:partition=", "signal="])
    assert options_of("extract", file, given_line)["gpus"] == "2"
    assert options_of("train", file, given_line)["gpus"] == "8"
    assert options_of("align", file, given_line) == {"gpus": "2", "exclusive": ""}


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ({}, 0),
        ({"gpus": "2"}, 2),
        ({"gpus": "a100:4"}, 4),
        ({"gpus-per-node": "h100:8"}, 8),
        ({"gpus-per-task": "2"}, 2),
        ({"gres": "gpu:2"}, 2),
        ({"gres": "lscratch:10,gpu:a100:3"}, 3),
        ({"gres": "gpu"}, 1),
        ({"gres": "gpu:a100"}, 1),
        ({"gres": "gpu:a100:2,lscratch:10,gpu:v100:1"}, 3),
        ({"gpus-per-node": "a100:2,v100:2"}, 4),
        ({"gres": "lscratch:10"}, 0),
    ],
)
def test_gpus_of_a_job(options: Mapping[str, str], gpus: int) -> None:
    assert gpus_of(options) == gpus


@pytest.mark.parametrize(
    ("options", "per_node", "nodes", "count"),
    [
        ({}, None, 1, 1),
        ({"gpus": "1"}, None, 1, 1),
        ({"gpus": "a100:4"}, None, 1, 4),
        ({"nodes": "1", "gpus": "2"}, 2, 1, 2),
        ({"nodes": "2", "gpus-per-node": "4"}, None, 2, 8),
        ({"nodes": "2", "gres": "gpu:4", "gpus-per-node": "4"}, None, 2, 8),
        ({"nodes": "2"}, 3, 2, 6),
        ({"nodes": "2", "gpus-per-node": "0"}, 3, 2, 6),
    ],
)
def test_processes_of_a_training(
    options: Mapping[str, str], per_node: int | None, nodes: int, count: int
) -> None:
    processes = training_processes(options, per_node)
    assert (processes.nodes, processes.count) == (nodes, count)


@pytest.mark.parametrize(
    ("options", "per_node", "words"),
    [
        ({"nodes": "2", "gpus": "8"}, None, ("gpus=8 with nodes=2", "gpus-per-node=N")),
        ({"gpus": "4", "gpus-per-node": "2"}, None, ("gpus=4, gpus-per-node=2", "gpus=")),
        ({"nodes": "2", "ntasks": "1"}, None, ("ntasks=1 with nodes=2", "ntasks=")),
        ({"gpus": "4"}, 2, ("processes_per_node.train 2 with 4 GPUs",)),
    ],
)
def test_options_of_a_training_that_conflict(
    options: Mapping[str, str], per_node: int | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match="options of the training job conflict") as caught:
        training_processes(options, per_node)
    assert all(word in caught.value.line() for word in words)


def test_worker_counts() -> None:
    assert parse_workers([]) == {}
    assert parse_workers(["16"]) == {"extract": 16, "align": 16}
    assert parse_workers(["align:4", "16"]) == {"extract": 16, "align": 4}
    for bad in ("0", "-1", "x", "", "train:2", "align:", "1.5"):
        with pytest.raises(ConfigError, match="--workers"):
            parse_workers([bad])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"slurm": {"all": {"time": 14400}}}, "time needs quotes"),
        ({"slurm": {"all": {"array": "0-3"}}}, "set by submit"),
        ({"slurm": {"all": {"comment": "a b"}}}, "character that a script cannot contain"),
        ({"slurm": {"eval": {"gpus": 1}}}, "slurm.eval"),
        ({"slurm": {"all": {"gpus": 1.5}}}, "gpus"),
        ({"workers": {"extract": 0}}, "greater than or equal to 1"),
        ({"workers": {"train": 2}}, "workers.train"),
        ({"processes_per_node": {"extract": 2}}, "processes_per_node.extract"),
        ({"processes_per_node": {"train": 0}}, "greater than or equal to 1"),
        ({"slurm": {"all": {"nodes": 2}}}, "train:nodes=N"),
        ({"slurm": {"train": {"nodes": "2-3"}}}, "nodes can only be one number"),
        ({"slurm": {"train": {"nodes": True}}}, "nodes needs a value"),
        ({"python": []}, "at least 1"),
        ({"max_requeues": -1}, "greater than or equal to 0"),
        ({"partition": "gpu"}, "unknown key"),
    ],
)
def test_run_files_that_are_refused(tmp_path: Path, section: object, message: str) -> None:
    path = planned_store.make_run(tmp_path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"launch": section}))
    with pytest.raises(ConfigError, match=message):
        load_run(path)


def test_an_unquoted_time_of_the_run_file_is_refused(tmp_path: Path) -> None:
    path = planned_store.make_run(tmp_path)
    path.write_text(path.read_text() + "launch: {slurm: {all: {time: 4:00:00}}}\n")
    with pytest.raises(ConfigError, match="YAML reads 4:00:00 as 14400"):
        load_run(path)


def test_nothing_of_the_section_shapes_a_store() -> None:
    assert LaunchSection().content() == {}
