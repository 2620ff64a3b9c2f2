"""For people to look at: attention and bias as arrays (`interpret`), and pictures of them and of results.

May import: everything below training: models, tokenizers, images, inference.
"""
