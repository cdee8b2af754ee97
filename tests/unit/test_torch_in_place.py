"""Parameters as views of a server's memory: where they lie, and what is copied instead."""

import faulthandler
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from treefold.common.layout import Layout
from treefold.common.spec import Dtype, Placement, Rule, TableSpec, TensorSpec
from treefold.torch.in_place import LINE_BYTES
from treefold.torch.values import ModelValues
from treefold.transport import segments
from treefold.worker.handed import Snapshot

SIZES = (40, 7, 33, 20)  # the third begins at 47
ELEMENTS = sum(SIZES)
CUT = 60  # two shards; the third tensor lies in both


class Server:
    """Two shards in shared memory, with two buffers each, as a worker has mapped them."""

    def __init__(self, shift: int = 0) -> None:
        self._steps = [128, 128]
        self._shift = shift
        self._own = [segments.create("test", 4 * 2 * step) for step in self._steps]
        self.mapped = [segments.attach(one.offer) for one in self._own]

    def publish(self, version: int) -> Snapshot:
        """Write a version, and say where it is."""
        parts: list[tuple[int, int, Tensor]] = []
        for number, (start, stop) in enumerate([(0, CUT), (CUT, ELEMENTS)]):
            at = (version % 2) * self._steps[number] + start % 16 + self._shift
            values = slice(at, at + stop - start)
            segments.announce(self._own[number], version % 2, version)
            wanted = torch.arange(start, stop) + 1000.0 * version
            self._own[number].body.view(torch.float32)[values] = wanted
            seen = self.mapped[number].values(torch.float32)[values]
            middle = (start + stop) // 2  # two parts, one after the other
            parts += [
                (start, middle, seen[: middle - start]),
                (middle, stop, seen[middle - start :]),
            ]
        return Snapshot(0, version, b"", 0.0, parts, list(self.mapped))

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory that is mapped."""
        return any(one.offset_of(tensor) is not None for one in self.mapped)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Zeros."""
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in SIZES]


def values_of(owned: Sequence[nn.Parameter], *, is_in_place: bool = True) -> ModelValues:
    """What loads versions into parameters."""
    specs = [TensorSpec(f"t{n}", [size], Dtype.FLOAT32, 0) for n, size in enumerate(SIZES)]
    layout = Layout(TableSpec("net", Rule.CONSTANT, Placement.ELEMENTWISE, specs, None))
    return ModelValues(owned, layout, layout.pieces, is_in_place=is_in_place)


def flat(owned: Sequence[nn.Parameter]) -> list[float]:
    """All values."""
    return torch.cat([one.detach().float() for one in owned]).tolist()


def wanted(version: int) -> list[float]:
    """What they should be."""
    return [1000.0 * version + n for n in range(ELEMENTS)]


def test_parameters_lie_in_the_servers_memory_and_one_that_is_cut_does_not() -> None:
    server, owned = Server(), parameters()
    assert values_of(owned).lend(server.publish(1))
    assert flat(owned) == wanted(1)
    assert [server.has(one) for one in owned] == [True, True, False, True]


def test_they_lie_to_cache_lines_as_in_the_flat_space_wherever_they_are() -> None:
    server, owned = Server(), parameters()
    values = values_of(owned)
    assert values.flat is not None
    origin = values.flat.data_ptr()
    before = [(one.data_ptr() - origin) % LINE_BYTES for one in owned]
    assert origin % LINE_BYTES == 0
    for version in (1, 2):
        assert values.lend(server.publish(version))
        assert [one.data_ptr() % LINE_BYTES for one in owned] == before


def test_memory_that_lies_otherwise_to_cache_lines_is_copied() -> None:
    server, owned = Server(shift=1), parameters()
    values = values_of(owned)
    snapshot = server.publish(1)
    assert not values.lend(snapshot)
    values.load(snapshot)
    assert flat(owned) == wanted(1)
    assert not any(server.has(one) for one in owned)


def test_versions_take_turns_in_two_places() -> None:
    server, owned = Server(), parameters()
    values, places = values_of(owned), []
    for version in range(1, 6):
        assert values.lend(server.publish(version))
        assert flat(owned) == wanted(version)
        places.append(owned[0].data_ptr())
    assert places == [places[0], places[1]] * 2 + [places[0]]
    assert len(set(places)) == 2


def test_backward_gives_the_same_gradients_as_with_a_copy() -> None:
    server, owned, copied = Server(), parameters(), parameters()
    snapshot = server.publish(1)
    assert values_of(owned).lend(snapshot)
    values_of(copied).load(snapshot)
    for some in (owned, copied):
        loss = torch.stack([(one * one.sin()).sum() for one in some]).sum()
        loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
    assert [one.grad.tolist() for one in owned if one.grad is not None] == [
        one.grad.tolist() for one in copied if one.grad is not None
    ]


@pytest.mark.parametrize("is_loaded", [False, True])
def test_they_get_memory_of_their_own_again(*, is_loaded: bool) -> None:
    server, owned = Server(), parameters()
    values = values_of(owned)
    assert values.lend(server.publish(1))
    if is_loaded:
        values.load(server.publish(2))
    else:
        values.take_back()
    server.publish(3)  # overwrites the first one
    assert flat(owned) == wanted(1 + is_loaded)
    assert not any(server.has(one) for one in owned)
    with torch.no_grad():
        owned[0].add_(1.0)  # as a script may after the loop


def test_what_is_saved_of_a_parameter_is_not_all_of_the_servers_memory() -> None:
    owned = parameters()
    server = Server()
    assert values_of(owned).lend(server.publish(1))
    assert owned[0].untyped_storage().nbytes() == 4 * SIZES[0]


def test_memory_of_servers_that_are_not_used_any_more_is_let_go() -> None:
    server, other, owned = Server(), Server(), parameters()
    values = values_of(owned)
    for version in (1, 2):
        assert values.lend(server.publish(version))
    for version in (3, 4):
        assert values.lend(other.publish(version))
    assert values._in_place is not None
    assert len(values._in_place._views) == 2
    assert all(other.has(one) for number, one in enumerate(owned) if number != 2)


def test_it_works_where_nothing_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("sys.stderr is None")

    monkeypatch.setattr(faulthandler, "is_enabled", lambda: False)
    monkeypatch.setattr(faulthandler, "enable", fail)
    server, owned = Server(), parameters()
    assert values_of(owned).lend(server.publish(1))


def test_without_servers_memory_nothing_is_lent() -> None:
    owned = parameters()
    snapshot = Snapshot(0, 1, b"", 0.0, [(0, ELEMENTS, torch.arange(float(ELEMENTS)))])
    assert not values_of(owned).lend(snapshot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_float32_parameters_that_asked_for_it_are_lent(dtype: torch.dtype) -> None:
    server, owned = Server(), parameters(dtype)
    assert not values_of(owned, is_in_place=dtype is torch.bfloat16).lend(server.publish(1))


def test_autograd_sees_that_values_have_changed() -> None:
    server, owned = Server(), parameters()
    values = values_of(owned)
    assert values.lend(server.publish(1))
    loss = owned[0].square().sum()
    assert values.lend(server.publish(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
