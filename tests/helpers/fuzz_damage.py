"""Odd values for a command line, and damages to files. See fuzz.py."""

import json

ODD = (
    "", " ", "~", "~/x", "s3:/b", "zzz://x", "file:///proc/nowhere", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e400",
    "0x10", "9" * 40, "9" * 5000, "a" * 300, "a" * 5000, "a\0b", "\udcff", "\ud800", "\u00e9", "e\u0301",
    "漢" * 90, "\U0001f984" * 50,
    "x\ny", "\x1b[31m", "--", "-", "%s%n{}", "deep/../x", "/", ".", "..", "/proc", "/proc/self/mem", "/proc/1/environ",
    "/dev/full", "/dev/zero", "/dev/urandom", "/dev/stdin", "/proc/nowhere/at/all", "[dog]", "a [", "a ] b", "[", "{",
    '{"prompt": 3}', '{"prompt": "a [b]", "prompt": "c"}', "voc", "coco", "cuda", "0.5", "1,2", "16x16", "99999x99999",
    "auto", "3/2", "true", "None",
)  # fmt: skip
VALUES = (None, True, -1, 0, 7, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**30, 2**63, "", "x", "é", "a" * 3000,
          "../../x", "/etc/passwd", "a\0b", [], [[]], [1, "a"], {}, {"": None})  # fmt: skip
PIECES = (b"\0", b"\xff\xfe", b"{", b"}", b"]", b"\n\n", b'"', b"nan", b"\r", b"," * 50, b"[" * 20_000, b"9" * 6000,
          b"[dog]", b"\xf0\x9f", b"x" * 200_000, b"=", b"#", b"\xef\xbb\xbf", b"{}", b"e\xcc\x81")  # fmt: skip


def odd_value(rng, given):
    """A word that nobody means."""
    files = sorted(path.name for path in given.iterdir())
    if rng.random() < 0.2:
        return str(given / rng.choice(files))
    if rng.random() < 0.05:
        return "".join(
            chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0x3000)))) for _ in range(rng.randrange(30))
        )
    return rng.choice(ODD)


def damage(rng, given, names):
    """Damage one file; returns what was done."""
    place = given / rng.choice(names)
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    texts = [path for path in files if path.suffix in (".json", ".jsonl", ".toml", ".txt")]
    file = rng.choice(texts if texts and rng.random() < 0.85 else files)
    how = rng.choice((change_value, change_value, change_value, splice, splice, cut, flip, replace))
    return f"{how(rng, file)} of {file.relative_to(given)}"


def change_value(rng, file):
    """A JSON value of another kind, one that is gone, or one that is there twice."""
    lines = file.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines)) if file.suffix in (".jsonl", ".txt") and lines else None
    text = b"".join(lines) if at is None else lines[at]
    try:
        content = json.loads(text)
    except ValueError:
        return splice(rng, file)
    places = list(walk(content))
    if not places:
        return splice(rng, file)
    holder, key = rng.choice(places)
    what = rng.random()
    told = f"{key!r}"[:40]
    if what < 0.2:
        del holder[key]
        told += " gone"
    else:
        holder[key] = rng.choice(VALUES)
        told += f" = {holder[key]!r}"[:40]
    new = json.dumps(content, ensure_ascii=rng.random() < 0.5, indent=1 if at is None else None).encode()
    if what > 0.9:
        new = new.replace(b"{", b'{"id": 1, "id": 1, "index": 0, "prompt": "a [b]", ', 1)
    file.write_bytes(new if at is None else b"".join([*lines[:at], new + b"\n", *lines[at + 1 :]]))
    return told


def walk(content):
    """(holder, key) of everything in a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from walk(value)


def splice(rng, file):
    content = file.read_bytes()
    at, piece = rng.randrange(len(content) + 1), rng.choice(PIECES)
    file.write_bytes(content[:at] + piece + content[at + rng.choice((0, 0, 1, 20)) :])
    return f"{piece[:10]!r} at {at}"


def cut(rng, file):
    content = file.read_bytes()
    at = rng.randrange(len(content) + 1)
    file.write_bytes(content[:at])
    return f"the first {at} bytes"


def flip(rng, file):
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 3, 20)) if content else 0):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return "flipped bits"


def replace(rng, file):
    """Something else in the place of the file."""
    file.unlink()
    what = rng.choice(("nothing", "a folder", "a link", "a device", "a loop", "emptiness"))
    if what == "a folder":
        file.mkdir()
    elif what == "a link":
        file.symlink_to("/etc/hostname")
    elif what == "a device":
        file.symlink_to("/dev/full")
    elif what == "a loop":
        file.symlink_to(file.name)
    elif what == "emptiness":
        file.write_bytes(b"")
    return what
