"""The image's two recipes agree with each other and with pyproject.toml; jobs name it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from store_schema import __version__
from tests.dependency_table import normal, pins

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINNED = re.compile(r"^[\w./-]+:\d+\.\d+\.\d+-base-ubuntu\d\d\.\d\d$")


def docker_steps() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile, lines joined, without comments."""
    text = (REPOSITORY / "containers/Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return [(word, rest) for line in lines for word, _, rest in [line.partition(" ")]]


def definition() -> tuple[dict[str, str], dict[str, str]]:
    """The header of the Apptainer definition, and its sections without comments."""
    text = (REPOSITORY / "containers/logitfuse.def").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    head, *parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    header = dict(line.split(": ", 1) for line in head.splitlines() if line)
    return header, dict(zip(parts[::2], parts[1::2], strict=True))


def shell_steps() -> tuple[list[str], list[str]]:
    """What each of the two runs: of Docker's RUN lines, of Apptainer's %post."""
    runs = [rest for word, rest in docker_steps() if word == "RUN"]
    docker = [step.strip() for rest in runs for step in rest.split("&&")]
    post = [line.strip() for line in definition()[1]["post"].splitlines() if line.strip()]
    return docker, post


def test_both_are_made_in_the_same_steps() -> None:
    docker, post = shell_steps()
    setup = ["set -eu", "export PATH=/opt/logitfuse/bin:$PATH"]
    assert [step for step in post if step not in setup] == [
        step.replace("$EXTRAS", "{{ EXTRAS }}") for step in docker
    ]
    steps = dict(docker_steps())
    header, sections = definition()
    assert (header["Bootstrap"], header["From"]) == ("docker", steps["FROM"])
    assert sections["arguments"].strip() == steps["ARG"]
    assert steps["ENV"] in sections["environment"]


def test_the_base_is_pinned_and_there_is_one() -> None:
    bases = [rest for word, rest in docker_steps() if word == "FROM"]
    assert len(bases) == 1
    assert PINNED.match(bases[0])
    assert not PINNED.match("nvidia/cuda:latest")


def test_the_extras_and_the_python_are_ours() -> None:
    (extras,) = [rest for word, rest in docker_steps() if word == "ARG"]
    assert set(extras.removeprefix("EXTRAS=").split(",")) <= set(PROJECT["optional-dependencies"])
    docker, _ = shell_steps()
    pythons = set(re.findall(r"python(3\.\d+)", " ".join(docker)))
    (version,) = pythons
    assert version in SpecifierSet(PROJECT["requires-python"])
    page = (REPOSITORY / "docs/containers.md").read_text()
    for named in re.findall(
        r"EXTRAS=([\w,-]+)", page + (REPOSITORY / "containers/Dockerfile").read_text()
    ):
        assert set(named.split(",")) <= set(PROJECT["optional-dependencies"]), named


def test_what_is_copied_is_let_through_and_made() -> None:
    """By .dockerignore, which leaves out all else, and by `make wheel`."""
    copied = next(rest for word, rest in docker_steps() if word == "COPY").split()[:-1]
    ignore = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignore == ["*", *(f"!{name}" for name in copied)]
    files = definition()[1]["files"].split("\n")
    assert [line.split()[0] for line in files if line.strip()] == copied
    assert (REPOSITORY / copied[0]).is_file()
    words = ["make", "-n", "wheel"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--wheel-dir dist ." in done.stdout


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_the_shell_of_a_section_is_shell(section: str) -> None:
    text = definition()[1][section].replace("{{ EXTRAS }}", "train")
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)


def test_the_image_has_the_versions_of_the_tests() -> None:
    """Of what is used directly; and the extras' own bounds hold."""
    extras = {"always", "train", "s3", "ray"}
    tested, here = pins(extras), pins(extras, "containers/constraints.txt")
    assert len(tested) > 25
    assert here == tested
    everything = pins({*extras, "vllm"}, "containers/constraints.txt")
    wanted = [*PROJECT["dependencies"]]
    for extra in ("train", "s3", "ray", "vllm"):
        wanted += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert everything[normal(requirement.name)] in requirement.specifier, requirement
    (python,) = re.findall(r"--python-version (\S+)", (REPOSITORY / "Makefile").read_text())
    assert f"python{python}-venv" in " ".join(shell_steps()[0])


def images(value: object) -> list[str]:
    """Every `image` of a manifest."""
    if isinstance(value, dict):
        own = [value["image"]] if isinstance(value.get("image"), str) else []
        return own + [image for inner in value.values() for image in images(inner)]
    if isinstance(value, list):
        return [image for inner in value for image in images(inner)]
    return []


def test_manifests_and_pages_name_the_image_of_this_version() -> None:
    for name in ("extract-job.yaml", "ray-cluster.yaml"):
        text = (REPOSITORY / "examples/kubernetes" / name).read_text()
        found = images(yaml.safe_load(text))
        assert found
        assert {image.partition("-ray")[0] for image in found} == {f"logitfuse:{__version__}"}
    pages = (
        (REPOSITORY / name).read_text() for name in ("containers/Dockerfile", "docs/containers.md")
    )
    tags = {tag for text in pages for tag in re.findall(r"\blogitfuse:(\d[\w.]*)", text)}
    assert tags == {__version__}


def test_the_ray_cluster_counts_its_gpus_and_starts_at_nothing() -> None:
    spec = yaml.safe_load((REPOSITORY / "examples/kubernetes/ray-cluster.yaml").read_text())["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    names = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
