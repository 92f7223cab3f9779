"""The pipeline on a real bundle: batches equal single runs, samplers, sizes, bad bundles and bad options."""

import json
import shutil
import warnings

import numpy as np
import pytest
from helpers.errors import relative_l2

from grounded_diffusion.bundle import UNET_GROUNDED, sha256
from grounded_diffusion.engine import GroundedPipeline, Options, Prompt
from grounded_diffusion.engine.sampling.batch import BatchRequest
from grounded_diffusion.engine.sampling.denoise import denoise
from grounded_diffusion.engine.sampling.noise import batch_normal
from grounded_diffusion.engine.sampling.schedule import SAMPLERS
from grounded_diffusion.errors import BackendError, BundleError, NumericsError, UsageError

NAMES = ("dog", "cat", "unicorn", "dragon", "rocket", "sea", "potted plant", "tv monitor")
# 1 to 8 objects, prompts of several lengths, seeds of their own.
MIXED = [
    Prompt(" and a ".join(["a photograph of a dog", *NAMES[1:n]]), NAMES[:n], seed=n if n % 3 == 0 else None)
    for n in range(1, 9)
]


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    return GroundedPipeline.open(tiny_bundle, threads=1)


def assert_same(got, expected):
    assert (got.index, got.prompt, got.names, got.seed, got.draw) == (
        expected.index, expected.prompt, expected.names, expected.seed, expected.draw,
    )  # fmt: skip
    assert relative_l2(got.latents, expected.latents) < 1e-5
    assert relative_l2(got.mask_logits, expected.mask_logits) < 1e-4
    assert np.abs(got.image.astype(int) - expected.image).max() <= 1
    for name in got.names:
        both, either = got.masks[name] & expected.masks[name], got.masks[name] | expected.masks[name]
        assert both.sum() >= 0.999 * either.sum()


def test_a_sample_has_what_it_says(pipe):
    (sample,) = pipe.generate("a photograph of a [dog] and a [cat]", steps=2, seed=7)
    assert sample.prompt == "a photograph of a dog and a cat" and sample.names == ("dog", "cat")
    assert sample.image.shape == (64, 64, 3) and sample.image.dtype == np.uint8
    assert sample.labels.shape == (64, 64) and set(np.unique(sample.labels)) <= {0, 1, 2}
    assert sample.mask_logits.shape[0] == 2 and sample.latents.shape == (4, 16, 16)
    for name, mask in sample.masks.items():
        found = sample.object(name)
        assert mask.shape == (64, 64) and mask.dtype == np.bool_ and mask.sum() == found.area
        x, y, width, height = found.box
        assert mask[y : y + height, x : x + width].sum() == mask.sum()
        assert 0.5 <= found.score <= 1 or not mask.any()
    assert np.array_equal(sample.labels > 0, sample.masks["dog"] | sample.masks["cat"])


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_a_mixed_batch_equals_single_runs(pipe, guidance_scale):
    options = Options(steps=3, guidance_scale=guidance_scale, seed=11)
    single = list(pipe.generate(MIXED, options, batch=1))
    for batch in (3, 8):
        whole = list(pipe.generate(MIXED, options, batch=batch))
        assert len(whole) == len(single) == 8
        for got, expected in zip(whole, single, strict=True):
            assert_same(got, expected)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipe):
    """The run's for prompts that have none of their own; "" of a line stands for none."""
    own = [Prompt("a dog", ("dog",), negative_prompt=text) for text in (None, "the sea", "")]
    rows = pipe.condition(own, "a red cat").context[:3]
    expected = pipe.text_encoder.contexts(["a red cat", "the sea", ""])
    assert np.array_equal(rows, expected)
    assert relative_l2(rows[0], rows[2]) > 0.1
    assert np.array_equal(pipe.condition(own[:1]).context[:1], expected[2:])


def test_images_with_a_negative_prompt_are_those_of_diffusers(pipe, tiny_checkpoint):
    """Steered away from something: PSNR of 50 dB to diffusers' own pipeline, and far from the image without."""
    torch = pytest.importorskip("torch")
    from grounded_diffusion.export.reference import reference_pipeline
    from grounded_diffusion.export.verify import psnr
    from grounded_diffusion.training.checkpoint import load_checkpoint

    noise = batch_normal([(7, 0)], (4, 16, 16))
    options = Options(steps=6, sampler="ddim", guidance_interval=(0.0, 1.0))
    plain, steered = (
        next(pipe.generate("a photograph of a [dog]", options, noise=noise, negative_prompt=text)).image
        for text in (None, "a rocket over the sea")
    )
    expected = reference_pipeline(load_checkpoint(tiny_checkpoint))(
        "a photograph of a dog", negative_prompt="a rocket over the sea", latents=torch.from_numpy(noise),
        num_inference_steps=6, guidance_scale=7.5, height=64, width=64, output_type="np",
    ).images[0]  # fmt: skip
    assert psnr(steered, (expected * 255).round()) >= 50
    assert psnr(steered, plain) < 40


