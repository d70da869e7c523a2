"""Studies: many runs over one prepared folder, or over the folds of one cleaned folder.

`tune` searches declared ranges, `crossval` repeats a training over folds and seeds, `transfer` asks
what tasks gain or lose by sharing. Their runs are ordinary run folders, and the same command
continues a study that was stopped or killed.
"""
