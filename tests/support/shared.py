"""What shared memory a process has, as the kernel says."""

import re
from pathlib import Path

SHM = ("/", "dev", "shm")
MAPPING = re.compile(r"^\S+ \S+ \S+ \S+ (\d+) +(/\S.*)$", re.MULTILINE)


def mapped(pid: int) -> dict[int, str]:
    """Inode and name of every anonymous file in memory that a process has mapped."""
    text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    found = {int(inode): name for inode, name in MAPPING.findall(text)}
    return {inode: name for inode, name in found.items() if name.startswith("/memfd:")}


def opened(pid: int) -> set[int]:
    """Inodes of the anonymous files in memory that a process has open, mapped or not."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return {link.stat().st_ino for link in links if str(link.readlink()).startswith("/memfd:")}


def own(pid: int) -> set[int]:
    """Inodes of the segments that a process has made itself: those that it may write to."""
    text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "/memfd:treefold" in line]
    return {int(line.split()[4]) for line in lines if line.split()[1].startswith("rw")}


def in_dev_shm(pid: int) -> list[str]:
    """Files of ``/dev/shm``, which outlive their processes, that a process has mapped."""
    text = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    return [name for _, name in MAPPING.findall(text) if Path(name).parts[:3] == SHM]


def foreign_bytes(pid: int) -> int:
    """Resident bytes of the segments that a process can only read, since peers have made them."""
    found, is_foreign = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_foreign = "/memfd:treefold" in line and words[1].startswith("r--")
        elif is_foreign and words[0] == "Rss:":
            found += int(words[1]) * 1024
    return found
