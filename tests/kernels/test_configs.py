"""The tile table: mapping of GPUs to architectures, and completeness."""

import pytest
import torch

from bagel_rt import Bagel
from bagel_rt.kernels import configs
from bagel_rt.kernels.backend import check_backend, choose_backend
from bagel_rt.models.bagel.model import BagelModel

CUDA = torch.device("cuda:0")


@pytest.fixture
def capability(monkeypatch):
    """Fake the compute capability of a GPU."""

    def set_to(*numbers):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: numbers)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        configs.architecture.cache_clear()
        configs.supports.cache_clear()

    yield set_to
    configs.architecture.cache_clear()
    configs.supports.cache_clear()


@pytest.mark.parametrize(
    "numbers, name",
    [
        ((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 7), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90"),
        ((10, 0), "sm_100"), ((10, 3), "sm_100"), ((12, 0), "sm_89"), ((12, 1), "sm_89"),
    ],
    ids=str,
)  # fmt: skip
def test_gpu_maps_to_an_architecture_it_supports(capability, numbers, name):
    capability(*numbers)
    assert configs.supports(CUDA) and configs.architecture(CUDA) == name


def test_rejects_gpu_older_than_sm_80(capability):
    capability(7, 5)
    assert not configs.supports(CUDA)
    with pytest.raises(ValueError, match="must be sm_80 .*, got sm_75 .a GPU.. Set BAGEL_RT_BACKEND=reference"):
        configs.architecture(CUDA)
    with pytest.raises(ValueError, match="sm_75"):
        check_backend(CUDA, "triton")


def test_every_architecture_has_every_class_with_a_source():
    for op, architectures in configs.TABLE.items():
        assert set(architectures) == set(configs.ARCHITECTURES), op
        assert len({frozenset(classes) for classes in architectures.values()}) == 1, op
        for classes in architectures.values():
            for entry in classes.values():
                assert set(entry) == {"tiles", "source"} and entry["source"], op


class Loaded(Exception):
    """Raised instead of loading a model."""


@pytest.mark.parametrize("device, chosen", [("cuda", []), ("cuda:1", [torch.device("cuda:1")])])
def test_loading_a_model_sets_the_current_gpu(monkeypatch, capability, device, chosen):
    capability(9, 0)
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)

    def load(*_):
        raise Loaded

    monkeypatch.setattr(BagelModel, "from_folder", load)
    with pytest.raises(Loaded):
        Bagel.from_pretrained(device=device)
    choose_backend(None)
    assert current == chosen
