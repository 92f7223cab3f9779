"""Lines and records as types: what is wrong is told by its field, and reading is no slower than with json."""

import json

import pytest
from helpers.plain_reader import in_turns, metadata_row, plain_line

from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset.rows import CocoRow, Row, read_line
from grounded_diffusion.engine.dataset.shards import DamagedShard, encode_shard, read_shard
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.reading import Misfit


def line(**changes):
    return json.dumps(metadata_row(3) | changes, ensure_ascii=False).encode()


def test_a_line_is_what_json_makes_of_it():
    row, plain = read_line(line()), plain_line(line())
    assert (row.id, row.index, row.prompt, row.image) == tuple(plain[k] for k in ("id", "index", "prompt", "image"))
    assert [list(thing.box) for thing in row.objects] == [thing["box"] for thing in plain["objects"]]


def test_colons_and_escapes_in_texts_are_no_fields():
    for prompt in ('a "dog": b', "a\\:b", ":" * 20, "a \\u003a b", "é:"):
        assert read_line(line(prompt=prompt)).prompt == prompt
        assert read_line(json.dumps(metadata_row(3) | {"prompt": prompt}).encode()).prompt == prompt


def test_fields_of_later_versions_are_let_be():
    assert read_line(line(more={"a": 1})).index == 3


THING = metadata_row(3)["objects"][0]
WRONG = {
    "seed must be a whole number, not a text": line(seed="7"),
    "seed must be a whole number, not true or false": line(seed=True),
    "width must be a whole number >= 1": line(width=0),
    "objects must be a list, not null": line(objects=None),
    "objects[0].area must be a whole number >= 0": line(objects=[THING | {"area": -1}]),
    "objects[0].box[1] must be a whole number, not a number": line(objects=[THING | {"box": [1, 2.5, 3, 4]}]),
    "objects[0].score must be a number <= 1": line(objects=[THING | {"score": 7}]),
    "index must be a whole number": line(index=10**30),
    "seed is given twice": line().replace(b'"seed": 0', b'"seed": 0, "seed": 0'),
    "label is given twice": line().replace(b'"label": 1', b'"label": 1, "label" : 1'),
    "it must be a table of fields, not a list": b"[]",
    "invalid JSON at column": line()[:-20],
    "not UTF-8 (byte 0xff)": line().replace(b"photograph", b"\xff"),
    "nested too deeply": b"[" * 100_000,
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_field_is_named(said):
    with pytest.raises(Misfit) as caught:
        read_line(WRONG[said])
    assert said in str(caught.value)


def test_a_field_given_twice_is_seen_through_escapes():
    with pytest.raises(Misfit, match="seed is given twice"):
        read_line(line().replace(b'"seed": 0', b'"seed": 0, "se\\u0065d": 1'))


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(Misfit, match="score"):
        read_line(line(objects=[THING | {"score": float("nan")}]))


def test_reading_lines_is_no_slower_than_json():
    plain, typed = min((in_turns(4000, 1000) for _ in range(3)), key=lambda pair: pair[1] / pair[0])
    assert typed < plain


def test_a_record_has_the_rows_of_its_format(tmp_path):
    storage, row = open_storage(tmp_path), metadata_row(0)
    storage.put("shards/000000.json", encode_shard(0, 0, [row], []))
    assert read_shard(storage, 0, row=Row)["rows"] == [row]
    with pytest.raises(DamagedShard, match=r"rows\[0\].objects\[0\]: the object 'dog' has no segmentation"):
        read_shard(storage, 0, row=CocoRow)


def test_card_names_the_field_of_a_record(data, capsys):
    file = data / "shards/000001.json"
    record = json.loads(file.read_text())
    record["rows"][2]["width"] = "wide"
    file.write_text(json.dumps(record))
    assert main(["card", str(data)]) == 1
    error = capsys.readouterr().err
    assert "shards/000001.json is damaged; remove it" in error
    assert "rows[2].width must be a whole number, not a text" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["card", "status", "stats", "verify", "preview", "merge", "convert"])
def test_no_command_ends_in_a_traceback_at_a_wrong_setting(data, tmp_path, capsys, command):
    (data / "run.json").write_text('{\n "format": "folder",\n "settings": {\n  "samples": "9"\n }\n}\n')
    more = {"merge": [str(data), "--out", str(tmp_path / "m")],
            "convert": ["--format", "voc", "--out", str(tmp_path / "c")]}  # fmt: skip
    status = main([command, str(data), *more.get(command, [])])
    said = capsys.readouterr()
    if command in ("card", "status"):
        assert "run.json:4: settings.samples must be a whole number, not a text" in said.err
    assert status in ((0,) if command in ("stats", "convert") else (1, 2))
