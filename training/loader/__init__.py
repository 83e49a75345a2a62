"""A snapshot as an endless, ordered stream of batches, the same whatever number of ranks reads it.

    order     position -> row: arithmetic and small permutations
    cache     the tars that rows lie in, fetched once and held against their hashes
    reader    row -> image and caption
    batches   a rank's share of every global batch, read ahead

The whole state of reading is one integer, the number of samples consumed.
"""
