"""Files are opened by the functions that check what they open; elsewhere only for a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from support.source_tree import MODULES, tree_of

DIRECT = {
    "io.open", "np.fromfile", "np.load", "np.memmap", "open", "os.open", "shutil.copy",
    "shutil.copy2", "shutil.copyfile", "shutil.move", "torch.load",
}  # fmt: skip
BY_NAME = {"open", "read_bytes", "read_text", "write_bytes", "write_text"}
OF_THE_KERNEL = ("/proc/", "os.devnull", "_BOOT", "_INSTALLATION", "_PORT_RANGE", "Path(limit)")
NO_FILES = {
    "checkpoint.saving.save: self.snapshot.open",
    "elastic.lighthouse: direct.open",
    "launch.processes: self._system.open",
    "parallel.offload.hooks.offloader: self._prefetch.open",
    "parallel.offload.hooks.offloader: self._selection.open",
}
REASONS = {
    "checkpoint.convert.rules.rules: files('holdfast.checkpoint.convert').joinpath('mappings', "
    "f'{name}.toml').read_text": "a file of the package",
    "checkpoint.convert.sources.engine: self._writes.open": "was checked a line before",
    "checkpoint.convert.sources.source_files: self._cached.open": "was checked a line before",
    "checkpoint.convert.sources.source_files: self._direct.open": "was checked a line before",
    "checkpoint.loading.readers: self._engine.open": "was checked a line before",
    "checkpoint.saving.save: self._resources.engine.open": "in a new folder of this save alone",
    "checkpoint.stores.durable: os.open": "what was just written, or a folder, to sync it",
    "checkpoint.stores.local: shutil.copyfile": "into a new folder of this save alone",
    "launch.agent.lighthouse_process: open": "a pipe of this process",
    "launch.launchers.nodes: open": "a pipe of this process",
    "launch.machine_errors.kernel_messages: os.open": "a device of the kernel, without waiting",
    "parallel.files.own_files: open": "a descriptor",
    "parallel.files.own_files: os.open": "checks itself",
    "parallel.files.scratch: os.open": "in a folder of this user, and no link is followed",
    "parallel.offload.stores.disk_file: os.open": "a file without a name",
    "parallel.output.standard_streams: open": "a descriptor",
    "parallel.reading: os.open": "checks itself",
    "trainer.config.loading: source.open": "what the caller has opened for the command",
    "trainer.data.corpora.megatron: np.fromfile": "a file that is open",
    "trainer.data.corpora.prepare: os.open": "what was just written, or a folder, to sync it",
    "trainer.data.corpora.token_cache: (made / 'documents.npy').open": "in a folder of this user",
    "trainer.data.corpora.token_cache: (made / 'entry.json').write_bytes": "in such a folder",
    "trainer.data.corpora.token_cache: (made / 'tokens.npy').open": "in such a folder",
    "trainer.data.corpora.token_cache: np.memmap": "a file that is open",
    "trainer.run.memory_copies: os.open": "a folder, and no link is followed",
}
"""By module and call, why what is opened there needs no check."""


WHOLE_READS = {
    "elastic.quorum_client: acceptor_file.read": "has a limit of its own",
    "elastic.watch: bulletin.read": "has a limit of its own",
    "checkpoint.convert.work.job: journal.read": "has a limit of its own",
    "launch.agent.agent: slot.spec.acceptor.read": "has a limit of its own",
    "launch.agent.lighthouse_process: lines.read": "a pipe of this process",
    "launch.launchers.display_process: file.read": "what the run has added since the last look",
    "launch.launchers.nodes: told.read": "a pipe of this process",
    "trainer.run.throughput: probe.stderr.read": "a pipe of this process",
}
"""By module and call, why what is read there to its end is not too large."""


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """The module, the name and the node of each call in the package's source."""
    for module, path in MODULES.items():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                yield module.removeprefix("holdfast."), ast.unparse(node.func), node


def test_nothing_is_read_to_its_end_without_a_limit() -> None:
    found = {
        f"{module}: {called}"
        for module, called, node in calls()
        if called.rpartition(".")[2] in {"read", "readlines", "readall"} and not node.args
    }
    assert found == set(WHOLE_READS)


def test_files_are_opened_by_what_checks_them() -> None:
    found = {
        f"{module}: {called}"
        for module, called, node in calls()
        if (called in DIRECT or called.rpartition(".")[2] in BY_NAME)
        and not any(name in ast.unparse(node) for name in OF_THE_KERNEL)
    }
    assert found - NO_FILES == set(REASONS)


def test_types_are_begun_by_one_thread() -> None:
    """msgspec itself crashes where two threads are the first to read values of one type."""
    typed = {
        f"{module}: {called}"
        for module, called, node in calls()
        if called == "msgspec.convert"
        or (called.startswith("msgspec.") and called.endswith("Decoder"))
        or (
            called in {"msgspec.json.decode", "msgspec.toml.decode"}
            and (len(node.args) > 1 or node.keywords)
        )
    }
    assert typed == {
        "parallel.reading: msgspec.convert",
        "parallel.reading: msgspec.json.Decoder",
        "parallel.reading: msgspec.json.decode",
    }
