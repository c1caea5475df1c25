from .initial_weights import (
    has_state as has_state,
)
from .process_heap import (
    prepare_heap as prepare_heap,
)
from .resume import (
    Resume as Resume,
    checkpoint_root as checkpoint_root,
    find_resume as find_resume,
    memory_root as memory_root,
    set_aside_newer as set_aside_newer,
)
from .run_directory import (
    RankError as RankError,
    RunDirectory as RunDirectory,
    choose_root as choose_root,
    lock_run as lock_run,
    open_run as open_run,
    read_error as read_error,
    write_error as write_error,
)
from .throughput import (
    Throughput as Throughput,
    assumed as assumed,
    described as described,
    measure_throughput as measure_throughput,
    recorded_throughput as recorded_throughput,
    resolve_throughput as resolve_throughput,
    with_throughput as with_throughput,
)
