"""Training of the grounding head on examples (section 3.3.3 of the paper).

Each step takes a batch of examples, reads the frozen model's features by one UNet call, and moves the head alone.
Everything random in a step comes from (seed, step), so a run that was stopped goes on to the same bits on one device,
and several processes share the very batch that one would have.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from grounded_diffusion.errors import CheckpointError, UsageError
from grounded_diffusion.files import readable_errors, replace_file
from grounded_diffusion.training.generator.base import FrozenBase
from grounded_diffusion.training.grounding.batches import Pool, collate, renoise, share
from grounded_diffusion.training.grounding.config import HeadTraining
from grounded_diffusion.training.grounding.loss import object_losses, term_weights
from grounded_diffusion.training.grounding.validate import Validation
from grounded_diffusion.training.head.head import GroundingHead, HeadConfig, upsample_logits
from grounded_diffusion.training.head.queried import layers_of
from grounded_diffusion.training.head.taps import Taps
from grounded_diffusion.training.optim import Muon

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LENGTH = ("iterations", "validate_every", "save_every")  # settings that may change from one call to the next
REPORT = 50  # steps between two lines


def make_head(base: FrozenBase, config: HeadTraining) -> GroundingHead:
    """A fresh head that fits the base model. Raises UsageError for unknown options."""
    scale = 2 ** (len(base.vae.config.block_out_channels) - 1)
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in config.head.items()}
    words = base.template_states() if options.pop("attention", False) else None
    if words is not None:
        options |= dict(attention=layers_of(base.unet), words=len(words))
    torch.manual_seed(config.seed)
    head = GroundingHead(HeadConfig.for_unet(base.unet.config, **{"image_scale": scale, **options}))
    if words is not None:
        head.evidence.read(base.unet, words)
    return head


def make_optimizer(head: torch.nn.Module, config: HeadTraining) -> torch.optim.Optimizer:
    """The optimiser; each group has its full rate as `peak`."""
    if config.optimizer == "muon":
        return Muon(head, config.lr, config.muon_lr, config.weight_decay)
    params = [parameter for parameter in head.parameters() if parameter.requires_grad]
    groups = [dict(params=params, lr=config.lr, peak=config.lr)]
    return torch.optim.Adam(groups, betas=(0.9, 0.999), weight_decay=config.weight_decay)


class HeadTrainer:
    """Trains one head.

    Args:
        base: the frozen model.
        examples: what to train on.
        config: settings.
        folder: holds state.pt, from which the same call goes on, and best.pt.
        validation: measures the head while it trains; None for none.
        accelerator: of `accelerate`: devices and processes.
        say: takes a line for the person who waits.
        log: takes (step, {name: value}).

    Attributes:
        head: on the training device.
        seconds: spent, over all calls.
        best: the best validation so far, {} before the first.

    Raises:
        UsageError: the batch cannot be shared, or the folder has a run with other settings.
    """

    def __init__(
        self,
        base: FrozenBase,
        examples: Pool,
        config: HeadTraining,
        folder: Path,
        validation: Validation | None,
        accelerator: Any,
        say: Callable[[str], None] = lambda line: None,
        log: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    ):
        self.base, self.examples, self.config, self.folder = base, examples, config, folder
        self.validation, self.accelerator, self.say, self.log = validation, accelerator, say, log
        if config.batch % accelerator.num_processes:
            raise UsageError(f"a batch of {config.batch} cannot be shared by {accelerator.num_processes} processes")
        self.head = make_head(base, config).to(accelerator.device).train()
        self.optimizer = make_optimizer(self.head, config)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.precision == "fp16")
        names = dict.fromkeys(name for k in range(len(examples)) for name in examples.names(k))
        self.index = {name: i for i, name in enumerate(names)}
        self.queries = base.queries(list(self.index))  # [names,D]
        self.step, self.seconds, self.best = 0, 0.0, {}
        self._resume()
        self.model = accelerator.prepare_model(self.head) if accelerator.num_processes > 1 else self.head

    def run(self) -> GroundingHead:
        """Train to the end; returns the best head where there is a validation, else the last one."""
        began, first = time.monotonic(), self.step
        running: float | None = None
        with self.head.taps(self.base.unet) as taps:
            while self.step < self.config.iterations:
                value = self._step(taps)
                self.step += 1
                if value is not None:
                    running = value if running is None else 0.98 * running + 0.02 * value
                    self.log(self.step, {"loss": value})
                ends = self.step == self.config.iterations
                if self.step % REPORT == 0 or ends:
                    self._report(running, (self.step - first) / (time.monotonic() - began))
                validated = self._validate(taps, ends)
                if self.step % self.config.save_every == 0 or ends or validated:
                    now = time.monotonic()
                    self.seconds, began, first = self.seconds + now - began, now, self.step
                    self._save("state.pt", self._state())
        return self._result()

    def _step(self, taps: Taps) -> float | None:
        """One step; returns the loss over all processes, None where the detector found nothing in the batch."""
        config, accelerator, device = self.config, self.accelerator, self.accelerator.device
        generator = torch.Generator().manual_seed((config.seed << 32) + self.step)
        picks = torch.randint(len(self.examples), (config.batch,), generator=generator).tolist()
        batch = collate([self.examples[k] for k in picks], self.index)
        if config.noise_range:
            batch = renoise(batch, self.base.parts["scheduler"], config.noise_range, generator)
        terms = term_weights(batch.masks, batch.valid, config.zero_masks).sum().item()  # of all processes
        if not terms:
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * config.rate(self.step)
        mine = share(batch, accelerator.process_index, accelerator.num_processes)
        masks, valid = mine.masks.to(device), mine.valid.to(device)
        with self._autocast():
            features = self.base.features(mine.latents, mine.prompts, mine.timesteps, taps)
            logits = self.model(features, self.queries[mine.names.to(device)], valid)
        losses = object_losses(upsample_logits(logits.float(), masks.shape[-2:]), masks)
        total = (losses * term_weights(masks, valid, config.zero_masks)).sum()
        # Processes average their gradients, so each divides by its part of the whole batch's terms.
        loss = total * accelerator.num_processes / (terms if config.loss == "mean" else config.batch)
        self.scaler.scale(loss).backward()
        if config.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), config.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return accelerator.reduce(loss.detach(), "mean").item()

    def _autocast(self):
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=PRECISIONS[self.config.precision])

    def _report(self, running: float | None, pace: float) -> None:
        left = (self.config.iterations - self.step) / pace / 60
        shown = "no masks yet" if running is None else f"loss {running:.4f}"
        self.say(f"{self.step}/{self.config.iterations} {shown}, {pace * self.config.batch:.1f} examples/s, "
                 f"{left:.1f} min left")  # fmt: skip

    def _validate(self, taps: Taps, ends: bool) -> bool:
        """Measure the head where it is time; keeps it where it is the best so far."""
        every = self.config.validate_every
        if self.validation is None or not every or not (self.step % every == 0 or ends):
            return False
        if self.accelerator.is_main_process:
            self.head.eval()
            with self._autocast():
                found = self.validation.measure(self.head, taps)
            self.head.train()
            self.say(f"{self.step}: {found.line()}")
            self.log(self.step, found.values())
            if found.score > self.best.get("score", -1.0):
                self.best = {"step": self.step, "score": found.score, **found.values(), "by_name": found.by_name}
                self._save("best.pt", {"weights": self.head.state_dict(), "best": self.best})
        self.accelerator.wait_for_everyone()
        return True

    def _result(self) -> GroundingHead:
        """The best head, or the last one, in evaluation mode."""
        self.accelerator.wait_for_everyone()
        best = self.folder / "best.pt"
        if self.best and best.is_file():
            self.head.load_state_dict(torch.load(best, weights_only=True, map_location="cpu")["weights"])
        return self.head.eval().requires_grad_(False)

    def _settings(self) -> dict[str, Any]:
        """What a state must have in common with this call."""
        given = {key: value for key, value in asdict(self.config).items() if key not in LENGTH}
        given["head"] = asdict(self.head.config)
        return {**given, "base": self.base.digest, "examples": len(self.examples), "names": list(self.index)}

    def _state(self) -> dict[str, Any]:
        return dict(
            settings=self._settings(),
            head=self.head.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            step=self.step,
            seconds=self.seconds,
            best=self.best,
        )

    def _save(self, name: str, content: dict[str, Any]) -> None:
        """Write a file of the folder as a whole, by the main process."""
        if self.accelerator.is_main_process:
            stream = io.BytesIO()
            torch.save(content, stream)
            with readable_errors(self.folder / name):
                self.folder.mkdir(parents=True, exist_ok=True)
                replace_file(self.folder / name, stream.getvalue())

    def _resume(self) -> None:
        """Go on from state.pt, if it is there. Raises CheckpointError where it is damaged."""
        file = self.folder / "state.pt"
        if not file.is_file():
            return
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
            before = state["settings"]
        except Exception as error:
            raise CheckpointError(f"{file} is damaged ({type(error).__name__}); remove it to start anew") from None
        now = self._settings()
        if changed := [key for key in now if before.get(key) != now[key]]:
            raise UsageError(
                f"{self.folder} has a run with other settings ({', '.join(changed)}); give the same command to go on, "
                "or another --out"
            )
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.say(f"going on from step {self.step}")
