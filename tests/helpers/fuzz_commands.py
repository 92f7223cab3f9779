"""What the fuzz test gives to each command: sound files, ways to damage them, and command lines. See fuzz.py."""

import contextlib
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from grounded_diffusion.bundle import GRAPHS, MANIFEST, TOKENIZER, Manifest, sha256, write_manifest
from grounded_diffusion.engine.backends.open import BACKENDS, DEFAULT_BACKEND
from grounded_diffusion.engine.cli import dataset, prompts
from helpers import null_backend
from helpers.fuzz_damage import damage, odd_value
from helpers.fuzz_lines import (
    bench_lines,
    dataset_lines,
    eval_lines,
    export_lines,
    infer_lines,
    prompts_lines,
    train_lines,
)

CHECKOUT = Path(__file__).resolve().parents[2]
PROMPTS = 'a photograph of a [dog] and a [cat]\n# a comment\n{"prompt": "the sea", "objects": ["boat"], "count": 2}\n'
TOML = """
latents = 8
examples = 8
[world]
size = 32
[stages.vae]
steps = 2
batch = 4
[stages.unet]
steps = 2
"""
FIGURES = {"things.split1.oracle.one_seen": 80.5, "things.oracle.one_seen": 80.5, "about.things": "28 names",
           "things.split1.oracle.name.dog": 81, "about.things.unseen": "dog", "about.things.page.exact": "a.webp",
           "ablation.timestep.t1.oracle.one_seen": 70, "ablation.timestep.t401.oracle.one_seen": 60.25,
           "pascal.oracle.one_seen": 91.0}  # fmt: skip
SETTINGS = '[{"steps": 2}, {"steps": 4, "sampler": "ddim"}]'


@dataclass
class Command:
    """A command: how to run it, the statuses that it may end with, and the lines it may make."""

    name: str
    main: Callable
    statuses: tuple[int, ...]
    lines: Callable  # (rng, given) -> words of a sound command line
    files: tuple[str, ...]  # folders and files of `given` that it reads, one of which may be damaged
    in_place: tuple[str, ...] = ()  # what of a data set it may change
    chatter: tuple[str, ...] = ()  # what lines begin with that are no refusal

    def case(self, rng, given):
        """A command line, after some file was damaged or with some word put in or changed."""
        words, told = [str(word) for word in self.lines(rng, given)], ""
        how = rng.random()
        if how < 0.55:
            named = lambda name: any(word.startswith(str(given / name)) for word in words)
            read = [name for name in self.files if named(name)] or self.files
            told = damage(rng, given, read)
            if "bundle" in told and rng.random() < 0.5:
                sign_bundle(given / "bundle")
        if how > 0.45:
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                words = self.twist(rng, words, given)
        return Case(self, words, told)

    def twist(self, rng, words, given):
        """The words with one changed, dropped or put in."""
        words = list(words)
        at = rng.randrange(len(words)) if words else 0
        what = rng.random()
        if what < 0.55 and words:
            places = [k for k, word in enumerate(words) if not word.startswith("--")]
            at = rng.choice(places) if places else at
            words[at] = odd_value(rng, given)
        elif what < 0.65 and words:
            del words[at]
        elif what < 0.75 and words:
            words.insert(at, words[at])
        elif what < 0.9:
            words.insert(at, odd_value(rng, given))
        else:
            words[at:at] = [rng.choice(("--version", "--help", "--overwrite", "--bogus", "--seed", "--out"))]
        return words


@dataclass
class Case:
    """One input."""

    command: Command
    words: list[str] = field(default_factory=list)
    damaged: str = ""

    def run(self):
        return self.command.main(self.words)

    def may_touch(self, name):
        """Whether the command may change a file of `given`."""
        top, _, rest = name.partition("/")
        if self.command.main is prompts.main:  # what is there is replaced where that is asked for
            return "--overwrite" in self.words and any(word.endswith(f"/{name}") for word in self.words)
        if self.command.main is infer and "--overwrite" in self.words:
            return top in ("data", "coco")  # a run of another format
        if top == "empty":  # an output like any other, where it is given as one
            given = any(option == "--out" and word.endswith("/empty") for option, word in pairwise(self.words))
            return given or self.command.main is infer
        of_a_data_set = any(rest == path or rest.startswith(f"{path}/") for path in self.command.in_place)
        return top in ("data", "coco") and of_a_data_set

    def __str__(self):
        line = " ".join(shlex.quote(word) if len(word) < 80 else f"{word[:30]!r}..." for word in self.words)
        return f"{self.command.name} {line.encode('utf-8', 'backslashreplace').decode()}" + (
            f"   [{self.damaged}]" if self.damaged else ""
        )


