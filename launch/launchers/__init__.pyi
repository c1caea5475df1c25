from .cluster import (
    join_run as join_run,
    run_first_task as run_first_task,
    run_other_task as run_other_task,
)
from .display_process import (
    start_display as start_display,
)
from .elastic import (
    explained as explained,
    log_agents as log_agents,
    node_settings as node_settings,
    run_elastic as run_elastic,
    worker_main as worker_main,
)
from .join_file import (
    take_ranks as take_ranks,
)
from .local import (
    run_local as run_local,
    start_workers as start_workers,
)
from .nodes import (
    run_nodes as run_nodes,
)
