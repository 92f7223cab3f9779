"""The page to look at a data set in a real browser: 10,000 samples from the disk, filters, keyboard."""

import io
import os

import numpy as np
import pytest
from helpers import browser as driven
from PIL import Image

from grounded_diffusion.engine.dataset.formats.common import encode_labels
from grounded_diffusion.engine.dataset.preview import write_preview
from grounded_diffusion.engine.dataset.storage.open import open_storage

COUNT, SIZE = 10_000, 16
NAMES = [f"class {k}" for k in range(10)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(driven.missing()), reason=driven.missing()),
]


def row(index):
    """A sample of two classes, whose score and area follow from its index."""
    things = [NAMES[index % 10], NAMES[(index + 1 + index // 10 % 3) % 10]]
    area = 1 + index * 7919 % (SIZE * SIZE)
    return {
        "id": f"{index:06d}", "index": index, "prompt": f"number {index} with <b>{things[0]}</b>", "seed": 7,
        "width": SIZE, "height": SIZE, "image": f"images/{index:06d}.png", "mask": f"masks/{index:06d}.png",
        "objects": [{"name": name, "label": k, "area": area, "score": index * 31 % COUNT / COUNT}
                    for k, name in enumerate(things, 1)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set of COUNT samples, which share a few files."""
    path = tmp_path_factory.mktemp("data")
    labels = np.zeros((SIZE, SIZE), np.uint8)
    labels[:8], labels[8:, 8:] = 1, 2
    for folder in ("images", "masks"):
        (path / folder).mkdir()
        for k in range(10):
            stream = io.BytesIO()
            Image.new("RGB", (SIZE, SIZE), (25 * k, 200, 90)).save(stream, "png")
            content = stream.getvalue() if folder == "images" else encode_labels(labels)
            (path / folder / f"{k:06d}.png").write_bytes(content)
        for index in range(10, COUNT):
            os.link(path / folder / f"{index % 10:06d}.png", path / folder / f"{index:06d}.png")
    write_preview(open_storage(path), map(row, range(COUNT)), {"steps": 20, "seed": 7})
    return path


@pytest.fixture(scope="module")
def chromium():
    with driven.browser() as opened:
        yield opened


@pytest.fixture
def page(chromium, data):
    """The page, opened anew, with its first cards; at the end nothing may have failed."""
    chromium.open((data / "index.html").as_uri())
    chromium.wait(f"return {CARDS}.length > 3")
    yield chromium
    assert chromium.errors() == []


CARDS = "[...document.querySelectorAll('#grid article')].filter(card => card.querySelector('img'))"
PROMPTS = f"""return {CARDS}.map(card => [new DOMMatrix(card.style.transform), card])
    .sort((a, b) => a[0].f - b[0].f || a[0].e - b[0].e).map(pair => pair[1].querySelector('p').textContent)"""
FACTS = "return document.getElementById('facts').textContent"
CHOOSE = """const node = document.getElementById(arguments[0]);
    node.value = arguments[1]; node.dispatchEvent(new Event(arguments[2]))"""
DIALOG = "return document.getElementById('dialog').open && document.querySelector('#dialog p').textContent"


def numbers(page):
    """Indices of the drawn cards, in their order on the page."""
    return [int(prompt.split()[1]) for prompt in page.run(PROMPTS)]


def choose(page, id, value, event="change"):
    """Set a control as a person does, and wait for what is told to be of it."""
    page.run(CHOOSE, id, value, event)


def test_pictures_are_decoded(page):
    """Images and masks, with the pixels of their files."""
    count, broken = page.run(f"""
        const images = {CARDS}.flatMap(card => [...card.querySelectorAll('img')]);
        return Promise.all(images.map(image => image.decode().then(() => 0, () => 1)))
            .then(failed => [images.length, failed.reduce((a, b) => a + b, 0)
                + images.filter(image => image.naturalWidth !== {SIZE}).length])""")
    assert (count >= 8, broken) == (True, 0)
    assert page.run(FACTS).startswith("10,000 images · 10 classes · steps 20")


def test_a_prompt_is_text_and_not_html(page):
    assert page.run("return document.querySelectorAll('#grid b').length") == 0
    assert page.run(PROMPTS)[0] == "number 0 with <b>class 0</b>"


def test_few_cards_are_drawn_and_scrolling_draws_others(page):
    assert numbers(page) == list(range(len(numbers(page))))
    page.run("scrollTo(0, document.documentElement.scrollHeight)")
    page.wait(f"return {CARDS}.some(card => card.textContent.includes('number {COUNT - 1} '))")
    assert numbers(page)[0] > COUNT - 100
    assert page.run("return document.querySelectorAll('#grid article').length") < 100


def test_a_class_filters(page):
    choose(page, "class", "class 3")
    expected = [k for k in range(COUNT) if "class 3" in [thing["name"] for thing in row(k)["objects"]]]
    page.wait(f"{FACTS}.startsWith('{len(expected):,} of 10,000 images')")
    page.wait(f"return {CARDS}.length > 3")
    shown = numbers(page)
    assert shown == expected[: len(shown)]


def test_words_filter_and_nothing_says_so(page):
    choose(page, "find", "NUMBER 77 ", "input")
    page.wait(f"{FACTS}.startsWith('{sum('77' in str(k) for k in range(COUNT)):,} of')")
    page.wait(f"return {CARDS}.length > 3")
    assert numbers(page)[0] == 77
    choose(page, "find", "nowhere", "input")
    told = "document.getElementById('told')"
    page.wait(f"return {told}.textContent === 'Nothing matches.' && !{told}.hidden")
    assert page.run("return document.querySelectorAll('#grid article').length") == 0


@pytest.mark.parametrize(
    ("order", "key"),
    [
        ("worst", lambda k: row(k)["objects"][0]["score"]),
        ("best", lambda k: -row(k)["objects"][0]["score"]),
        ("area", lambda k: -round(row(k)["objects"][0]["area"] / SIZE**2, 4)),
    ],
)
def test_orders(page, order, key):
    choose(page, "order", order)
    expected = sorted(range(COUNT), key=key)
    page.wait(f"return {CARDS}.some(card => card.textContent.includes('number {expected[0]} '))")
    page.wait(f"return {CARDS}.length > 3")
    shown = numbers(page)
    assert [key(k) for k in shown] == [key(k) for k in expected[: len(shown)]]


def test_the_keyboard(page):
    """Enlarge, go to the next and back, and close; m changes how masks are drawn."""
    page.run("document.querySelector('#grid .picture').focus()")
    page.press("Enter")
    page.wait(f"{DIALOG} === 'number 0 with <b>class 0</b>'")
    page.press("ArrowRight")
    page.wait(f"{DIALOG} === 'number 1 with <b>class 1</b>'")
    page.press("ArrowRight", "ArrowLeft", "ArrowLeft")
    page.wait(f"{DIALOG} === 'number 0 with <b>class 0</b>'")
    page.press("ArrowLeft")  # before the first there is none
    assert page.run(DIALOG) == "number 0 with <b>class 0</b>"
    page.press("Escape")
    page.wait("return !document.getElementById('dialog').open")
    looks = []
    for _ in range(3):
        page.press("m")
        looks.append(page.run("return document.body.className"))
    assert looks == ["outlines", "off", "areas"]


def test_the_mouse(page):
    page.click("#grid .picture")
    page.wait(f"{DIALOG} === 'number 0 with <b>class 0</b>'")
    assert page.run("return document.querySelector('#dialog img').decode().then(() => true)")


def test_a_missing_file_is_told(chromium, data):
    chunk = data / "preview/000019.js"
    chunk.rename(data / "gone.js")
    try:
        chromium.open((data / "index.html").as_uri())
        chromium.wait(f"return {CARDS}.length > 3")
        chromium.run("scrollTo(0, document.documentElement.scrollHeight)")
        told = "preview/000019.js is missing; make the page again with gd-dataset preview"
        chromium.wait(f"return document.getElementById('told').textContent === '{told}'")
    finally:
        (data / "gone.js").rename(chunk)
        chromium.errors()
