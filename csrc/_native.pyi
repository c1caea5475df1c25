"""Native kernels of holdfast.

Arrays are addresses (`tensor.data_ptr()`) of contiguous memory aligned to its element; counts and
offsets are in elements. Every function is Local, releases the GIL, uses the calling thread alone
and raises ValueError for a negative count or an argument outside its stated range. All are
exact-mode safe: results have the same bits on every instruction set, for every alignment and for
every way of cutting the elements into calls (sums of squares excepted: one call, one fixed order).

Flags: 1 = a gradient was not finite, 2 = a contribution or a sum left the int64 range.
"""

def isa() -> str:
    """The instruction set in use: "portable", "avx2" or "avx512".

    The best one of the machine, or the one that the environment variable HOLDFAST_NATIVE_ISA named
    at import (importing fails if the machine cannot run it).
    """

def accumulate_f32(
    accumulator: int, gradient: int, count: int, fraction_bits: int, first: bool = False
) -> int:
    """accumulator[i] += rint(gradient[i] * 2**fraction_bits), half to even; returns flags.

    Args:
        accumulator: int64[count]; an overflowing sum wraps and sets flag 2.
        gradient: float32[count]; an element that is not finite, or not below 2**63 once scaled,
            adds nothing.
        fraction_bits: 0 to 62.
        first: as if the accumulator were zero; it is only written.
    """

def accumulate_bf16(
    accumulator: int, gradient: int, count: int, fraction_bits: int, first: bool = False
) -> int:
    """As accumulate_f32, gradient: bfloat16[count]."""

def accumulate_f64(
    accumulator: int, gradient: int, count: int, fraction_bits: int, first: bool = False
) -> int:
    """As accumulate_f32, gradient: float64[count]."""

def accumulate_rows_f32(
    accumulator: int,
    gradient: int,
    rows: int,
    row_count: int,
    row_elements: int,
    fraction_bits: int,
) -> int:
    """As accumulate_f32 for row rows[k] of the accumulator and row k of the gradient.

    Args:
        accumulator: int64[any, row_elements].
        gradient: float32[row_count, row_elements].
        rows: int64[row_count], each within the accumulator (not checked).
    """

def accumulate_rows_bf16(
    accumulator: int,
    gradient: int,
    rows: int,
    row_count: int,
    row_elements: int,
    fraction_bits: int,
) -> int:
    """As accumulate_rows_f32, gradient: bfloat16."""

def accumulate_rows_f64(
    accumulator: int,
    gradient: int,
    rows: int,
    row_count: int,
    row_elements: int,
    fraction_bits: int,
) -> int:
    """As accumulate_rows_f32, gradient: float64."""

def add_i64(accumulator: int, other: int, count: int) -> int:
    """accumulator[i] += other[i], both int64[count]; returns flag 2 if a sum wrapped."""

def reduce_convert_f32(sums: int, output: int, count: int, fraction_bits: int) -> float:
    """output[i] = sums[i] * 2**-fraction_bits, rounded once to nearest; returns its sum of squares.

    Args:
        sums: int64[count].
        output: float32[count], not overlapping sums.
        fraction_bits: 0 to 62.
    Returns:
        sum_squares_f32(output, count).
    """

def reduce_convert_f64(sums: int, output: int, count: int, fraction_bits: int) -> float:
    """As reduce_convert_f32, output: float64[count]."""

def sum_squares_f32(values: int, count: int) -> float:
    """Sum of squares of float32[count] in float64, in a fixed order.

    Sixteen lanes: lane j adds elements j, j + 16, ... in turn; then lanes j and j + 8, j + 4, j +
    2, j + 1 are added.
    """

def sum_squares_f64(values: int, count: int) -> float:
    """As sum_squares_f32, values: float64[count]."""

def bit_sum_16(values: int, count: int, first: int) -> int:
    """The weighted sum modulo 2**64 of the bits of count values of 16 bits: unsigned.

    Value i, as an unsigned number, counts ((first + i) * 0x9E3779B97F4A7C15) | 1 times. So any
    change of a single value changes the sum, the order counts, and sums of disjoint ranges of
    places add up to that of all.

    Args:
        first: the place of the first value; unsigned 64 bits.
    """

def bit_sum_32(values: int, count: int, first: int) -> int:
    """As bit_sum_16, for values of 32 bits."""

def bit_sum_64(values: int, count: int, first: int) -> int:
    """As bit_sum_16, for values of 64 bits."""

def packed_bound(count: int) -> int:
    """The most bytes that count int64 take once packed: 8 each and a header."""

def pack_i64(sums: int, count: int, output: int) -> int:
    """Write int64[count] without the bytes that only repeat the sign; returns the bytes written.

    Runs of 4096 elements have a width of 0 to 8 bytes each, the least that holds their values; the
    format is in packing.h.

    Args:
        sums: int64[count].
        output: uint8[packed_bound(count)], not overlapping sums.
    """

