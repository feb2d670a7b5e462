"""Formulas only: tensors in, one number per row out. No configuration, no state, no collectives.

Letters: b rows of this rank (or of one chunk), B columns of all ranks, d embedding width. `offset` is the column of
row 0's positive. All of it runs in the dtype of its inputs; the objective hands in fp32.
"""
