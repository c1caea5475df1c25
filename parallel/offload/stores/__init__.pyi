from .disk_file import (
    DiskFile as DiskFile,
    DriveRequest as DriveRequest,
)
from .disk_store import (
    DiskStore as DiskStore,
)
from .host_store import (
    HostStore as HostStore,
)
from .staged_store import (
    StagedStore as StagedStore,
)
from .store import (
    Store as Store,
    StoredCopy as StoredCopy,
    StoreStatistics as StoreStatistics,
)
