"""`logitfuse store ...`: verify, repair, gc, stats, show, copy, export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from launch.command import StageGroup, echo_json, echo_pages, json_option, set_up_logging
from launch.pages.page import write_page
from launch.signals import stop_on_signals
from launch.work import parse_shards, shards_in
from store_schema.errors import ConfigError, LogitfuseError
from store_schema.layout import KINDS, Kind
from store_tools.copy import copy_command
from store_tools.export import export_command
from store_tools.leftovers import Collected, Leftover, collect, parse_age
from store_tools.places import StorePlace, find_places, one_place
from store_tools.repair import RepairReport, repair_store
from store_tools.show import list_segments, read_segment
from store_tools.show_page import page
from store_tools.show_text import (
    heading,
    list_text,
    listed_object,
    segment_text,
    shown_object,
)
from store_tools.stats import store_stats
from store_tools.stats_text import stats_text
from store_tools.verify import StoreReport, verify_store

MEGABYTE = 1e6
OF_SOURCE = "Only stores of this source (may be repeated). Default: all."
PLAN = "Folder or URL of the plan. Default: the run's, or ../../plan of a store's folder."


@click.group(cls=StageGroup)
def store() -> None:
    """Verify, repair, inspect, copy and export stores.

    TARGET is a store's folder or URL, or a run file for all stores of the run.
    """


store.add_command(copy_command)
store.add_command(export_command)


def store_options(function: Callable[..., None]) -> Callable[..., None]:
    """Decorator: add TARGET, --source, --kind and --plan; the command gets `places`."""

    @click.argument("target", type=click.Path())
    @click.option("--source", "sources", multiple=True, metavar="NAME", help=OF_SOURCE)
    @click.option(
        "--kind", type=click.Choice(KINDS), help="Only stores of this kind. Default: all."
    )
    @click.option("--plan", metavar="PATH", help=PLAN)
    def command(
        target: str, sources: tuple[str, ...], kind: Kind | None, plan: str | None, **options: Any
    ) -> None:
        set_up_logging()
        function(places=find_places(target, sources=sources, kind=kind, plan=plan), **options)

    command.__name__ = function.__name__
    command.__doc__ = function.__doc__
    command.__click_params__ = [  # type: ignore[attr-defined]
        *getattr(function, "__click_params__", []),
        *getattr(command, "__click_params__", []),
    ]
    return command


JOBS = click.option(
    "--jobs",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Shards processed at a time. Default: one per processor.",
)


# ------------------------------------------------------------------------------- verify


@store.command("verify")
@JOBS
@click.option(
    "--allow-missing",
    is_flag=True,
    help="Missing shards are no error, for a store that is still being written; damage still is.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="Check commits against the plan, and that their files are there in the right size; read no "
    "data.",
)
@json_option
@store_options
def verify_command(
    places: list[StorePlace], jobs: int | None, allow_missing: bool, quick: bool, as_json: bool
) -> None:
    """Check every byte: checksums, the layout's invariants, segments equal to the plan.

    Exit code 2 if anything is damaged or missing.
    """
    sound, contents = True, []
    with stop_on_signals() as stop:
        for place in places:
            report = verify_store(place, jobs=jobs, stop=stop, quick=quick)
            contents.append(_verified(report))
            if not as_json:
                click.echo(verify_lines(report))
            sound &= report.is_whole and (allow_missing or not report.missing)
    if as_json:
        echo_json({"sound": sound, "stores": contents})
    if not sound:
        raise click.exceptions.Exit(LogitfuseError.exit_code)


def _verified(report: StoreReport) -> dict[str, Any]:
    """The result for one store, for JSON."""
    return {
        "store": report.name,
        "sound": report.sound,
        "damaged": {shard: fault.line() for shard, fault in sorted(report.damaged.items())},
        "missing": report.missing,
        "faults": [fault.line() for fault in report.broken],
        "compared": report.compared,
        "quick": report.quick,
        "leftovers": [asdict(item) for item in report.leftovers],
    }


def verify_lines(report: StoreReport) -> str:
    """The result for one store: one line for each fault, the counts last."""
    lines = [fault.line() for fault in report.broken]
    lines += [report.damaged[shard].line() for shard in sorted(report.damaged)]
    if report.missing:
        lines.append(f"missing shards: {ranges(report.missing)}")
    if report.reader is not None and not report.compared:
        lines.append("segments not compared with a plan (give --plan, or the run file)")
    if report.leftovers:
        lines.append(f"{leftover_counts(report.leftovers)}; `logitfuse store gc` removes them")
    counts = [f"{len(report.sound)} shards sound", f"{len(report.damaged)} damaged"]
    unknown = "how many are missing is not known"
    counts.append(unknown if report.missing is None else f"{len(report.missing)} missing")
    if report.quick:
        counts.append("data not read (--quick)")
    if report.broken:
        counts.append("and the store as a whole has faults")
    return "\n".join([*lines, f"{report.name}: {', '.join(counts)}"])


def ranges(shards: list[int]) -> str:
    """Shards as ranges, such as "0-3, 7"; at most 20 ranges."""
    parts: list[list[int]] = []
    for shard in shards:
        if parts and parts[-1][1] == shard - 1:
            parts[-1][1] = shard
        else:
            parts.append([shard, shard])
    shown = [f"{first}" if first == last else f"{first}-{last}" for first, last in parts]
    return ", ".join(shown[:20]) + (" ..." if len(shown) > 20 else "")


def leftover_counts(leftovers: list[Leftover] | tuple[Leftover, ...]) -> str:
    """Number of leftovers of each kind, and their size."""
    attempts = sum(item.shard is not None for item in leftovers)
    size = sum(item.size for item in leftovers) / MEGABYTE
    parts = []
    if attempts:
        parts.append(f"{attempts} folder(s) of unfinished attempts")
    if len(leftovers) > attempts:
        parts.append(f"{len(leftovers) - attempts} temporary file(s)")
    return f"{' and '.join(parts) or 'no leftovers'}, {size:,.1f} MB"


# ------------------------------------------------------------------------------- repair


@store.command("repair")
@click.option(
    "--shard",
    "shards",
    type=int,
    multiple=True,
    metavar="N",
    help="Uncommit shard N without verifying it (may be repeated; one store). Default: verify all "
    "shards, and uncommit those that are damaged.",
)
@click.option(
    "--delete",
    is_flag=True,
    help="Remove the data of uncommitted shards now. Default: `store gc` does later.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@JOBS
@json_option
@store_options
def repair_command(
    places: list[StorePlace],
    shards: tuple[int, ...],
    delete: bool,
    dry_run: bool,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Remove the commits of damaged shards, so that a rerun of the stage writes them again.

    Exit code 2 if a fault is of the whole store, which no rerun repairs.
    """
    if shards:
        places = [one_place(places)]
    sound, contents = True, []
    with stop_on_signals() as stop:
        for place in places:
            report = repair_store(
                place, shards=shards, delete=delete, dry_run=dry_run, jobs=jobs, stop=stop
            )
            contents.append(_repaired(report))
            if not as_json:
                click.echo(repair_lines(report, dry_run=dry_run))
            sound &= not report.broken
    if as_json:
        echo_json({"dry_run": dry_run, "stores": contents})
    if not sound:
        raise click.exceptions.Exit(LogitfuseError.exit_code)


