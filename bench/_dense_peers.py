"""The contenders of `bench.dense` that are not treefold: each does the work as fast as it can.

Nothing here is a framework of ours. All are tuned: gradients are not copied where they need not be,
optimizer steps are taken on pieces that stay in the cache, and nobody waits for what is not needed.
"""

import ctypes
import warnings
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from threading import Lock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import rpc
from torch.futures import Future

from bench._dense_work import CHUNK, Step, Work, error_of, pieces
from bench._harness import FORKED, Part, Processes
from bench._link import Link, Member

RPC_TIMEOUT_S = 60.0
RPC_THREADS = 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
RPC_PIECE = 1 << 20  # as large as a model's tensors are


def keep_memory() -> None:
    """Have malloc keep what is freed, or whatever is received costs page faults anew."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)


def repeat(step: Callable[[], None]) -> Callable[[int], None]:
    """So many steps."""

    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


# ---- the floor -----------------------------------------------------------------------------------


def floor(work: Work, processors: int, *, is_lean: bool) -> Processes:
    """The fold, the step and the copies with no framework, spread over the processors.

    As treefold makes them: gradients are scaled with a rounding of their own, so that it does not
    matter where, and the parameters that workers copy are not those that the next step changes. If
    lean, the fewest passes over memory that give the step at all: a fused multiply-add of the
    gradients, and workers that copy the very parameters that are stepped.
    """
    count = max(1, min(processors, work.workers + work.servers))
    barrier = FORKED.Barrier(count)
    shared = Shared(
        [work.gradient(worker) for worker in range(work.workers)],
        work.initial(),
        [torch.zeros(work.elements) for _ in range(work.workers)],
        None if is_lean else torch.zeros(work.elements),
    )
    given = (work, (count, barrier), shared)
    return Processes(
        "lean floor" if is_lean else "floor",
        [Part("player", rank, floor_part, given) for rank in range(count)],
    )


class Shared:
    """What the processes of the floor share: float32 [elements] each."""

    def __init__(
        self,
        gradients: list[Tensor],
        parameters: Tensor,
        models: list[Tensor],
        published: Tensor | None,
    ) -> None:
        self.gradients = gradients
        self.parameters = parameters
        self.models = models
        self.published = published
        for tensor in (
            *gradients,
            parameters,
            *models,
            *([] if published is None else [published]),
        ):
            tensor.share_memory_()  # type: ignore[no-untyped-call] # torch's own has no types


def floor_part(link: Link, work: Work, crew: tuple[int, Barrier], shared: Shared) -> None:
    """Fold and step one share of the parameters, then copy one share of all models."""
    count, barrier = crew
    member = Member(link)
    start, stop = work.share(link.rank, count)
    optimizer = Step(work.optimizer, shared.parameters)
    scratch, other, weight = torch.empty(CHUNK), torch.empty(CHUNK), 1.0 / work.workers
    published = shared.parameters if shared.published is None else shared.published
    own = range(link.rank * work.workers, (link.rank + 1) * work.workers)

    def step() -> None:
        barrier.wait()
        for first, last in pieces(start, stop):
            total = scratch[: last - first]
            torch.mul(shared.gradients[0][first:last], weight, out=total)
            for gradient in shared.gradients[1:]:
                if shared.published is None:
                    total.add_(gradient[first:last], alpha=weight)
                else:
                    scaled = other[: last - first]
                    total.add_(torch.mul(gradient[first:last], weight, out=scaled))
            optimizer.take(first, last, total)
            if shared.published is not None:
                published[first:last].copy_(shared.parameters[first:last])
        barrier.wait()
        for share in own:  # there are as many shares of each model as processes
            model, part = divmod(share, count)
            first, last = work.share(part, count)
            shared.models[model][first:last].copy_(published[first:last])
        barrier.wait()

    def error(wanted: str) -> float:
        return max(error_of(model, wanted) for model in shared.models)

    member.meet()
    member.serve(repeat(step), {"error": error})


# ---- gloo ----------------------------------------------------------------------------------------


def gloo(work: Work, folder: str) -> Processes:
    """All-reduce of one flat tensor, then a local step on every worker."""
    given = (work, f"file://{folder}/gloo")
    return Processes("gloo", [Part("player", n, gloo_worker, given) for n in range(work.workers)])


def gloo_worker(link: Link, work: Work, meeting: str) -> None:
    """One worker.

    After the first step its gradient is the mean, whose mean is itself: the same work for gloo, and
    no copy is needed to keep a gradient for the next step.
    """
    member = Member(link)
    dist.init_process_group("gloo", init_method=meeting, rank=link.rank, world_size=work.workers)
    gradient = work.gradient(link.rank)
    optimizer = Step(work.optimizer, work.initial())
    weight = 1.0 / work.workers

    def step() -> None:
        dist.all_reduce(gradient)
        for first, last in pieces(0, work.elements):
            optimizer.take(first, last, gradient[first:last].mul_(weight))

    member.meet()
    member.serve(repeat(step), {"error": lambda wanted: error_of(optimizer.parameters, wanted)})


# ---- torch's RPC ---------------------------------------------------------------------------------


def rpc_server(work: Work, folder: str) -> Processes:
    """A parameter server of `torch.distributed.rpc`, as torch's tutorial on batched RPC has it."""
    given = (work, f"file://{folder}/rpc")
    servers = [Part("server", n, rpc_serve, given) for n in range(work.servers)]
    workers = [Part("player", n, rpc_work, given) for n in range(work.workers)]
    return Processes("rpc", [*servers, *workers], is_spinning=True)


