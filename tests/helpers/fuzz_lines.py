"""Sound command lines of every command, for the fuzz test. See fuzz.py."""

from grounded_diffusion.engine.dataset.formats import FORMATS


def infer_lines(rng, given):
    words = ["--model", given / "bundle", "--steps", "1", "--batch", "2", "--threads", "1", "--shard-size", "3"]
    words += rng.choice([["--prompts", given / "prompts.txt"], ["--prompt", "a [dog]"], ["--prompt", "a [dog] on [x]"]])
    words += ["--out", rng.choice(["out", "out", "deep/er", given / "data"]), "--format", rng.choice(list(FORMATS))]
    options = [["--images-per-prompt", "2"], ["--min-area", "0.1"], ["--require-masks"], ["--seed", "3"],
               ["--names", given / "names.txt"], ["--void-border", "1"], ["--log", "log.jsonl"], ["--dry-run"],
               ["--metrics-file", "m.prom"], ["--jpeg-quality", "80"], ["--shard", "0/2"], ["--size", "16"],
               ["--negative-prompt", "x"], ["--sampler", "ddim"], ["--guidance-interval", "0", "0.5"],
               ["--val", "0.5"], ["--config", given / "infer.toml"], ["--config", given / "data" / "run.json"],
               ["--instances", "components"], ["--skip-bad-lines"], ["--quiet"], ["--json"], ["--lanes", "1"],
               ["--min-presence", "0.5"], ["--min-distance", "4"], ["--void-band", "0.3", "0.7"], ["--attempts", "1"],
               ["--polygons"], ["--png"], ["--instance-area", "0.01"], ["--threshold", "0.4"], ["--max-overlap", "0.5"],
               ]  # fmt: skip
    return [*words, *(word for option in rng.sample(options, rng.randrange(4)) for word in option)]


def dataset_lines(rng, given):
    data = rng.choice([given / "data", given / "data", given / "coco"])
    return rng.choice([
        ["verify", data], ["stats", data], ["stats", data, "--json", "--plot", "p.svg"], ["status", data],
        ["status", data, "--json"], ["preview", data], ["card", data, "--license", "mit", "--title", "A: b"],
        ["card", data, "--model", given / "bundle", "--overwrite"], ["split", data, "--val", "0.5"],
        ["merge", data, given / "coco", "--out", "merged"], ["merge", data, data, "--out", "merged"],
        *([["convert", data, "--format", name, "--out", "converted"] for name in ("voc", "coco", "yolo-seg")]),
        ["convert", data, "--format", "webdataset", "--names", given / "names.txt", "--out", "converted"],
    ])  # fmt: skip


def prompts_lines(rng, given):
    words = rng.choice([["--vocabulary", "voc"], ["--names", given / "names.txt"], ["--names", "voc"]])
    options = [["--pairs", given / "pairs.txt"], ["--templates", given / "templates.txt"], ["--shuffle-seed", "1"],
               ["--per-name", "7"], ["--per-pair", "0"], ["--overwrite"]]  # fmt: skip
    more = (word for option in rng.sample(options, rng.randrange(5)) for word in option)
    return [*words, "--out", rng.choice(["prompts.jsonl", "deep/p.jsonl", given / "prompts.txt"]), *more]


def train_lines(rng, given):
    """Nothing that would train: what a stage needs is not there, or its configuration is damaged."""
    names = ["--names", given / "names.txt", "--unseen", given / "pairs.txt"]
    return rng.choice([
        *([[stage, "--config", given / "run.toml", "--run", given / "empty"] for stage in ("labeller", "judge")]),
        ["head", "--base", given / "empty", "--examples", given / "data", "--out", "head", "--config",
         given / "run.toml"],
        ["examples", "--model", given / "bundle", "--detector", given / "empty", "--out", "examples", *names],
        ["real", "--base", given / "empty", "--coco", given / "settings.json", "--images", given / "empty", "--out",
         "real", *names],
        ["real", "--base", given / "empty", "--rendered", "8", "--out", "real", *names],
        ["real", "--base", given / "empty", "--voc", given / "data", "--out", "real", *names],
        ["distill", "--base", given / "empty", "--model", given / "bundle", "--prompts", given / "prompts.txt", "--out",
         "student", "--timesteps", "999,500"],
    ])  # fmt: skip


def export_lines(rng, given):
    return rng.choice([
        ["--ckpt", given / "empty", "--out", "bundle"], ["--base", given / "model.safetensors", "--out", "bundle"],
        ["--ckpt", given / "model.safetensors", "--base", given / "empty", "--out", "bundle"],
        ["--bundle", given / "bundle", "--engine", "tensorrt", "--batch", "1,x"],
        ["--base", given / "empty", "--lora", f"{given / 'names.txt'}:0.5", "--out", given / "data"],
    ])  # fmt: skip


def bench_lines(rng, given):
    """Nothing that would measure: one value is always refused."""
    return rng.choice([
        ["speed", "--model", given / "empty", "--peers", "nobody"],
        ["speed", "--backend", "onnxruntime", "--backend", "cuda", "--model", given / "empty"],
        ["quality", "--settings", given / "settings.json", "--model", given / "empty"],
        ["quality", "--setting", "steps=x", "--model", given / "empty", "--ckpt", given / "empty"],
        ["grounding", "--size", "none", "--threads", "0"],
    ])  # fmt: skip


def eval_lines(rng, given):
    """A report of figures, or nothing that would measure: there is no model, detector or image."""
    names = ["--names", given / "names.txt", "--unseen", given / "pairs.txt"]
    lab = ["--detector", given / "empty", "--base", given / "empty", "--out", "lab"]
    return rng.choice([
        *([["report", given / "measured", "--truth", "t.json", "--out", "page.md"]] * 3),
        ["report", given / "empty", "--truth", given / "measured" / "figures.json", "--out", "page.md"],
        ["protocol1", *lab, *names, "--config", given / "run.toml"], ["protocol1", *lab, "--vocabulary", "voc"],
        ["protocol1", *lab, *names, "--coco", given / "settings.json", "--images", given / "empty"],
        ["protocol2", *lab, *names, "--rendered", "things", "--network-iterations", "1"],
        ["protocol2", *lab, *names, "--voc", given / "data", "--network", given / "empty"],
        ["ablation", "timestep", *lab, *names, "--timesteps", "1", "801"],
        ["ablation", "real", *lab, *names, "--voc", given / "data", "--aliases", given / "pairs.txt"],
    ])  # fmt: skip
