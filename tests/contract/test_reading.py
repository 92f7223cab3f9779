"""The typed reader: what it makes of JSON and TOML, and what it says of what does not fit."""

import math
from dataclasses import dataclass, field

import pytest

from grounded_diffusion.bundle import MANIFEST, read_manifest
from grounded_diffusion.errors import BundleError
from grounded_diffusion.reading import Count, Misfit, decode, load_json, load_toml


@dataclass(frozen=True)
class Inner:
    sides: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Outer:
    name: str
    count: Count = 1
    inner: Inner = field(default_factory=Inner)
    share: float | None = None


def test_a_dataclass_is_made_of_json():
    given = b'{"name": "a", "count": 2, "inner": {"sides": [3, 4]}, "share": null}'
    assert decode(given, Outer) == Outer("a", 2, Inner((3, 4)))


WRONG = {
    b"{\n}": "f: name is missing",
    b'{\n "name": 3\n}': "f:2: name must be a text, not a whole number",
    b'{"name": "",\n\n "count": 0}': "f:3: count must be a whole number >= 1",
    b'{"name": "", "inner": {"sides": [1]}}': "f:1: inner.sides must be a list of length 2, not 1",
    b'{"name": "", "share": "x"}': "f:1: share must be a number or null, not a text",
    b'{"name": "", "extra": 1}': "f: unknown field extra; known are count, inner, name, share",
    b'{"name": "",\n "name": ""}': "f:2: name is given twice",
    b"[1, 2]": "f: it must be a table of fields, not a list",
    b'{"name": "\xff"}': "f:1: not UTF-8 (byte 0xff); save it as UTF-8",
    b'{"name":\n oops}': "f:2: invalid JSON at column 2: Expecting value",
    b"9" * 10_000: "f: invalid JSON: a number has too many digits",
    b"[" * 100_000: "f: invalid JSON: nested too deeply",
}


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit_is_told_with_line_and_field(content):
    with pytest.raises(Misfit) as caught:
        decode(content, Outer)
    assert caught.value.at("f").startswith(WRONG[content])


def test_a_line_is_not_guessed_where_a_field_occurs_twice():
    content = b'{\n "inner": {"name": 1},\n "name": 2\n}'
    with pytest.raises(Misfit) as caught:
        decode(content, Outer)
    assert caught.value.line is None


def test_infinity_is_read_as_python_writes_it():
    """As diffusers' scheduler configurations have it."""
    assert load_json(b'{"lambda_min_clipped": -Infinity}') == {"lambda_min_clipped": -math.inf}


def test_toml_names_the_line():
    assert load_toml(b"a = 1\r\n[b]\r\nc = 'x'\r\n") == {"a": 1, "b": {"c": "x"}}
    with pytest.raises(Misfit) as caught:
        load_toml(b"a = 1\nb = \n")
    assert caught.value.line == 2


def test_a_long_value_is_not_told_in_full():
    with pytest.raises(Misfit) as caught:
        decode(b'{"name": "", "%s": 1}' % (b"x" * 10_000), Outer)
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"schema": 1,\n "family": 3}', "manifest.json"),
        ('{"schema": "1"}', "manifest.json:1: schema must be a whole number, not a text"),
        ("[]", "manifest.json: it must be a table of fields"),
        ('{"schema": 1, "schema": 1}', "manifest.json:1: schema is given twice"),
    ],
)
def test_a_manifest_names_its_wrong_field(tmp_path, content, said):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(BundleError) as caught:
        read_manifest(tmp_path)
    assert said in str(caught.value)
    assert "run gd-export again" in str(caught.value)
