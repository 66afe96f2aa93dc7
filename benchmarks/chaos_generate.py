"""`mnistattn generate --shards`, killed: a subject of chaos.py.

After a kill, every file that passes for a whole shard, or for its manifest, has to be the
undisturbed run's, byte for byte; at the end the card, the digests and the files too.
"""

import sys
from pathlib import Path

from killing import Subject

from mnistattn.dataset.lock import work_folder
from mnistattn.dataset.read import read_card
from mnistattn.dataset.seal import is_sealed
from mnistattn.dataset.verify import verify


def command(args, out: Path) -> list:
    """The command line that makes the data set in one file a split."""
    return [
        sys.executable, "-m", "mnistattn", "generate", "--variant", args.variant, "--out", out,
        "--train", args.train, "--val", args.val, "--test", args.test, "--digits", args.digits,
        "--data-root", args.data_root, "--workers", args.workers,
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Generate(Subject):
    name = "generate"

    def __init__(self, args, home: Path, engine: str):
        super().__init__(home, engine)
        self.args, self.out = args, self.root / "set"

    def command(self, folder: Path) -> list:
        sharded = ["--shards", self.args.shards, "--engine", self.engine]
        return command(self.args, folder / "set") + sharded

    def look(self) -> None:
        pass  # all that it makes is there at the end

    def learn(self) -> None:
        self.right = contents(self.whole / "set")
        self.digests = digests(self.whole / "set")

    def made(self) -> bool:
        return self.out.exists()

    def false_files(self) -> list[str]:
        """Of the data set, all; of the work folder, shards with a sound manifest, and that."""
        if self.made():
            found = contents(self.out)
            return [name for name in self.right if found.get(name) != self.right[name]]
        wrong = []
        for manifest in work_folder(self.out).glob("*-of-*.json"):
            shard = manifest.with_suffix(".h5")
            if is_sealed(data := manifest.read_bytes()):
                found = {manifest.name: data, shard.name: shard.exists() and shard.read_bytes()}
                wrong += [name for name in found if found[name] != self.right[name]]
        return wrong

    def problems(self) -> list[str]:
        if not self.made():
            return ["no data set"]
        found = [str(problem) for problem in verify(self.out, 0).problems]
        return found + ["digests"] * (digests(self.out) != self.digests)


def digests(out: Path) -> dict[str, str]:
    return {split: entry["digest"] for split, entry in read_card(out).splits.items()}
