"""Looking images up by their features.

`exact` finds the nearest rows on the device, `index` those of a table of features. `origin` refuses features of
different models, `images` opens the images that a table names, and `picture` draws them. May import: the ground,
`images`, `tables`.
"""
