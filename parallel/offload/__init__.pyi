from .hooks import Offloader as Offloader, SavedOfProgram as SavedOfProgram
from .policy import (
    Amount as Amount,
    Bounds as Bounds,
    OffloadEstimate as OffloadEstimate,
    OffloadReport as OffloadReport,
    Rates as Rates,
    choose_layers as choose_layers,
    compact_heap_environment as compact_heap_environment,
    drive_life_years as drive_life_years,
    estimate_offload as estimate_offload,
    restart_with_compact_heap as restart_with_compact_heap,
)
from .stores import DiskFile as DiskFile, DriveRequest as DriveRequest
