"""`eval advantage`: who is best by given answers, by own answers, and by both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.plan.plan import Plan
from store_schema.store.reader import StoreReader
from tests import command
from tests.command import ok
from tests.judge_runs import PROMPTS, answered, half_right, judged, judges, make_models, wrong

pytestmark = pytest.mark.usefixtures("quick_processes")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("advantage")
    models = make_models(root / "models")
    names = [name for name in models if name != "target"]
    said = dict(zip(names, (half_right, wrong), strict=True))
    path = answered(root / "run", models, said)
    return path


def call(*words: object) -> str:
    result = command.call("eval", "advantage", *words)
    return (result.stdout if result.exit_code == 0 else result.stderr).strip()


def test_it_says_what_is_missing_and_then_counts(asked: Path) -> None:
    line = call(asked)
    assert line.startswith("error: ")
    ok("extract", "run", asked)
    assert "run `logitfuse judge` first" in call(asked)
    judged(asked, *judges("exact_answer"))
    found = json.loads(call(asked, "--json"))
    run = load_run(asked)
    sources = found["sources"]
    assert found["prompts"] == {"chat": 1, "sums": 5}
    likely = {name: dict.fromkeys(sources, 0) | {"of": 0} for name in found["domains"]}
    plan = Plan.open(open_location(f"{run.folder}/plan"))
    nats: dict[str, list[float]] = {}
    for shard in plan.shards:
        arrays = [
            StoreReader.open(open_location(run.store_url(name))).read(shard.index)
            for name in sources
        ]
        for d, segment in enumerate(plan.segments(shard)):
            if segment.context is not None:
                rows = [slice(*a["token_offsets"][d : d + 2].tolist()) for a in arrays]
                here = [
                    float(-a["label_logprobs"][r].astype(float).sum())
                    for a, r in zip(arrays, rows, strict=True)
                ]
                before = nats.get(segment.document_id, [0.0] * len(sources))
                nats[segment.document_id] = [a + b for a, b in zip(before, here, strict=True)]
    assert set(nats) == set(PROMPTS)
    for prompt, by_source in nats.items():
        domain = "chat" if prompt.startswith("talk") else "sums"
        likely[domain][sources[int(np.argmin(by_source))]] += 1
        likely[domain]["of"] += 1
    for domain, by_mode in found["domains"].items():
        assert by_mode["training"] == likely[domain]
        assert by_mode["inference"]["of"] == sum(by_mode["inference"][name] for name in sources)
        assert by_mode["both"]["of"] == min(m["of"] for m in list(by_mode.values())[:2])
    inference = found["domains"]["sums"]["inference"]
    assert inference == {"of": 2, sources[0]: 2, sources[1]: 0}  # it answers two of them right
    assert found["unknown"] == {"likelihood": 0, "answer": 0, "tie": 4}  # none answers the others
    both = sum(by_mode["both"][name] for by_mode in found["domains"].values() for name in sources)
    assert found["agree"] == pytest.approx(both / 2)
    text = call(asked)
    assert "how often each source is the best" in text
    assert "no judge tells them apart: 4 prompts" in text
    assert f"for {found['agree']:.0%} of the prompts" in text
    assert command.ok("report", asked)
    page = (asked.parent / "run/report/index.html").read_text()
    assert "Whose answer" in page
    assert "sums, inference (2 prompts)" in page
