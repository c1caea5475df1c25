from .going_back import (
    answer_request as answer_request,
    go_back_from_spike as go_back_from_spike,
)
from .requests import (
    MOST_SAMPLES as MOST_SAMPLES,
    RewindRequest as RewindRequest,
    ask as ask,
)
from .stopped import (
    take_back_stopped as take_back_stopped,
)
