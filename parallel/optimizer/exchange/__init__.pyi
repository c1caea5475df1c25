from .arrival import (
    spread as spread,
)
from .buckets import (
    Gathering as Gathering,
    OwnedBlock as OwnedBlock,
    Routes as Routes,
    gathering as gathering,
    placed_blocks as placed_blocks,
    routes as routes,
    span_of as span_of,
    update_runs as update_runs,
)
from .followers import (
    follower_routes as follower_routes,
)
from .gradients import (
    GradientExchange as GradientExchange,
    beside as beside,
)
from .parameters import (
    ParameterArrival as ParameterArrival,
    receive_buckets as receive_buckets,
    send_bucket as send_bucket,
)
from .settings import (
    ExchangeSettings as ExchangeSettings,
    wire_of as wire_of,
)
from .wire import (
    in_one as in_one,
)
