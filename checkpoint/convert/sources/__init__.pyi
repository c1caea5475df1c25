from .catalog import (
    Catalog as Catalog,
    ReadOptions as ReadOptions,
    WriteOptions as WriteOptions,
    choose_output_dtypes as choose_output_dtypes,
    files_for as files_for,
    given_files as given_files,
    make_catalog as make_catalog,
)
from .described import (
    check_described as check_described,
    config_of as config_of,
)
from .engine import (
    SLOT_BYTES as SLOT_BYTES,
    Engine as Engine,
    Sums as Sums,
)
from .entry_checks import (
    CheckedRange as CheckedRange,
    DamagedEntry as DamagedEntry,
    EntryChecks as EntryChecks,
)
from .model_files import left_files as left_files
from .open_files import (
    OpenFiles as OpenFiles,
)
from .pickles import (
    PickledObject as PickledObject,
    StoredTensor as StoredTensor,
    plain as plain,
    read_pickle as read_pickle,
    unplain as unplain,
)
from .recognition import (
    BIN_FILES as BIN_FILES,
    BIN_INDEX as BIN_INDEX,
    DCP_METADATA as DCP_METADATA,
    MEGATRON_FILE as MEGATRON_FILE,
    MEGATRON_RANK as MEGATRON_RANK,
    MEGATRON_TRACKER as MEGATRON_TRACKER,
    ZERO_FILE as ZERO_FILE,
    is_dcp as is_dcp,
    is_deepspeed as is_deepspeed,
    is_holdfast as is_holdfast,
    is_hugging_face as is_hugging_face,
    is_megatron as is_megatron,
    is_torch_dist as is_torch_dist,
    is_universal as is_universal,
    torch_dist_backend as torch_dist_backend,
)
from .torch_files import (
    TorchFile as TorchFile,
    read_torch_file as read_torch_file,
    read_torch_item as read_torch_item,
    tensors_in as tensors_in,
)
