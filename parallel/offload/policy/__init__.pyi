from .amount import (
    Amount as Amount,
    Bounds as Bounds,
    Measured as Measured,
    drive_life_years as drive_life_years,
    next_amount as next_amount,
)
from .choice import (
    Rates as Rates,
    choose_layers as choose_layers,
)
from .estimate import (
    OffloadEstimate as OffloadEstimate,
    estimate_offload as estimate_offload,
)
from .heap import (
    compact_heap_environment as compact_heap_environment,
    restart_with_compact_heap as restart_with_compact_heap,
)
from .phases import (
    HostMoment as HostMoment,
    Moment as Moment,
    Phase as Phase,
    Phases as Phases,
    StepPhases as StepPhases,
)
from .report import (
    OffloadReport as OffloadReport,
)
