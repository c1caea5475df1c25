from .audit import (
    WrongComputation as WrongComputation,
)
from .build import (
    UNKNOWN_MEMORY as UNKNOWN_MEMORY,
    DeviceMemory as DeviceMemory,
    backend_of as backend_of,
    choose_device as choose_device,
    compile_model as compile_model,
    device_memory as device_memory,
    mark_compilation as mark_compilation,
    open_training as open_training,
    probe as probe,
)
from .construction import (
    hosted_experts as hosted_experts,
    open_split as open_split,
)
from .evaluation import (
    batches_of as batches_of,
    evaluates_after as evaluates_after,
    mean_held_out_loss as mean_held_out_loss,
    open_validation as open_validation,
)
from .micro_batches import (
    Included as Included,
    RankInputs as RankInputs,
    included_after_change as included_after_change,
    included_from_data as included_from_data,
    included_to_data as included_to_data,
    inputs_after_change as inputs_after_change,
    inputs_from_data as inputs_from_data,
    inputs_to_data as inputs_to_data,
    keeps_sums as keeps_sums,
    training_batch as training_batch,
)
from .planning import (
    context_exchange as context_exchange,
    device_bytes as device_bytes,
    layers_of_config as layers_of_config,
    plan_of as plan_of,
    room_of as room_of,
    shadows_in_host_memory as shadows_in_host_memory,
)
from .saved_tensors import (
    renumbered as renumbered,
    saved_tensors as saved_tensors,
    state_format as state_format,
    wanted_boxes as wanted_boxes,
    weights_only as weights_only,
)
from .state_views import (
    TrainingState as TrainingState,
    huggingface_files as huggingface_files,
)
from .training import (
    Training as Training,
)
from .vote import (
    AtPhase as AtPhase,
    Outcome as Outcome,
    RankTimes as RankTimes,
    RecentSteps as RecentSteps,
    Requests as Requests,
    StepProgress as StepProgress,
    Straggler as Straggler,
    by_slice as by_slice,
    find_stragglers as find_stragglers,
    lasting as lasting,
    no_hook as no_hook,
    usual_s as usual_s,
    wants_probe as wants_probe,
)
