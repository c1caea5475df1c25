"""The sizes of a model that follow from its width where they are not given. Pure.

They depend on the model alone, never on the layout: a run that goes on in another layout is the
same model.
"""

from __future__ import annotations

_FEWEST_HEADS = 4
_MOST_KV_HEADS = 8
_WIDE = 2048
"""The width from which heads are of 128 elements, and no longer of 64."""
_WIDEST = 2**20
_LEAST_HEAD_DIM = 16
"""The least power of two that is taken before other head dimensions."""
_FIRST_INTERMEDIATE = {96: 224}
"""By width: what earlier versions took for every width, kept for the width of the examples."""


def default_heads(hidden: int, head_dim: int = 0) -> int:
    """The number of query heads.

    The head dimension is the largest power of two from 16 to 64 (128 from 2048 on) that divides the
    width into four heads or more; else the largest even number up to there that does; else 2.

    Args:
        head_dim: the head dimension, if it is given.
    """
    hidden = max(1, min(hidden, _WIDEST))
    if head_dim > 0:
        return max(1, hidden // head_dim)
    most = min(128 if hidden >= _WIDE else 64, hidden // _FEWEST_HEADS)
    fitting = [dim for dim in range(2, most + 1, 2) if hidden % dim == 0]
    powers = [dim for dim in fitting if dim >= _LEAST_HEAD_DIM and dim.bit_count() == 1]
    chosen = max(powers or fitting, default=2)
    return max(1, hidden // chosen) if hidden % chosen == 0 else 1


def default_kv_heads(heads: int) -> int:
    """The largest divisor of the query heads that is at most half of them, and at most 8."""
    most = min(heads // 2, _MOST_KV_HEADS)
    return max((count for count in range(1, most + 1) if heads % count == 0), default=1)


def default_intermediate(hidden: int) -> int:
    """8/3 of the width, which gives three matrices the size of two of four times the width.

    It is rounded up to a multiple of 256, as Touvron et al. 2023 do, or of 32 below width 256.
    """
    if hidden in _FIRST_INTERMEDIATE:
        return _FIRST_INTERMEDIATE[hidden]
    hidden = max(1, min(hidden, _WIDEST))  # of more, the width is refused
    multiple = 256 if hidden >= 256 else 32
    return -(-8 * hidden // (3 * multiple)) * multiple
