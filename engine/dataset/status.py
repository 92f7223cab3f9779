"""How far a run is, from what lies in its output: run.json, the shards' records and locks. Works on a run that goes on,
on one that died and on one that is finished, and needs nothing of the processes themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from grounded_diffusion.engine.checks import duration
from grounded_diffusion.engine.dataset.rows import Head
from grounded_diffusion.engine.dataset.runfile import INFER, RUN, SUMMARY, About, kind_of, read_about
from grounded_diffusion.engine.dataset.shards import DamagedShard, absent, finished_shards, read_finished
from grounded_diffusion.engine.dataset.storage.base import FINISH, FINISHED, SHARDS, Storage, read_holder, record_path
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import UsageError
from grounded_diffusion.reading import Misfit, decode

WINDOW = 600.0  # seconds before the last record, over which the rate is taken
FEWEST = 8  # records that the rate is taken over, where there are so many
PIECE = 1 << 16  # bytes of a record that are read at a time
SHOWN = 8  # holders that the text lists


def read_status(out: str | Path) -> dict[str, Any]:
    """What is known of a run, as JSON takes it. Raises UsageError where there is no run.

    Returns:
        `state`: "finished", "running", "stopped" (nobody works on it) or "unfinished" (all shards are there, the lists
        are not). `shards`: total, finished, in_hand, missing (neither of the two), damaged (numbers). `samples`: total,
        accepted, rejected, quarantined, missing. `reasons`: of rejected and quarantined, counted. `rate`: samples a
        second, and `left`: seconds; None where unknown. `holders`: shard (a number, or what else is held), host, pid,
        started and alive of each lock. `next`: what to do.
    """
    storage = open_storage(out)
    if (about := read_about(storage)) is None:
        raise UsageError(f"{out} has no {RUN}; give the --out of a gd-infer command that has begun")
    settings, finished = about.settings, finished_shards(storage)
    sizes, counts, reasons, damaged = count_records(storage, finished)
    holders = read_holders(storage)
    samples = settings.get("samples", sum(sizes.values()))  # a merged data set has no plan
    shards = -(-samples // settings["shard_size"]) if "shard_size" in settings else len(finished)
    in_hand = [holder for holder in holders if holder["alive"] and isinstance(holder["shard"], int)]
    missing = samples - sum(sizes.values())
    if not missing and not lost_files(storage) and (storage.exists(SUMMARY) or about.made_by != INFER):
        state = "finished"
    elif any(holder["alive"] for holder in holders):
        state = "running"
    else:
        state = "stopped" if missing else "unfinished"
    rate = record_rate(storage, sizes)
    working = {holder["shard"] for holder in in_hand} - sizes.keys()
    return {
        "output": storage.root,
        "format": about.format,
        "state": state,
        "shards": {"total": shards, "finished": len(sizes), "in_hand": len(working),
                   "missing": max(0, shards - len(sizes) - len(working)), "damaged": damaged},
        "samples": {"total": samples, **counts, "missing": missing},
        "reasons": reasons,
        "rate": rate,
        "left": missing / rate if rate and state == "running" else None,
        "holders": holders,
        "next": next_step(storage.root, state, about, damaged),
    }  # fmt: skip


def count_records(storage: Storage, shards: list[int]) -> tuple[dict[int, int], Counter, dict[str, dict], list[int]]:
    """Samples by shard; accepted, rejected and quarantined of all; the reasons; shards whose record is damaged."""
    sizes, counts, damaged = {}, Counter(accepted=0, rejected=0, quarantined=0), []
    reasons = {"rejected": Counter(), "quarantined": Counter()}
    for shard in shards:
        try:
            head = read_head(storage, record_path(shard))
        except FileNotFoundError:  # being made again
            continue
        except Misfit:
            damaged.append(shard)
            continue
        lost = {kind: [kind_of(entry.reason, kind) for entry in getattr(head, kind)] for kind in reasons}
        sizes[shard] = head.samples
        counts["accepted"] += head.accepted
        for kind, some in lost.items():
            counts[kind] += len(some)
            reasons[kind].update(some)
    return sizes, counts, {kind: dict(some.most_common()) for kind, some in reasons.items()}, damaged


def read_head(storage: Storage, path: str) -> Head:
    """A record without its files and rows. Raises Misfit, FileNotFoundError."""
    content = b""
    for piece in pieces(storage, path):
        content += piece
        # Not within a text: there the quotation marks would be escaped.
        head, found, _ = content.partition(b', "files": ')
        if found:
            return decode(head + b"}", Head)
    return decode(content, Head)


def pieces(storage: Storage, path: str) -> Iterator[bytes]:
    """A file from its beginning, no further than needed."""
    with storage.open(path) as stream:
        while piece := stream.read(PIECE):
            yield piece


def local(storage: Storage, path: str) -> Path | None:
    """A file of a local output."""
    folder = getattr(storage, "folder", None)
    return folder / path if folder else None


def read_holders(storage: Storage) -> list[dict[str, Any]]:
    """Who holds what. `alive` is what the lock itself says, so it holds for other machines as well."""
    alive, holders = storage.claims(), []
    for name in storage.list(SHARDS):
        stem, _, suffix = name.partition(".")
        if suffix != "lock":
            continue
        try:
            holder = alive.get(stem) or read_holder(storage.read(f"{SHARDS}/{name}"))
        except FileNotFoundError:  # it was let go just now
            continue
        except Misfit:
            holder = {}
        if stem.isdecimal() or stem.isalpha():
            known = {key: holder.get(key) for key in ("host", "pid", "started")}
            holders.append({"shard": int(stem) if stem.isdecimal() else stem, **known, "alive": stem in alive})
    return holders


def record_rate(storage: Storage, sizes: dict[int, int]) -> float | None:
    """Samples a second, from the times at which the last records were written; None where they do not tell."""
    if local(storage, RUN) is None:
        return None
    files = [(local(storage, record_path(shard)), n) for shard, n in sizes.items()]
    times = sorted(((file.stat().st_mtime, n) for file, n in files if file), reverse=True)
    recent = [(time, n) for k, (time, n) in enumerate(times) if k < FEWEST or times[0][0] - time <= WINDOW]
    seconds = recent[0][0] - recent[-1][0] if recent else 0
    return sum(n for _, n in recent[:-1]) / seconds if seconds > 0 else None


def lost_files(storage: Storage) -> list[str]:
    """Lists, tables and records that were there when the data set was finished, and are gone."""
    try:
        return absent(storage, read_finished(storage)["files"])
    except FileNotFoundError:
        return []
    except DamagedShard:
        return [FINISHED]


def next_step(out: str, state: str, about: About, damaged: list[int]) -> str:
    """What to do, in a line."""
    if about.made_by != INFER and (damaged or state != "finished"):
        return f"give the same {about.made_by} command again, with --overwrite"
    if damaged:
        return "give the same gd-infer command again: it makes the shards whose records are damaged anew"
    if state == "running":
        return "wait; the same gd-infer command, given elsewhere, helps"
    if state == "stopped":
        return "give the same gd-infer command again: it finishes what is missing"
    if state == "unfinished":
        return "give the same gd-infer command again: it writes the lists"
    look = f", then open {out}/index.html" if about.format == "folder" else ""
    return f"gd-dataset verify {out}{look}"


def describe_status(status: dict[str, Any]) -> str:
    """The status as text."""
    shards, samples = status["shards"], status["samples"]
    kinds = ", ".join(f"{samples[kind]:,} {kind}" for kind in ("accepted", "rejected", "quarantined"))
    made = samples["total"] - samples["missing"]
    lines = [
        ("shards", f"{shards['finished']:,} of {shards['total']:,} finished, {shards['in_hand']} in hand, "
                   f"{shards['missing']:,} missing"),
        ("samples", f"{made:,} of {samples['total']:,}: {kinds}"),
    ]  # fmt: skip
    for kind, reasons in status["reasons"].items():
        if reasons:
            lines.append((kind, ", ".join(f"{reason} {n:,}" for reason, n in reasons.items())))
    if status["rate"] and status["state"] != "finished":
        left = f", {duration(status['left'])} left" if status["left"] is not None else " before it stopped"
        lines.append(("rate", f"{status['rate']:.2f} images/s{left}"))
    if shards["damaged"]:
        lines.append(
            ("damaged", f"{len(shards['damaged'])} records: shard {', '.join(map(str, shards['damaged'][:8]))}")
        )
    lines += [("held", describe_holder(holder)) for holder in islice(status["holders"], SHOWN)]
    if (more := len(status["holders"]) - SHOWN) > 0:
        lines.append(("", f"and {more} more"))
    lines.append(("next", status["next"]))
    return "\n".join([f"{status['output']}: {status['state']}", *(f"  {name:<12}{text}" for name, text in lines)])


def describe_holder(holder: dict[str, Any]) -> str:
    """Who holds a lock, in a line."""
    names = {FINISH: "the lists"}
    what = (
        f"shard {holder['shard']}" if isinstance(holder["shard"], int) else names.get(holder["shard"], holder["shard"])
    )
    who = f"process {holder['pid']} on {holder['host']}"
    try:
        for_ = duration((datetime.now(UTC) - datetime.fromisoformat(holder["started"])).total_seconds())
    except (TypeError, ValueError):
        for_ = "an unknown time"
    return f"{what} by {who} for {for_}" if holder["alive"] else f"{what} was held by {who}, which is gone"
