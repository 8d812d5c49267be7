"""Rows to embed, in batches whose order never changes.

    opening   any of the three by its name; start here
    source    what they have in common
    folder    the files of a folder, a path to each
    tables    Parquet files that hold the pictures or texts themselves
    shards    WebDataset's tar files

Each is a list of pieces that are read apart from each other, here and on other machines. Nothing is
fetched, no archive is unpacked to disk, and no path inside a table or an archive is opened.
"""