def is_rpc_available() -> bool:
    """Whether this torch was built with it."""
    return bool(rpc.is_available())


class RpcShard:
    """One server's share of the parameters, and the round in progress."""

    def __init__(self, work: Work, rank: int) -> None:
        start, stop = work.share(rank, work.servers)
        self._optimizer = Step(work.optimizer, work.initial()[start:stop].clone())
        self._workers = work.workers
        self._gradients: list[list[Tensor]] = []
        self._lock = Lock()
        self._scratch = torch.empty(CHUNK)
        self._round: Future[list[Tensor]] = Future()
        self._pieces = list(pieces(0, stop - start, RPC_PIECE))

    def push(self, gradient: list[Tensor]) -> "Future[list[Tensor]]":
        """Take a worker's gradient; the future has the new parameters when all have come."""
        with self._lock:
            self._gradients.append(gradient)
            future = self._round
            if len(self._gradients) == self._workers:
                self._step()
                self._gradients, self._round = [], Future()
                parameters = self._optimizer.parameters
                future.set_result([parameters[first:last] for first, last in self._pieces])
        return future

    def _step(self) -> None:
        for number, (start, stop) in enumerate(self._pieces):
            came = [gradient[number] for gradient in self._gradients]
            for first, last in pieces(start, stop):
                total = came[0][first - start : last - start]
                for other in came[1:]:
                    total.add_(other[first - start : last - start])
                self._optimizer.take(first, last, total, 1.0 / self._workers)


RPC_SHARDS: list[RpcShard] = []
"""This process's share: a function that is called from afar finds nothing else."""


@rpc.functions.async_execution  # type: ignore[untyped-decorator] # torch's own has no types
def rpc_push(gradient: list[Tensor]) -> "Future[list[Tensor]]":
    """What workers call: push a gradient, get the new parameters, both in pieces."""
    return RPC_SHARDS[0].push(gradient)


def rpc_join(link: Link, work: Work, meeting: str) -> None:
    """Make this process one of the RPC group, with the transports that torch chooses."""
    keep_memory()
    warnings.simplefilter("ignore")  # torch's, about its own use of gloo
    rank = link.rank + (work.servers if link.role == "player" else 0)
    options = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=RPC_THREADS, rpc_timeout=RPC_TIMEOUT_S, init_method=meeting
    )
    rpc.init_rpc(  # type: ignore[no-untyped-call] # torch's own has no types
        f"{link.role}-{link.rank}",
        rank=rank,
        world_size=work.servers + work.workers,
        rpc_backend_options=options,
    )


def rpc_serve(link: Link, work: Work, meeting: str) -> None:
    """One server: torch's threads do the rest."""
    member = Member(link)
    RPC_SHARDS.append(RpcShard(work, link.rank))
    rpc_join(link, work, meeting)
    member.meet()
    member.serve(lambda _: None)


def rpc_work(link: Link, work: Work, meeting: str) -> None:
    """One worker."""
    member = Member(link)
    rpc_join(link, work, meeting)
    gradient, model = work.gradient(link.rank), work.initial()
    shares = [work.share(number, work.servers) for number in range(work.servers)]
    cut = [list(pieces(start, stop, RPC_PIECE)) for start, stop in shares]

    def step() -> None:
        futures = [
            rpc.rpc_async(f"server-{number}", rpc_push, ([gradient[a:b] for a, b in each],))
            for number, each in enumerate(cut)
        ]
        for each, future in zip(cut, futures, strict=True):
            for (first, last), values in zip(each, future.wait(), strict=True):
                model[first:last].copy_(values)

    member.meet()
    member.serve(repeat(step), {"error": lambda wanted: error_of(model, wanted)})
