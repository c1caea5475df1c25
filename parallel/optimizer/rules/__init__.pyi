from .clip import (
    HeadFactors as HeadFactors,
    head_factors as head_factors,
)
from .groups import (
    ParameterGroups as ParameterGroups,
    Place as Place,
    matched_by_none as matched_by_none,
)
from .registry import (
    OPTIMIZERS as OPTIMIZERS,
    rule_of as rule_of,
)
from .rule import (
    AVERAGE as AVERAGE,
    MASTER as MASTER,
    BlockUpdate as BlockUpdate,
    OptimizerRule as OptimizerRule,
    OwnKey as OwnKey,
    StateFormat as StateFormat,
)
