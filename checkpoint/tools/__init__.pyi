from .diff import (
    Difference as Difference,
    TensorDifference as TensorDifference,
    diff_checkpoints as diff_checkpoints,
)
from .inspect import (
    Summary as Summary,
    inspect_checkpoint as inspect_checkpoint,
)
from .verify import (
    check_small_parts as check_small_parts,
    checkpoint_to_rebuild as checkpoint_to_rebuild,
    rebuild_manifest as rebuild_manifest,
    verify_checkpoint as verify_checkpoint,
)
