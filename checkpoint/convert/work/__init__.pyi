from .job import (
    Converted as Converted,
    convert as convert,
)
from .request import (
    Conversion as Conversion,
)
