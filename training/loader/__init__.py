"""A snapshot as an endless, ordered stream of batches, the same whatever number of ranks reads it.

    order     position -> row of the selection, by arithmetic and small permutations
    buckets   the order of several sizes: which batch is of which, each batch of one
    cache     a machine's folder of tars, each fetched once and checked against its hash
    selection the snapshot's rows, captions and labels, mapped into memory
    reader    row -> image and caption
    conditions captions or labels of a batch, of which some are dropped
    batches   a rank's share of every global batch, read ahead in threads

The whole state of reading is one integer: the position, which is the number of samples consumed.
"""
