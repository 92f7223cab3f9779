"""Renders the bank of sprites and backgrounds that the things world is composed of. Run once; its output is checked in.

    apt-get download sweethome3d-furniture 0ad-data lomiri-wallpapers-16.04
    for package in *.deb; do dpkg -x $package unpacked/${package%%_*}; done
    python -m grounded_diffusion.training.things.render_bank unpacked training/things/bank

The same packages give the same pictures, byte for byte with the same Pillow.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image

from grounded_diffusion.training.things.backgrounds import PHOTOGRAPHS, render_backgrounds
from grounded_diffusion.training.things.meshes import Furniture, Mesh, ZeroAD, join_meshes
from grounded_diffusion.training.things.raster import render

SIZE = 96  # pixels, of a sprite and of a background
# Degrees from the front, the most telling view first. Sprites are mirrored at random, so sides alternate.
VIEWS = ((-50, 0), (38, 5), (-25, -4), (12, 2))
BACKGROUNDS = 20  # of each surface
QUALITY = 85
LICENCES = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-3.0-US": "https://creativecommons.org/licenses/by/3.0/us/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
}
NOTICES = {
    "sweethome3d": """\
Renders of models of Debian's `sweethome3d-furniture`, each under the licence of its model.""",
    "0ad": """\
Renders of models of Debian's `0ad-data`, copyright Wildfire Games. All of this folder is under CC-BY-SA-3.0.""",
    "backgrounds": """\
Terrain textures of Debian's `0ad-data` (copyright Wildfire Games, CC-BY-SA-3.0) below skies, walls and blurred crops of
these photographs of `lomiri-wallpapers-16.04`. All of this folder is under CC-BY-SA-4.0.""",
}


def read_selection() -> dict[str, dict]:
    """The names of the world and the models that show them."""
    return tomllib.loads(Path(__file__).with_name("selection.toml").read_text(encoding="utf-8"))


class Library:
    """Both packages behind one key; see selection.toml."""

    def __init__(self, root: Path):
        self.furniture, self.zero_ad = Furniture(root / "sweethome3d-furniture"), ZeroAD(root / "0ad-data")

    def load(self, key: str) -> tuple[Mesh, dict[str, str]]:
        """A mesh and whom it is from: folder, title, author and licence."""
        if "|" not in key:
            model = self.furniture.models[key]
            source = dict(title=model["name"], author=model.get("creator", key.split("#")[0]), licence=model["licence"])
            return self.furniture.load(key), dict(folder="sweethome3d", source=key) | source
        first, *props = (part.split("|") for part in key.split("+"))
        mesh = join_meshes([self.zero_ad.load(*first), *(self.zero_ad.load(*prop, cut_out=True) for prop in props)])
        source = dict(title=first[1], author=self.zero_ad.author, licence=self.zero_ad.licence)
        return mesh, dict(folder="0ad", source=key) | source


def save_strip(tiles: np.ndarray, file: Path) -> None:
    """Pictures [n,h,w,3 or 4] in [0,1] side by side as one WebP; transparency is kept exactly."""
    strip = np.concatenate(list(tiles), 1)
    if strip.shape[-1] == 4:
        strip = np.concatenate([strip[..., :3] / np.maximum(strip[..., 3:], 1e-6), strip[..., 3:]], -1)
    pixels = (np.clip(strip, 0, 1) * 255).round().astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, quality=QUALITY, method=6, alpha_quality=100)


def render_sprites(library: Library, selection: dict[str, dict], out: Path) -> dict[str, dict]:
    """Writes a strip of views a model and returns the index of names."""
    index = {}
    for name, entry in selection.items():
        index[name] = dict(kind=entry["kind"], place=entry.get("place", "ground"), models=[])
        keys = [*((key, False) for key in entry["models"]), *((key, True) for key in entry.get("held_out", []))]
        for number, (key, held_out) in enumerate(keys):
            mesh, source = library.load(key)
            elevation = entry.get("elevation", 12)
            views = np.stack([render(mesh, side, elevation + up, SIZE) for side, up in VIEWS])
            file = Path(source.pop("folder"), f"{name.replace(' ', '-')}-{number}.webp")
            save_strip(views, out / file)
            index[name]["models"].append(dict(file=file.as_posix(), held_out=held_out) | source)
        print(f"{name}: {len(keys)} models", flush=True)
    return index


def write_notices(index: dict, out: Path) -> None:
    """Writes ATTRIBUTION.md into every folder: whose work each picture shows, and under which licence."""
    rows = {folder: [] for folder in NOTICES}
    for entry in index["names"].values():
        for model in entry["models"]:
            folder, file = model["file"].split("/")
            rows[folder].append((file, model["title"], model["author"], model["licence"]))
    rows["backgrounds"] = [(p["file"], "photograph", p["author"], p["licence"]) for p in index["photographs"]]
    for folder, notice in NOTICES.items():
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows[folder])
        links = "\n".join(f"- {x}: {url}" for x, url in LICENCES.items() if x in notice + table)
        text = f"# {folder}\n\n{notice}\nAll were rendered, scaled and compressed for this project.\n\n{links}\n\n"
        text += f"| file | of | author | licence |\n|---|---|---|---|\n{table}\n"
        (out / folder / "ATTRIBUTION.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the unpacked Debian packages, each below its name")
    parser.add_argument("out", type=Path, help="the bank's folder")
    args = parser.parse_args()
    names = render_sprites(Library(args.packages), read_selection(), args.out)
    surfaces = render_backgrounds(
        args.packages / "0ad-data", args.packages / "lomiri-wallpapers-16.04", SIZE, BACKGROUNDS
    )
    for surface, tiles in surfaces.items():
        save_strip(tiles, args.out / "backgrounds" / f"{surface}.webp")
    photographs = [dict(file=file, author=author, licence=licence) for file, (author, licence) in PHOTOGRAPHS.items()]
    index = dict(
        size=SIZE, views=[side for side, _ in VIEWS], names=names, surfaces=list(surfaces), photographs=photographs
    )
    (args.out / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    write_notices(index, args.out)


if __name__ == "__main__":
    main()
