from .batch import (
    Batch as Batch,
    Documents as Documents,
)
from .executor import (
    ActionTimes as ActionTimes,
    Executor as Executor,
    MessageShape as MessageShape,
    receive_order as receive_order,
)
from .expert_inputs import (
    ExpertInput as ExpertInput,
    ExpertInputs as ExpertInputs,
    PassageInputs as PassageInputs,
)
from .expert_team import (
    ExpertTeam as ExpertTeam,
    LayerHosts as LayerHosts,
)
from .model_chunk import (
    Chunk as Chunk,
    MicroBatchContext as MicroBatchContext,
    Passage as Passage,
    TokensKey as TokensKey,
    WeightGradientQueue as WeightGradientQueue,
)
from .runner import (
    ModelChunkRunner as ModelChunkRunner,
)
