"""The CUDA kernels under the host's compiler and on a GPU."""

import pytest
import torch
from helpers import emulated


@pytest.fixture(params=["emulated", "gpu"])
def kernels(request) -> emulated.Kernels:
    """The GPU has to have the CAPABILITY of the test's module, if that names one."""
    if request.param == "emulated":
        made = emulated.emulated(request.getfixturevalue("host_library"))
        made.settle(0, 0)
        return made
    wanted = getattr(request.module, "CAPABILITY", None)
    if not torch.cuda.is_available() or wanted not in (None, torch.cuda.get_device_capability()):
        pytest.skip("no such NVIDIA GPU here")
    return emulated.on_gpu()
