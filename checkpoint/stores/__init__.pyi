from .durable import (
    free_bytes as free_bytes,
    open_written as open_written,
    set_aside as set_aside,
    sync as sync,
    write_synced as write_synced,
)
from .local import (
    LocalStore as LocalStore,
)
from .protocol import (
    Best as Best,
    CheckpointStore as CheckpointStore,
    Retention as Retention,
    StoredCheckpoint as StoredCheckpoint,
    apply_retention as apply_retention,
    best_names as best_names,
    commit as commit,
    has_content as has_content,
    newest as newest,
    readable as readable,
)
from .registry import (
    PathOrUrl as PathOrUrl,
    checkpoint_at as checkpoint_at,
    find_checkpoint as find_checkpoint,
    open_store as open_store,
    read_manifest as read_manifest,
)
