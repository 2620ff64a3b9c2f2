"""Training: evaluation and losses of segmentation. The sharded loop, its objectives and recipes will be here."""
