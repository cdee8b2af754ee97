"""Training by a schedule: rounds are those of a plain loop, and bases matter."""

import torch
from torch import Tensor, nn

from tests.sim.training import (
    BATCH,
    HYPER,
    IN_A_ROW,
    TRAIN,
    Digits,
    Lesson,
    Step,
    make_model,
    replay,
)

SLOTS, SEED, ROUNDS = 4, 3, 12
ROUNDS_OF_EPOCH = TRAIN // BATCH


def rounds(count: int) -> list[Step]:
    """Of a synchronous job, a second each."""
    return [Step(n + 1, tuple((n, slot) for slot in range(SLOTS)), n) for n in range(count)]


def one_by_one(bases: list[int]) -> list[Step]:
    """Contributions of an asynchronous job, slot after slot, by the version they begin with."""
    return [Step(n + 1, (divmod(n, SLOTS),), base) for n, base in enumerate(bases)]


class Plain:
    """The loop that anybody would write, with torch's own optimizer."""

    def __init__(self) -> None:
        self.digits, self.model = Digits(SEED), make_model(SEED)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=float(str(HYPER["lr"])))

    def gradients(self, round_: int, slot: int) -> list[Tensor]:
        """Of a slot, with its share."""
        self.optimizer.zero_grad()
        images = self.digits.of(round_, slot, SLOTS)
        loss = nn.functional.cross_entropy(self.model(images.pixels), images.labels)
        loss.backward()  # type: ignore[no-untyped-call] # torch's own has no types
        return [one.grad / SLOTS for one in self.model.parameters() if one.grad is not None]

    def step(self, gradients: list[Tensor]) -> None:
        """Take one step."""
        for one, gradient in zip(self.model.parameters(), gradients, strict=True):
            one.grad = gradient
        self.optimizer.step()

    def values(self) -> Tensor:
        """All parameters."""
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def test_synchronous_rounds_come_to_the_bits_of_a_plain_loop() -> None:
    plain = Plain()
    for number in range(ROUNDS):
        leaves = [plain.gradients(number, slot) for slot in range(SLOTS)]
        plain.step([(a + b) + (c + d) for a, b, c, d in zip(*leaves, strict=True)])
    assert torch.equal(replay(rounds(ROUNDS), SLOTS, SEED).values, plain.values())


def test_contributions_that_are_never_stale_come_to_the_bits_of_a_plain_loop() -> None:
    plain = Plain()
    for number in range(ROUNDS):
        plain.step(plain.gradients(number // SLOTS, number % SLOTS))
    fresh = replay(one_by_one(list(range(ROUNDS))), SLOTS, SEED)
    assert torch.equal(fresh.values, plain.values())


def test_a_gradient_is_computed_with_the_version_that_its_body_began_with() -> None:
    plain = Plain()
    first, second = (plain.gradients(0, slot) for slot in (0, 1))
    plain.step(first)
    plain.step(second)
    assert torch.equal(replay(one_by_one([0, 0]), SLOTS, SEED).values, plain.values())
    assert not torch.equal(replay(one_by_one([0, 1]), SLOTS, SEED).values, plain.values())


def test_each_epoch_has_each_sample_once_in_an_order_of_its_own() -> None:
    digits = Digits(SEED)
    epochs = [
        torch.cat(
            [
                digits.of(epoch * ROUNDS_OF_EPOCH + number, slot, SLOTS).pixels
                for number in range(ROUNDS_OF_EPOCH)
                for slot in range(SLOTS)
            ]
        )
        for epoch in range(2)
    ]
    expected = sorted(digits.train.pixels.tolist())
    assert [sorted(epoch.tolist()) for epoch in epochs] == [expected, expected]
    assert not torch.equal(*epochs)


def test_losses_are_taken_once_for_each_rounds_worth_of_contributions() -> None:
    assert replay(rounds(3), SLOTS, SEED).times_ns == [1, 2, 3]
    assert replay(one_by_one(list(range(10))), SLOTS, SEED).times_ns == [4, 8]


def test_a_loss_is_reached_when_it_stays_so_for_some_rounds() -> None:
    losses = [0.9, 0.4, 0.6, *[0.5] * IN_A_ROW, 0.7]
    lesson = Lesson(list(range(len(losses))), losses, 0.9, torch.empty(0))
    assert lesson.reached_ns(0.5) == 3
    assert lesson.reached_ns(0.45) is None
    assert lesson.reached_ns(0.8) == 1
