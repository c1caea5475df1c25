from .accumulator import (
    NONFINITE as NONFINITE,
    OUT_OF_RANGE as OUT_OF_RANGE,
    GradientAccumulator as GradientAccumulator,
)
from .background_transfer import (
    BackgroundTransfer as BackgroundTransfer,
    TransferPace as TransferPace,
)
from .exchange import (
    ExchangeSettings as ExchangeSettings,
    ParameterArrival as ParameterArrival,
)
from .fence import (
    BlockNumbers as BlockNumbers,
    Fence as Fence,
)
from .kernels import (
    ContributionDigests as ContributionDigests,
    operations_of as operations_of,
)
from .owned_state import (
    OwnedState as OwnedState,
)
from .parameter_buffer import (
    ParameterBuffer as ParameterBuffer,
    Segment as Segment,
)
from .rules import (
    AVERAGE as AVERAGE,
    MASTER as MASTER,
    OPTIMIZERS as OPTIMIZERS,
    BlockUpdate as BlockUpdate,
    HeadFactors as HeadFactors,
    OptimizerRule as OptimizerRule,
    OwnKey as OwnKey,
    ParameterGroups as ParameterGroups,
    StateFormat as StateFormat,
    head_factors as head_factors,
    matched_by_none as matched_by_none,
    rule_of as rule_of,
)
from .shadow_state import (
    ShadowCopies as ShadowCopies,
    ShadowedBlock as ShadowedBlock,
    ShadowState as ShadowState,
)
from .sharded import (
    ShardedOptimizer as ShardedOptimizer,
    clipping_factor as clipping_factor,
    norm_from_squares as norm_from_squares,
)
from .sharding import (
    LayerParameters as LayerParameters,
    kept_spans as kept_spans,
)
from .spans import (
    KeptSpans as KeptSpans,
)
from .state_transfer import (
    move_blocks as move_blocks,
)
from .transfer_messages import (
    BlockState as BlockState,
    carried_bytes as carried_bytes,
)
