"""Several processes that compute one thing: which rows of a batch are this one's, and how rows and sums come together.

All processes run the same program with the same random numbers. Only two things are divided: a batch of samples is read and
encoded in shares (:func:`share`), and passes over many images are dealt out batch by batch (:func:`dealt`). Whatever is computed
from gathered rows is computed by every process, so losses may couple the samples of a batch in any way.

Gradients follow the convention of data parallelism: the gradient of a step is the *mean* over processes of what each finds in its
``.grad``. A parameter behind :func:`gather_rows` gets N times its share's part, one that is used elsewhere the whole in every
process; both means are the gradient of the whole batch.
"""

from __future__ import annotations

from cl_methods.ranks.broadcast import by_first, from_first
from cl_methods.ranks.group import (
    OtherRankError,
    alone,
    broke_off,
    count,
    dealt,
    exchange,
    first,
    joined,
    joined_count,
    rank,
    share,
)
from cl_methods.ranks.tensors import anyone, everyone, gather_batches, gather_rows, gather_values, start_sum, sum_

__all__ = [
    "OtherRankError",
    "alone",
    "anyone",
    "broke_off",
    "by_first",
    "count",
    "dealt",
    "everyone",
    "exchange",
    "first",
    "from_first",
    "gather_batches",
    "gather_rows",
    "gather_values",
    "joined",
    "joined_count",
    "rank",
    "share",
    "start_sum",
    "sum_",
]
