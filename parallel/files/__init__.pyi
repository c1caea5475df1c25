from .locks import (
    await_lock as await_lock,
    is_at as is_at,
    open_lock as open_lock,
    try_lock as try_lock,
)
from .machine import (
    machine_identity as machine_identity,
)
from .memory_limits import (
    memory_limits as memory_limits,
)
from .own_files import (
    create_file as create_file,
    open_added as open_added,
    write_own_file as write_own_file,
)
from .scratch import (
    scratch_folder as scratch_folder,
    sweep_scratch as sweep_scratch,
    torch_caches_in as torch_caches_in,
)
