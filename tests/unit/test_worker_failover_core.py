"""A shard gets another primary: the worker asks there, and again soon if it is not answered."""

from msgspec.structs import replace

from tests.unit.worker_driver import ME, OTHER, SERVER, Driver, sent
from treefold.wire.membership import MS
from treefold.wire.messages import Pull, View
from treefold.wire.words import Member, Role

PROMOTED = SERVER + 100


def promotion(driver: Driver) -> View:
    """A view in which another server leads every shard."""
    view = driver.view([ME, OTHER])
    members = [*view.members, Member(Role.SERVER, 1, PROMOTED, "other", "host", 2)]
    tables = [
        replace(
            table, shards=[replace(one, server=PROMOTED, view=view.number) for one in table.shards]
        )
        for table in view.tables
    ]
    return replace(view, members=members, tables=tables)


def test_a_new_primary_that_has_not_heard_of_it_is_asked_again_at_once() -> None:
    driver = Driver()
    driver.declare()
    driver.enter([ME, OTHER])
    driver.wait(5_000 * MS)  # which the old one does not answer, so that pauses grow
    assert len(sent(driver.control(promotion(driver)), Pull)) == 1
    assert len(sent(driver.wait(200 * MS), Pull)) >= 2
