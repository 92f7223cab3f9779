"""Data set cards, read back by the hub's own library."""

import io
import json
import shutil

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from PIL import Image

from grounded_diffusion.bundle import MANIFEST, sha256
from grounded_diffusion.engine.cli.dataset import main
from grounded_diffusion.engine.dataset import card as dataset_card
from grounded_diffusion.engine.dataset import sheet as card_sheet
from grounded_diffusion.engine.dataset.card import Contents, Counts, classes_table, front_matter
from grounded_diffusion.engine.dataset.formats.tables import yaml_string
from grounded_diffusion.engine.dataset.shards import Recording, note_files
from grounded_diffusion.engine.dataset.storage.open import open_storage
from grounded_diffusion.engine.prompts.vocabulary import THINGS_NAMES

SETTINGS = {"sampler": "ddim", "steps": 25, "guidance_scale": 7.5, "seed": 0, "samples": 12, "min_area": None,
            "prompts": "b" * 64, "require_masks": False}  # fmt: skip
SUMMARY = {"samples": 12, "accepted": 9, "rejected": 2, "quarantined": 1, "reasons": {"NaN": 1, "no mask": 2}}


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A manifest of a model that knows the shipped model's names; the cache holds no other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "bundle"
    folder.mkdir()
    manifest = {
        "family": "stable-diffusion", "image_size": [64, 64], "vae_scale_factor": 4, "latent_channels": 4,
        "size_multiple": 16, "context_length": 77, "context_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "scheduler": {}, "capture_timestep": 1, "query_template": "a {}", "head": {},
        "precision": "fp32", "names": {"seen": list(THINGS_NAMES[:20]), "unseen": list(THINGS_NAMES[20:])}, "schema": 1,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def run(data, bundle):
    """The shared data set with the settings and summary of a run."""
    settings = {"model": sha256(bundle / MANIFEST), **SETTINGS}
    storage = Recording(open_storage(data))
    storage.put("run.json", json.dumps({"format": "folder", "settings": settings}).encode())
    storage.put("summary.json", json.dumps(SUMMARY).encode())
    note_files(storage)
    return data


def test_card(run, bundle, blobs, capsys):
    arguments = ["card", str(run), "--title", 'Blobs: "nine" | ü', "--license", "cc-by-4.0", "--model", str(bundle)]
    assert main(arguments) == 0
    assert "9 images with 3 classes" in capsys.readouterr().out
    card = DatasetCard.load(run / "README.md")
    assert card.data.pretty_name == 'Blobs: "nine" | ü'
    assert card.data.license == "cc-by-4.0"
    assert card.data.task_categories == ["image-segmentation", "object-detection"]
    assert card.data.size_categories == ["n<1K"]
    assert card.data.tags == ["synthetic", "grounded-diffusion"]
    samples = [blobs.sample(index) for index in range(blobs.count)]
    cats = [sample for sample in samples if "cat" in sample.names]
    area = np.mean([sample.object("cat").area / (40 * 56) for sample in cats])
    assert f"| cat | {len(cats)} | 0 | {area:.1%} | 0.750 |" in card.text
    tvs = [sample.object("tv monitor").area for sample in samples]
    assert f"| tv monitor | 9 | {tvs.count(0)} |" in card.text
    for told in (sha256(bundle / MANIFEST), "| sampler | ddim |", "| steps | 25 |", "| seed | 0 |"):
        assert told in card.text
    for told in ("9 of 12 accepted (NaN: 1; no mask: 2)", "training/things/bank", "FolderDataset", "](card.png)"):
        assert told in card.text
    assert "min area" not in card.text
    assert "require masks" not in card.text
    before = (run / "README.md").read_bytes(), (run / "card.png").read_bytes()
    assert main(arguments) == 0
    assert ((run / "README.md").read_bytes(), (run / "card.png").read_bytes()) == before
    assert main(["verify", str(run)]) == 0


def test_a_summary_that_gives_no_reasons(run, bundle):
    (run / "summary.json").write_text(json.dumps({key: value for key, value in SUMMARY.items() if key != "reasons"}))
    assert main(["card", str(run), "--model", str(bundle)]) == 0
    assert "9 of 12 accepted |" in (run / "README.md").read_text(encoding="utf-8")


def test_the_shipped_model_is_found_in_the_cache(run, bundle, tmp_path):
    assert main(["card", str(run)]) == 0
    assert "training/things/bank" not in (run / "README.md").read_text()
    shutil.copytree(bundle, tmp_path / "cache/grounded-diffusion/things-64-0123")
    assert main(["card", str(run)]) == 0
    assert "training/things/bank" in (run / "README.md").read_text()


def test_sheet(run, blobs):
    assert main(["card", str(run)]) == 0
    sheet = np.asarray(Image.open(run / "card.png"))
    side, gap, text = card_sheet.SIDE, card_sheet.GAP, card_sheet.TEXT
    lines = 3  # nine samples
    assert sheet.shape == (gap + lines * (side + text + gap), gap + card_sheet.COLUMNS * (2 * side + gap), 3)
    small = Image.fromarray(blobs.sample(0).image).resize((side, round(40 * side / 56)), Image.Resampling.NEAREST)
    top = gap + (side - small.height) // 2
    assert np.array_equal(sheet[top : top + small.height, gap : gap + side], np.asarray(small))


def test_overlay_has_the_labels_colours():
    labels = np.array([[0, 1, 2, 255]], np.uint8)
    shown = card_sheet.overlay(np.full((1, 4, 3), 100, np.uint8), labels)
    assert shown[0].tolist() == [[45, 45, 45], [178, 50, 50], [50, 178, 50], [178, 178, 178]]


def test_sheet_shows_every_class():
    rows = [{"index": k, "objects": [{"name": "cat" if k < 3000 else "dog", "area": k % 2}]} for k in range(5000)]
    chosen = card_sheet.choose(rows)
    assert len(chosen) == card_sheet.SAMPLES
    assert [row["index"] for row in chosen] == sorted(row["index"] for row in chosen)
    assert {thing["name"] for row in chosen for thing in row["objects"]} == {"cat", "dog"}
    assert card_sheet.choose(rows[:1]) == []  # nothing to see
    assert Image.open(io.BytesIO(card_sheet.draw_sheet(None, []))).size[0] > 0


@pytest.mark.parametrize("format", ["hf-imagefolder", "hf-parquet"])
def test_hugging_face_keeps_its_columns(blobs, tmp_path, format):
    from datasets import load_dataset

    out = blobs.convert(tmp_path / format, format)
    before = DatasetCard.load(out / "README.md").data.to_dict()
    for _ in range(2):
        assert main(["card", str(out), "--license", "mit"]) == 0
    card = DatasetCard.load(out / "README.md")
    after = card.data.to_dict()
    assert after["configs"] == before["configs"]
    assert after["dataset_info"] == before["dataset_info"]
    assert after["license"] == "mit"
    assert "| 1 | cat |" in card.text
    assert "| 3 | tv monitor |" in card.text
    assert "card.png" not in card.text
    assert "load_dataset" in card.text
    assert main(["verify", str(out)]) == 0
    data = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 6, "validation": 3}


