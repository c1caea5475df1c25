from .actions import (
    COMPUTE as COMPUTE,
    RECEIVES as RECEIVES,
    SENDS as SENDS,
    Action as Action,
    ActionKey as ActionKey,
    Op as Op,
    Program as Program,
    parse_programs as parse_programs,
    peak_in_flight as peak_in_flight,
    render_programs as render_programs,
)
from .checker import (
    check_programs as check_programs,
)
from .drawing import (
    draw as draw,
    legend as legend,
)
from .list_scheduler import (
    list_schedule as list_schedule,
)
from .messages import (
    PeersOf as PeersOf,
    matching_receive as matching_receive,
    program_with_messages as program_with_messages,
    with_messages as with_messages,
)
from .orders import (
    in_stretches as in_stretches,
)
from .registry import (
    SCHEDULES as SCHEDULES,
    check_stretches as check_stretches,
    compute_programs as compute_programs,
    forward_only as forward_only,
    placement as placement,
)
from .schedule import (
    Schedule as Schedule,
)
from .simulator import (
    ActionSpan as ActionSpan,
    Timeline as Timeline,
    simulate as simulate,
    unit_cost as unit_cost,
)
from .step_phases import (
    FAULTS as FAULTS,
    STEP_PHASES as STEP_PHASES,
    TIMED_PHASES as TIMED_PHASES,
    FaultKind as FaultKind,
    StepPhase as StepPhase,
)
