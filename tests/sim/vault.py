"""A simulated folder of checkpoints: files that are whole or not there, and manifests."""

from dataclasses import dataclass, field

from tests.sim.world import Violation
from treefold.checkpoint.manifest import Manifest
from treefold.common.layout import Layout, ShardSpan

FOLDER = "ckpt"


@dataclass(frozen=True, slots=True)
class Saved:
    """A file: the version of elements ``[start, stop)`` of a table."""

    table: int
    version: int
    start: int
    stop: int


@dataclass(eq=False, slots=True)
class Vault:
    """What servers and the scheduler have written."""

    files: dict[str, Saved] = field(default_factory=dict)
    manifests: dict[int, Manifest] = field(default_factory=dict)

    def put(self, path: str, saved: Saved) -> None:
        """A file is there, whole."""
        if path in self.files:
            raise Violation(f"{path} is written over")
        self.files[path] = saved

    def commit(self, manifest: Manifest) -> None:
        """A checkpoint counts: all that it names is there, and is what it says."""
        if manifest.version in self.manifests:
            return
        for table in manifest.tables:
            layout, at = Layout(table.spec), 0
            for file in table.files:
                start, stop = layout.shard_range(ShardSpan(file.first_block, file.blocks))
                wanted = Saved(table.number, table.version, start, stop)
                if file.first_block != at:
                    raise Violation(f"a manifest with {file} after block {at}")
                if self.files.get(file.path) != wanted:
                    raise Violation(f"{file.path} is {self.files.get(file.path)}, not {wanted}")
                at += file.blocks
            if at != layout.blocks:
                raise Violation(f"a manifest with {at} of {layout.blocks} blocks")
        self.manifests[manifest.version] = manifest

    def choose(self, passed_over: int) -> Manifest | None:
        """The newest checkpoint but for some that are damaged; later ones are set aside."""
        versions = sorted(self.manifests, reverse=True)
        for version in versions[: min(passed_over, len(versions) - 1)]:
            del self.manifests[version]
        return self.manifests[max(self.manifests)] if self.manifests else None