@pytest.mark.parametrize("format", ["coco", "voc", "webdataset", "yolo"])
def test_other_formats(blobs, tmp_path, format):
    out = blobs.convert(tmp_path / format, format)
    assert main(["card", str(out)]) == 0
    text = DatasetCard.load(out / "README.md").text
    assert f"The format is `{format}`" in text and "## Recipe" not in text
    assert main(["verify", str(out)]) == 0


def test_what_is_refused(run, bundle, tmp_path, capsys):
    refused = lambda *arguments: (main(["card", *map(str, arguments)]), capsys.readouterr().err)
    for arguments, told in (
        ([tmp_path / "nowhere"], "is no finished data set"),
        ([run, "--license", "My Own"], "--license takes"),
    ):
        code, line = refused(*arguments)
        assert code == 2
        assert told in line
        assert line.count("\n") == 1
    (bundle / MANIFEST).write_text("{}")
    code, line = refused(run, "--model", bundle)
    assert code == 2
    assert "is not the model of this data set" in line
    (run / "README.md").write_text("# mine\n")
    code, line = refused(run)
    assert code == 2
    assert "--overwrite replaces it" in line
    assert main(["card", str(run), "--overwrite"]) == 0
    assert "# mine" not in (run / "README.md").read_text()


def test_an_unfinished_run_is_refused(run, capsys):
    (run / "shards/finish.json").unlink()
    assert main(["card", str(run)]) == 2
    assert "gd-dataset status" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "size"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**7, "10M<n<100M"), (10**10, "10B<n<100B"), (10**12, "n>1T")],
)
def test_size_categories(images, size):
    assert f"\n- {size}\n" in front_matter("x", None, images, "")


def test_many_classes_and_awkward_names():
    classes = {f"a|{k}": Counts(k, 1) for k in range(dataset_card.SHOWN + 5)}
    text = classes_table(Contents(1, set(), classes), "folder")
    assert text.count("\n| a\\|") == dataset_card.SHOWN
    assert "and 5 more" in text


@pytest.mark.parametrize(
    "title", ["\x7f", "a\u2028b", "\ufeff", "\U0001f600", "tab\there", 'quote " and \\ slash', "\x85", "ü: #"]
)
def test_yaml_takes_any_title(title):
    found = yaml.safe_load(front_matter(title, None, 1, "").strip("-\n"))
    assert found["pretty_name"] == title
    for ascii in (False, True):
        assert yaml.safe_load(f"name: {yaml_string(title, ascii)}")["name"] == title
    assert yaml_string(title, ascii=True).isascii()


def test_the_card_tells_what_is_true_of_seeds(run, blobs):
    """All of these samples have one seed; each has a draw of its own."""
    assert main(["card", str(run)]) == 0
    text = (run / "README.md").read_text()
    assert "own seed" not in text
    assert "`seed` and `draw`" in text
