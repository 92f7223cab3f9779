"""Names, and pairs of names that occur together, from which prompts are made (the paper's appendix B).

Sources:
    VOC_NAMES: PASCAL VOC 2012 in its own order, written with spaces as a prompt would.
    VOC_PAIRS: the paper takes 142 co-appearing pairs from VOC's annotations (B.2, B.3) but lists them nowhere, nor
        does its released code. These 142 of the 190 possible pairs are our own choice, NOT counted from the
        annotations: people with everything; traffic with traffic; furniture and what stands on it with one another;
        pets with furniture; farm and field animals with one another, people and vehicles. So the paper's counts are
        reproduced; its exact pairs are not claimed. `--pairs FILE` takes others.
    COCO: names, ids and supercategories of COCO's 80 classes, whose ids run to 90 (cocodataset.org, the `categories` of
        instances_val2017.json). The pairs are NOT counted from COCO's annotations either: people with everything, and
        every two names whose supercategories stand in COCO_SCENES.
    THINGS_NAMES: what the shipped model draws, in the order of models/things-64.toml. Its training scenes have any two
        names together, so all pairs count.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from grounded_diffusion.engine.prompts.prompt import check_name, tidy
from grounded_diffusion.errors import UsageError
from grounded_diffusion.files import lines_of

VOC_NAMES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip

# name -> the later names, in VOC's order, that it is paired with
_VOC_PARTNERS = {
    "aeroplane": "bicycle, bird, boat, bus, car, motorbike, person, train",
    "bicycle": "bird, boat, bottle, bus, car, cat, chair, dining table, dog, horse, motorbike, person, potted plant, "
    "sofa, train, tv monitor",
    "bird": "boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, person, potted plant, sheep, sofa, "
    "tv monitor",
    "boat": "bottle, bus, car, chair, cow, dining table, dog, horse, motorbike, person, potted plant, sheep, train",
    "bottle": "bus, car, cat, chair, dining table, dog, motorbike, person, potted plant, sofa, train, tv monitor",
    "bus": "car, chair, dog, horse, motorbike, person, potted plant, train",
    "car": "cat, chair, cow, dining table, dog, horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor",
    "cat": "chair, dining table, dog, horse, motorbike, person, potted plant, sofa, tv monitor",
    "chair": "cow, dining table, dog, horse, motorbike, person, potted plant, sofa, train, tv monitor",
    "cow": "dog, horse, person, sheep, train",
    "dining table": "dog, person, potted plant, sofa, tv monitor",
    "dog": "horse, motorbike, person, potted plant, sheep, sofa, train, tv monitor",
    "horse": "motorbike, person, potted plant, sheep, train",
    "motorbike": "person, potted plant, sofa, train",
    "person": "potted plant, sheep, sofa, train, tv monitor",
    "potted plant": "sheep, sofa, train, tv monitor",
    "sofa": "tv monitor",
    "train": "tv monitor",
}
VOC_PAIRS = tuple((first, second) for first, rest in _VOC_PARTNERS.items() for second in rest.split(", "))

THINGS_NAMES = (
    *VOC_NAMES, "elephant", "zebra", "teddy bear", "fire hydrant", "truck", "bench", "bear", "giraffe", "umbrella",
    "suitcase", "sports ball", "cup", "cake", "bed", "toilet", "laptop", "vase", "lion", "tiger", "fox", "deer",
    "camel", "rhinoceros", "crocodile", "rabbit", "pig", "whale", "shark", "palm tree", "cactus", "snowman", "piano",
    "guitar", "lamp", "mailbox", "teapot", "barrel", "traffic cone", "tent", "helmet",
)  # fmt: skip

# supercategory -> its classes by id
_COCO = {
    "person": {1: "person"},
    "vehicle": {2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat"},
    "outdoor": {10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench"},
    "animal": {16: "bird", 17: "cat", 18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear",
               24: "zebra", 25: "giraffe"},
    "accessory": {27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase"},
    "sports": {34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat",
               40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket"},
    "kitchen": {44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl"},
    "food": {52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog",
             59: "pizza", 60: "donut", 61: "cake"},
    "furniture": {62: "chair", 63: "couch", 64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet"},
    "electronic": {72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard", 77: "cell phone"},
    "appliance": {78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator"},
    "indoor": {84: "book", 85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier",
               90: "toothbrush"},
}  # fmt: skip
COCO_IDS = tuple(k for classes in _COCO.values() for k in classes)
COCO_NAMES = tuple(name for classes in _COCO.values() for name in classes.values())
COCO_SUPERCATEGORIES = {name: above for above, classes in _COCO.items() for name in classes.values()}
COCO_SCENES = {("vehicle", "vehicle"), ("vehicle", "outdoor"), ("animal", "animal"), ("kitchen", "kitchen"),
               ("kitchen", "food"), ("food", "food"), ("kitchen", "furniture"), ("furniture", "furniture"),
               ("furniture", "electronic"), ("electronic", "electronic"), ("kitchen", "appliance"),
               ("appliance", "appliance"), ("furniture", "indoor"), ("accessory", "accessory")}  # fmt: skip
COCO_PAIRS = tuple(
    (a, b)
    for a, b in combinations(COCO_NAMES, 2)
    if a == "person" or (COCO_SUPERCATEGORIES[a], COCO_SUPERCATEGORIES[b]) in COCO_SCENES
)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Names and pairs of them.

    Raises:
        UsageError: at construction, for a name that cannot be masked, a repeated name or pair, or a pair with a name
            that is not in the list.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        known: set[str] = set()
        for name in self.names:
            if check_name(name) != name or set(name) & set("[]{}"):
                raise UsageError(f"the name {name!r} contains brackets or spaces that a prompt cannot have")
            if name.casefold() in known:
                raise UsageError(f"the name {name!r} is given twice")
            known.add(name.casefold())
        if not self.names:
            raise UsageError("the vocabulary has no names")
        seen: set[frozenset[str]] = set()
        names = set(self.names)
        for pair in self.pairs:
            for name in pair:
                if name not in names:
                    raise UsageError(f"the pair {', '.join(pair)!r} has {name!r}, which is not among the names")
            if len(set(pair)) < 2 or frozenset(pair) in seen:
                raise UsageError(
                    f"the pair {', '.join(pair)!r} {'is given twice' if len(set(pair)) > 1 else 'is no pair'}"
                )
            seen.add(frozenset(pair))


BUILT_IN = {
    "voc": (VOC_NAMES, VOC_PAIRS),
    "coco": (COCO_NAMES, COCO_PAIRS),
    "things-64": (THINGS_NAMES, tuple(combinations(THINGS_NAMES, 2))),
}


def built_in(name: str) -> Vocabulary:
    """A vocabulary of this module. Raises UsageError for another name."""
    if name not in BUILT_IN:
        line = f"there is no vocabulary {name!r}; known are {', '.join(BUILT_IN)}, or give `names` a file"
        raise UsageError(line, "names")
    return Vocabulary(*BUILT_IN[name])


def read_names(path: str | Path) -> tuple[str, ...]:
    """Names of a file, one a line; empty lines and lines that start with # are skipped. Raises UsageError."""
    names = tuple(tidy(line) for _, line in read_lines(path, "name"))
    in_file(path, Vocabulary, names)
    return names


def read_pairs(path: str | Path, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Pairs of a file, `a, b` on a line. Raises UsageError."""
    pairs = []
    for number, line in read_lines(path, "pair"):
        pair = tuple(tidy(part) for part in line.split(","))
        if len(pair) != 2 or not all(pair):
            raise UsageError(f"{path}:{number}: {line.strip()!r} is not a pair; write two names with a comma between")
        pairs.append(pair)
    in_file(path, Vocabulary, names, tuple(pairs))
    return tuple(pairs)


def read_lines(path: str | Path, what: str) -> list[tuple[int, str]]:
    """Numbered lines that say something. Raises UsageError: no such file, not UTF-8, or nothing in it."""
    try:
        with Path(path).open("rb") as stream:
            found = enumerate((line.decode("utf-8-sig") for line in lines_of(stream, path)), 1)
            lines = [(number, line) for number, line in found if line.strip() and line.lstrip()[0] != "#"]
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    if not lines:
        raise UsageError(f"{path} is empty; write one {what} a line")
    return lines


def in_file(path: str | Path, check, *arguments) -> None:
    """Call `check`; its UsageError names the file."""
    try:
        check(*arguments)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
