from .door import (
    Door as Door,
    allow_descriptors as allow_descriptors,
    listen as listen,
    to_server as to_server,
)
from .link import (
    ANY_BEATS as ANY_BEATS,
    StrangerError as StrangerError,
)
from .meeting import (
    answer_all as answer_all,
    ask as ask,
    knock as knock,
    until_answered as until_answered,
)
from .private_server import (
    PrivateServer as PrivateServer,
    close_to_all as close_to_all,
)
from .secret import (
    MAKE_SECRET as MAKE_SECRET,
    ONE_SECRET as ONE_SECRET,
    derived_key as derived_key,
    given_secret as given_secret,
    new_secret as new_secret,
)
from .stores import (
    STORE_TIMEOUT_S as STORE_TIMEOUT_S,
    HostedStore as HostedStore,
    StoreAccess as StoreAccess,
    host_store as host_store,
)
from .tunnels import (
    Tunnels as Tunnels,
)
