"""Looking at models and results: arrays for analysis, and pictures for people.

`interpret` computes attention, its rollout and the position bias as arrays. `visualize` draws these, training curves
and parity, by matplotlib. `pictures` lays label maps over images, `reconstruct` decodes what a masked image model
predicts, `compared` draws what is true beside what was found. `segmented` says which files segmentation writes,
`written` which pictures a default name may replace. May import: the ground, `images`, `models`, `tokenizers`,
`inference`.
"""
