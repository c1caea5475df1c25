from .content import (
    same_content as same_content,
    same_tensor as same_tensor,
)
from .dtypes import (
    DTYPE_NAMES as DTYPE_NAMES,
    TORCH_DTYPES as TORCH_DTYPES,
)
from .files import (
    ALIGNMENT as ALIGNMENT,
    ELEMENT_BYTES as ELEMENT_BYTES,
    FORMAT_VERSION as FORMAT_VERSION,
    INDEX as INDEX,
    MANIFEST as MANIFEST,
    MANIFEST_END_BYTES as MANIFEST_END_BYTES,
    TORCH_NAMES as TORCH_NAMES,
    Checksum as Checksum,
    FileEntry as FileEntry,
    FileHeader as FileHeader,
    FileTensor as FileTensor,
    Manifest as Manifest,
    PieceEntry as PieceEntry,
    TensorEntry as TensorEntry,
    crc32c_of as crc32c_of,
    decode_header as decode_header,
    decode_manifest as decode_manifest,
    encode_manifest as encode_manifest,
    ends_manifest as ends_manifest,
    header_capacity as header_capacity,
    key_of as key_of,
)
from .kinds import (
    BUFFER as BUFFER,
    STEP as STEP,
    TENSOR as TENSOR,
    UNPREFIXED_KINDS as UNPREFIXED_KINDS,
    WEIGHT as WEIGHT,
    base_name as base_name,
    full_name as full_name,
)
from .manifest import (
    SaveFacts as SaveFacts,
    build_manifest as build_manifest,
    header_of as header_of,
)
from .names import (
    BEST as BEST,
    LATEST as LATEST,
    OWNER as OWNER,
    PARTIAL as PARTIAL,
    STATE as STATE,
    STATE_VERSION as STATE_VERSION,
    VALIDATION as VALIDATION,
    attempt_of as attempt_of,
    expanded as expanded,
    local_path as local_path,
    name_of as name_of,
    place_fault as place_fault,
    scheme_of as scheme_of,
    step_of as step_of,
    unfinished_generation as unfinished_generation,
)
from .plan_types import (
    HeldBox as HeldBox,
    PlannedFile as PlannedFile,
    PlannedPiece as PlannedPiece,
    SavedTensor as SavedTensor,
    WritePlan as WritePlan,
)
from .safetensors import (
    decode_entries as decode_entries,
    decode_index as decode_index,
    read_header as read_header,
)