def test_a_negative_prompt_that_is_too_long_is_told(pipe):
    with pytest.warns(UserWarning, match="the model does not see its end"):
        pipe.generate("a [dog]", negative_prompt="sea " * 100)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_and_batches_alike(pipe, sampler):
    single = list(pipe.generate(MIXED[:3], steps=4, sampler=sampler, batch=1))
    for got, expected in zip(pipe.generate(MIXED[:3], steps=4, sampler=sampler, batch=3), single, strict=True):
        assert_same(got, expected)
    assert relative_l2(single[0].latents, single[1].latents) > 0.1


CLASSES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp-2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}


@pytest.mark.parametrize(("guidance_scale", "interval"), [(4.0, (0.0, 1.0)), (1.0, (0.0, 1.0)), (4.0, (0.2, 0.7))])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_equals_one_around_the_diffusers_scheduler(pipe, monkeypatch, sampler, guidance_scale, interval):
    import diffusers
    import torch

    steps = 7
    config = dict(pipe.bundle.manifest.scheduler) | {"skip_prk_steps": True}
    scheduler = getattr(diffusers, CLASSES[sampler]).from_config(config)
    scheduler.set_timesteps(steps)
    keys = [(7, 0), (7, 1)]
    latents = torch.from_numpy(batch_normal(keys, (4, 16, 16))) * scheduler.init_noise_sigma
    context = pipe.condition([Prompt("a dog", ("dog",)), Prompt("a cat", ("cat",))]).context
    for i, t in enumerate(scheduler.timesteps):
        both = scheduler.scale_model_input(latents, t).repeat(2, 1, 1, 1).numpy()
        inputs = {"latents": both, "timestep": np.full(4, t, np.float32), "context": context}
        u, c = torch.from_numpy(pipe.backend.run("unet.onnx", inputs)["model_output"].copy()).chunk(2)
        noise = torch.from_numpy(batch_normal(keys, (4, 16, 16), i + 1))
        for kind in ("lcm", "euler_ancestral_discrete"):
            monkeypatch.setattr(f"diffusers.schedulers.scheduling_{kind}.randn_tensor", lambda *_, n=noise, **__: n)
        scale = guidance_scale if interval[0] <= 1 - float(t) / 999 <= interval[1] else 1.0
        latents = scheduler.step(u + scale * (c - u), t, latents, return_dict=False)[0]
    options = Options(steps=steps, sampler=sampler, guidance_scale=guidance_scale, guidance_interval=interval, seed=7)
    got = np.stack([sample.latents for sample in pipe.generate(["a [dog]", "a [cat]"], options)])
    assert relative_l2(got, latents.numpy()) < 1e-4


def test_the_captured_step_does_not_disturb_the_image(pipe):
    """Captured early or late, with the head's graph or the plain one, the latents come out the same."""
    schedule, size = pipe.schedule(Options(steps=4, sampler="ddim")), pipe.bundle.manifest.image_size
    noise, conditioning = batch_normal([(7, 0), (7, 1)], (4, 16, 16)), pipe.condition(MIXED[:2])
    for scale in (1.0, 5.0):
        runs = [
            denoise(pipe.backend, BatchRequest(schedule, conditioning, noise, size, scale, capture))
            for capture in (0, 2, 3)
        ]
        assert [run.capture_timestep for run in runs] == [751, 251, 1]
        for run in runs[1:]:
            assert relative_l2(run.latents, runs[0].latents) < 1e-5
            assert relative_l2(run.mask_logits, runs[0].mask_logits) > 1e-3


def test_without_guidance_the_unconditional_half_does_not_matter(pipe):
    (free,) = pipe.generate(MIXED[0], steps=3, guidance_scale=1.0)
    (nearly,) = pipe.generate(MIXED[0], steps=3, guidance_scale=1.0 + 1e-6)
    assert relative_l2(free.latents, nearly.latents) < 1e-4


