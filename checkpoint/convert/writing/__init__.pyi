from .distcp_writing import (
    DistcpFolder as DistcpFolder,
)
from .pickle_writing import (
    size as size,
)
from .small_files import write_files as write_files
from .torch_folder import (
    TorchFolder as TorchFolder,
)
from .torch_writing import (
    TORCH_FILE_DTYPES as TORCH_FILE_DTYPES,
    TensorToCome as TensorToCome,
    torch_file as torch_file,
)
