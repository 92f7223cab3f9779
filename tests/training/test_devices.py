"""Which precision training computes in, by what the device has."""

import pytest
import torch

from grounded_diffusion.errors import UsageError
from grounded_diffusion.training.devices import check_device, fast_autocast


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_trains_in_bfloat16_only_where_it_has_instructions_for_it(monkeypatch, has, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    with fast_autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="there is no device 'cuda:99'"):
        check_device("cuda:99")
