from .remote import (
    RemoteStore as RemoteStore,
    Uploader as Uploader,
    UploadResult as UploadResult,
)
from .tiers import (
    flush as flush,
)
