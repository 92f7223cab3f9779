"""Small helpers that turn tensors into pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[B,3,H,W] in [-1,1] -> [B,H,W,3] uint8, rounded as diffusers' image processor does."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu()


def save_grid(images: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Write a contact sheet of images [B,3,H,W] in [-1, 1], filled row by row."""
    pixels = to_uint8(images)
    b, h, w, _ = pixels.shape
    rows = -(-b // columns)
    sheet = torch.full((rows * columns, h, w, 3), 255, dtype=torch.uint8)
    sheet[:b] = pixels
    sheet = sheet.view(rows, columns, h, w, 3).transpose(1, 2).reshape(rows * h, columns * w, 3)
    Image.fromarray(sheet.numpy()).save(path)
