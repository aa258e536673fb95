"""What every test relies on: one thread per operator (the shapes are tiny), and the same examples on every machine."""

import os
import signal
from importlib.metadata import version
from pathlib import Path

import cuda_on_host
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

import torch

PACK = Path(__file__).parent / "conformance" / "bagel"
CHECKPOINT = PACK / "checkpoint"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything defines a kernel
    # Autograd counts devices when it is first used. torch.compile makes CUDA builds of torch count a GPU that is not
    # there, for which autograd would start threads, and processes forked later, the workers of training, would fail.
    torch.ones(1, requires_grad=True).backward()

# What a shell starts in the background ignores interrupts, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A fixture may serve all examples of a test: none here is used up.
settings.register_profile(
    "bagel_rt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("bagel_rt")


def pytest_configure(config):
    """Let pytest-xdist run files in the order of collection.

    By default the files with the fewest tests come last. The longest file has five tests and would run alone at the
    end. The option exists only where pytest-xdist is installed.
    """
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(scope="session")
def bagel():
    """The recorded small model of random weights, in float32 on the CPU."""
    from bagel_rt import Bagel  # imports torch, which reads the environment set above

    return Bagel.from_pretrained(CHECKPOINT, device="cpu")


@pytest.fixture
def kernels():
    """The device on which the test's ops launch Triton kernels: a GPU, or the CPU by way of Triton's interpreter."""
    from bagel_rt.kernels.backend import choose_backend

    choose_backend("triton")
    yield DEVICE
    choose_backend(None)


@pytest.fixture(params=["reference", "triton"])
def device(request):
    """The device of a test that runs twice, with the ops' references and with their kernels."""
    from bagel_rt.kernels.backend import choose_backend

    choose_backend(request.param)
    yield DEVICE if request.param == "triton" else torch.device("cpu")
    choose_backend(None)


@pytest.fixture(scope="session")
def _emulated_module():
    return cuda_on_host.load(cuda_on_host.build())


@pytest.fixture
def emulated_extension(_emulated_module, monkeypatch):
    """The extension whose CUDA kernels run on CPU tensors; the ops take them, as the backend is "triton"."""
    from bagel_rt.kernels.backend import choose_backend

    monkeypatch.setattr("bagel_rt.kernels.extension.EXTENSION", _emulated_module)
    _emulated_module.set_schedule(0)
    choose_backend("triton")
    yield _emulated_module
    choose_backend(None)
    _emulated_module.set_schedule(0)


@pytest.fixture(params=["emulated", "cuda"])
def extension_device(request):
    """The device of a test that runs twice: with the extension's kernels emulated on the CPU, and on a GPU."""
    from bagel_rt.kernels.extension import cuda_error

    if request.param == "emulated":
        request.getfixturevalue("emulated_extension")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    device = torch.device("cuda", torch.cuda.current_device())
    if error := cuda_error(device):
        pytest.skip(f"the extension has no kernels for this GPU: {error.splitlines()[0]}")
    return device


@pytest.fixture
def launches(monkeypatch):
    """Record the launches of one of the extension's kernels; to be called after ``extension_device`` has loaded it."""
    from bagel_rt.kernels import extension

    def watch(kernel):
        seen, module = [], extension.EXTENSION

        class Watched:
            def __getattr__(self, name):
                if name == kernel:
                    return lambda *args: seen.append(name) or getattr(module, name)(*args)
                return getattr(module, name)

        monkeypatch.setattr(extension, "EXTENSION", Watched())
        return seen

    return watch


def _interpret_dynamic_ranges():
    """Triton 3.6's interpreter takes a one-element array for the end of a range, which NumPy 2.4 no longer does."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _interpret_bfloat16_rounding():
    """Triton's interpreter cuts float32 off to bfloat16; round to nearest even instead, as GPUs do."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = rounded


if os.environ.get("TRITON_INTERPRET") == "1":
    _interpret_bfloat16_rounding()
    if version("triton").startswith("3.6."):
        _interpret_dynamic_ranges()


@pytest.fixture
def photo():
    """An image of noise, 90x70 pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
