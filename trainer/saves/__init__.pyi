from .checkpointing import (
    Checkpoints as Checkpoints,
)
from .rewind import (
    MOST_SAMPLES as MOST_SAMPLES,
    RewindRequest as RewindRequest,
    answer_request as answer_request,
    ask as ask,
    go_back_from_spike as go_back_from_spike,
    take_back_stopped as take_back_stopped,
)
