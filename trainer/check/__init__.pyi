from .compare import (
    Finding as Finding,
    compare as compare,
)
from .files import (
    load_capture as load_capture,
    save_capture as save_capture,
)
from .layout_run import (
    run_layout as run_layout,
)
from .operations import (
    OUTPUT as OUTPUT,
    operations_file as operations_file,
    recorded_operations as recorded_operations,
)
from .reference import (
    run_reference as run_reference,
)
from .tiny import (
    tiny_config as tiny_config,
)
