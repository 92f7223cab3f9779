"""The CUDA kernels compile for every listed architecture, and the cubin cache never serves a wrong file.

No GPU is needed: NVRTC comes with the `dev` extra.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from grounded_diffusion.errors import BackendError
from grounded_diffusion.kernels import StepCoefficients
from grounded_diffusion.kernels.cuda import nvrtc
from grounded_diffusion.kernels.cuda.launch import COEFFICIENTS, CudaKernels, pack_step

KERNELS = {
    "cfg_step": [b"cfg_step_f32", b"cfg_step_f16"],
    "image_epilogue": [b"image_epilogue_f32", b"image_epilogue_f16"],
    "mask_epilogue": [b"mask_begin", b"mask_scan_f32", b"mask_scan_f16", b"mask_finish"],
}


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("stem", nvrtc.STEMS)
def test_compiles(stem, arch):
    code = nvrtc.compile_cubin(stem, arch)
    assert code[:4] == b"\x7fELF"
    for name in KERNELS[stem]:
        assert b".text." + name in code


def test_cache_serves_the_same_bytes_and_repairs_damage(tmp_path, monkeypatch):
    code = nvrtc.cubin("image_epilogue", "sm_80", tmp_path)
    (file,) = tmp_path.iterdir()
    compiled = []
    original = nvrtc.compile_cubin
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *at: compiled.append(at) or original(*at))
    assert nvrtc.cubin("image_epilogue", "sm_80", tmp_path) == code
    assert not compiled
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert nvrtc.cubin("image_epilogue", "sm_80", tmp_path) == code
    assert len(compiled) == 1
    nvrtc.cubin("image_epilogue", "sm_90", tmp_path)
    assert len(compiled) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_key_follows_the_headers(tmp_path, monkeypatch):
    for name in ("cuda", "core"):
        shutil.copytree(nvrtc.FOLDER.parent / name, tmp_path / name)
    key = nvrtc.cache_key("cfg_step", "sm_80")
    monkeypatch.setattr(nvrtc, "FOLDER", tmp_path / "cuda")
    assert nvrtc.cache_key("cfg_step", "sm_80") == key
    assert nvrtc.cache_key("cfg_step", "sm_86") != key
    with (tmp_path / "core" / "common.cuh").open("a") as stream:
        stream.write("// changed\n")
    assert nvrtc.cache_key("cfg_step", "sm_80") != key


def test_compiler_errors_are_told(tmp_path, monkeypatch):
    (tmp_path / "cfg_step.cu").write_text("this is not CUDA\n")
    monkeypatch.setattr(nvrtc, "FOLDER", tmp_path)
    with pytest.raises(BackendError, match=r"NVRTC refused kernels/cuda/cfg_step.cu for sm_80"):
        nvrtc.compile_cubin("cfg_step", "sm_80")


def test_a_device_that_is_not_there_is_told():
    with pytest.raises(BackendError, match="no CUDA device 63"):
        CudaKernels(device_id=63)


def test_coefficients_have_the_layout_of_the_struct():
    row = pack_step(StepCoefficients(7.5, cx=1, co=2, a=3, b=[4, 0, 6], n=5, next_scale=8), slots=3)
    words, integers = row.view(np.float32), row.view(np.int32)
    assert COEFFICIENTS.itemsize == 104
    assert words[:7].tolist() == [7.5, 1, 2, 3, 4, 5, 8]
    assert integers[7:9].tolist() == [0, 1]
    assert words[10] == 6 and integers[18] == 1, "the value of two steps ago lies in slot (0 - 2) mod 3"
    assert pack_step(StepCoefficients(None, cx=0, co=1, a=1, b=[1]))["head"] == -1
