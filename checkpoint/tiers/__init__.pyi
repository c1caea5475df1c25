from .flush import (
    flush as flush,
)
from .remote_tier import (
    RemoteTier as RemoteTier,
)
from .uploader import (
    UploadResult as UploadResult,
)
