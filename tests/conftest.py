"""What all tests share: shape checks, one thread, tiny models of every family."""

from __future__ import annotations

import os

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Packages whose annotations are real at run time; the others name torch for type checkers only.
# Judges are left out: they check the shapes they are given themselves, and are tested with wrong
# ones.
install_import_hook(
    [f"safelight.{name}" for name in ("models", "align", "guard", "attack")], "beartype.beartype"
)

FAMILIES = ("sd1", "sdxl", "sd3", "flux")


def pytest_configure(config):
    """Upstream warnings that are not ours to fix, each with its version and date."""
    config.addinivalue_line(  # diffusers 0.42 schedulers under numpy 2.4, November 2026
        "filterwarnings", "ignore:__array__ implementation:DeprecationWarning"
    )


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models are ten times faster on one thread than on two busy ones."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_sd1():
    return _tiny("sd1")


@pytest.fixture(scope="session")
def tiny_sdxl():
    return _tiny("sdxl")


@pytest.fixture(scope="session")
def tiny_sd3():
    return _tiny("sd3")


@pytest.fixture(scope="session")
def tiny_flux():
    return _tiny("flux")


@pytest.fixture(params=FAMILIES)
def tiny_model(request):
    """A tiny model of each family in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")


def _tiny(family):
    from safelight.models.tiny import tiny

    return tiny(family)


@pytest.fixture
def endpoint():
    """A chat model's endpoint on this machine."""
    from endpoint import Endpoint

    one = Endpoint()
    yield one
    one.server.shutdown()
    one.server.server_close()
