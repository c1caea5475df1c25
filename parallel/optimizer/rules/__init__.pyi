from .groups import (
    ParameterGroups as ParameterGroups,
    Place as Place,
    matched_by_none as matched_by_none,
)
from .registry import (
    OPTIMIZERS as OPTIMIZERS,
)
from .rule import (
    MASTER as MASTER,
    BlockUpdate as BlockUpdate,
    OptimizerRule as OptimizerRule,
    OwnKey as OwnKey,
    StateFormat as StateFormat,
)
