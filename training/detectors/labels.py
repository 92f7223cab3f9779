"""From a model's labels to our names: spellings, synonyms, and what to say where there is none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from grounded_diffusion.errors import UsageError
from grounded_diffusion.reading import Misfit, read_file

# Words for one thing in PASCAL VOC, COCO, LVIS, ADE20K and Cityscapes.
SYNONYMS = (
    {"aeroplane", "airplane", "plane"},
    {"bicycle", "bike"},
    {"boat", "ship"},
    {"bus", "autobus"},
    {"car", "automobile", "auto"},
    {"cell phone", "mobile phone", "cellular telephone", "cellphone"},
    {"cow", "cattle"},
    {"dining table", "dinner table"},
    {"donut", "doughnut"},
    {"hair drier", "hair dryer", "hairdryer"},
    {"handbag", "purse"},
    {"keyboard", "computer keyboard"},
    {"laptop", "laptop computer"},
    {"microwave", "microwave oven"},
    {"motorbike", "motorcycle", "minibike"},
    {"mouse", "computer mouse"},
    {"person", "people", "human"},
    {"potted plant", "houseplant", "plant pot"},
    {"refrigerator", "fridge", "icebox"},
    {"remote", "remote control"},
    {"skis", "ski"},
    {"sofa", "couch"},
    {"suitcase", "luggage"},
    {"traffic light", "traffic signal"},
    {"train", "railway train"},
    {"tv monitor", "tv", "television", "television set", "television receiver", "tv set"},
    {"wine glass", "wineglass"},
)
SUFFIXES = re.compile(r"-(merged|other|stuff)$")  # of COCO's panoptic labels, as in "tree-merged"
NEAREST = 3
SHOWN = 12


def key(name: str) -> str:
    """A word as it is compared: "TV monitor", "tvmonitor" and "tv_monitor" are one."""
    return re.sub(r"[\W_]+", "", name.casefold())


_MEANING = {key(word): key(min(words)) for words in SYNONYMS for word in words}


def meaning(name: str) -> str:
    """The same for two words of one thing."""
    return _MEANING.get(key(name), key(name))


def spellings(label: str) -> list[str]:
    """What a label says: "car, auto, automobile" is three words, "tree-merged" is "tree"."""
    return [SUFFIXES.sub("", word.strip()) for word in re.split(r"[,;]", label) if word.strip()]


def match_labels(
    names: Sequence[str], labels: Mapping[int, str], aliases: Mapping[str, Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """The ids of the labels that stand for each name.

    Args:
        names: ours.
        labels: the model's, by id.
        aliases: name -> labels to take instead of what is found here.

    Raises:
        UsageError: an alias for a label that is not there; names without a label, each with the nearest ones.
    """
    said: dict[str, list[int]] = {}  # what a label says -> its ids
    for k, label in labels.items():
        for word in spellings(label):
            said.setdefault(key(word), []).append(k)
    meant: dict[str, list[int]] = {}
    for word, ids in said.items():
        meant.setdefault(_MEANING.get(word, word), []).extend(ids)
    found = {}
    for name in names:
        if name in aliases:
            found[name] = _aliased(name, aliases[name], labels)
        else:  # the very word goes before what means the same: COCO has both "tv" and "tv monitor" at times
            found[name] = tuple(dict.fromkeys(said.get(key(name)) or meant.get(meaning(name)) or ()))
    if unknown := [name for name, ids in found.items() if not ids]:
        raise UsageError(_unknown(unknown, len(names), list(labels.values())))
    return found


def _aliased(name: str, words: Iterable[str], labels: Mapping[int, str]) -> tuple[int, ...]:
    """Ids of the labels that a user names."""
    by_key = {key(label): k for k, label in labels.items()}
    for word in words:
        if key(word) not in by_key:
            near = ", ".join(nearest(word, labels.values()))
            raise UsageError(f"the detector has no label {word!r}, which is to stand for {name!r}; nearest: {near}")
    return tuple(by_key[key(word)] for word in words)


def _unknown(unknown: list[str], of: int, labels: list[str]) -> str:
    """What to say about names that no label stands for."""
    if len(unknown) == of:
        shown = ", ".join(labels[:SHOWN]) + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")
        return (
            f"the detector knows none of the {of} names; its labels are {shown}; take another detector, or say with "
            "--aliases which of its labels stand for your names"
        )
    told = "; ".join(f"{name!r} (nearest labels: {', '.join(nearest(name, labels))})" for name in unknown)
    return (
        f"the detector does not know {told}; say with --aliases which labels to take, move the name to the unseen "
        "ones, or take another detector"
    )


def nearest(name: str, labels: Iterable[str]) -> list[str]:
    """The labels most like a name, those with a word in common first."""
    words = set(name.casefold().split())
    score = lambda label: (
        bool(words & set(re.findall(r"\w+", label.casefold()))),
        difflib.SequenceMatcher(None, key(name), key(label)).ratio(),
    )
    return sorted(labels, key=score, reverse=True)[:NEAREST]


def read_aliases(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Aliases of a file, `name = label, label` on a line. Raises UsageError, with the line."""
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except Misfit as error:
        raise UsageError(error.at(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    aliases: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, rest = line.partition("=")
        words = tuple(word.strip() for word in rest.split(",") if word.strip())
        if not equals or not name.strip() or not words:
            raise UsageError(f"{path}:{number}: {line.strip()!r} is not an alias; write: name = label, label")
        aliases[" ".join(name.split())] = words
    return aliases
