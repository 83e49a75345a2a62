"""A snapshot as an endless, ordered stream of batches, the same whatever number of ranks reads it.

    order     position -> row of the selection, by arithmetic and small permutations
    cache     the tars with the images, each fetched once and checked against its hash
    reader    row -> image and caption
    batches   a rank's share of every global batch, read ahead

The whole state of reading is one integer: the position, which is the number of samples consumed.
"""
