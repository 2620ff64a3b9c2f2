"""Any amount of images in, a table out.

Read: `inputs` makes a `Listing` of what a user names: `images` says what an image of it is, `files`, `archives` and
`records` find them. Prepared: `decoding` makes batches, in worker processes; `pictures` does the common case quickly.
Computed: `tasks` says what becomes of a batch, `devices` computes it on all devices of this host, `work` does so for
ranges of images; `segmenting` and `reconstructing` are those two commands. Written: `chunks` are finished parts of a
table, `table` makes those of this process and joins all. `face` is for programs. May import: everything below.
"""
