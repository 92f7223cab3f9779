"""Hostile input to every command, from a seed: `python tests/helpers/fuzz.py --inputs 6000` prints the counts.

Each input is a command line with odd values, or a sound one on files of which one is damaged, run in this process. What
must not happen: a traceback or a line about a bug, more than LIMIT seconds or MEMORY bytes, an exit status that the
command does not have, a refusal of no line, of several or of a long one, and a file outside of the output that is made
or changed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as pytest has it

from helpers import fuzz_commands
from helpers.fuzz_commands import COMMANDS, Case, prepare

LIMIT = 60  # seconds
LONGEST = 500  # characters of a line
MEMORY = 3 << 30  # bytes, beyond what this process has
FAULTS = ("traceback", "hang", "memory", "exit status", "message", "touched")


class Hang(BaseException):
    """An input has taken too long."""


@dataclass
class Counts:
    """What came of the inputs."""

    inputs: int = 0
    status: Counter = field(default_factory=Counter)
    faults: list[tuple[str, int, str]] = field(default_factory=list)  # kind, number of the input, what was seen
    slowest: float = 0.0

    def of(self, kind):
        return sum(fault[0] == kind for fault in self.faults)

    def __str__(self):
        statuses = ", ".join(f"{n} ended with {status}" for status, n in sorted(self.status.items(), key=str))
        faults = ", ".join(f"{self.of(kind)} {kind}" for kind in FAULTS)
        return f"{self.inputs} inputs: {statuses}\nfaults: {faults}\nslowest: {self.slowest:.1f} s"


def contents(folder):
    """Every file below a folder, with its content; of links and devices, what they are."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*files, *(name for name in folders if Path(parent, name).is_symlink())):
            path = Path(parent, name)
            plain = path.is_file() and not path.is_symlink()
            found[str(path.relative_to(folder))] = path.read_bytes() if plain else str(path.lstat().st_mode)
    return found


def restore(folder, before, now):
    """Put a folder back."""
    for name in now.keys() - before.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in before.items():
        if now.get(name) != content:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def run_case(case: Case):
    """(exit status or what was raised, standard output, standard error, seconds) of a command."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")

    def too_long(*_):
        raise Hang

    before, started = signal.signal(signal.SIGALRM, too_long), time.monotonic()
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            status = case.run()
    except SystemExit as stopped:
        status = stopped.code
    except BaseException as error:
        status = "hang" if isinstance(error, Hang) else traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    seconds = time.monotonic() - started
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return status, *texts, seconds


@contextlib.contextmanager
def little_memory():
    """Have an allocation of over MEMORY fail at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def faults_of(case, status, out, err):
    """(kind, what was seen) of what must not happen."""
    if status == "hang":
        yield "hang", f"over {LIMIT} s"
    elif isinstance(status, str) or "Traceback (most" in err or "this is a bug" in err:
        yield "traceback", status if isinstance(status, str) else err
    elif status not in case.command.statuses:
        yield "exit status", f"{status}: {err}"
    if "not enough memory" in err:
        yield "memory", err
    lines = err.splitlines()
    if any(len(line) > LONGEST for line in lines):
        yield "message", f"a line of {max(map(len, lines))} characters: {err[:300]}"
    if status and not (lines or out):
        yield "message", f"exit status {status} without a word"
    refusals = [line for line in lines if not line.startswith(case.command.chatter)]
    if status == 2 and len(refusals) != 1 and "prompts cannot be used" not in (lines or [""])[-1]:  # each has its line
        yield "message", err[:600]


def fuzz(inputs, seed=0, commands=tuple(COMMANDS), say=lambda line: None, first=0):
    """Try so many inputs; returns the Counts."""
    counts, here = Counts(), Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        given, place, home = prepare(root)
        for name in ("XDG_CACHE_HOME", "TMPDIR"):
            stack.callback(os.environ.update, {name: os.environ.get(name, "")})
            os.environ[name] = str(home)
        stack.callback(os.chdir, here)
        stack.enter_context(fuzz_commands.without_a_model())
        if set(commands) - set(fuzz_commands.LIGHT):
            fuzz_commands.load_torch()  # which takes seconds, and is no fault of the first input
        stack.enter_context(little_memory())
        sound = contents(given)
        for number in range(first, first + inputs):
            rng = random.Random(f"{seed}:{number}")
            os.chdir(place)
            case = COMMANDS[rng.choice(commands)].case(rng, given)
            before = contents(given)
            status, out, err, seconds = run_case(case)
            os.chdir(here)
            found = list(faults_of(case, status, out, err))
            now = contents(given)
            touched = sorted(name for name in now.keys() | before.keys() if now.get(name) != before.get(name))
            if bad := [name for name in touched if not case.may_touch(name)]:
                found.append(("touched", ", ".join(bad[:5])))
            if others := sorted({path.name for path in root.iterdir()} - {given.name, place.name, home.name}):
                found.append(("touched", ", ".join(others)))
            counts.inputs += 1
            counts.status[status if isinstance(status, int) else "an exception"] += 1
            counts.slowest = max(counts.slowest, seconds)
            for kind, what in found:
                counts.faults.append((kind, number, what))
                say(f"input {number}, {kind}: {case}\n    {what.strip()[-1500:]}")
            restore(given, sound, now)
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            for path in home.iterdir():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="only this one; repeatable")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = fuzz(options.inputs, options.seed, tuple(options.command or COMMANDS), print, options.first)
    print(json.dumps({"inputs": result.inputs, **{k: result.of(k) for k in FAULTS}}) if options.json else result)
    sys.exit(bool(result.faults))