def test_seeds_and_counts(pipe):
    prompts = [Prompt("a dog", ("dog",)), Prompt("a cat", ("cat",), seed=5, count=3)]
    samples = list(pipe.generate(prompts, steps=1, images_per_prompt=2, seed=7))
    assert [(s.index, s.prompt, s.seed, s.draw) for s in samples] == [
        (0, "a dog", 7, 0), (1, "a dog", 7, 1), (2, "a cat", 5, 0), (3, "a cat", 5, 1), (4, "a cat", 5, 2),
    ]  # fmt: skip
    alone = list(pipe.generate(prompts[1], steps=1, seed=99))  # its own seed: the same wherever it stands
    assert all(np.array_equal(a.latents, b.latents) for a, b in zip(alone, samples[2:], strict=True))


def test_skipping_changes_nothing_else(pipe):
    whole = list(pipe.generate(MIXED[:4], steps=2))
    rest = list(pipe.generate(MIXED[:4], steps=2, skip={0, 2}))
    assert [s.index for s in rest] == [1, 3]
    for got in rest:
        assert_same(got, whole[got.index])


def test_noise_may_be_given(pipe):
    (drawn,) = pipe.generate("a [dog]", steps=2, seed=3)
    (given,) = pipe.generate("a [dog]", steps=2, seed=99, noise=batch_normal([(3, 0)], (4, 16, 16)))
    assert np.array_equal(drawn.latents, given.latents) and np.array_equal(drawn.image, given.image)
    with pytest.raises(UsageError, match=r"noise must have shape \[1, 4, 16, 16\]"):
        pipe.generate("a [dog]", noise=np.zeros((2, 4, 16, 16), np.float32))


def test_other_sizes(pipe):
    multiple = pipe.bundle.manifest.size_multiple
    size = (2 * multiple, 3 * multiple)
    (sample,) = pipe.generate("a [dog]", steps=2, size=size)
    assert sample.image.shape == (*size, 3) and sample.labels.shape == size and sample.masks["dog"].shape == size


def test_threshold(pipe):
    low, high = (next(pipe.generate("a [dog]", steps=2, threshold=t)).object("dog").area for t in (0.01, 0.99))
    assert low > high


def test_same_prompt_is_encoded_once(tiny_bundle):
    pipe = GroundedPipeline.open(tiny_bundle, threads=1)
    encoded, run = [], pipe.backend.run

    def counting(graph, inputs):
        encoded.extend([graph] * len(inputs.get("input_ids", ())))
        return run(graph, inputs)

    pipe.backend.run = counting
    list(pipe.generate(["a [dog]"] * 5 + ["a [cat] and a [dog]"], steps=1, batch=2))
    assert len(encoded) == 5  # two prompts, the empty one, two objects


def test_query_is_the_mean_over_the_name(pipe):
    """Against the tokenizer's own word boundaries: the sub-tokens between those of the template's start and the end."""
    template = pipe.bundle.manifest.query_template
    start = len(pipe.tokenizer.encode(template.split("{}")[0]).spans)
    for name in ("dog", "potted plant", "zyxwv"):
        queries, valid = pipe.text_encoder.queries([(name,), (name, "dog")][: 1 + (name != "dog")])
        tokens = pipe.tokenizer.encode(template.format(name))
        context = pipe.text_encoder.contexts([template.format(name)])[0]
        expected = context[1 + start : 1 + len(tokens.spans)].mean(0)
        assert np.allclose(queries[0, 0], expected, atol=1e-6) and valid[0].tolist()[0]


def test_a_long_prompt_warns_and_goes_on(pipe):
    prompt = "a [dog] " + "and a cat next to a dragon " * 11 + "zzz"
    with pytest.warns(UserWarning, match="over 77 tokens.*zzz"):
        (sample,) = pipe.generate(prompt, steps=1)
    assert sample.image.shape == (64, 64, 3)
    tokens = pipe.tokenizer.encode(Prompt(prompt.replace("[", "").replace("]", ""), ("dog",)).text)
    kept = prompt.replace("[dog]", "dog")[: tokens.spans[-1][1]].split()
    assert (*kept, *tokens.dropped) == tuple(prompt.replace("[dog]", "dog").split())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.generate("a [dog]")


