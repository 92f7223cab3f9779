"""CudaDevice on a GPU, and on a driver of host memory where there is none: engine/backends/test_gpu_driver.py."""

from __future__ import annotations

import threading

import pytest
from cuda.bindings import driver

from grounded_diffusion.engine.backends.gpu.cuda import CudaDevice, choose_device
from grounded_diffusion.engine.backends.gpu.device import DeviceMemoryError
from grounded_diffusion.errors import BackendError
from grounded_diffusion.kernels.cuda.launch import check_driver


def test_device_memory_that_is_not_there_is_refused():
    device = CudaDevice()
    with pytest.raises(DeviceMemoryError, match="is out of memory while allocating"):
        device.allocate(1 << 50)


def test_a_captured_graph_runs_only_when_it_is_replayed():
    device = CudaDevice()
    device.activate()
    stream, done, pointer = device.stream(), device.event(), device.allocate(1024)
    host = device.pinned(1024)
    host[:] = 7
    device.copy(stream, pointer, host.ctypes.data, 1024)
    replay = device.capture(stream, lambda: device.clear(stream, pointer, 512))
    for replays, zeros in ((0, 0), (1, 512)):
        for _ in range(replays):
            replay()
        back = device.pinned(1024)
        device.copy(stream, back.ctypes.data, pointer, 1024)
        device.record(done, stream)
        device.sync(done)
        assert (back == 0).sum() == zeros and (back[512:] == 7).all()
    device.free(pointer)


def test_a_wait_of_another_thread_does_not_break_a_capture():
    """ONNX Runtime captures in CUDA's global mode, which forbids every thread to wait for the device."""
    device = CudaDevice()
    device.activate()
    stream, other, done, waited = device.stream(), device.stream(), device.event(), threading.Event()
    device.record(done, other)

    def wait():
        device.activate()
        device.sync(done)
        waited.set()

    with device.lock:
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
        assert int(driver.cuStreamBeginCapture(stream.handle, mode)[0]) == 0
        thread = threading.Thread(target=wait)
        thread.start()
        assert not waited.wait(0.2)
        code, graph = driver.cuStreamEndCapture(stream.handle)
    thread.join()
    assert int(code) == 0
    driver.cuGraphDestroy(graph)
    assert waited.is_set()


@pytest.mark.parametrize("name", ["LOCAL_RANK", "SLURM_LOCALID"])
def test_ranks_go_round_the_devices(monkeypatch, name):
    count = int(driver.cuDeviceGetCount()[1])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    assert choose_device() == 0
    monkeypatch.setenv(name, str(count))
    assert choose_device() == 0
    monkeypatch.setenv(name, str(count + 1))
    assert choose_device() == 1 % count


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match="no CUDA device 99"):
        CudaDevice(99)


def test_an_old_driver_is_refused(monkeypatch):
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, 12080))
    with pytest.raises(BackendError, match=r"for CUDA 12\.8; install driver 580 or newer"):
        check_driver()
