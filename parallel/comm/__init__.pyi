from .addresses import (
    own_address_towards as own_address_towards,
)
from .flight_recorder import (
    Operation as Operation,
    OperationRing as OperationRing,
    RankPage as RankPage,
    read_page as read_page,
)
from .groups import (
    GlooCommunicator as GlooCommunicator,
    GlooMesh as GlooMesh,
    Groups as Groups,
    build_groups as build_groups,
    edit_groups as edit_groups,
    gloo_device as gloo_device,
)
from .protocol import (
    Communicator as Communicator,
    Handle as Handle,
    MembershipChange as MembershipChange,
)
from .watchdog import (
    silent_operations as silent_operations,
)