def test_tokens_equal_those_of_transformers(pipe, tiny_checkpoint):
    from transformers import CLIPTokenizer

    reference = CLIPTokenizer.from_pretrained(tiny_checkpoint / "tokenizer")
    for text in ("", "a dog", "A photograph of a Potted Plant!", "café ünïcorn 🦄", "a dog and a cat " * 40):
        ids = reference(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert pipe.tokenizer.encode(text).ids.tolist() == ids


BAD_OPTIONS = [
    ({"steps": 0}, "steps must be a whole number from 1"),
    ({"guidance_scale": 0.5}, "guidance_scale must be a number from 1 to 100"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval must be \(start, end\)"),
    ({"sampler": "heun"}, "unknown sampler 'heun'; choose one of ddim"),
    ({"seed": -1}, "seed must be"),
    ({"images_per_prompt": 0}, "images_per_prompt must be"),
    ({"batch": 0}, "batch must be"),
    ({"threshold": 1.0}, "threshold must be"),
    ({"size": "64"}, "size must be"),
    ({"size": 0}, "size must be"),
    ({"size": 70}, "height 70 is not divisible by"),
    ({"size": (64, 100)}, "width 100 is not divisible by"),
    ({"sampler": "lcm", "steps": 51}, "at most 50 steps"),
]


@pytest.mark.parametrize(("option", "message"), BAD_OPTIONS)
def test_bad_options_fail_before_anything_runs(pipe, option, message):
    with pytest.raises(UsageError, match=message):
        pipe.generate("a [dog]", **option)


def test_object_names_the_model_cannot_take(pipe):
    with pytest.raises(UsageError, match="too long for the model's 77 tokens"):
        pipe.generate(Prompt("a dog", ("🦄" * 60,)))


def damaged(tiny_bundle, folder, change):
    copy = folder / "bundle"
    shutil.copytree(tiny_bundle, copy)
    change(copy)
    return copy


def edit_manifest(**changes):
    def change(bundle):
        file = bundle / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def flip_a_byte(bundle):
    file = bundle / UNET_GROUNDED
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


BAD_BUNDLES = {
    "no manifest": (lambda bundle: (bundle / "manifest.json").unlink(), "has no manifest.json"),
    "changed byte": (flip_a_byte, "has changed since export"),
    "newer schema": (edit_manifest(schema=99), "upgrade grounded-diffusion"),
    "missing file": (lambda bundle: (bundle / "vae_decoder.onnx").unlink(), "is missing"),
}


@pytest.mark.parametrize("case", BAD_BUNDLES)
def test_damaged_bundles_are_refused(tiny_bundle, tmp_path, case):
    change, message = BAD_BUNDLES[case]
    with pytest.raises(BundleError, match=message):
        GroundedPipeline.open(damaged(tiny_bundle, tmp_path, change))
    with pytest.raises(BundleError, match="there is no bundle at"):
        GroundedPipeline.open(tmp_path / "absent")


def replace_file(name, content):
    def change(bundle):
        (bundle / name).write_bytes(content)
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"][name] = sha256(bundle / name)
        (bundle / "manifest.json").write_text(json.dumps(manifest))

    return change


def test_a_graph_that_does_not_load(tiny_bundle, tmp_path):
    pipe = GroundedPipeline.open(damaged(tiny_bundle, tmp_path, replace_file("cpu/unet.onnx", b"not a graph")))
    with pytest.raises(BackendError, match=r"cannot load .*cpu/unet\.onnx") as caught:
        next(pipe.generate("a [dog]", steps=2))
    assert "\n" not in str(caught.value)


def test_a_graph_in_the_place_of_another(tiny_bundle, tmp_path):
    decoder = (tiny_bundle / "vae_decoder.onnx").read_bytes()
    pipe = GroundedPipeline.open(damaged(tiny_bundle, tmp_path, replace_file("text_encoder.onnx", decoder)))
    with pytest.raises(BackendError, match="not those of the bundle format"):
        next(pipe.generate("a [dog]", steps=1))


def test_a_tokenizer_that_is_none(tiny_bundle, tmp_path):
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        GroundedPipeline.open(damaged(tiny_bundle, tmp_path, replace_file("tokenizer.json", b"{}")))


def test_numerics_name_stage_step_and_sample(pipe):
    noise = batch_normal([(1, 0), (1, 1)], (4, 16, 16))
    noise[1, 0, 3, 3] = np.nan
    with pytest.raises(NumericsError, match="sample 1: the latents at step 1 of 2 are not finite"):
        list(pipe.generate(["a [dog]", "a [cat]"], steps=2, noise=noise))


def test_outputs_survive_the_next_run(pipe):
    """The backend reuses its buffers; what the pipeline hands out must not change afterwards."""
    first = next(iter(pipe.generate("a [dog]", steps=2, seed=1)))
    copies = [first.image.copy(), first.latents.copy(), first.mask_logits.copy(), first.masks["dog"].copy()]
    list(pipe.generate("a [dog]", steps=2, seed=2))
    for before, now in zip(copies, [first.image, first.latents, first.mask_logits, first.masks["dog"]], strict=True):
        assert np.array_equal(before, now)
