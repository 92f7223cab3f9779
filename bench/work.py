"""What a bench measures, what it gives a system to do, and what comes back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from grounded_diffusion.engine import Options, Prompt
from grounded_diffusion.engine.backends.open import backend_entry

OBJECTS = 2  # to a prompt
EVERY_STEP = (0.0, 1.0)  # guidance_interval of plain classifier-free guidance


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One round: n prompts of OBJECTS objects each, and noise [n,4,h,w] to start from."""

    prompts: tuple[Prompt, ...]
    noise: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """images uint8 [n,H,W,3], masks bool [n,O,H,W]."""

    images: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True, slots=True)
class PeerForm:
    """Images to a call of a peer, and torch's memory layout of images."""

    batch: int
    channels_last: bool = True


class System(Protocol):
    """One way of making images with masks."""

    name: str

    def run(self, work: Work) -> Output:
        """All images of a round with the masks of their objects."""
        ...


@dataclass(frozen=True, slots=True)
class EngineForm:
    """How the engine runs: its backend, images to a batch, and batches at once."""

    backend: str
    batch: int
    lanes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        options: sampler, steps, guidance.
        threads: CPU threads of every system.
        engines: the engine by precision, and by a second backend in one ("fp32 by openvino"); the most exact last. Of
            the first the stages and the writer are measured.
        peers: names of the peers.
        peer_forms: by precision, the batch and layout at which torch is fastest.
        images: to a turn of the engine and of OpenVINO, as many as their lanes need.
        least: images to a turn of any system.
        rounds: timed turns of every system; None takes what fits into BUDGET.
        repeats: timed calls of every stage.
        checkpoint: directory of the torch model that the peers load; None where there is none.
        folder: an empty folder to work in.
        memory: measure peak memory, in a process of its own for each system.
    """

    options: Options
    threads: int
    engines: dict[str, EngineForm]
    peers: tuple[str, ...]
    peer_forms: dict[str, PeerForm]
    images: int
    least: int
    rounds: int | None
    repeats: int
    checkpoint: Path | None
    folder: Path
    memory: bool = True

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return backend_entry(next(iter(self.engines.values())).backend).device

    def of_engine(self, label: str) -> Options:
        """The options with the batch of one of the engines."""
        return replace(self.options, batch=self.engines[label].batch)

    def form(self, peer: str) -> PeerForm:
        """A peer's batch and layout. OpenVINO, several at once, takes the batch that is best for the engine."""
        kind, precision = peer.split()
        ours = next((one for one in self.engines.values() if backend_entry(one.backend).precision == precision), None)
        return PeerForm(ours.batch) if kind == "openvino" and ours else self.peer_forms[precision]

    def turn(self, name: str) -> int:
        """Images to a turn of a system. Those that run one call after the other take as few as fill their calls."""
        if name.startswith(("engine", "openvino")):
            return self.images
        batch = self.form(name).batch
        return -(-self.least // batch) * batch

    def dump(self) -> dict[str, Any]:
        """As JSON has it."""
        paths = {"checkpoint": self.checkpoint and str(self.checkpoint), "folder": str(self.folder)}
        return asdict(self) | paths

    @classmethod
    def load(cls, dumped: dict[str, Any]) -> Plan:
        """What `dump` gave."""
        paths = {"checkpoint": dumped["checkpoint"] and Path(dumped["checkpoint"]), "folder": Path(dumped["folder"])}
        read = lambda kind, name: {key: kind(**value) for key, value in dumped[name].items()}
        forms = {"engines": read(EngineForm, "engines"), "peer_forms": read(PeerForm, "peer_forms")}
        return cls(
            **dumped | paths | forms | {"options": Options(**dumped["options"]), "peers": tuple(dumped["peers"])}
        )
