"""Key files and the allow-list, as ``treefold keys`` makes them and processes read them."""

import stat
from pathlib import Path

import pytest

from treefold.cli.keys import main
from treefold.common.errors import ConfigError
from treefold.transport.keys import (
    Entry,
    generate,
    own_key,
    read_allowed,
    read_key,
    write_allowed,
    write_key,
)
from treefold.wire.permissions import KeyRole


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `treefold keys init` makes it."""
    assert main(["init", str(tmp_path / "keys")]) == 0
    return tmp_path / "keys"


def names(folder: Path) -> dict[str, KeyRole]:
    return {entry.name: entry.role for entry in read_allowed(folder)}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_init_makes_a_key_for_each_role_that_only_its_owner_can_read(folder: Path) -> None:
    assert names(folder) == {role.value: role for role in KeyRole}
    assert mode(folder) == 0o700
    assert {mode(folder / f"{role}.key") for role in KeyRole} == {0o600}
    keys = [own_key(str(folder), [role]) for role in KeyRole]
    assert {key.entry for key in keys} == set(read_allowed(folder))
    assert len({key.secret for key in keys}) == len(KeyRole)


def test_init_leaves_a_folder_alone_that_has_something(folder: Path) -> None:
    before = (folder / "allowed").read_text()
    with pytest.raises(ConfigError, match="is not empty"):
        main(["init", str(folder)])
    assert (folder / "allowed").read_text() == before


@pytest.mark.parametrize("wider", [0o640, 0o604, 0o620, 0o666])
def test_a_secret_key_that_others_can_reach_is_refused_by_name(folder: Path, wider: int) -> None:
    path = folder / "worker.key"
    path.chmod(wider)
    with pytest.raises(ConfigError, match=rf"worker\.key is a secret key.*0{wider:o}.*chmod 600"):
        own_key(str(folder), [KeyRole.WORKER])


def test_an_allow_list_that_others_can_write_is_refused(folder: Path) -> None:
    (folder / "allowed").chmod(0o664)
    with pytest.raises(ConfigError, match="others can write it"):
        read_allowed(folder)


def test_neither_the_words_of_a_key_nor_an_error_show_its_secret(folder: Path) -> None:
    key = read_key(folder / "worker.key")
    assert key.secret not in f"{key!r} {key}"
    (folder / "worker.key").write_text(f"name = {key.secret}")
    with pytest.raises(ConfigError) as caught:
        read_key(folder / "worker.key")
    assert key.secret not in str(caught.value)


def test_a_key_file_with_anothers_public_key_is_refused(folder: Path) -> None:
    one, other = generate(KeyRole.WORKER, "one"), generate(KeyRole.WORKER, "other")
    path = write_key(folder, one)
    path.write_text(path.read_text().replace(one.public, other.public))
    with pytest.raises(ConfigError, match="belongs to another secret one"):
        read_key(path)


def test_add_and_remove_change_who_is_allowed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["add", str(folder), "gpu7", "--role", "worker"])
    made = read_key(folder / "gpu7.key")
    assert made.entry in read_allowed(folder)
    main(["list", str(folder)])
    assert (
        f"gpu7                  {made.public}  (its secret key is here)" in capsys.readouterr().out
    )
    main(["remove", str(folder), "gpu7"])
    assert "gpu7" not in names(folder)
    assert not (folder / "gpu7.key").exists()


def test_a_public_key_from_elsewhere_is_allowed_without_its_secret(folder: Path) -> None:
    public = generate(KeyRole.OBSERVER, "x").public
    main(["add", str(folder), "laptop", "--role", "observer", "--public", public])
    assert Entry(KeyRole.OBSERVER, "laptop", public) in read_allowed(folder)
    assert not (folder / "laptop.key").exists()


def test_rotate_allows_the_old_key_until_it_is_removed(folder: Path) -> None:
    old = read_key(folder / "server.key")
    main(["rotate", str(folder), "server"])
    new = read_key(folder / "server.key")
    assert new.public != old.public
    assert {entry.public for entry in read_allowed(folder)} >= {old.public, new.public}
    with pytest.raises(ConfigError, match="was rotated before"):
        main(["rotate", str(folder), "server"])
    main(["remove", str(folder), "server-old"])
    publics = {entry.public for entry in read_allowed(folder)}
    assert (new.public in publics, old.public in publics) == (True, False)
    assert mode(folder / "server.key") == 0o600


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add", "DIR", "../evil", "--role", "worker"], "a key cannot be called"),
        (["add", "DIR", "a b", "--role", "worker"], "a key cannot be called"),
        (["add", "DIR", "more"], "which role"),
        (["add", "DIR", "worker", "--role", "worker"], "on the allow-list already"),
        (["add", "DIR", "more", "--role", "worker", "--public", "short"], "is no public key"),
        (["remove", "DIR", "nobody"], "is not on the allow-list; there are worker, server"),
        (["rotate", "DIR", "nobody"], "is not on the allow-list"),
        (["remove", "DIR"], "needs the NAME"),
        (["list", "DIR", "worker"], "takes no NAME"),
        (["list", "DIR", "--role", "worker"], "--role goes with treefold keys add"),
        (["list", "DIR/none"], "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(
    folder: Path, words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        main([word.replace("DIR", str(folder)) for word in words])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("worker one", "expected ROLE NAME PUBLIC-KEY, got 2 words"),
        ("root one KEY", "'root' is no role; there are worker"),
        ("worker ../one KEY", "cannot be called"),
        ("worker one nokey", "is no public key"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(folder: Path, line: str, said: str) -> None:
    path = folder / "allowed"
    key = generate(KeyRole.WORKER, "x").public
    path.write_text(f"# nothing\n{line.replace('KEY', key)}\n")
    with pytest.raises(ConfigError, match=f"line 2: .*{said}"):
        read_allowed(folder)


def test_the_same_name_or_key_twice_is_refused(folder: Path) -> None:
    one = generate(KeyRole.WORKER, "one").entry
    with pytest.raises(ConfigError, match="is twice in the allow-list"):
        write_allowed(folder, [one, Entry(KeyRole.ADMIN, "two", one.public)])
    with pytest.raises(ConfigError, match="one is twice"):
        write_allowed(folder, [one, generate(KeyRole.ADMIN, "one").entry])


def test_a_process_takes_the_key_of_the_first_role_that_there_is(folder: Path) -> None:
    (folder / "observer.key").unlink()
    assert own_key(str(folder), [KeyRole.OBSERVER, KeyRole.ADMIN]).role is KeyRole.ADMIN
    (folder / "worker.key").rename(folder / "gpu7.key")
    assert own_key(str(folder), [KeyRole.WORKER]).role is KeyRole.WORKER
    main(["add", str(folder), "gpu8", "--role", "worker"])
    with pytest.raises(ConfigError, match=r"which of gpu7\.key|which of .*gpu8\.key"):
        own_key(str(folder), [KeyRole.WORKER])
    with pytest.raises(ConfigError, match=r"there is no observer\.key"):
        own_key(str(folder), [KeyRole.OBSERVER])
