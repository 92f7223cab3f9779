"""Trains a head and writes its losses; run by each of several processes: BASE EXAMPLES FOLDER OUT."""

import json
import sys
from pathlib import Path


def main(base, examples, folder, out):
    import torch
    from accelerate import Accelerator

    from grounded_diffusion.training.generator.base import FrozenBase
    from grounded_diffusion.training.grounding.batches import Pool
    from grounded_diffusion.training.grounding.config import HeadTraining
    from grounded_diffusion.training.grounding.store import ExampleSet
    from grounded_diffusion.training.grounding.train import HeadTrainer

    torch.set_num_threads(1)
    accelerator, losses = Accelerator(cpu=True), []
    sizes = dict(embed_dim=32, heads=2, ffn_dim=32, patch=2, reduced_channels=[8, 16])
    config = HeadTraining(iterations=8, batch=8, lr=1e-3, validate_every=0, zero_masks="trust", head=sizes)
    log = lambda step, values: losses.append(values["loss"])
    HeadTrainer(FrozenBase(base), Pool([ExampleSet(examples)]), config, Path(folder), None, accelerator, log=log).run()
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps({"processes": accelerator.num_processes, "losses": losses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