def write_bundle(folder):
    """A bundle whose graphs are empty, for a backend without a network."""
    folder.mkdir()
    for name in GRAPHS:
        (folder / name).write_bytes(b"graph")
    tokenizer = json.loads((CHECKOUT / "models/things-64/tokenizer/tokenizer.json").read_text())
    (folder / TOKENIZER).write_text(json.dumps(tokenizer))
    ids = tokenizer["model"]["vocab"]
    scheduler = json.loads((CHECKOUT / "models/things-64/scheduler/scheduler_config.json").read_text())
    write_manifest(folder, Manifest(
        family="stable-diffusion", image_size=(16, 16), vae_scale_factor=4, latent_channels=4, size_multiple=16,
        context_length=77, context_dim=8, pad_token_id=ids["<|endoftext|>"], bos_token_id=ids["<|startoftext|>"],
        eos_token_id=ids["<|endoftext|>"], scheduler=scheduler, capture_timestep=1, precision="fp32",
        query_template="a photograph of a {}", head={"variant": "released"}, names={"seen": ["dog"]},
        files={name: sha256(folder / name) for name in (*GRAPHS, TOKENIZER)},
    ))  # fmt: skip


def sign_bundle(folder):
    """Have the manifest of a damaged bundle, where it can still be read, say the SHA-256 of what is there."""
    if not all(path.is_file() for path in folder.iterdir()):  # a device has no end
        return
    with contextlib.suppress(OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"] = {name: sha256(folder / Path(name).name) for name in manifest["files"]}
        (folder / MANIFEST).write_text(json.dumps(manifest))


def prepare(root):
    """(sound files, where commands are started, a home) in a new folder."""
    given, place, home = (root / name for name in ("given", "place", "home"))
    for folder in (given, place, home):
        folder.mkdir()
    write_bundle(given / "bundle")
    (given / "prompts.txt").write_text(PROMPTS)
    (given / "names.txt").write_text("dog\ncat\nboat\n")
    (given / "pairs.txt").write_text("dog, cat\n")
    (given / "templates.txt").write_text("a {}\na {} and a {}\n")
    (given / "run.toml").write_text(TOML)
    (given / "infer.toml").write_text('images-per-prompt = 2\nseed = 3\nnames = ["dog", "cat", "boat"]\n')
    (given / "settings.json").write_text(SETTINGS)
    (given / "empty").mkdir()
    (given / "measured").mkdir()
    (given / "measured" / "figures.json").write_text(json.dumps(FIGURES))
    (given / "model.safetensors").write_bytes(b'\x10\0\0\0\0\0\0\0{"a": {}}       ')
    with without_a_model(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model = ["--model", given / "bundle", "--steps", "1", "--batch", "2", "--threads", "1", "--shard-size", "3"]
        for out, format in (("data", "folder"), ("coco", "coco")):
            command = [*model, "--prompts", given / "prompts.txt", "--out", given / out, "--format", format]
            assert infer([*map(str, command), "--images-per-prompt", "2"]) == 0
    return given, place, home


def infer(words):
    from grounded_diffusion.engine.cli.infer import main

    return main(words)


def train(words):
    from grounded_diffusion.training.cli import main

    return main(words)


def export(words):
    from grounded_diffusion.export.cli import main

    return main(words)


def bench(words):
    from grounded_diffusion.bench.cli import main

    return main(words)


def evaluate(words):
    from grounded_diffusion.training.evaluation.cli import main

    return main(words)


def load_torch():
    """Load all that training, export and bench load."""


@contextlib.contextmanager
def without_a_model():
    """A network that costs nothing in the place of ONNX Runtime."""
    before = BACKENDS[DEFAULT_BACKEND]
    BACKENDS[DEFAULT_BACKEND] = null_backend.backend_of(null_backend.NullBackend)
    try:
        yield
    finally:
        BACKENDS[DEFAULT_BACKEND] = before


IN_PLACE = ("README.md", "card.png", "train.txt", "val.txt", "index.html", "preview", "shards/finish.json", ".partial")
RUN = (*IN_PLACE, "run.json", "summary.json", "shards", "images", "masks", "objects", "metadata.jsonl")
COMMANDS = {
    command.name: command
    for command in (
        Command("gd-infer", infer, (0, 1, 2, 3), infer_lines,
                ("bundle", "prompts.txt", "names.txt", "data", "infer.toml"), RUN,
                ("gd-infer: warning", "gd-infer: computing", "gd-infer: skipped")),
        Command("gd-dataset", dataset.main, (0, 1, 2), dataset_lines, ("data", "data", "coco", "names.txt", "bundle"),
                IN_PLACE),
        Command("gd-prompts", prompts.main, (0, 2), prompts_lines, ("names.txt", "pairs.txt", "templates.txt")),
        Command("gd-train", train, (0, 1, 2), train_lines, ("run.toml", "names.txt", "data", "bundle/manifest.json")),
        Command("gd-export", export, (0, 1, 2), export_lines, ("bundle", "model.safetensors")),
        Command("gd-eval", evaluate, (0, 1, 2), eval_lines, ("measured", "run.toml", "names.txt", "pairs.txt"),
                chatter=("gd-eval: warning",)),
        Command("gd-bench", bench, (0, 1, 2), bench_lines, ("settings.json", "bundle")),
    )
}  # fmt: skip
LIGHT = ("gd-infer", "gd-dataset", "gd-prompts")  # without torch
