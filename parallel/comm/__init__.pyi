from .addresses import (
    LOOPBACK_NAMES as LOOPBACK_NAMES,
    own_address_towards as own_address_towards,
)
from .flight_recorder import (
    BusyKind as BusyKind,
    FlightRecord as FlightRecord,
    FlightRecorder as FlightRecorder,
    Operation as Operation,
    read_record as read_record,
)
from .groups import (
    Backend as Backend,
    Groups as Groups,
    build_groups as build_groups,
    collectives_record as collectives_record,
    edit_groups as edit_groups,
    end_transports as end_transports,
    separate_group as separate_group,
)
from .last_operations import (
    busy_text as busy_text,
    last_operations as last_operations,
)
from .protocol import (
    Communicator as Communicator,
    Handle as Handle,
    MembershipChange as MembershipChange,
)
from .tags import (
    ACTIVATIONS as ACTIVATIONS,
    BACKGROUND_TRANSFER as BACKGROUND_TRANSFER,
    CONTRIBUTIONS as CONTRIBUTIONS,
    GATHERING as GATHERING,
    LAYERS as LAYERS,
    REDUCTION as REDUCTION,
    SHADOW_GRADIENTS as SHADOW_GRADIENTS,
    STATE_TRANSFER as STATE_TRANSFER,
    TagRange as TagRange,
)
from .timings import (
    SlowLink as SlowLink,
    Window as Window,
    delays as delays,
    probe as probe,
    slow_links as slow_links,
    window_of as window_of,
)
from .wait_watch import (
    WaitNews as WaitNews,
    watch_waits as watch_waits,
)
