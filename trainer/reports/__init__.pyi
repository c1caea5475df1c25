from . import trace as trace
from .checkpoint_events import (
    SaveFailures as SaveFailures,
)
from .digests import (
    StepDigests as StepDigests,
    broken_links as broken_links,
    digests_by_step as digests_by_step,
    read_digests as read_digests,
)
from .events import (
    EventFile as EventFile,
)
from .failure import (
    device_facts as device_facts,
    keep_failure as keep_failure,
    note_operations as note_operations,
)
from .flops import (
    step_flops as step_flops,
)
from .metrics import (
    StepMetrics as StepMetrics,
    last_step as last_step,
)
from .offload_metrics import (
    OffloadMetrics as OffloadMetrics,
)
from .reporter import (
    Reporter as Reporter,
)
from .run_console import (
    RunConsole as RunConsole,
)
from .stragglers import (
    PhaseClock as PhaseClock,
)
from .terminal import (
    LayoutTable as LayoutTable,
)
from .workers import (
    introduce as introduce,
    workers_of as workers_of,
)
