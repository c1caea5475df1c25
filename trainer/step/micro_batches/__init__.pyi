from .claims import (
    Claims as Claims,
)
from .contexts import (
    MicroBatches as MicroBatches,
    reads_batches as reads_batches,
    training_batch as training_batch,
)
from .partial_sums import (
    NOT_INTERRUPTED as NOT_INTERRUPTED,
    Included as Included,
    Inputs as Inputs,
    InterruptedStep as InterruptedStep,
    ParameterKey as ParameterKey,
    RankInputs as RankInputs,
    included_after_change as included_after_change,
    included_from_data as included_from_data,
    included_to_data as included_to_data,
    inputs_after_change as inputs_after_change,
    inputs_from_data as inputs_from_data,
    inputs_to_data as inputs_to_data,
    keeps_sums as keeps_sums,
)
