"""A bare ZeroMQ program that moves the bytes of `bench.dense`: the bound of treefold's socket lane.

DEALER and ROUTER sockets, slices of 1 MiB that are sent from flat buffers and folded straight from
the received frames, no copy but the kernel's and the worker's one into its model. There is no
protocol beyond a slice's number, and nothing can go wrong without the program's hanging.
"""

import warnings

import torch
import zmq
from torch import Tensor

from bench._dense_peers import keep_memory, repeat
from bench._dense_work import CHUNK, Step, Work, error_of, pieces
from bench._harness import Part, Processes
from bench._link import Link, Member

SLICE = CHUNK  # 1 MiB: larger ones leave the cache, smaller ones cost more messages


def bare_zmq(work: Work, transport: str, folder: str) -> Processes:
    """The program over ``tcp`` or ``ipc``."""
    servers = [Part("server", n, serve, (work, transport, folder)) for n in range(work.servers)]
    workers = [Part("player", n, push_and_pull, (work,)) for n in range(work.workers)]
    return Processes(f"zmq {transport}", [*servers, *workers])


def open_socket(kind: int) -> zmq.Socket[bytes]:
    """A socket that queues without a limit."""
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.SNDHWM, 0)
    made.setsockopt(zmq.RCVHWM, 0)
    return made


def view(tensor: Tensor) -> memoryview:
    """A tensor's memory, to be sent."""
    return tensor.numpy().data.cast("B")


def tensor_of(frame: zmq.Frame) -> Tensor:
    """A received frame, to be read."""
    return torch.frombuffer(frame.buffer, dtype=torch.float32)


def serve(link: Link, work: Work, transport: str, folder: str) -> None:
    """One server: when a slice of every worker is there, fold, step, and send it back."""
    warnings.simplefilter("ignore")  # torch's, about frames that may not be written
    keep_memory()
    start, stop = work.share(link.rank, work.servers)
    optimizer = Step(work.optimizer, work.initial()[start:stop].clone())
    slices = list(pieces(0, stop - start, SLICE))
    views = [view(optimizer.parameters[first:last]) for first, last in slices]
    router = open_socket(zmq.ROUTER)
    where = f"ipc://{folder}/zmq-{link.rank}" if transport == "ipc" else "tcp://127.0.0.1:*"
    router.bind(where)
    member = Member(link, router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
    member.meet()
    member.end_with_conductor()
    scratch, weight = torch.empty(SLICE), 1.0 / work.workers
    waiting: list[list[tuple[bytes, zmq.Frame]]] = [[] for _ in slices]
    while True:
        sender, number, frame = router.recv_multipart(copy=False)
        index = int.from_bytes(number.bytes, "little")
        came = waiting[index]
        came.append((sender.bytes, frame))
        if len(came) < work.workers:
            continue
        first, last = slices[index]
        total = scratch[: last - first]
        if work.workers == 1:
            total.copy_(tensor_of(frame))
        else:
            torch.add(tensor_of(came[0][1]), tensor_of(came[1][1]), out=total)
        for _, other in came[2:]:
            total.add_(tensor_of(other))
        optimizer.take(first, last, total, weight)
        for peer, _ in came:
            router.send(peer, zmq.SNDMORE)
            router.send(number.bytes, zmq.SNDMORE)
            router.send(views[index], copy=False)
        came.clear()


def push_and_pull(link: Link, work: Work) -> None:
    """One worker: send all slices, then take in the new parameters as they come."""
    warnings.simplefilter("ignore")  # torch's, about frames that may not be written
    keep_memory()
    member = Member(link)
    gradient, model = work.gradient(link.rank), work.initial()
    dealers = [open_socket(zmq.DEALER) for _ in range(work.servers)]
    poller = zmq.Poller()
    for dealer, address in zip(dealers, member.meet(), strict=True):
        dealer.connect(address)
        poller.register(dealer, zmq.POLLIN)
    shares = [work.share(number, work.servers) for number in range(work.servers)]
    slices = [list(pieces(start, stop, SLICE)) for start, stop in shares]
    views = [[view(gradient[first:last]) for first, last in each] for each in slices]
    numbers = dict(zip(dealers, range(work.servers), strict=True))

    def step() -> None:
        for index in range(max(map(len, slices))):
            for dealer, each in zip(dealers, views, strict=True):
                if index < len(each):
                    dealer.send(index.to_bytes(4, "little"), zmq.SNDMORE)
                    dealer.send(each[index], copy=False)
        missing = sum(map(len, slices))
        while missing:
            for dealer, _ in poller.poll():
                missing -= take_in(dealer, slices[numbers[dealer]], model)

    member.serve(repeat(step), {"error": lambda wanted: error_of(model, wanted)})


def take_in(dealer: zmq.Socket[bytes], slices: list[tuple[int, int]], model: Tensor) -> int:
    """Copy what has arrived on a socket into the model; how many slices that was."""
    count = 0
    while int(dealer.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
        number, frame = dealer.recv_multipart(copy=False)
        first, last = slices[int.from_bytes(number.bytes, "little")]
        model[first:last].copy_(tensor_of(frame))
        count += 1
    return count
