"""Prompt files: both forms, and one test per kind of bad input."""

import pytest

from grounded_diffusion.engine.prompts.file import read_prompts
from grounded_diffusion.engine.prompts.prompt import Prompt, as_prompts, parse_prompt, to_line
from grounded_diffusion.errors import UsageError


def write(folder, content):
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_both_forms(tmp_path):
    path = write(
        tmp_path,
        "\ufeff# comment\r\n\r\n  a photograph of a [dog] and a [traffic  light]  \r\n   # another\n"
        '{"prompt": "a street with a [car]", "objects": ["bus", "tree"], "seed": 0, "count": 3}\n'
        '{"prompt": "a lake", "objects": ["canoë"]}',
    )
    assert read_prompts(path) == [
        Prompt("a photograph of a dog and a traffic light", ("dog", "traffic light")),
        Prompt("a street with a car", ("car", "bus", "tree"), 0, 3),
        Prompt("a lake", ("canoë",)),
    ]


def test_a_negative_prompt_of_a_line(tmp_path):
    path = write(
        tmp_path,
        '{"prompt": "a [dog]", "negative_prompt": " blurred,   grey "}\n'
        '{"prompt": "a [dog]", "negative_prompt": ""}\na [dog]',
    )
    given = read_prompts(path)
    assert [prompt.negative_prompt for prompt in given] == ["blurred, grey", "", None]
    assert [parse_prompt(to_line(prompt)) for prompt in given] == given


def test_callers_may_mix_strings_and_prompts():
    given = ["a [dog]", Prompt("a lake", ("boat",), seed=4)]
    assert as_prompts(given) == [Prompt("a dog", ("dog",)), given[1]]
    assert as_prompts("a [dog]") == [Prompt("a dog", ("dog",))]


GOOD = "a [dog]\n"
BAD = {
    "no objects": ("a photograph of a dog", "mark objects with brackets, as in: a photograph of a [dog]"),
    "no objects in JSON": ('{"prompt": "a dog"}', "names no objects; mark objects with brackets"),
    "unclosed bracket": ("a [dog and a cat", "bracket before 'dog and a cat' is not closed"),
    "nested bracket": ("a [dog [cat]]", "bracket before 'dog' is not closed"),
    "stray bracket": ("a dog] and a [cat]", "a ] without its [ after 'a dog'"),
    "empty brackets": ("a [] dog", "empty name"),
    "only brackets": ("[ ]", "no text"),
    "JSON cut off": ('{"prompt": "a [dog]"', "invalid JSON at column 21"),
    "JSON nested": ('{"prompt": ' + "[" * 100_000, "invalid JSON: nested too deeply"),
    "JSON huge number": ('{"prompt": "a [dog]", "seed": ' + "9" * 5000 + "}", "invalid JSON"),
    "JSON without prompt": ('{"objects": ["dog"]}', 'no "prompt"'),
    "JSON prompt not text": ('{"prompt": 3, "objects": ["dog"]}', 'no "prompt"'),
    "JSON unknown field": ('{"prompt": "a [dog]", "sede": 3}', "unknown field sede"),
    "JSON objects not a list": ('{"prompt": "a dog", "objects": "dog"}', '"objects" must be a list'),
    "JSON objects not names": ('{"prompt": "a dog", "objects": [1]}', '"objects" must be a list'),
    "JSON negative prompt not text": ('{"prompt": "a [dog]", "negative_prompt": 3}', "negative_prompt must be a text"),
    "JSON negative seed": ('{"prompt": "a [dog]", "seed": -1}', "seed must be a whole number"),
    "JSON true seed": ('{"prompt": "a [dog]", "seed": true}', "seed must be a whole number"),
    "JSON zero count": ('{"prompt": "a [dog]", "count": 0}', "count must be a whole number"),
    "JSON fraction": ('{"prompt": "a [dog]", "count": 1.5}', "count must be a whole number"),
    "JSON surrogate": ('{"prompt": "a [dog] \\ud800"}', "control character U+D800"),
    "long name": (f"a [{'dog' * 100}]", "has 300 characters, at most 64"),
    "path in a name": ("a [../../etc/passwd]", "contains /"),
    "backslash in a name": ("a [c\\d]", "contains \\"),
    "hidden name": ("a [.ssh]", "starts with a dot"),
    "invisible character": ("a [d\u200bog]", "invisible character"),
    "control character": ("a [dog] \x07", "control character U+0007"),
    "object twice": ('{"prompt": "two dogs", "objects": ["dog", "Dog"]}', "'Dog' is named twice"),
    "255 objects": (" ".join(f"[o{i}]" for i in range(255)), "255 objects, at most 254"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path, case):
    line, message = BAD[case]
    path = write(tmp_path, GOOD + "# comment\n" + line + "\n" + GOOD)
    with pytest.raises(UsageError) as caught:
        read_prompts(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)


def test_two_marks_of_a_name_are_one_object():
    """One mask covers all of a kind; the text keeps both."""
    (prompt,) = as_prompts("a [dog] chases a [cat] and another [Dog] and a [ dog ]")
    assert prompt.objects == ("dog", "cat")
    assert prompt.text == "a dog chases a cat and another Dog and a dog"


@pytest.mark.parametrize("content", ["", "\n\n", "# only a comment\n"])
def test_empty_file(tmp_path, content):
    with pytest.raises(UsageError, match="has no prompts"):
        read_prompts(write(tmp_path, content))


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match="there is no prompt file"):
        read_prompts(tmp_path / "absent.txt")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="cannot read the prompt file"):
        read_prompts(tmp_path)


def test_not_utf8(tmp_path):
    with pytest.raises(UsageError, match=r":2: not UTF-8 \(byte 0xe9\)"):
        read_prompts(write(tmp_path, b"a [dog]\na caf\xe9 with a [cup]\n"))


def test_nul_bytes(tmp_path):
    with pytest.raises(UsageError, match=":2: contains a NUL byte"):
        read_prompts(write(tmp_path, b"a [dog]\na \0[cat]\n"))


@pytest.mark.parametrize(
    ("given", "message"), [([], "no prompts"), ([3], "prompt 1 must be a string"), (["a dog"], "1:")]
)
def test_bad_arguments(given, message):
    with pytest.raises(UsageError, match=message):
        as_prompts(given)


def test_bad_prompt_objects():
    with pytest.raises(UsageError, match="no text"):
        Prompt(" ", ("dog",))
    with pytest.raises(UsageError, match="must be a list"):
        Prompt("a dog", "dog")
