from .admission import (
    next_plan as next_plan,
    state_of as state_of,
)
from .block_transfers import (
    BlockTransfer as BlockTransfer,
    held_blocks as held_blocks,
    incoming_blocks as incoming_blocks,
    missing_blocks as missing_blocks,
    plan_block_transfers as plan_block_transfers,
)
from .buffers import (
    LAYERS_AHEAD as LAYERS_AHEAD,
    MESSAGES_AHEAD as MESSAGES_AHEAD,
    RECEIVED_BYTES as RECEIVED_BYTES,
    STAGED_BYTES as STAGED_BYTES,
    staged_bytes as staged_bytes,
)
from .cost import (
    RankMemory as RankMemory,
    action_cost as action_cost,
    between_stretches_bytes as between_stretches_bytes,
    peak_activation_bytes as peak_activation_bytes,
    rank_memory as rank_memory,
    replica_timeline as replica_timeline,
    step_time_s as step_time_s,
)
from .formation import (
    Roster as Roster,
    replica_sizes as replica_sizes,
)
from .initial import (
    MICRO_BATCH_ORDERS as MICRO_BATCH_ORDERS,
    make_plan as make_plan,
    on_shards as on_shards,
)
from .ownership import (
    Block as Block,
    BlockKey as BlockKey,
    assign_owners as assign_owners,
    update_ends as update_ends,
)
from .plan import (
    Plan as Plan,
    Shard as Shard,
    Slowness as Slowness,
    block_box as block_box,
)
from .programs import (
    evaluation_program as evaluation_program,
    message_units as message_units,
    team_micro_batches as team_micro_batches,
    training_program as training_program,
)
from .replan import (
    relieved as relieved,
    replan as replan,
    with_shadows as with_shadows,
    would_move_experts as would_move_experts,
    would_move_layers as would_move_layers,
)
from .serialization import (
    plan_from_data as plan_from_data,
    plan_to_data as plan_to_data,
)
from .sharding import (
    Contribution as Contribution,
    KeptKind as KeptKind,
    ShardGroup as ShardGroup,
    all_keepers as all_keepers,
    are_aligned as are_aligned,
    contribution_order as contribution_order,
    is_apart as is_apart,
    keepers as keepers,
    keeps_parameters as keeps_parameters,
    shard_group as shard_group,
    shards as shards,
    use_order as use_order,
)
from .speeds import (
    makespan as makespan,
)
