from .job import (
    Converted as Converted,
    convert as convert,
)
from .model_reading import (
    PublishedModel as PublishedModel,
    open_published as open_published,
)
from .request import (
    Conversion as Conversion,
)
