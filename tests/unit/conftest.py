"""Fixtures of the unit tests."""

from collections.abc import Iterator

import pytest

from tests.support.accelerator import ScriptDevice, accelerated


@pytest.fixture(params=["host", "accelerator", "accelerator, pinned"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where models are: an accelerator, whose copies are late, changes no bit."""
    where: str = request.param
    if where == "host":
        yield where
        return
    device = ScriptDevice(is_pinnable=where == "accelerator, pinned")
    with accelerated(device):
        yield where
    assert device.launched, "nothing was copied beside the computing"
