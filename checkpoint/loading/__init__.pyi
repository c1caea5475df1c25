from .loader import (
    LoadStatistics as LoadStatistics,
    LoadTarget as LoadTarget,
    boxes_of as boxes_of,
    load as load,
)
from .read_plan import (
    PieceRead as PieceRead,
    check_coverage as check_coverage,
    requests_of as requests_of,
)
from .readers import (
    ByteReader as ByteReader,
    FolderReader as FolderReader,
    RemoteReader as RemoteReader,
)