def unpack_add_i64(packed: int, packed_bytes: int, base: int, output: int, count: int) -> int:
    """output[i] = base[i] + element i of what pack_i64 wrote; returns flag 2 if a sum wrapped.

    Args:
        packed: uint8[packed_bytes]; bytes behind the last run are not read.
        base: int64[count], may be output; 0: the elements alone.
        output: int64[count], not overlapping packed.
    Raises:
        ValueError: a width is above 8, or packed_bytes are too few for the widths. Nothing has been
            written.
    """

def crc32c(data: int, nbytes: int, initial: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of nbytes bytes that follow data with checksum `initial`."""

def crc32c_combine(a: int, b: int, length_b: int) -> int:
    """Checksum of A followed by B, from those of A and B; length_b in bytes."""

def copy_crc32c(destination: int, source: int, nbytes: int, initial: int = 0) -> int:
    """Copy nbytes bytes and return crc32c(source, nbytes, initial); the ranges must not overlap."""

class FileEngine:
    """Asynchronous reads and writes of files, for checkpoints and offloaded activations. Local.

    A request may have any address, offset and length. Whole 4 KiB blocks go past the page cache
    (O_DIRECT) where address and offset are equally far from a multiple of 4096 and the filesystem
    allows it; other bytes go through the cache. At most queue_depth pieces of 1 MiB are in flight;
    a call with more pieces waits. Every wait releases the GIL and ends with a signal's exception.
    Several threads may use one engine. Memory must not change until its ticket is done.
    """

    def __init__(
        self,
        *,
        kind: str = "auto",
        queue_depth: int = 64,
        threads: int = 4,
        direct: bool | None = None,
        background: bool = False,
    ) -> None:
        """Start the engine.

        Args:
            kind: "io_uring", "threads", or "auto": the kind in the environment variable
                HOLDFAST_FILE_ENGINE, else io_uring where the kernel allows it, else threads.
            queue_depth: the most pieces in flight.
            threads: the number of threads of the kind "threads".
            direct: whether O_DIRECT is used; None: unless HOLDFAST_FILE_DIRECT is 0.
            background: whether another thread also begins direct requests (pins their memory). They
                begin later, but cost the caller a tenth of the time.
        Raises:
            RuntimeError: this machine cannot run the kind.
        """

    @property
    def kind(self) -> str:
        """The kind in use."""

    @property
    def in_flight(self) -> int:
        """The number of pieces that the kernel or a thread has now."""

    def register_buffer(self, address: int, nbytes: int) -> None:
        """Announce memory that many requests use; the kernel then pins it once, if it can."""

    def unregister_buffers(self) -> None:
        """Forget all announced memory. Raises RuntimeError while requests are in flight."""

    def open(
        self,
        path: str,
        *,
        write: bool = False,
        create: bool = False,
        truncate: bool = False,
        size: int = -1,
    ) -> int:
        """Open a file; size >= 0 sets its length and reserves its room. Raises OSError."""

    def direct(self, file: int) -> bool:
        """Whether the filesystem accepts direct requests for this file."""

    def write(self, file: int, address: int, offset: int, nbytes: int) -> int:
        """Begin to write nbytes at offset of the file. Returns a ticket."""

    def read(self, file: int, address: int, offset: int, nbytes: int) -> int:
        """Begin to read nbytes at offset of the file. Returns a ticket."""

    def submit(self, requests: list[tuple[bool, int, int, int, int]]) -> list[int]:
        """Begin many requests: (is a write, file, address, offset, nbytes). Returns tickets."""

    def done(self, ticket: int) -> bool:
        """Whether the request has ended, well or not."""

    def wait(self, ticket: int, timeout_s: float = -1.0) -> bool:
        """Wait for one request; False if the time is over first. True or an error ends the ticket.

        Raises:
            OSError: the request failed; the error has the file's name.
        """

    def wait_all(self, timeout_s: float = -1.0) -> bool:
        """Wait for all requests and end their tickets. Raises the first error."""

    def sync(self, file: int) -> None:
        """Wait for the file's requests, then until its data are on the device. Raises OSError."""

    def close_file(self, file: int) -> None:
        """Wait for the file's requests and close it."""

    def close(self) -> None:
        """Wait for all requests and close all files. May be called again."""

    def inject(self, operation: str, after: int, error: int, count: int = 1) -> None:
        """For tests: let `count` pieces fail, after `after` more pieces that succeed.

        Args:
            operation: "read", "write", "sync" or "open".
            error: the errno; 0 splits a piece into two transfers instead.
        """

    def statistics(self) -> dict[str, int]:
        """bytes_read, bytes_written, direct_bytes_read, direct_bytes_written, requests, busy_ns."""

    def __enter__(self) -> FileEngine: ...
    def __exit__(self, *error: object) -> None: ...

def philox_uint32(output: int, count: int, key: int, stream: int, offset: int) -> None:
    """Elements offset.. of the Philox4x32-10 stream (Salmon et al. 2011) named by key and stream.

    Element i is word i % 4 of the block with counter [i // 4 low, high, stream low, high].

    Args:
        output: uint32[count].
        key: unsigned 64 bits.
        stream: unsigned 64 bits.
    """

def philox_uniform_f32(output: int, count: int, key: int, stream: int, offset: int) -> None:
    """float32[count] in [0, 1): (word i >> 8) * 2**-24."""

def philox_uniform_f64(output: int, count: int, key: int, stream: int, offset: int) -> None:
    """float64[count] in [0, 1): the upper 53 bits of (word 2i << 32 | word 2i + 1), times
    2**-53.
    """

def philox_normal_f32(
    output: int, count: int, key: int, stream: int, offset: int, mean: float, std: float
) -> None:
    """philox_normal_f64 rounded to float32[count]."""

def philox_normal_f64(
    output: int, count: int, key: int, stream: int, offset: int, mean: float, std: float
) -> None:
    """float64[count], normal: mean + std * z by Box-Muller.

    With u, v the float64 uniforms 2(i // 2) and 2(i // 2) + 1: z = sqrt(-2 log(1 - u)) times
    cos(2 pi v) for even i, sin(2 pi v) for odd i.
    """

def philox_normal_box_f32(
    output: int,
    rows: int,
    columns: int,
    row_start: int,
    column_start: int,
    total_columns: int,
    key: int,
    stream: int,
    mean: float,
    std: float,
) -> None:
    """A box of a logical matrix of normals: output: float32[rows, columns].

    output[r, c] is normal (row_start + r) * total_columns + column_start + c of the stream.
    """

def philox_normal_box_f64(
    output: int,
    rows: int,
    columns: int,
    row_start: int,
    column_start: int,
    total_columns: int,
    key: int,
    stream: int,
    mean: float,
    std: float,
) -> None:
    """As philox_normal_box_f32, output: float64[rows, columns]."""

def dropout_scale_f32(
    output: int, input: int, count: int, key: int, stream: int, offset: int, probability: float
) -> None:
    """output[i] = input[i] * (1 / (1 - probability) if kept else 0), both float32[count].

    Kept when word offset + i of the stream >= floor(probability * 2**32). output may be input.

    Args:
        probability: 0 <= probability < 1. The factor is rounded to float32 once.
    """

def dropout_scale_bf16(
    output: int, input: int, count: int, key: int, stream: int, offset: int, probability: float
) -> None:
    """As dropout_scale_f32 for bfloat16[count]: the float32 product, rounded half to even."""

def dropout_scale_f64(
    output: int, input: int, count: int, key: int, stream: int, offset: int, probability: float
) -> None:
    """As dropout_scale_f32 for float64[count] (factor in float64)."""

def merge_attention_f32(out1: int, lse1: int, out2: int, lse2: int, rows: int, dim: int) -> None:
    """Join attention over two parts of the keys: out1, lse1 become those of both parts.

    Weights are the softmax of (lse1[r], lse2[r]), in double. A row's bits depend on it alone.

    Args:
        out1, out2: float32[rows, dim], the attention over each part.
        lse1, lse2: float32[rows], the logarithms of its sums of exponentials.
    """

def merge_attention_bf16(out1: int, lse1: int, out2: int, lse2: int, rows: int, dim: int) -> None:
    """As merge_attention_f32, out1 and out2: bfloat16[rows, dim]."""

def merge_attention_f64(out1: int, lse1: int, out2: int, lse2: int, rows: int, dim: int) -> None:
    """As merge_attention_f32, all of float64."""

def swiglu_f32(gate_up: int, out: int, rows: int, width: int) -> None:
    """out[r, i] = silu(gate_up[r, i]) * gate_up[r, width + i]; an element's bits depend on both.

    Args:
        gate_up: float32[rows, 2 * width].
        out: float32[rows, width].
    """

def swiglu_backward_f32(
    gradient: int, gate_up: int, out: int, by_gate_up: int, rows: int, width: int
) -> None:
    """The gradient by gate_up of swiglu_f32, from that by its result, which is written again.

    Args:
        gradient, out: float32[rows, width].
        gate_up, by_gate_up: float32[rows, 2 * width].
    """

def permute_index(index: int, size: int, key: int) -> int:
    """The image of index under a keyed bijection of [0, size); key: unsigned 64 bits."""

def permute_indices(output: int, start: int, count: int, size: int, key: int) -> None:
    """output[i] = permute_index(start + i, size, key), output: int64[count]."""

def best_fit(bins: int, sizes: int, count: int, room: int, open: int) -> int:
    """Put items into bins of equal size, in order, by best fit. Returns the number of bins.

    Each item goes into the open bin with the least room that suffices, of these into the one that
    has had this room for longest; else into a new bin, for which the fullest open one is closed.

    Args:
        bins: int64[count], set to each item's bin, numbered as they are opened.
        sizes: int64[count], 1 to `room` each.
        open: the most bins that are open at once, 1 or more.
    """
