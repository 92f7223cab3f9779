"""Writing a data set to a folder, in threads, so that the model never waits for a file.

    images/000000.png               the image
    masks/000000.png                palette label map: 0 background, k the k-th object of the record
    objects/000000_0_dog.png        one binary mask per object; these may overlap
    metadata.jsonl                  one record an image, written last
    index.html                      contact sheet
    run.json                        the settings, so that a resumed run is the same run

Every file is written under a temporary name and renamed. Finished records are journaled in `metadata.jsonl.part`
until the run ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from grounded_diffusion.engine.pipeline import Sample
from grounded_diffusion.errors import UsageError

FOLDERS = ("images", "masks", "objects")
METADATA, JOURNAL, RUN, INDEX = "metadata.jsonl", "metadata.jsonl.part", "run.json", "index.html"
COMPRESSION = 3  # of PNG: half the time of the usual 6 for a few per cent more bytes
FORMAT = 1


class Writer(Protocol):
    """Where samples go. `start` before the first `put`; `close` in any case, also after a failure."""

    def start(self, settings: dict[str, Any]) -> set[int]:
        """Prepare the output; returns the indices of samples that an earlier run has already written."""
        ...

    def put(self, sample: Sample) -> None:
        """Take a sample. Returns before it is written, unless too many are waiting."""
        ...

    def close(self) -> None:
        """Finish what was taken and complete the output."""
        ...


class FolderWriter:
    """Writes the layout above.

    Args:
        out: the folder; created if it does not exist.
        resume: go on with what an earlier run left.
        overwrite: remove what an earlier run left.
        threads: encoding threads.

    Raises:
        UsageError: the folder is in use, not ours, or cannot be written. Nothing is written before `start`.
    """

    def __init__(self, out: str | Path, *, resume: bool = False, overwrite: bool = False, threads: int = 2):
        self.out, self.resume, self.overwrite, self.threads = Path(out), resume, overwrite, threads
        self.records: dict[int, dict[str, Any]] = {}
        self.outlines: dict[int, list[str]] = {}
        self._settings: dict[str, Any] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._waiting = threading.BoundedSemaphore(4 * threads)
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._check_folder()

    def _check_folder(self) -> None:
        out = self.out
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file; give --out a folder")
        parent = next(p for p in (out, *out.absolute().parents) if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise UsageError(f"cannot write to {out}: no permission in {parent}; choose another --out")
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not (out / RUN).is_file():
            raise UsageError(f"{out} is not empty and was not written by gd-infer; choose another --out")
        if not self.resume and not self.overwrite:
            raise UsageError(f"{out} is not empty; --resume finishes what is missing, --overwrite starts again")

    def start(self, settings: dict[str, Any]) -> set[int]:
        """See Writer.start. Raises UsageError when a resumed run's settings differ, naming them."""
        with readable_errors(self.out):
            if self.resume and (self.out / RUN).is_file():
                self._check_settings(settings)
                self._read_records()
            self.out.mkdir(parents=True, exist_ok=True)
            for name in FOLDERS:
                (self.out / name).mkdir(exist_ok=True)
            self._clear()
            self._settings = settings
            replace_file(self.out / RUN, json.dumps({"format": FORMAT, "settings": settings}, indent=1).encode())
            journal = "".join(json.dumps(record) + "\n" for record in self.records.values())
            replace_file(self.out / JOURNAL, journal.encode())
        self._pool = ThreadPoolExecutor(self.threads, "writer")
        return set(self.records)

    def _check_settings(self, settings: dict[str, Any]) -> None:
        try:
            before = json.loads((self.out / RUN).read_text(encoding="utf-8"))["settings"]
            changed = [k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{self.out / RUN} is damaged, so the run cannot be resumed; use --overwrite") from None
        if changed:
            told = "; ".join(f"{k} was {show(before.get(k))}, now {show(settings.get(k))}" for k in sorted(changed))
            raise UsageError(f"cannot resume {self.out}: {told}; use the same input, or --overwrite")

    def _read_records(self) -> None:
        """Records of an earlier run whose files are all there; a torn last line is no record."""
        for name in (METADATA, JOURNAL):
            file = self.out / name
            for line in file.read_bytes().splitlines() if file.is_file() else ():
                with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
                    record = json.loads(line)
                    if all((self.out / path).stat().st_size for path in record_files(record)):
                        self.records[int(record["index"])] = record

    def _clear(self) -> None:
        """Remove what belongs to no kept record: leavings of a killed run and, with --overwrite, the earlier run."""
        kept = {path for record in self.records.values() for path in record_files(record)}
        if not self.records:
            for name in (METADATA, INDEX):
                (self.out / name).unlink(missing_ok=True)
        for folder in FOLDERS:
            for file in (self.out / folder).iterdir():
                if f"{folder}/{file.name}" not in kept and file.suffix in (".png", ".tmp"):
                    file.unlink()

    def put(self, sample: Sample) -> None:
        """See Writer.put. Raises what an earlier sample's writing has raised."""
        if self._pool is None:
            raise RuntimeError("FolderWriter.put before start, or after close")
        self._waiting.acquire()
        if self._error:
            self._waiting.release()
            raise self._error
        self._pool.submit(self._write, sample)

    def _write(self, sample: Sample) -> None:
        from grounded_diffusion.engine.outline import outline

        try:
            with readable_errors(self.out):
                record = write_sample(self.out, sample)
                paths = [outline(sample.masks[name]) for name in sample.objects]
                with self._lock:
                    with (self.out / JOURNAL).open("a", encoding="utf-8") as journal:
                        journal.write(json.dumps(record) + "\n")
                    self.records[sample.index], self.outlines[sample.index] = record, paths
        except Exception as error:
            self._error = self._error or error
        finally:
            self._waiting.release()

    def close(self) -> None:
        """See Writer.close. Raises what the writing of a sample has raised."""
        if self._pool is None:
            return
        self._pool.shutdown(wait=True)
        self._pool = None
        with readable_errors(self.out):
            if self.records:
                self._complete()
            else:
                self._withdraw()
        if self._error:
            raise self._error

    def _complete(self) -> None:
        """Write the contact sheet, then the metadata."""
        from grounded_diffusion.engine.gallery import render_gallery

        records = [self.records[index] for index in sorted(self.records)]
        replace_file(self.out / INDEX, render_gallery(self.out, records, self.outlines, self._settings).encode())
        replace_file(self.out / METADATA, "".join(json.dumps(record) + "\n" for record in records).encode())
        (self.out / JOURNAL).unlink()

    def _withdraw(self) -> None:
        """Leave nothing of a run that made nothing, so that the same command can simply be given again."""
        for name in (JOURNAL, RUN):
            (self.out / name).unlink()
        for folder in (*(self.out / name for name in FOLDERS), self.out):
            with contextlib.suppress(OSError):  # something of the user's own is in it
                folder.rmdir()


def write_sample(out: Path, sample: Sample) -> dict[str, Any]:
    """Write a sample's files and return its record."""
    from PIL import Image

    name = f"{sample.index:06d}"
    image, mask = f"images/{name}.png", f"masks/{name}.png"
    save_png(out / image, Image.fromarray(sample.image))
    labels = Image.fromarray(sample.labels)
    labels.putpalette(voc_palette())
    save_png(out / mask, labels)
    objects = []
    for k, thing in enumerate(sample.objects):
        file = f"objects/{name}_{k}_{slug(thing)}.png"
        save_png(out / file, Image.fromarray(sample.masks[thing]))
        objects.append(
            {
                "name": thing,
                "label": k + 1,
                "area": sample.areas[thing],
                "box": list(sample.boxes[thing]),
                "score": round(sample.scores[thing], 4),
                "mask": file,
            }
        )
    return {
        "id": name,
        "index": sample.index,
        "prompt": sample.prompt,
        "seed": sample.seed,
        "draw": sample.draw,
        "width": sample.image.shape[1],
        "height": sample.image.shape[0],
        "capture_timestep": sample.capture_timestep,
        "image": image,
        "mask": mask,
        "objects": objects,
    }


def record_files(record: dict[str, Any]) -> list[str]:
    """Paths, relative to the folder, of all files of a record."""
    return [record["image"], record["mask"], *(thing["mask"] for thing in record["objects"])]


def slug(name: str) -> str:
    """An object's name as part of a file name: 40 characters are at most 160 bytes."""
    return re.sub(r"[^\w-]+", "_", name)[:40].strip("_") or "object"


def voc_palette() -> list[int]:
    """The 256 colours of PASCAL VOC's label maps, [768]: bits 0, 3 and 6 of k are the top bits of red, and so on."""
    colours, k = np.zeros((256, 3), np.uint8), np.arange(256)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((k >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours.ravel().tolist()


def save_png(path: Path, image: Any) -> None:
    """Save a Pillow image under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    image.save(temporary, "png", compress_level=COMPRESSION)
    temporary.replace(path)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def readable_errors(out: Path) -> Iterator[None]:
    """Turn an OSError into a UsageError that names the file."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        raise UsageError(f"cannot write {where}: {error.strerror or error}") from None


def show(value: Any) -> str:
    """A setting as it appears in a message."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else "not set" if value is None else str(value)
