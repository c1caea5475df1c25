from .console import (
    Display as Display,
    ProgressLine as ProgressLine,
    duration as duration,
    loss_name as loss_name,
)
from .layout_table import (
    LayoutTable as LayoutTable,
)
