from .elements import (
    FLOATS as FLOATS,
)
from .formats import (
    recognise as recognise,
    targets as targets,
)
from .work import (
    Conversion as Conversion,
    Converted as Converted,
    PublishedModel as PublishedModel,
    convert as convert,
    open_published as open_published,
)
