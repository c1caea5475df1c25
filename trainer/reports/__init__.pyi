from . import trace as trace
from .checkpoint_events import (
    SaveFailures as SaveFailures,
)
from .console import (
    Display as Display,
    ProgressLine as ProgressLine,
    duration as duration,
    layout_grid as layout_grid,
)
from .events import (
    EventFile as EventFile,
)
from .flops import (
    step_flops as step_flops,
)
from .metrics import (
    last_step as last_step,
)
from .offload_metrics import (
    OffloadMetrics as OffloadMetrics,
    described as described,
)
from .reporter import (
    Reporter as Reporter,
)
from .stragglers import (
    PhaseClock as PhaseClock,
)
from .workers import (
    introduce as introduce,
    workers_of as workers_of,
)
