"""gd-prompts: the paper's counts, own lists, templates, determinism, refusals."""

import json
import tomllib
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from grounded_diffusion.bundle import SHIPPED
from grounded_diffusion.engine.cli.prompts import main
from grounded_diffusion.engine.pipeline.job import list_jobs
from grounded_diffusion.engine.prompts.file import read_prompts
from grounded_diffusion.engine.prompts.prompt import Prompt
from grounded_diffusion.engine.prompts.templates import BUILT_IN, LIGHTS, PLACES, VIEWS
from grounded_diffusion.engine.prompts.vocabulary import (
    COCO_IDS,
    COCO_NAMES,
    COCO_PAIRS,
    THINGS_NAMES,
    VOC_NAMES,
    VOC_PAIRS,
    built_in,
)
from grounded_diffusion.engine.sampling.options import Options


def make(tmp_path, *options, out="prompts.jsonl"):
    out = tmp_path / out
    assert main([*map(str, options), "--out", str(out)]) == 0
    return out


def refused(capsys, *options):
    """The one line of a refusal."""
    assert main([str(option) for option in options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("gd-prompts: ")
    return error


def write(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_the_papers_counts(tmp_path, capsys):
    out = make(tmp_path, "--vocabulary", "voc")
    assert "10,000 images of 20 names and 10,082 of 142 pairs" in capsys.readouterr().out
    prompts = read_prompts(out)
    images = Counter()
    for prompt in prompts:
        images[prompt.objects] += prompt.count
    assert {objects[0]: n for objects, n in images.items() if len(objects) == 1} == dict.fromkeys(VOC_NAMES, 500)
    assert {objects: n for objects, n in images.items() if len(objects) == 2} == dict.fromkeys(VOC_PAIRS, 71)
    assert len(list_jobs(prompts, Options())) == 20_082
    assert prompts[0].text == "a photograph of a aeroplane"
    assert prompts[0].seed is None
    assert prompts[20].text == "a photograph of a aeroplane and a bicycle"


def test_vocs_pairs_are_pairs_of_its_names_in_order():
    assert len(VOC_PAIRS) == len(set(VOC_PAIRS)) == 142
    assert set(VOC_PAIRS) <= set(combinations(VOC_NAMES, 2))
    assert sum("person" in pair for pair in VOC_PAIRS) == 19


def test_cocos_names_and_ids(tmp_path, capsys):
    assert len(set(COCO_NAMES)) == len(set(COCO_IDS)) == 80
    assert list(COCO_IDS) == sorted(COCO_IDS)
    assert set(range(1, 91)) - set(COCO_IDS) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # COCO's gaps
    ids = dict(zip(COCO_NAMES, COCO_IDS, strict=True))
    assert (ids["person"], ids["stop sign"], ids["dining table"], ids["toothbrush"]) == (1, 13, 67, 90)
    assert set(COCO_PAIRS) <= set(combinations(COCO_NAMES, 2))
    assert ("person", "toothbrush") in COCO_PAIRS
    assert ("cup", "pizza") in COCO_PAIRS
    assert ("elephant", "microwave") not in COCO_PAIRS
    make(tmp_path, "--names", "coco", "--per-name", 2, "--per-pair", 1)
    assert f"160 images of 80 names and {len(COCO_PAIRS)} of {len(COCO_PAIRS)} pairs" in capsys.readouterr().out


def test_the_shipped_worlds_names():
    config = tomllib.loads((Path(__file__).parents[3] / "models" / f"{SHIPPED}.toml").read_text())
    assert tuple(config["names"]) == THINGS_NAMES
    assert len(built_in("things-64").pairs) == 60 * 59 // 2


def test_shuffled_prompts_are_the_same_images_in_another_order(tmp_path):
    counts = ("--vocabulary", "voc", "--per-name", 3, "--per-pair", 2)
    ordered = read_prompts(make(tmp_path, *counts, out="ordered"))
    mixed = make(tmp_path, *counts, "--shuffle-seed", 5, out="mixed")
    again = make(tmp_path, *counts, "--shuffle-seed", 5, out="again")
    other = make(tmp_path, *counts, "--shuffle-seed", 6, out="other")
    assert mixed.read_bytes() == again.read_bytes() != other.read_bytes()
    prompts = read_prompts(mixed)
    assert all(prompt.count == 1 for prompt in prompts)
    assert len(prompts) == 3 * 20 + 2 * 142
    assert Counter(p.text for p in prompts) == {p.text: p.count for p in ordered}
    assert [p.text for p in prompts] != sorted((p.text for p in prompts), key=[p.text for p in ordered].index)


def test_own_names_pairs_and_templates(tmp_path):
    names = write(tmp_path, "names.txt", "# mine\nred  panda\n\nteapot\nlamp\n")
    pairs = write(tmp_path, "pairs.txt", "lamp, teapot\n")
    templates = write(tmp_path, "templates.txt", "a {} at night\n{}, oil on canvas\na {} beside a {}\n")
    out = make(tmp_path, "--names", names, "--pairs", pairs, "--templates", templates, "--per-name", 5, "--per-pair", 2)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["objects"], line["count"]) for line in lines] == [
        ("a red panda at night", ["red panda"], 3),
        ("red panda, oil on canvas", ["red panda"], 2),
        ("a teapot at night", ["teapot"], 3),
        ("teapot, oil on canvas", ["teapot"], 2),
        ("a lamp at night", ["lamp"], 3),
        ("lamp, oil on canvas", ["lamp"], 2),
        ("a lamp beside a teapot", ["lamp", "teapot"], 2),
    ]
    assert all("seed" not in line for line in lines)
    assert len(read_prompts(out)) == 7


def test_names_without_pairs(tmp_path):
    out = make(tmp_path, "--names", write(tmp_path, "names.txt", "teapot\nlamp\n"), "--per-name", 2)
    assert [prompt.objects for prompt in read_prompts(out)] == [("teapot",), ("lamp",)]


def test_an_existing_file_is_kept(tmp_path, capsys):
    out = write(tmp_path, "prompts.jsonl", "mine")
    assert "exists" in refused(capsys, "--vocabulary", "voc", "--out", out)
    assert out.read_text() == "mine"
    make(tmp_path, "--vocabulary", "voc", "--overwrite")
    assert len(read_prompts(out)) == 162
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("", "names.txt is empty"),
        ("lamp\nLamp\n", "given twice"),
        ("a/b\n", "cannot be part of a file name"),
        ("a [lamp]\n", "brackets"),
    ],
)
def test_bad_names(tmp_path, capsys, names, said):
    file = write(tmp_path, "names.txt", names)
    assert said in refused(capsys, "--names", file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ("dog\n", "pairs.txt:1: 'dog' is not a pair"),
        ("dog, cat\ndog, cat, cow\n", "pairs.txt:2:"),
        ("dog, zebra\n", "'zebra', which is not among the names"),
        ("dog, cat\ncat, dog\n", "given twice"),
        ("dog, dog\n", "is no pair"),
    ],
)
def test_bad_pairs(tmp_path, capsys, pairs, said):
    file = write(tmp_path, "pairs.txt", pairs)
    assert said in refused(capsys, "--vocabulary", "voc", "--pairs", file, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("templates", "said"),
    [
        ("a photo\n", "templates.txt:1: write {} once or twice"),
        ("a {}\n{} {} {}\n", "templates.txt:2:"),
        ("a [{}]\n", "no other brackets"),
        ("a {name}\n", "write {} once or twice"),
        ("a {}\na  {}\n", "occurs twice"),
        (f"a {{}} {'x' * 1000}\n", "has 1,005 characters; at most 1,000"),
        ("a {}\n", "no template with two {}"),
        ("a {} and {}\n", "no template with one {}"),
    ],
)
def test_bad_templates(tmp_path, capsys, templates, said):
    file = write(tmp_path, "templates.txt", templates)
    assert said in refused(capsys, "--vocabulary", "voc", "--templates", file, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--vocabulary", "imagenet"], "there is no vocabulary 'imagenet'"),
        (["--names", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--vocabulary", "voc", "--per-name", "-1"], "--per-name must be from 0"),
        (["--vocabulary", "voc", "--per-pair", "1000001"], "--per-pair must be from 0"),
        (["--vocabulary", "voc", "--per-name", "0", "--per-pair", "0"], "nothing to make"),
        (["--vocabulary", "voc", "--names", "x"], "not allowed with"),
        ([], "one of the arguments --vocabulary --names is required"),
        (["--vocabulary", "voc", "--shuffle-seed", "x"], "invalid int value"),
    ],
)
def test_bad_options(tmp_path, capsys, options, said):
    assert said in refused(capsys, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf8(tmp_path, capsys):
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8" in refused(capsys, "--names", tmp_path / "names.txt", "--out", tmp_path / "out")


def test_varied_templates_differ_in_view_place_and_light(tmp_path):
    out = make(tmp_path, "--vocabulary", "voc", "--templates", "varied", "--per-name", 500, "--per-pair", 71)
    prompts = read_prompts(out)
    dogs = [prompt for prompt in prompts if prompt.objects == ("dog",)]
    assert len({prompt.text for prompt in dogs}) == 500
    assert {prompt.count for prompt in dogs} == {1}
    pairs = [prompt.text for prompt in prompts if prompt.objects == ("cat", "dog")]
    assert len(set(pairs)) == 71
    assert all("a cat and a dog" in text for text in pairs)


def test_the_built_in_templates_are_round_about_evenly_used():
    ones, twos = BUILT_IN["varied"]
    assert len(set(ones)) == len(set(twos)) == len(VIEWS) * len(PLACES) * len(LIGHTS) == 504
    for part, parts in ((0, VIEWS), (1, PLACES), (2, LIGHTS)):
        found = Counter(next(p for p in parts if p in text) for text in ones[:63])
        assert max(found.values()) - min(found.values()) <= 1, part
    assert all(len(Prompt(text.format("dog"), ("dog",)).text.split()) < 30 for text in ones)
