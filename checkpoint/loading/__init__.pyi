from .loader import (
    LoadRequest as LoadRequest,
    LoadStatistics as LoadStatistics,
    boxes_of as boxes_of,
    load as load,
)
from .node_memory import (
    NodeMeeting as NodeMeeting,
)
from .read_plan import (
    PieceRead as PieceRead,
    check_coverage as check_coverage,
    fits as fits,
    requests_of as requests_of,
)
from .readers import (
    ByteReader as ByteReader,
    FolderReader as FolderReader,
    RemoteReader as RemoteReader,
)
from .targets import (
    LoadTarget as LoadTarget,
    Targets as Targets,
)
