from .dataset import (
    Dataset as Dataset,
)
from .opening import (
    open_dataset as open_dataset,
)
from .prepare import (
    prepare as prepare,
)
