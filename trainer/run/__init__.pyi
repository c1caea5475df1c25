from .folder_lock import (
    is_locked as is_locked,
    unwritable as unwritable,
)
from .history import (
    read_events as read_events,
)
from .initial_weights import (
    has_state as has_state,
)
from .log import (
    locate_log as locate_log,
    log_to_file as log_to_file,
)
from .machine import (
    require_processes as require_processes,
    this_machine as this_machine,
)
from .memory_copies import (
    forget_newer as forget_newer,
    memory_root as memory_root,
)
from .opening import (
    OpenedRun as OpenedRun,
    RunRequest as RunRequest,
    at_rest as at_rest,
    load_run_config as load_run_config,
    opened_run as opened_run,
)
from .resume import (
    CERTIFICATE as CERTIFICATE,
    FINGERPRINT as FINGERPRINT,
    REMOVED as REMOVED,
    Resume as Resume,
    best_rule as best_rule,
    check_same_data as check_same_data,
    checkpoint_root as checkpoint_root,
    differing_keys as differing_keys,
    find_resume as find_resume,
    set_aside_newer as set_aside_newer,
)
from .run_directory import (
    RankError as RankError,
    RunAnswer as RunAnswer,
    RunDirectory as RunDirectory,
    read_error as read_error,
    told_run as told_run,
    write_error as write_error,
)
from .run_folder import (
    note_config as note_config,
)
from .secret import (
    job_secret as job_secret,
    run_secret as run_secret,
)
from .signals import (
    Signals as Signals,
    begin_to_hear as begin_to_hear,
)
from .throughput import (
    Throughput as Throughput,
    assumed as assumed,
    described as described,
    measure_throughput as measure_throughput,
    recorded_throughput as recorded_throughput,
    with_throughput as with_throughput,
)
