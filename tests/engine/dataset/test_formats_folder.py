"""The formats "folder" and "null": layout, palette, names, and the page's data."""

import json
import re

import numpy as np
import pytest
from helpers import samples
from PIL import Image

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset.formats import Settings, open_format
from grounded_diffusion.engine.dataset.formats.common import unsure, voc_palette
from grounded_diffusion.engine.dataset.formats.folder import slug
from grounded_diffusion.engine.dataset.reader import FolderDataset
from grounded_diffusion.engine.dataset.record import Record
from grounded_diffusion.engine.dataset.shards import (
    encode_shard,
    finish_shards,
    finished_shards,
    read_shard,
    write_shards,
)
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.errors import StorageError

RUN = {"sampler": "ddim", "steps": 25, "seed": 7}


def make_sample(index, objects=("dog", "traffic light")):
    rng = np.random.default_rng(index)
    masks = {name: rng.random((20, 24)) > 0.5 for name in objects}
    image = rng.integers(0, 256, (20, 24, 3), np.uint8)
    logits = rng.normal(size=(2, 5, 6)).astype(np.float32)
    return samples.sample(index, image, masks, f'a "dog" & </script><b> {index}', mask_logits=logits)


def write(out, indices, settings=None, shard_size=4):
    storage, format = open_storage(out), open_format("folder", settings or Settings())
    storage.put("run.json", json.dumps({"format": "folder", "settings": RUN}).encode())
    records = [Record.from_sample(make_sample(index)) for index in indices]
    write_shards(storage, format, [(len(records), records)], format.encode, shard_size, RUN)
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def test_layout_and_contents(tmp_path):
    out = tmp_path / "new" / "out"
    rows = write(out, range(12))
    assert [row["index"] for row in rows] == list(range(12))
    for row in rows:
        sample = make_sample(row["index"])
        assert np.array_equal(np.asarray(Image.open(out / row["image"])), sample.image)
        labels = Image.open(out / row["mask"])
        assert labels.mode == "P"
        assert np.array_equal(np.asarray(labels), sample.labels)
        assert labels.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        for thing in row["objects"]:
            mask = Image.open(out / thing["mask"])
            assert mask.mode == "1"
            assert np.array_equal(np.asarray(mask), sample.masks[thing["name"]])
            assert np.asarray(mask).sum() == thing["area"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["images", "masks", "objects", "preview", "shards", "index.html", "metadata.jsonl", "run.json"]
    )
    assert len(list(out.rglob("*.png"))) == 12 * 4
    assert 'a \\"dog\\" & </script>' in (out / "preview" / "000000.js").read_text()


def test_a_thousand_samples_share_a_folder(tmp_path):
    rows = write(tmp_path, [998, 999, 1000, 1_234_567])
    assert [row["image"] for row in rows] == [
        "images/000/000998.png", "images/000/000999.png", "images/001/001000.png", "images/1234/1234567.png",
    ]  # fmt: skip
    assert rows[3]["objects"][1]["mask"] == "objects/1234/1234567_1_traffic_light.png"
    assert [record.id for record in FolderDataset(tmp_path)] == ["000998", "000999", "001000", "1234567"]


