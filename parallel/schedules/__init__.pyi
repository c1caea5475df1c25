from .actions import (
    COMPUTE as COMPUTE,
    RECEIVES as RECEIVES,
    SENDS as SENDS,
)
from .messages import (
    matching_receive as matching_receive,
)
from .registry import (
    SCHEDULES as SCHEDULES,
    Action as Action,
    Op as Op,
    Program as Program,
    Timeline as Timeline,
    compute_programs as compute_programs,
    draw as draw,
    forward_only as forward_only,
    list_schedule as list_schedule,
    peak_in_flight as peak_in_flight,
    placement as placement,
    simulate as simulate,
    unit_cost as unit_cost,
    with_messages as with_messages,
)
