from .ballot import (
    BallotFormat as BallotFormat,
    Losses as Losses,
    SliceLosses as SliceLosses,
    by_slice as by_slice,
    loss_slots as loss_slots,
    mean_loss as mean_loss,
    words_of as words_of,
)
from .notes import (
    Logits as Logits,
    Notes as Notes,
    by_layer as by_layer,
    largest_of as largest_of,
    packed as packed,
    place_of as place_of,
)
from .progress import (
    NO_REQUESTS as NO_REQUESTS,
    AtPhase as AtPhase,
    Outcome as Outcome,
    RecentSteps as RecentSteps,
    Requests as Requests,
    StepProgress as StepProgress,
    no_hook as no_hook,
)
from .slowness import (
    TIMES as TIMES,
    RankTimes as RankTimes,
    Straggler as Straggler,
    find_stragglers as find_stragglers,
    lasting as lasting,
    micro_batch_work as micro_batch_work,
    slowness_of as slowness_of,
    times_of as times_of,
    usual_s as usual_s,
    wants_probe as wants_probe,
    with_loads as with_loads,
)
from .spikes import (
    judged as judged,
)