def _repaired(report: RepairReport) -> dict[str, Any]:
    """What was done to one store, for JSON; None as the fault of a shard that --shard named."""
    faults = report.uncommitted.items()
    return {
        "store": report.name,
        "uncommitted": {shard: None if fault is None else fault.line() for shard, fault in faults},
        "rewritten": report.rewritten,
        "faults": [fault.line() for fault in report.broken],
        "rerun": report.rerun or None,
    }


def repair_lines(report: RepairReport, *, dry_run: bool) -> str:
    """What was done to one store, and the command to run next."""
    lines = [f"not repaired: {fault.line()}" for fault in report.broken]
    done = "would be uncommitted" if dry_run else "uncommitted"
    for shard, fault in report.uncommitted.items():
        why = "named by --shard" if fault is None else f"{fault.what} in {fault.where}"
        lines.append(f"shard {shard} {done}: {why}")
    if report.rewritten:
        lines.append(f"written again meanwhile, left alone: {ranges(report.rewritten)}")
    lines.append(f"{report.name}: {len(report.uncommitted)} shard(s) {done}")
    if report.uncommitted and not dry_run:
        lines.append(f"to write them again: {report.rerun}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- gc


@store.command("gc")
@click.option(
    "--older-than",
    default="24h",
    show_default=True,
    metavar="AGE",
    help="Keep what was written to within this time (30m, 24h, 2d); 0 only if no worker is running.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@json_option
@store_options
def gc_command(places: list[StorePlace], older_than: str, dry_run: bool, as_json: bool) -> None:
    """Remove data that no commit names, and temporary files that a kill left."""
    age_s, contents = parse_age(older_than), []
    for place in places:
        collected = collect(place, older_than_s=age_s, dry_run=dry_run)
        contents.append({"store": place.name} | asdict(collected))
        if not as_json:
            click.echo(gc_lines(place.name, collected, older_than, dry_run=dry_run))
    if as_json:
        echo_json({"dry_run": dry_run, "stores": contents})


def gc_lines(name: str, collected: Collected, older_than: str, *, dry_run: bool) -> str:
    """What was removed from one store."""
    lines = [f"{item.key}  {item.size / MEGABYTE:,.1f} MB" for item in collected.removed]
    done = "would be removed" if dry_run else "removed"
    lines.append(f"{name}: {leftover_counts(collected.removed)} {done}")
    if collected.kept:
        kept = leftover_counts(collected.kept)
        lines.append(f"{name}: {kept} left alone, written to within {older_than}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------- stats


@store.command("stats")
@click.option(
    "--shards",
    metavar="LIST",
    help="Read only these shards, such as 0-3 or 0,4-7. Default: 16, spread evenly.",
)
@json_option
@JOBS
@store_options
def stats_command(
    places: list[StorePlace], shards: str | None, as_json: bool, jobs: int | None
) -> None:
    """Show stored bytes by array, and figures of the distributions.

    Bytes are those of all shards; the other figures are of the shards that are read.
    """
    wanted = None if shards is None else shards_in(parse_shards(shards))
    with stop_on_signals() as stop:
        stats = [store_stats(place, shards=wanted, jobs=jobs, stop=stop) for place in places]
    if as_json:
        echo_json({"stores": stats})
    else:
        click.echo("\n\n".join(map(stats_text, stats)))


# ------------------------------------------------------------------------------- show


@store.command("show")
@click.option("--segment", metavar="ID", help="Segment id, or its row in the plan.")
@click.option(
    "--answer",
    type=click.IntRange(0),
    metavar="N",
    help="In a generated store: answer N (from 0) to the segment's prompt. Default: 0.",
)
@click.option(
    "--top",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    metavar="N",
    help="Most probable tokens shown at each position.",
)
@click.option("--html", metavar="PATH", help="Write an HTML page to this file instead of text.")
@json_option
@store_options
def show_command(
    places: list[StorePlace],
    segment: str | None,
    answer: int | None,
    top: int,
    html: str | None,
    as_json: bool,
) -> None:
    """Show a segment, or an answer to its prompt, token by token with the most probable tokens.

    Without --segment, lists the first segments or answers. Page by page on a terminal.
    """
    columns = shutil.get_terminal_size((120, 24)).columns
    place = one_place(places)
    if html is not None and (segment is None or not html.rpartition("/")[2]):
        raise ConfigError(
            "a page needs a segment and a file's name",
            where="--html",
            expected="--segment ID --html page.html",
            got=f"--html {html!r}",
        )
    if segment is None:
        listed = list_segments(place)
        if as_json:
            echo_json({"store": place.name, "segments": [listed_object(item) for item in listed]})
        else:
            click.echo(list_text(listed, columns))
        return
    shown = read_segment(place, segment, top=top, answer=answer)
    if html is not None:
        write_page(html, page(shown))
    if as_json:
        echo_json(shown_object(shown) | ({} if html is None else {"page": html}))
    elif html is None:
        echo_pages(segment_text(shown, columns))
    else:
        click.echo(f"{heading(shown)}\nwritten to {html}")
