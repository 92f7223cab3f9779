"""From a model and a detector that nobody has seen before to images with masks, by the commands of a user."""

import json

from grounded_diffusion.bundle import open_bundle
from grounded_diffusion.engine.cli import infer
from grounded_diffusion.export import cli as export
from grounded_diffusion.training import cli
from grounded_diffusion.training.checkpoint import load_checkpoint

SETTINGS = "iterations = 6\nbatch = 4\nvalidate_every = 3\nsave_every = 2\n[head]\nembed_dim = 32\nheads = 2\n"
SETTINGS += "ffn_dim = 32\npatch = 2\nreduced_channels = [8, 16]\n"


def gd_train(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_examples_head_pack_export_infer(base, examples, held_out, tmp_path, capsys):
    settings, checkpoint, bundle, data = (tmp_path / name for name in ("head.toml", "checkpoint", "bundle", "data"))
    settings.write_text(SETTINGS)
    train = ["head", "--base", base, "--examples", examples, "--validate", held_out, "--config", settings]
    assert gd_train(*train, "--out", checkpoint, "--device", "cpu") == 0
    assert "mIoU" in capsys.readouterr().out
    loaded = load_checkpoint(checkpoint)
    assert loaded.names == {"seen": ["cat", "dog", "tv monitor"], "unseen": ["deer"]}
    assert loaded.capture_timestep == 1
    measured = json.loads((checkpoint / "grounding.json").read_text())
    assert {"miou_seen", "miou_unseen", "by_name", "step", "score"} == set(measured["validation"])
    assert sum(counts["images"] for counts in measured["yields"].values()) >= 24
    card = (checkpoint / "README.md").read_text()
    assert str(tmp_path) not in card
    for word in ("mask2former", "deer", "dog", "cpu", "grounding.webp"):
        assert word in card
    assert (checkpoint / "grounding.webp").stat().st_size > 1000
    assert export.main(["--ckpt", str(checkpoint), "--out", str(bundle)]) == 0
    assert open_bundle(bundle).manifest.names["unseen"] == ["deer"]
    prompt = "a photograph of a [dog] and a [deer]"
    options = ["--model", bundle, "--prompt", prompt, "--out", data, "--steps", 3, "--images-per-prompt", 2]
    assert infer.main([str(option) for option in options]) == 0
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    assert [thing["name"] for row in rows for thing in row["objects"]] == ["dog", "deer"] * 2
