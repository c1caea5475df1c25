from .buckets import (
    Gathering as Gathering,
    OwnedBlock as OwnedBlock,
    Routes as Routes,
    Span as Span,
    gathering as gathering,
    routes as routes,
)
from .followers import (
    follower_routes as follower_routes,
)
from .gradients import (
    GradientExchange as GradientExchange,
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
