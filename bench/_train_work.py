"""What `bench.train` trains: two models on Fashion-MNIST, plainly and with DDP over gloo."""

import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bench._harness import Part, Processes
from bench._link import BenchError, Link, Member

RATE, MOMENTUM = 0.05, 0.9
IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049  # of IDX files of bytes with three and with one dimension
TEST_CHUNK = 1_000


@dataclass(frozen=True, slots=True)
class Training:
    """One training: ``model`` is a key of `MODELS`, ``batch`` counts the samples of all workers."""

    model: str
    data: str
    batch: int
    workers: int
    servers: int

    def dump(self) -> str:
        """As text, for another process."""
        return msgspec.json.encode(asdict(self)).decode()

    @classmethod
    def parse(cls, text: str) -> "Training":
        """From `dump`."""
        return msgspec.json.decode(text, type=cls)

    def make_model(self) -> nn.Sequential:
        """The model, the same in every process."""
        torch.manual_seed(0)
        return MODELS[self.model]()


def mlp() -> nn.Sequential:
    """A perceptron 784-512-512-10, 669,706 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def cnn() -> nn.Sequential:
    """Two convolutions and two linear layers, 229,028 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1_568, 142),
        nn.ReLU(),
        nn.Linear(142, 10),
    )


MODELS: dict[str, Callable[[], nn.Sequential]] = {"mlp": mlp, "cnn": cnn}


def make_optimizer(model: nn.Module) -> torch.optim.SGD:
    """Everybody's."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


# ---- data ----------------------------------------------------------------------------------------


class Images:
    """One of the two sets of Fashion-MNIST, in memory.

    Parameters
    ----------
    folder : str
        With the four IDX files, packed by gzip or not.
    name : str
        ``train`` or ``t10k``.

    Raises
    ------
    BenchError
        A file is missing, or is not what it should be.
    """

    def __init__(self, folder: str, name: str) -> None:
        pixels = read_idx(folder, f"{name}-images-idx3-ubyte", IMAGES_MAGIC)
        labels = read_idx(folder, f"{name}-labels-idx1-ubyte", LABELS_MAGIC)
        self.images = pixels.unsqueeze(1).float().div_(255.0).sub_(0.5)
        self.labels = labels.long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """A whole batch."""
        return self.images[indices], self.labels[indices]


def read_idx(folder: str, name: str, magic: int) -> Tensor:
    """An IDX file, uint8 of its own shape."""
    plain, packed = Path(folder, name), Path(folder, f"{name}.gz")
    if not plain.is_file() and not packed.is_file():
        raise BenchError(
            f"neither {plain} nor {packed} is there: say with --data where the data is"
        )
    raw = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    words = np.frombuffer(raw, ">i4", count=1 + magic % 256)
    shape = [int(word) for word in words[1:]]
    body = np.frombuffer(raw, np.uint8, offset=words.nbytes)
    if words[0] != magic or body.size != np.prod(shape):
        raise BenchError(f"{name} in {folder} is not an IDX file of bytes with {len(shape)} axes")
    return torch.from_numpy(body.reshape(shape).copy())


def accuracy(model: nn.Module, folder: str) -> float:
    """Share of the test images that a model recognises."""
    test = Images(folder, "t10k")
    right = 0
    with torch.no_grad():
        for first in range(0, len(test), TEST_CHUNK):
            answers = model(test.images[first : first + TEST_CHUNK]).argmax(1)
            right += int((answers == test.labels[first : first + TEST_CHUNK]).sum())
    return right / len(test)


# ---- plain torch ---------------------------------------------------------------------------------


def plain(training: Training) -> Processes:
    """One process."""
    return Processes("plain", [Part("player", 0, train_plain, (training,))])


def ddp(training: Training, folder: str) -> Processes:
    """A process per worker."""
    given = (training, f"file://{folder}/ddp-{training.model}")
    return Processes(
        "ddp", [Part("player", rank, train_ddp, given) for rank in range(training.workers)]
    )


def train_plain(link: Link, training: Training) -> None:
    """The plain loop."""
    model = training.make_model()
    train(Member(link), training, model, (0, 1))


def train_ddp(link: Link, training: Training, meeting: str) -> None:
    """The same loop, with DDP as its documentation recommends for a model that does not change."""
    member = Member(link)
    dist.init_process_group(
        "gloo", init_method=meeting, rank=link.rank, world_size=training.workers
    )
    inner = training.make_model()
    model = DistributedDataParallel(inner, gradient_as_bucket_view=True, static_graph=True)
    train(member, training, model, (link.rank, training.workers))


def train(member: Member, training: Training, model: nn.Module, part: tuple[int, int]) -> None:
    """Train by order of the conductor; ``part`` is this process's number and how many there are."""
    data = Images(training.data, "train")
    optimizer = make_optimizer(model)
    rank, size = part
    each = training.batch // size
    batches = shuffled(len(data), training.batch)

    def run(steps: int) -> None:
        for _ in range(steps):
            x, y = data.__getitems__(next(batches)[rank * each : (rank + 1) * each])
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
            optimizer.step()

    member.meet()
    member.serve(run, {"accuracy": lambda _: accuracy(model, training.data)})


def shuffled(samples: int, batch: int) -> Iterator[Tensor]:
    """Whole batches of shuffled sample numbers, epoch after epoch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from torch.split(order[: samples - samples % batch], batch)
