"""Every damage to a finished data set is found, whatever its format, and what the same command can make comes back."""

import json
import random
from itertools import islice

import pytest
from helpers import null_backend as null

from grounded_diffusion.engine.cli import dataset
from grounded_diffusion.engine.dataset.formats import FORMATS
from grounded_diffusion.engine.dataset.status import read_status
from grounded_diffusion.engine.dataset.verify import verify
from grounded_diffusion.errors import GroundedDiffusionError

FLIPS = 200
FINAL = {
    "folder": {"metadata.jsonl", "index.html", "preview/index.js", "preview/000000.js", "preview/block-000.js"},
    "voc": {f"VOCdevkit/VOC2012/{name}" for name in ("labelmap.txt", *(
        f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val", "trainval")))},
    "coco": {"annotations/instances_train.json", "annotations/captions_train.json"},
    "coco-panoptic": {"annotations/panoptic_train.json", "annotations/captions_train.json"},
    "mmseg": {"classes.txt"},
    "webdataset": set(),
    "hf-imagefolder": {"README.md", "train/metadata.jsonl"},
    "hf-parquet": {"README.md"},
    "yolo": {"data.yaml"},
    "yolo-seg": {"data.yaml"},
    "examples": set(),
    "null": set(),
}  # fmt: skip


def files_of(folder):
    """Every file below a folder, with its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def make(tiny_bundle):
    """gd-infer of a format into a folder: five samples in three shards, some of which the filters refuse."""
    options = ["--model", tiny_bundle, "--prompt", "a [dog] and a [cat]", "--images-per-prompt", "5", "--steps", "2",
               "--sampler", "ddim", "--batch", "2", "--shard-size", "2", "--attempts", "1"]  # fmt: skip
    return lambda format, out, *more: null.main([*options, "--format", format, "--out", out, *more])


@pytest.fixture(scope="module", params=FORMATS)
def finished(request, make, tmp_path_factory):
    """(format, folder) of a finished data set. Tests put back what they damage."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert make(request.param, out) == 0
    assert list(verify(out)) == []
    return request.param, out


def found(out):
    """Whether verify has a problem, or refuses the data set."""
    try:
        return any(islice(verify(out), 1))
    except GroundedDiffusionError:
        return True


def test_every_flipped_bit_is_found(finished):
    """Spread over all files, each as often as the others; and at the places where a file is text and JSON."""
    _, out = finished
    contents, generator = files_of(out), random.Random(7)
    names = sorted(contents) * (1 + FLIPS // len(contents))
    unseen = []
    for name in names[: max(FLIPS, len(contents))]:
        damaged = bytearray(contents[name])
        bit = generator.randrange(8 * len(damaged)) if damaged else None
        if bit is None:
            damaged += b"\0"
        else:
            damaged[bit // 8] ^= 1 << bit % 8
        (out / name).write_bytes(damaged)
        if not found(out):
            unseen.append((name, bit))
        (out / name).write_bytes(contents[name])
    assert unseen == []
    assert list(verify(out)) == []


def test_every_missing_file_is_found_and_named(finished):
    _, out = finished
    unseen = []
    for name, content in files_of(out).items():
        (out / name).unlink()
        try:
            said = list(verify(out))
        except GroundedDiffusionError as error:
            said = [str(error)]
        if not any(name in line for line in said):
            unseen.append(name)
        (out / name).write_bytes(content)
    assert unseen == []


def test_the_same_command_makes_what_is_missing(finished, make):
    """Lists, tables, the page, summary and records: each alone and all at once, byte for byte, and the same for
    shards/finish.json itself."""
    format, out = finished
    before = files_of(out)
    lost = {*FINAL[format], "summary.json", "shards/finish.json", "shards/000002.json"}
    assert lost <= before.keys()
    for names in [*([name] for name in sorted(lost)), sorted(lost)]:
        for name in names:
            (out / name).unlink()
        assert read_status(out)["state"] != "finished" or names == ["shards/finish.json"]
        named = "shards/finish.json" if "shards/finish.json" in names else names[0]
        assert any(named in line for line in verify(out))
        assert make(format, out) == 0
        assert files_of(out) == before


def test_status_and_verify_tell_a_lost_last_shard(finished, capsys):
    _, out = finished
    record = out / "shards/000002.json"
    content = record.read_bytes()
    record.unlink()
    status = read_status(out)
    assert (status["state"], status["shards"]["missing"], status["samples"]["missing"]) == ("stopped", 1, 1)
    assert dataset.main(["verify", str(out)]) == 1
    assert "shards/000002.json: is missing; the same gd-infer command makes the shard" in capsys.readouterr().out
    record.write_bytes(content)


def test_a_data_set_of_an_earlier_version(make, tmp_path, capsys):
    """Its shards/finish.json knew lists and tables alone: verify says so, and the same command adds the rest."""
    out = tmp_path / "out"
    assert make("folder", out) == 0
    before, file = files_of(out), out / "shards/finish.json"
    old = {"files": {"metadata.jsonl": json.loads(file.read_text())["files"]["metadata.jsonl"]}}
    file.write_text(json.dumps(old, ensure_ascii=False, indent=1) + "\n")
    (line,) = verify(out)
    assert "as those of earlier versions do; the same gd-infer command adds them" in line
    assert make("folder", out) == 0
    assert files_of(out) == before
    assert list(verify(out)) == []


def test_what_is_added_later_is_checked_too(data, capsys):
    """A card, the lists of a split, the page made anew: expected, and missed when they are gone."""
    for command in (["card"], ["split", "--val", "0.5"], ["preview"]):
        assert dataset.main([command[0], str(data), *command[1:]]) == 0
    assert list(verify(data)) == []
    for name in ("README.md", "card.png", "train.txt", "val.txt", "preview/000000.js", "index.html"):
        content = (data / name).read_bytes()
        (data / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert any(name in line for line in verify(data)), name
        (data / name).unlink()
        assert any(name in line for line in verify(data)), name
        (data / name).write_bytes(content)
    assert list(verify(data)) == []


def test_what_is_added_later_outlives_a_lost_table(make, tmp_path):
    """The same gd-infer command makes metadata.jsonl again, the same gd-dataset command train.txt."""
    out = tmp_path / "out"
    assert make("folder", out) == 0
    split = lambda: dataset.main(["split", str(out), "--val", "0.5"])
    assert split() == 0
    before = files_of(out)
    (out / "metadata.jsonl").unlink()
    assert make("folder", out) == 0
    assert files_of(out) == before
    (out / "train.txt").unlink()
    assert any("train.txt" in line for line in verify(out))
    (out / "val.txt").unlink()
    assert split() == 0
    assert files_of(out) == before


@pytest.mark.parametrize("format", ["coco", "webdataset"])
def test_damages_of_what_was_converted(blobs, tmp_path, format):
    out = blobs.convert(tmp_path / "out", format, "--shard-size", 4)
    assert read_status(out)["state"] == "finished"
    for name, content in files_of(out).items():
        for damaged in (content[:-1] + bytes([content[-1] ^ 4]), None):
            (out / name).unlink() if damaged is None else (out / name).write_bytes(damaged)
            assert found(out), name
            (out / name).write_bytes(content)
    (out / "shards/000002.json").unlink()
    status = read_status(out)
    assert status["state"] != "finished"
    assert "gd-dataset convert" in status["next"]
