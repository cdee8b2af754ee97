"""Streams of an accelerator, as staging uses them: a narrow port, and CUDA behind it.

Beside the streams that compute there is one that copies. Order between them is by events; nothing
here waits for a whole device. Tests have a port of their own, whose copies are done late.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from treefold.common.errors import UnsupportedError
from treefold.common.log import logger

PIN_BYTES_MIN = 1 << 20
"""Smaller memory is not worth a call of the driver."""
PINNED_SHARE_MAX = 4
"""At most this fraction of the host's memory is locked in place."""
READ_ONLY_FLAG = 8  # cudaHostRegisterReadOnly


class Event(Protocol):
    """A point in the work of a stream."""

    def query(self) -> bool:
        """Whether everything before it is done."""

    def synchronize(self) -> None:
        """Wait, in this thread, until everything before it is done."""


class Stream(Protocol):
    """Work that an accelerator does in order. Equal and hashed by what it is."""

    def record_event(self) -> Event:
        """An event that is done when everything given to the stream so far is."""


class Port(Protocol):
    """One accelerator's streams, with a copy stream of this port's own."""

    def current(self) -> Stream:
        """The stream that this thread gives its work to."""

    def launch(self, work: Callable[[], None], after: Sequence[Event]) -> Event:
        """Give the copy stream work that begins when ``after`` is done; does not wait."""

    def wait(self, event: Event) -> None:
        """Let what the current stream is given from now on begin when ``event`` is done."""

    def buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of the accelerator, for use within `launch` only."""

    def pinned(self, nbytes: int) -> Tensor:
        """New host memory that the accelerator reads and writes by itself, uint8 [nbytes]."""

    def pin(self, memory: Tensor, *, is_read_only: bool) -> bool:
        """Make existing host memory such memory; False if it cannot be."""


class Pins:
    """Host memory that the driver has locked in place. One per process, like the driver."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}
        self._bytes = 0
        self._refused: dict[int, None] = {}
        self._log = logger("worker")

    def pin(self, memory: Tensor, flags: int, device: torch.device) -> bool:
        """Lock memory in place until `release`, which it is kept alive for; False if that fails."""
        known = self._known.get(memory.data_ptr())
        if known is not None:
            return known.nbytes >= memory.nbytes
        if memory.nbytes < PIN_BYTES_MIN or flags in self._refused:
            return False
        if self._bytes + memory.nbytes > psutil.virtual_memory().total // PINNED_SHARE_MAX:
            return False
        error = int(_driver().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags))
        if error:
            self._refused[flags] = None
            _forget_error(device)
            what = "servers' memory" if flags else "this worker's memory"
            self._log.info(
                f"the driver cannot lock {what} in place (error {error}); it is staged instead"
            )
            return False
        self._known[memory.data_ptr()] = memory
        self._bytes += memory.nbytes
        return True

    def release(self) -> None:
        """Unlock everything."""
        for address in self._known:
            _driver().cudaHostUnregister(address)
        self._known.clear()
        self._refused.clear()
        self._bytes = 0


PINS = Pins()


class CudaPort:
    """The streams of one GPU.

    Parameters
    ----------
    device : torch.device
        With an index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch's own

    def current(self) -> Stream:
        """The stream that this thread gives its work to.

        Raises
        ------
        UnsupportedError
            It is being captured into a CUDA graph.
        """
        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "a backward was captured into a CUDA graph; its replays run no hooks, so that "
                "nobody would know that there are gradients: capture the forward only"
            )
        return torch.cuda.current_stream(self._device)

    def launch(self, work: Callable[[], None], after: Sequence[Event]) -> Event:
        """Give the copy stream work that begins when ``after`` is done; does not wait."""
        for event in after:
            self._copying.wait_event(_own(event))
        with torch.cuda.stream(self._copying), torch.no_grad():
            work()
        # Who waits for this event leaves the processor to others.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # torch's own
        self._copying.record_event(done)
        return done

    def wait(self, event: Event) -> None:
        """Let what the current stream is given from now on begin when ``event`` is done."""
        torch.cuda.current_stream(self._device).wait_event(_own(event))

    def buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of the GPU, for use within `launch` only."""
        return torch.empty(elements, dtype=dtype, device=self._device)

    def pinned(self, nbytes: int) -> Tensor:
        """New host memory that the GPU reads and writes by itself, uint8 [nbytes]."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def pin(self, memory: Tensor, *, is_read_only: bool) -> bool:
        """Make existing host memory such memory; False if it cannot be."""
        return PINS.pin(memory, READ_ONLY_FLAG if is_read_only else 0, self._device)


def port_of(tensors: Sequence[Tensor]) -> Port | None:
    """A port to the GPU that all of these tensors are on; None if they are not all on one."""
    devices = list(dict.fromkeys(tensor.device for tensor in tensors))
    if len(devices) != 1 or devices[0].type != "cuda":
        return None
    return CudaPort(devices[0])


def _driver() -> Any:  # noqa: ANN401 # a module without types
    return torch.cuda.cudart()  # type: ignore[no-untyped-call] # torch's own


def _own(event: Event) -> torch.cuda.Event:
    """An event of CUDA's own, as all are that reach a `CudaPort`."""
    assert isinstance(event, torch.cuda.Event)
    return event


def _forget_error(device: torch.device) -> None:
    """Meet the error of a failed call here, and not in a kernel of the script's."""
    with suppress(RuntimeError):  # the driver reports it once more, with the next launch
        torch.empty(1, device=device).fill_(1.0)
