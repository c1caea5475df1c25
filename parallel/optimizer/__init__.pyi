from .accumulator import (
    NONFINITE as NONFINITE,
    OUT_OF_RANGE as OUT_OF_RANGE,
    GradientAccumulator as GradientAccumulator,
)
from .adamw import (
    AdamWSettings as AdamWSettings,
    Fence as Fence,
)
from .background_transfer import (
    BackgroundTransfer as BackgroundTransfer,
)
from .parameter_buffer import (
    ParameterBuffer as ParameterBuffer,
    Segment as Segment,
)
from .shadow_state import (
    STATE_KINDS as STATE_KINDS,
    ShadowedBlock as ShadowedBlock,
    ShadowState as ShadowState,
)
from .sharded import (
    ShardedAdamW as ShardedAdamW,
    clipping_factor as clipping_factor,
    norm_from_squares as norm_from_squares,
)
from .state_transfer import (
    BlockState as BlockState,
    carried_bytes as carried_bytes,
    move_blocks as move_blocks,
)
