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
from .reference import (
    run_reference as run_reference,
)
from .tiny import (
    tiny_config as tiny_config,
)