def test_shards_of_any_size_give_the_same_data_set(tmp_path):
    for size in (1, 3, 12):
        write(tmp_path / str(size), range(12), shard_size=size)
    trees = [
        {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("1", "3", "12")
    ]
    for tree in trees:
        for path in [path for path in tree if path.parts[0] == "shards"]:
            del tree[path]
    assert trees[0] == trees[1] == trees[2]
    assert len(trees[0]) == 12 * 4 + 6


def test_a_run_with_lost_samples_is_sound(tmp_path, capsys):
    """Rejected and failed samples leave gaps, which verify accounts for and convert leaves out."""
    out, format = tmp_path / "out", open_format("folder", Settings())
    storage = open_storage(out)
    storage.put("run.json", json.dumps({"format": "folder", "settings": RUN}).encode())
    lost = {1: "rejected", 4: "quarantined", 6: "rejected", 7: "rejected"}
    for shard, first in enumerate((0, 3, 6)):
        indices = range(first, min(first + 3, 8))
        samples = [format.encode(Record.from_sample(make_sample(k))) for k in indices if k not in lost]
        files, kinds = list(format.pack(shard, 3, samples)), {"rejected": [], "quarantined": []}
        for index in indices:
            if index in lost:
                kinds[lost[index]].append({"index": index, "reason": "no mask of dog", "attempts": 2})
        storage.commit(shard, files, encode_shard(shard, first, [sample.row for sample in samples], files, **kinds))
    assert finish_shards(storage, format, range(3), RUN) == ""
    assert main(["verify", str(out)]) == 0
    assert "4 records, no problems" in capsys.readouterr().out
    assert FolderDataset(out).indices.tolist() == [0, 2, 3, 5]
    for name in ("coco", "webdataset"):
        assert main(["convert", str(out), "--format", name, "--out", str(tmp_path / name), "--shard-size", "3"]) == 0
        assert main(["verify", str(tmp_path / name)]) == 0
    table = json.loads((tmp_path / "coco/annotations/instances_train.json").read_text())
    assert [image["id"] for image in table["images"]] == [1, 3, 4, 6]
    assert [annotation["id"] for annotation in table["annotations"]] == list(range(1, 9))


def test_jpeg(tmp_path):
    rows = write(tmp_path, range(2), Settings(jpeg_quality=90))
    assert rows[0]["image"] == "images/000/000000.jpg"
    with Image.open(tmp_path / rows[0]["image"]) as image:
        assert image.format == "JPEG"
    assert main(["verify", str(tmp_path)]) == 0


def test_void_band_follows_the_probabilities(tmp_path):
    """Pixels that are sure stay; the others become 255, in the label map and in what is converted from it."""
    logits = np.array([[[-4.0, -4.0, 0.1, 4.0]]], np.float32).repeat(4, 1)  # [1,4,4], unsure in its third column
    void = unsure(logits, (4, 16), (0.3, 0.7))
    probability = 1 / (1 + np.exp(-np.interp((np.arange(16) + 0.5) / 4 - 0.5, np.arange(4), logits[0, 0])))
    assert np.array_equal(void, np.broadcast_to((probability > 0.3) & (probability <= 0.7), (4, 16)))
    assert void.any()
    rows = write(tmp_path / "out", range(3), Settings(void_band=(0.3, 0.7)))
    for row in rows:
        sample, labels = make_sample(row["index"]), np.asarray(Image.open(tmp_path / "out" / row["mask"]))
        void = unsure(sample.mask_logits, (20, 24), (0.3, 0.7))
        assert np.array_equal(labels == 255, void)
        assert void.any()
        assert np.array_equal(labels[~void], sample.labels[~void])
    (tmp_path / "names").write_text("dog\ntraffic light\n")
    convert = ["convert", str(tmp_path / "out"), "--format", "mmseg", "--out", str(tmp_path / "mmseg")]
    assert main([*convert, "--names", str(tmp_path / "names")]) == 0
    converted = np.asarray(Image.open(tmp_path / "mmseg/ann_dir/train/000002.png"))
    assert np.array_equal(converted, labels)  # names in the record's order


def test_null_writes_rows_only(tmp_path):
    storage, format = open_storage(tmp_path / "out"), open_format("null", Settings())
    records = [Record.from_sample(make_sample(index)) for index in range(3)]
    assert write_shards(storage, format, [(3, records)], format.encode, 2, RUN) == ""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shards"]
    assert [row["id"] for shard in (0, 1) for row in read_shard(storage, shard)["rows"]] == [
        "000000",
        "000001",
        "000002",
    ]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b'{"shard": 0}',
        encode_shard(1, 0, [], []),
        encode_shard(0, 0, [{}], []).replace(b": 1", b": 2"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path, damage):
    storage = open_storage(tmp_path)
    storage.put("shards/000000.json", damage)
    assert finished_shards(storage) == [0]
    with pytest.raises(StorageError, match=r"shards/000000\.json is damaged; remove it"):
        read_shard(storage, 0)


def test_palette_is_that_of_pascal_voc():
    palette = np.reshape(voc_palette(), (256, 3)).tolist()
    assert palette[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[15] == [192, 128, 128]
    assert palette[20] == [0, 64, 128]
    assert palette[255] == [224, 224, 192]


@pytest.mark.parametrize("name", ["dog", "dining table", "ünïcorn", "漢" * 64, "..", "--"])
def test_slugs_are_short_file_names(name):
    assert 1 <= len(slug(name).encode()) <= 160
    assert re.fullmatch(r"[\w-]+", slug(name))
